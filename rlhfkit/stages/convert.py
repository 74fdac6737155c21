"""``rlhfkit convert SRC DST``: a legacy checkpoint to transformers' own class, or back to its original layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from rlhfkit.errors import CheckpointError, ConfigError
from rlhfkit.repair.convert import PROOF_FILE, Step, convert, plan_conversion
from rlhfkit.repair.convert_back import convert_back, plan_way_back
from rlhfkit.repair.convert_proof import Proof
from rlhfkit.runtime.screen import quiet_libraries
from rlhfkit.words import tr
from rlhfkit.words.lines import shown


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """What a conversion did.

    Args:
        status: ``planned`` (dry run), ``declined`` (the user said no) or ``converted``.
        steps: the plan.
        proof: how close the result is; None where nothing was converted.
        changes: what was changed in the special tokens, and why.
    """

    status: Literal["planned", "declined", "converted"]
    steps: tuple[Step, ...]
    proof: Proof | None = None
    changes: tuple[str, ...] = ()


def run(
    src: Path,
    dst: Path,
    *,
    to: str,
    original: Path | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    confirm: Callable[[str], bool],
) -> ConversionResult:
    """Plan, show, ask, convert, prove.

    Args:
        src: the folder to convert; never written to.
        dst: the folder to make; absent or empty.
        to: ``native`` or ``original``.
        original: the original folder, for the way back.
        dry_run: show the plan and stop.
        yes: do not ask.
        as_json: print one JSON object and nothing else.
        confirm: asks a question and returns the answer.

    Raises:
        ConfigError: options that do not go together.
        RepairRefusedError: the folder cannot be converted; nothing was written.
        CheckpointError: the result is not proved, or cannot be written; nothing was put in place.
    """
    _check_options(to, original, dry_run=dry_run, yes=yes, as_json=as_json)
    quiet_libraries()
    console = Console(quiet=as_json)
    forth = plan_conversion(src) if to == "native" else None
    back = plan_way_back(src, original) if to == "original" else None
    steps = forth.steps if forth else back.steps if back else ()
    _show_plan(console, src, dst, steps)
    if dry_run:
        console.print(tr("Dry run: nothing was written."))
        return _told(ConversionResult("planned", steps), as_json)
    if not yes and not confirm(tr(f"Write {dst}?")):
        console.print(tr("Nothing was written."))
        return ConversionResult("declined", steps)
    changes: tuple[str, ...] = ()
    try:
        if forth:
            proof, changes = convert(forth, dst)
        elif back:
            proof = convert_back(back, dst)
    except OSError as error:
        raise CheckpointError(f"{dst} could not be written: {error}", hint="mend the cause and run again") from error
    for line in [*changes, *proof.sentences()]:
        console.print(shown(line), soft_wrap=True)
    console.print(shown(f"Written: {dst} (proof in {PROOF_FILE})"), soft_wrap=True)
    return _told(ConversionResult("converted", steps, proof, changes), as_json)


def _check_options(to: str, original: Path | None, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    if to not in ("native", "original"):
        raise ConfigError(f"--to: '{to}' is no layout", hint="give native or original")
    if original is not None and to != "original":
        raise ConfigError("--original has no effect with --to native", hint="leave it out, or give --to original")
    if dry_run and yes:
        raise ConfigError("--yes has no effect with --dry-run, which asks nothing", hint="give one of them")
    if as_json and not (dry_run or yes):
        raise ConfigError("--json cannot ask whether to go ahead", hint="give --yes or --dry-run")


def _show_plan(console: Console, src: Path, dst: Path, steps: Sequence[Step]) -> None:
    table = Table(title=shown(f"{src} to {dst}"), title_justify="left")
    table.add_column(tr("file"), overflow="fold")
    table.add_column(tr("what"), overflow="fold")
    table.add_column(tr("why"), overflow="fold")
    for step in steps:
        table.add_row(shown(step.file), shown(step.what), shown(step.why))
    console.print(table)


def _told(result: ConversionResult, as_json: bool) -> ConversionResult:
    if as_json:
        print(json.dumps(asdict(result), ensure_ascii=False, indent=2))
    return result
