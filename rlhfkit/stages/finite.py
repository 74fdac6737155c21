"""The end of a run whose numbers are NaN or infinite: which rows give them, and whether the weights are the cause."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlhfkit.data.batch import share
from rlhfkit.errors import NonFiniteError
from rlhfkit.runtime.optim import Optimisation
from rlhfkit.runtime.run import Run
from rlhfkit.stages.common import SourceRows

LOOKED_AT = 64  # rows that are computed alone before the next ones are


def not_finite(
    what: str,
    step: int,
    rows: SourceRows,
    indices: Sequence[int],
    numbers_of: Callable[[int], Tensor],
    run: Run,
    update: Optimisation,
) -> NonFiniteError:
    """The error that names rows, checkpoint and cause; every process makes it.

    Args:
        what: is not finite.
        step: at which.
        rows: know where they come from.
        indices: of those in question, of all processes.
        numbers_of: what the module makes of the row at a place of ``indices``.
        run: tells the last checkpoint.
        update: its module holds the weights.
    """
    faulty = _faulty(len(indices), numbers_of, run, update)
    hint = ""
    if name := _damaged_weight(run, update):
        hint = (
            f"the weights of {run.config.model.path} hold NaN or infinite values in {run.precision}, first in {name}: "
            "take another copy of the model, or --precision fp32 if these are in order"
        )
    return run.not_finite(what, step, rows.places(indices[i] for i in faulty), hint)


@torch.no_grad()
def _faulty(count: int, numbers_of: Callable[[int], Tensor], run: Run, update: Optimisation) -> list[int]:
    """Which rows give numbers that are not finite, each computed alone: the first that do. All of them if none does,
    since then it is their sum or their gradient."""
    for start in range(0, count, LOOKED_AT):
        mine = share(range(start, min(start + LOOKED_AT, count)), run.rank, run.world)
        looked_at = [(i, bool(numbers_of(i).isfinite().all()), w) for i, w in update.lockstep(mine, spare=start)]
        faulty = [i for i, finite, weight in looked_at if weight and not finite]
        if faulty := gather_object(faulty) if run.world > 1 else faulty:
            return sorted(faulty)
    return list(range(count))


def _damaged_weight(run: Run, update: Optimisation) -> str:
    """The first weight that holds a value that is not finite, if there is one."""
    for name, weight in run.accelerator.unwrap_model(update.module).named_parameters():
        part = weight.to_local() if hasattr(weight, "to_local") else weight  # FSDP shards it
        (damaged,) = run.sum_over_processes([float(not part.isfinite().all())])
        if damaged:
            return str(name.removeprefix("model."))
    return ""
