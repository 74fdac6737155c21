"""``rlhfkit report``: what runs did, as a page, pictures or Markdown. No torch in here: it opens at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhfkit.errors import ConfigError
from rlhfkit.report.page import write_html, write_markdown, write_pictures
from rlhfkit.report.runs import read_runs

FORMATS = ("html", "png", "md")


def run(folders: Sequence[Path], *, out: Path | None, form: str | None) -> list[Path]:
    """Write the report of some run folders.

    Args:
        folders: run folders, or folders that hold some.
        out: file to write; by default ``report.html`` (or png, md) in the folder if one is given, else here.
        form: html, png or md; by default what the name of ``out`` says, else html.

    Returns:
        The files written, the report first.

    Raises:
        ConfigError: a folder that is no run, an unknown form, or one that the name of ``out`` contradicts.
    """
    suffix = out.suffix.removeprefix(".").lower() if out is not None else ""
    form = form or suffix or "html"
    if form not in FORMATS:
        raise ConfigError(f"a report can be {', '.join(FORMATS)}, not '{form}'", hint="for example --format html")
    if suffix and suffix != form:
        raise ConfigError(f"--out {out} and --format {form} contradict each other", hint="give one of them")
    runs = read_runs(folders)
    target = out or (folders[0] if len(folders) == 1 else Path()) / f"report.{form}"
    if form == "html":
        write_html(runs, target)
        return [target]
    if form == "md":
        return [target, *write_markdown(runs, target)]
    return write_pictures(runs, target)
