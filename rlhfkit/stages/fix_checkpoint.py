"""``rlhfkit fix-checkpoint SRC DST``: make what a training run saved loadable again, from the original model folder.

Weight files are only read, unless they are asked to be rewritten; no code of either folder is imported or run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from rlhfkit.errors import CheckpointError, ConfigError, Interrupted, RepairRefusedError, RlhfkitError
from rlhfkit.repair.folder import Folder
from rlhfkit.repair.plan import Plan, WriteWeights, alone, apply, is_interrupted, recover
from rlhfkit.repair.rules import plan_repair
from rlhfkit.repair.verify import Check, verify
from rlhfkit.repair.weights import WeightWork
from rlhfkit.words import mark, tr
from rlhfkit.words.lines import shown

_STYLES = {mark("ok"): "green", mark("warning"): "yellow", mark("failed"): "red"}


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


def run(
    src: Path,
    dst: Path,
    *,
    dry_run: bool,
    yes: bool,
    confirm: Callable[[str], bool],
    pad_vocab: int = 0,
    safetensors: bool = False,
    as_json: bool = False,
) -> RepairResult:
    """Plan, show, ask, repair, verify.

    Args:
        src: the original model folder; never written to.
        dst: the fine-tuned folder to repair.
        dry_run: show the plan and stop.
        yes: do not ask.
        confirm: asks a question and returns the answer.
        pad_vocab: grow embedding and head to a multiple of this; 0 leaves them.
        safetensors: write .bin weights as safetensors.
        as_json: print one JSON object, a refusal too, and nothing else.

    Raises:
        RepairRefusedError: the folders do not belong together; nothing was written.
        CheckpointError: the verification found a fault that the repair could not mend.
    """
    if as_json and not (yes or dry_run):
        raise ConfigError("--json prints a result and cannot ask", hint="give --yes or --dry-run as well")
    console = Console(quiet=as_json)
    work = WeightWork(pad_vocab, safetensors)
    try:
        with alone(dst) if dst.is_dir() else nullcontext():
            result = _repair(console, src, dst, work, dry_run=dry_run, yes=yes, confirm=confirm)
    except RlhfkitError as error:
        if as_json:
            status = "refused" if isinstance(error, RepairRefusedError) else "failed"
            print(json.dumps({"status": status, "reason": error.message, "hint": error.hint}, ensure_ascii=False))
        raise
    if as_json:
        print(json.dumps(_as_dict(result), ensure_ascii=False, indent=2))
    failed = [f"{check.name}: {check.detail}" for check in result.checks if check.state == "failed"]
    if failed:
        raise CheckpointError(
            f"{dst} is not whole: {'; '.join(failed)}",
            hint=f"what the repair replaced is in {result.backup}"
            if result.backup
            else f"is {src} the complete original folder?",
        )
    return result


def _repair(
    console: Console,
    src: Path,
    dst: Path,
    work: WeightWork,
    *,
    dry_run: bool,
    yes: bool,
    confirm: Callable[[str], bool],
) -> RepairResult:
    if dst.is_dir() and is_interrupted(dst):
        if dry_run:
            raise CheckpointError(
                f"a repair of {dst} was stopped while files were being exchanged",
                hint="run it without --dry-run: what was replaced is put back first",
            )
        recover(dst)
        said = tr(f"A repair of {dst} had been stopped: what it had replaced was put back.")
        console.print(Text(said), soft_wrap=True)
    source, target = Folder(src, "SRC"), Folder(dst, "DST")
    plan = plan_repair(source, target, work)
    weights = _weight_stamps(target, plan)
    _show_plan(console, plan)
    if dry_run:
        console.print(tr("Dry run: nothing was changed."))
        return RepairResult("unchanged" if plan.is_empty else "planned", plan)
    if plan.is_empty:
        return RepairResult("unchanged", plan, _verified(console, src, dst, plan, weights, work))
    _refuse_unless_room(plan)
    count = len(plan.actions)
    if not yes and not confirm(tr(f"Make {'this change' if count == 1 else f'these {count} changes'} in {dst}?")):
        console.print(tr("Nothing was changed."))
        return RepairResult("declined", plan)
    backup = _applied(console, plan)
    console.print(shown(f"Written or removed in {dst}: {', '.join(plan.files)}"), soft_wrap=True)
    if backup is not None:
        kept = f"What was replaced is kept in {backup}."
        if plan.weight_bytes:
            size = _gib(sum(p.stat().st_size for p in backup.iterdir()))
            kept = (
                f"What was replaced is kept in {backup} ({size}; delete it once the new weights are proved to be good)."
            )
        console.print(shown(kept), soft_wrap=True)
    return RepairResult("repaired", plan, _verified(console, src, dst, plan, weights, work), backup)


def _as_dict(result: RepairResult) -> dict[str, Any]:
    return {
        "status": result.status,
        "dst": str(result.plan.dst),
        "actions": [{"file": a.file, "what": a.what, "why": a.why} for a in result.plan.actions],
        "notes": list(result.plan.notes),
        "checks": [asdict(check) for check in result.checks],
        "backup": str(result.backup) if result.backup else None,
    }


def _applied(console: Console, plan: Plan) -> Path | None:
    try:
        with Progress(
            console=console, transient=True, disable=not (plan.weight_bytes and console.is_terminal)
        ) as progress:
            task = progress.add_task(tr("writing weights"), total=plan.weight_bytes)
            return apply(plan, lambda count: progress.advance(task, count))
    except OSError as error:
        raise CheckpointError(
            f"{plan.dst} could not be repaired: {error}",
            hint="every file in it is as it was; mend the cause, run again",
        ) from error
    except KeyboardInterrupt:
        raise Interrupted(f"every file in {plan.dst} is as it was") from None


def _refuse_unless_room(plan: Plan) -> None:
    free = shutil.disk_usage(plan.dst).free
    if plan.weight_bytes > free:
        raise CheckpointError(
            f"the new weights take {_gib(plan.weight_bytes)}, and the disk of {plan.dst} has {_gib(free)} left",
            hint="make room, or copy the folder to a larger disk",
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _weight_stamps(folder: Folder, plan: Plan) -> dict[str, tuple[int, int]]:
    """Size and time of every weight file the plan leaves alone, to prove afterwards that none was written."""
    stamps = {name: (folder.path / name).stat() for name in folder.weights.files if name not in plan.files}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stamps.items()}


def _show_plan(console: Console, plan: Plan) -> None:
    for note in plan.notes:
        console.print(shown(f"note: {note}", style="yellow"), soft_wrap=True)
    if plan.is_empty:
        console.print(shown(f"{plan.dst}: nothing to do."), soft_wrap=True)
        return
    table = Table(title=shown(f"To do in {plan.dst}"), title_justify="left")
    table.add_column(tr("file"), no_wrap=True)
    table.add_column(tr("what"), overflow="fold")
    table.add_column(tr("why"), overflow="fold")
    for action in plan.actions:
        table.add_row(Text(action.file), shown(action.what), shown(action.why))
    console.print(table)


def _verified(
    console: Console, src: Path, dst: Path, plan: Plan, weights: dict[str, tuple[int, int]], work: WeightWork
) -> tuple[Check, ...]:
    """Read both folders anew, check them and show the outcome."""
    target = Folder(dst, "DST")
    untouched = _weight_stamps(target, plan) == weights
    written = [action.file for action in plan.actions if isinstance(action.change, WriteWeights)]
    parts = [f"{', '.join(written)} written, and read back byte for byte"] if written else []
    parts += ["not touched" if not written else f"{len(weights)} not touched"] if weights else []
    checks = (
        *verify(Folder(src, "SRC"), target, work),
        Check("weight files", "ok" if untouched else "failed", "; ".join(parts) if untouched else "changed meanwhile"),
    )
    for check in checks:
        words = f"{tr(check.state):>7}  {tr(check.name)}{tr(': ')}{tr(check.detail)}"
        console.print(Text(words, style=_STYLES[check.state]), soft_wrap=True)
    return checks
