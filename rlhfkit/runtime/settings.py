"""What a run folder holds from before: its settings, whether a resume may have others, and how to go on from it.

No torch in here: the command line asks, too.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhfkit.config.load import RESOLVED, differing_keys, dump_config
from rlhfkit.config.stages import StageConfig
from rlhfkit.errors import CheckpointError, ConfigError, Interrupted
from rlhfkit.words import mark

# Keys that change what is written or how fast, but not which weights come out.
FREE_ON_RESUME = {
    "run.out", "run.keep", "run.log_every", "run.save_every", "run.eval_every", "run.trackers", "run.view",
    "optim.micro_batch_tokens", "optim.gradient_checkpointing", "model.hf_endpoint", "data.eval",
}  # fmt: skip
OPEN = ("auto", None)  # values that leave a choice to the run


def check_folder(config: StageConfig, out: Path) -> None:
    """Refuse to write over a run, or to resume one with settings that would change its result.

    Raises:
        ConfigError: see above; says both ways on.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"run.out: {out} is a file, not a folder", hint="give another --out")
    resolved = out / RESOLVED
    if not config.run.resume:
        if _has_begun(out):
            raise ConfigError(
                f"run.out: {out} holds a run already",
                hint="go on with it: --resume; or start another: --out OTHER_FOLDER",
            )
        return
    if resolved.is_file():
        old = _read(resolved)
        new = yaml.safe_load(dump_config(config))
        free = FREE_ON_RESUME | {f"{config.stage}.reward_timeout", f"{config.stage}.reward_retries"}
        # TRL takes means over passes: their size is part of its result.
        free -= {"optim.micro_batch_tokens"} if config.engine == "trl" else set()
        changed = [key for key in differing_keys(old, new) if key not in free]
        # What is left to the run is compared once it has chosen: `refuse_other_choices`.
        changed = [key for key in changed if key not in config.open_choices or _at(new, key) not in OPEN]
        if changed:
            values = "; ".join(f"{key}: {_at(old, key)!r} -> {_at(new, key)!r}" for key in changed)
            raise ConfigError(
                f"--resume with other settings would give another result: {values}",
                hint=f"repeat the run's own: --config {resolved} --resume; or start another with --out",
            )


def refuse_other_choices(chosen: Mapping[str, Any], checkpoint: Path, resolved: Path) -> None:
    """Refuse to go on where ``auto`` is something else than it was, as without a library or with another one.

    Args:
        chosen: dotted path -> what this run takes.
        checkpoint: that it would go on from. It knows its number format and optimiser, and refuses others itself.
        resolved: the settings that it was made with; those of an older version may not say what was chosen.

    Raises:
        CheckpointError: see above.
    """
    old = _read(resolved) if resolved.is_file() else {}
    values = [
        f"{key}: {was!r} -> {value!r}"
        for key, value in chosen.items()
        if key not in ("model.precision", "optim.optimizer", "run.out")
        and (was := _at(old, key)) not in OPEN
        and was != value
    ]
    if values:
        raise CheckpointError(
            f"{checkpoint} was made with other settings than auto gives here: {'; '.join(values)}",
            hint="go on where the same libraries are installed, or start another run with --out",
        )


def stopped_between_checkpoints(config: StageConfig) -> Interrupted:
    """What there is of a run that was stopped before its first step, or within a step, and how to start again."""
    if config.run.plan:
        return Interrupted("the plan is not finished")
    out = Path(config.out)
    steps = [int(p.name[5:]) for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    begun = _has_begun(out)
    command = command_line("--resume") if begun else command_line()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        command = mark("the same launch command and --resume") if begun else mark("the same launch command")
    if steps:
        last = out / "checkpoints" / f"step-{max(steps)}"
        return Interrupted(f"nothing after {last} is saved", hint=f"go on from there with: {command}")
    words = f"no step is saved: there is no checkpoint in {out} to go on from"
    return Interrupted(words, hint=f"start from the beginning with: {command}")


def _has_begun(out: Path) -> bool:
    """Whether the folder holds anything of a run that another start would write over."""
    return any((out / name).exists() for name in ("metrics.jsonl", "checkpoints", "final"))


def command_line(*extra: str) -> str:
    """The command that was typed, with further flags."""
    words = [w for w in sys.argv[1:] if w not in extra]
    return shlex.join(["rlhfkit", *words, *extra])


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return found


def _at(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data
