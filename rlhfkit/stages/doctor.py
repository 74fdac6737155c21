"""``rlhfkit doctor M``: a table of what is right and wrong with a model folder, each fault with what mends it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhfkit.errors import ModelError
from rlhfkit.repair.doctor import examine
from rlhfkit.repair.patient import ADAPTER_CONFIG, Finding
from rlhfkit.repair.rules import CONFIG
from rlhfkit.words import mark, tr
from rlhfkit.words.lines import shown

_STYLES = {mark("pass"): "green", mark("warn"): "yellow", mark("fail"): "red"}


def run(path: Path, *, as_json: bool) -> list[Finding]:
    """Examine a folder (of a run: its ``final/``) and print what was found.

    Raises:
        ModelError: there is no such folder; as JSON that is printed first, as a check that failed.
    """
    if not path.is_dir():
        absent = ModelError(
            f"no folder at {path}",
            hint="doctor reads folders: download a hub model first, or give the path of the folder",
        )
        if as_json:  # a program that reads the answer gets one
            _print_json(path, [Finding("folder", "fail", absent.message, absent.hint)])
        raise absent
    final = path / "final"
    if final.is_dir() and not any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        path = final
    findings = examine(path)
    counts = Counter(finding.state for finding in findings)
    if as_json:
        _print_json(path, findings)
        return findings
    console = Console()
    table = Table(title=Text(str(path)), title_justify="left")
    table.add_column(tr("check"), no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column(tr("what was found, and → what mends it"), overflow="fold")
    for finding in findings:
        text = shown(finding.detail)
        if finding.fix and finding.state != "pass":
            text.append(f"\n→ {tr(finding.fix)}", style="bold")
        table.add_row(shown(finding.check), shown(finding.state, style=_STYLES[finding.state]), text)
    console.print(table)
    console.print(tr(f"{counts['pass']} pass, {counts['warn']} warn, {counts['fail']} fail"))
    return findings


def _print_json(path: Path, findings: list[Finding]) -> None:
    checks = [asdict(finding) for finding in findings]
    result = {"path": str(path), "ok": all(finding.state != "fail" for finding in findings), "checks": checks}
    print(json.dumps(result, ensure_ascii=False, indent=2))
