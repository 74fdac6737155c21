"""The report itself: one HTML page that needs nothing beside it, or Markdown with pictures, or pictures alone."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from datetime import date
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from rlhfkit import __version__
from rlhfkit.report.curves import COLOURS, in_letters_that_are_there, svg_figures, write_png
from rlhfkit.report.findings import findings
from rlhfkit.report.runs import RunRecord
from rlhfkit.report.tables import facts, headline, sample_table, titles
from rlhfkit.runtime.records import replace_text
from rlhfkit.words import chosen, tr

HEADINGS = {"sft": "Supervised fine-tuning", "rm": "Reward model", "ppo": "PPO", "dpo": "DPO", "kto": "KTO",
            "grpo": "GRPO", "rloo": "RLOO"}  # fmt: skip


def write_html(runs: Sequence[RunRecord], path: Path) -> None:
    """One page with everything in it: opens from disk, asks for nothing from the network."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(
        (files("rlhfkit.assets") / "report.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        tr=tr,
        language={"zh": "zh-CN"}.get(chosen(), chosen()),
        title=_title(runs),
        version=__version__,
        date=date.today().isoformat(),
        folders=[str(run.folder) for run in runs],
        groups=[_group(stage, members) for stage, members in _by_stage(runs)],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)


def write_pictures(runs: Sequence[RunRecord], path: Path) -> list[Path]:
    """A PNG for each stage: ``path`` itself for one stage, else its name with the stage's behind it."""
    groups = _by_stage(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for stage, members in groups:
        target = path if len(groups) == 1 else path.with_name(f"{path.stem}-{stage}{path.suffix}")
        beside = target.with_name(f".{target.stem}.partial{target.suffix}")
        with in_letters_that_are_there():
            write_png(members, beside, title=f"{tr(HEADINGS.get(stage, stage))}: {', '.join(r.name for r in members)}")
        os.replace(beside, target)
        written.append(target)
    return written


def write_markdown(runs: Sequence[RunRecord], path: Path) -> list[Path]:
    """Tables as Markdown, with the curves as PNG files beside it; returns those."""
    pictures = write_pictures(runs, path.with_suffix(".png"))
    lines = [f"# {_title(runs)}", ""]
    for (stage, members), picture in zip(_by_stage(runs), pictures, strict=True):
        lines += [f"## {tr(HEADINGS.get(stage, stage))}", ""]
        for run in members:
            lines += [f"### {run.name}", ""]
            if figures := headline(run):
                before, after = map(tr, titles(run))
                lines += [f"| {tr('figure')} | {before} | {after} |", "|---|---|---|"]
                lines += [f"| {_cell(tr(f.name))} | {f.before} | {f.after} |" for f in figures]
                lines.append("")
            lines += [f"- {name}{tr(': ')}{_cell(value)}" for name, value in _facts(run)]
            lines.append("")
            if found := findings(run):
                lines += [tr("Worth a look:"), "", *(f"- {tr(sentence)}" for sentence in found), ""]
        lines += [f"![curves]({picture.name})", ""]
        if table := sample_table(members):
            lines += [f"| {tr('prompt')} | " + " | ".join(_cell(tr(heading)) for heading in table.headings) + " |",
                      "|---" * (len(table.headings) + 1) + "|"]  # fmt: skip
            for prompt, answers in table.rows:
                cells = [_cell(a.text) + (f" ({tr(a.note)})" if a.note else "") if a else "–" for a in answers]
                lines.append("| " + " | ".join([_cell(prompt), *cells]) + " |")
            lines.append("")
    replace_text(path, "\n".join(lines))
    return pictures


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """What a run was, in the reader's language; names and numbers stay as they are."""
    return [(tr(name), tr(value) if name in ("trains", "finished") else value) for name, value in facts(run)]


def _by_stage(runs: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    return [(stage, list(members)) for stage, members in groupby(runs, key=lambda run: run.stage)]


def _title(runs: Sequence[RunRecord]) -> str:
    return "rlhfkit: " + ", ".join(run.name for run in runs)


def _group(stage: str, runs: list[RunRecord]) -> dict[str, Any]:
    cards = []
    for i, run in enumerate(runs):
        before, after = map(tr, titles(run))
        cards.append(
            {
                "name": run.name,
                "colour": COLOURS[i % len(COLOURS)],
                "figures": [figure._replace(name=tr(figure.name)) for figure in headline(run)],
                "before": before,
                "after": after,
                "facts": _facts(run),
                "findings": [tr(sentence) for sentence in findings(run)],
                "config": run.config_text,
            }
        )
    return {
        "stage": stage,
        "heading": tr(HEADINGS.get(stage, stage)),
        "names": ", ".join(run.name for run in runs),
        "runs": cards,
        "pictures": [(title, _data_uri(svg)) for title, svg in svg_figures(runs)],
        "samples": sample_table(runs),
    }


def _data_uri(svg: str) -> str:
    # As an image of its own: its ids cannot meet those of another figure on the page.
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
