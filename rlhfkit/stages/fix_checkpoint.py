"""``rlhfkit fix-checkpoint SRC DST``: make what a training run saved loadable again, from the original model folder.

Weight files are only read; no code of either folder is imported or run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhfkit.errors import CheckpointError
from rlhfkit.repair.folder import Folder
from rlhfkit.repair.plan import Plan, apply
from rlhfkit.repair.rules import plan_repair
from rlhfkit.repair.verify import Check, verify

_STYLES = {"ok": "green", "warning": "yellow", "failed": "red"}


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What a repair did.

    Args:
        status: ``unchanged`` (nothing to do), ``planned`` (dry run), ``declined`` (the user said no) or ``repaired``.
        plan: the actions, done or not.
        checks: the verification; empty when nothing was verified (planned, declined).
        backup: where replaced files are kept; None when no existing file was replaced.
    """

    status: Literal["unchanged", "planned", "declined", "repaired"]
    plan: Plan
    checks: tuple[Check, ...] = ()
    backup: Path | None = None


def run(src: Path, dst: Path, *, dry_run: bool, yes: bool, confirm: Callable[[str], bool]) -> RepairResult:
    """Plan, show, ask, repair, verify.

    Args:
        src: the original model folder; never written to.
        dst: the fine-tuned folder to repair.
        dry_run: show the plan and stop.
        yes: do not ask.
        confirm: asks a question and returns the answer.

    Raises:
        RepairRefusedError: the folders do not belong together; nothing was written.
        CheckpointError: the verification found a fault that the repair could not mend.
    """
    console = Console()
    source, target = Folder(src, "SRC"), Folder(dst, "DST")
    plan = plan_repair(source, target)
    weights = _weight_stamps(target)
    _show_plan(console, plan)
    if dry_run:
        console.print("Dry run: nothing was changed.")
        return RepairResult("unchanged" if plan.is_empty else "planned", plan)
    if plan.is_empty:
        return RepairResult("unchanged", plan, _verified(console, src, dst, weights, backup=None))
    count = len(plan.actions)
    if not yes and not confirm(f"Make {'this change' if count == 1 else f'these {count} changes'} in {dst}?"):
        console.print("Nothing was changed.")
        return RepairResult("declined", plan)
    backup = _applied(plan)
    console.print(Text(f"Written or removed in {dst}: {', '.join(plan.files)}"), soft_wrap=True)
    if backup is not None:
        console.print(Text(f"What was replaced is kept in {backup}."), soft_wrap=True)
    return RepairResult("repaired", plan, _verified(console, src, dst, weights, backup=backup), backup)


def _applied(plan: Plan) -> Path | None:
    try:
        return apply(plan)
    except OSError as error:
        raise CheckpointError(
            f"{plan.dst} could not be repaired: {error}", hint="every file in it is whole; mend the cause and run again"
        ) from error


def _weight_stamps(folder: Folder) -> dict[str, tuple[int, int]]:
    """Size and time of every weight file, to prove afterwards that none was written."""
    stamps = {name: (folder.path / name).stat() for name in folder.weights.files}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stamps.items()}


def _show_plan(console: Console, plan: Plan) -> None:
    for note in plan.notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    if plan.is_empty:
        console.print(Text(f"{plan.dst}: nothing to do."), soft_wrap=True)
        return
    table = Table(title=Text(f"To do in {plan.dst}"), title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("why", overflow="fold")
    for action in plan.actions:
        table.add_row(Text(action.file), Text(action.what), Text(action.why))
    console.print(table)


def _verified(
    console: Console, src: Path, dst: Path, weights: dict[str, tuple[int, int]], *, backup: Path | None
) -> tuple[Check, ...]:
    """Read both folders anew, check them and show the outcome."""
    target = Folder(dst, "DST")
    untouched = _weight_stamps(target) == weights
    checks = (
        *verify(Folder(src, "SRC"), target),
        Check("weight files", "ok" if untouched else "failed", "not touched" if untouched else "changed meanwhile"),
    )
    for check in checks:
        console.print(
            Text(f"{check.state:>7}  {check.name}: {check.detail}", style=_STYLES[check.state]), soft_wrap=True
        )
    failed = [f"{check.name}: {check.detail}" for check in checks if check.state == "failed"]
    if failed:
        raise CheckpointError(
            f"{dst} is not whole: {'; '.join(failed)}",
            hint=f"what the repair replaced is in {backup}" if backup else f"is {src} the complete original folder?",
        )
    return checks
