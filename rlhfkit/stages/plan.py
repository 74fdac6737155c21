"""``--plan``: what a run would do and how much memory it needs, found without loading a weight."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhfkit.config.stages import PpoConfig, StageConfig
from rlhfkit.data.batch import BatchOrder
from rlhfkit.models.precision import current_device
from rlhfkit.models.reward_sources import check_rewards
from rlhfkit.runtime.screen import Screen, quiet_libraries
from rlhfkit.runtime.settings import check_folder
from rlhfkit.stages.common import fit_length, open_text_side, read_rows
from rlhfkit.stages.memory import GIB, Estimate, available_memory, estimate
from rlhfkit.stages.ppo import rollout_sizes
from rlhfkit.words import tr


def run(config: StageConfig) -> Estimate:
    """Print the plan.

    Raises:
        Whatever the run itself would raise before its first step.
    """
    quiet_libraries()
    config = fit_length(config)
    check_folder(config, Path(config.out))
    if isinstance(config, PpoConfig):
        check_rewards(config.ppo.reward, config.ppo.reward_timeout)
    screen = Screen()
    source, text = open_text_side(config)
    rows = read_rows(config, config.data.train, text, screen, "training").rows
    held_out = read_rows(config, config.data.eval, text, screen, "held out").rows

    device = current_device()
    found = estimate(config, source, text, rows, device, held_out)
    console = Console()
    console.print(tr(_what_runs(config, len(rows))))
    console.print(tr(f"models held: {', '.join(found.models)}"), markup=False, highlight=False)
    console.print(_table(config, found, device))
    console.print(_what_fits(found, available_memory(device), device), highlight=False)
    console.print(tr("Less memory: --micro-batch-tokens, --gradient-checkpointing, --lora-rank, --quantize 4bit"))
    return found


def _table(config: StageConfig, found: Estimate, device: torch.device) -> Table:
    table = Table(title=tr(f"rlhfkit {config.stage}: memory on one {device.type} device"))
    table.add_column(tr("part"))
    table.add_column(tr("GiB"), justify="right")
    phases = {
        "held all the time": found.held,
        "while models are loaded": found.loading,
        "in a rollout": found.rollout,
        "in an update": found.update,
    }
    for heading, parts in phases.items():
        if parts:
            table.add_row(f"[bold]{tr(heading)}[/bold]", "")
            for name, size in parts.items():
                table.add_row(f"  {escape(tr(name))}", f"{size / GIB:.2f}")
            table.add_section()
    table.add_row(tr("the most at one time, about"), f"{found.total / GIB:.2f}")
    return table


def _what_fits(found: Estimate, available: float, device: torch.device) -> str:
    where = "GPU" if device.type == "cuda" else tr("system")
    tokens, answers = found.tokens_that_fit(available), found.answers_that_fit(available) if found.answers else None
    lines = [f"{available / GIB:.1f} GiB of {where} memory are free."]
    if tokens:
        lines.append(f"What fits: --micro-batch-tokens up to {tokens:,} (the largest here has {found.tokens:,}).")
    else:
        lines.append("This does not fit.")
    if answers is not None:
        lines.append(f"Answers that fit in a rollout at one time: {answers:,} (here {found.answers}).")
    return "\n".join(map(tr, lines))


def _what_runs(config: StageConfig, rows: int) -> str:
    optim = config.optim
    if isinstance(config, PpoConfig):
        ppo = config.ppo
        sizes = rollout_sizes(config, rows)
        last = f", the last of {sizes[-1]}" if sizes[-1] < sizes[0] else ""
        return (
            f"{len(sizes)} steps of {sizes[0]} episodes{last}, each with {ppo.ppo_epochs} passes of "
            f"{-(-sizes[0] // config.minibatch_size)} minibatches; run folder {config.out}"
        )
    steps = BatchOrder(rows, optim.batch_size, 0).total_steps(optim.epochs, optim.max_steps)
    return f"{steps} steps of {optim.batch_size} rows; run folder {config.out}"
