"""A run: its folder, its records, its checkpoints, and how it stops.

runs/sft/config.resolved.yaml   metrics.jsonl   samples.jsonl   tensorboard/   checkpoints/step-N/   final/
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
)
from safetensors import SafetensorError
from torch import Tensor

from rlhfkit.config.load import RESOLVED, dump_config
from rlhfkit.config.rewards import without_secrets
from rlhfkit.config.stages import StageConfig
from rlhfkit.errors import CheckpointError, Interrupted, NonFiniteError, RewardError
from rlhfkit.models.folder import RECORD
from rlhfkit.models.precision import DTYPES, Resolved
from rlhfkit.report.card import model_card
from rlhfkit.report.runs import DATA_FAULTS, read_runs
from rlhfkit.runtime.checkpoint import (
    RandomStates,
    checkpoint_folders,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from rlhfkit.runtime.optim import MOST_SKIPPED, SkippedError
from rlhfkit.runtime.records import append_json, json_lines, replace_text
from rlhfkit.runtime.screen import Screen
from rlhfkit.runtime.settings import command_line, refuse_other_choices
from rlhfkit.runtime.trackers import track_histogram, track_samples


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage leaves behind: the run folder, the model in it, and the last metrics."""

    out: Path
    final: Path
    metrics: dict[str, Any]


@dataclass
class Run:
    """Made by `rlhfkit.runtime.start.start_run`; the stages talk to it."""

    config: StageConfig
    accelerator: Accelerator
    screen: Screen
    precision: Resolved
    out: Path
    step: int = 0  # last finished step
    resumed_from: int | None = None
    tokens_total: int = 0
    seconds_total: float = 0.0
    interrupted: bool = False
    fingerprint: str = ""
    chosen: dict[str, Any] = field(default_factory=dict)  # dotted path -> what this run takes for auto
    evaluation_due: bool = False  # that of the last finished step failed
    _data_faults: list[str] = field(default_factory=list)
    # Where models and optimisers belong to another library, these write them into a checkpoint and read them back.
    write_state: Callable[[Path], None] | None = None
    read_state: Callable[[Path], None] | None = None
    _last: dict[str, Any] = field(default_factory=dict)
    _step_started: float = 0.0
    _state: Callable[[], dict[str, Any]] | None = None  # what the last whole step left, for a checkpoint
    _random: RandomStates | None = None  # as they were before a reward was asked

    # -- facts -------------------------------------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights: then no process can do anything with them alone."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the computation, and of weights that do not train."""
        return DTYPES[self.precision]

    @property
    def autocast(self) -> torch.dtype | None:
        """For passes outside the prepared module; None computes in the weights' own format."""
        return None if self.precision == "fp32" else self.dtype

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens in one forward pass that a backward pass follows."""
        most = self.config.optim.micro_batch_tokens
        return most or default_micro_batch_tokens(self.device, self.config.stage, self.precision)

    @property
    def scoring_tokens(self) -> int:
        """Most tokens in a pass that keeps nothing but its result."""
        return self.config.optim.micro_batch_tokens or (2048 if self.device.type == "cpu" else 4096)

    # -- data --------------------------------------------------------------------------------------------------------

    def note_data(self, digest: str, faults: Sequence[str] = ()) -> None:
        """Remember what the data was, so that a resume on other rows is refused; and what was wrong with it, for the
        report."""
        self.fingerprint, self._data_faults = digest[:16], list(faults)

    # -- resume ------------------------------------------------------------------------------------------------------

    def begin(self, load_state: Callable[[dict[str, Any]], None]) -> None:
        """Open the run folder, now that data and model are known to be good; with ``--resume`` go back to the newest
        complete checkpoint, or say that there is none.

        Raises:
            CheckpointError: a damaged checkpoint, or other data or choices than it was made with.
        """
        folders = checkpoint_folders(self.out)
        if self.config.run.resume and folders:
            refuse_other_choices(self.chosen, folders[-1], self.out / RESOLVED)
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        if self.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            replace_text(self.out / RESOLVED, dump_config(self.config, self.chosen))
            if self._data_faults:
                replace_text(self.out / DATA_FAULTS, "".join(f"{fault}\n" for fault in self._data_faults))
        trackers = [t for t in self.config.run.trackers if t != "none"]
        if trackers:
            self.accelerator.init_trackers(
                "tensorboard" if trackers == ["tensorboard"] else "rlhfkit", config=_flat(self.config)
            )
        if not self.config.run.resume:
            return
        if not folders:
            self.screen.line(f"no checkpoint in {self.out} yet: starting from the beginning")
            self._truncate_records(-1)  # the evaluation before the first step is done again too
            return
        state = load_checkpoint(self.accelerator, folders[-1], self.read_state)
        if state["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"the training data is not what it was when {folders[-1]} was written",
                hint="restore the data files, or start a new run with another --out",
            )
        if (stored := state.get("precision", self.precision)) != self.precision:
            raise CheckpointError(
                f"{folders[-1]} was computed in {stored}, and this run computes in {self.precision}",
                hint=f"go on where --precision {stored} works, or start another run with --out",
            )
        if state["world"] != self.world:
            self.screen.line(
                f"note: the run was started with {state['world']} processes and goes on with {self.world}; "
                "results agree to rounding, not bit for bit"
            )
        self.step = self.resumed_from = int(state["step"])
        self.evaluation_due = bool(state.get("evaluation_due"))
        self.tokens_total, self.seconds_total = int(state["tokens_total"]), float(state["seconds_total"])
        self._last = dict(state["last_metrics"])
        load_state(state["stage"])
        self._truncate_records(self.step)
        self.screen.line(f"resumed from {folders[-1]}")

    def _truncate_records(self, step: int, *names: str) -> None:
        """Drop what was recorded after a step, in these files or in all: it is done again."""
        if not self.is_main:
            return
        for name in names or ("metrics.jsonl", "samples.jsonl"):
            path = self.out / name
            if path.is_file():
                kept = []
                for text in json_lines(path):
                    try:  # a killed run may leave half a line
                        row = json.loads(text)
                    except json.JSONDecodeError:
                        continue
                    if row.get("step", 0) <= step and row.get("event") != "end":
                        kept.append(text + "\n")
                replace_text(path, "".join(kept))

    # -- stepping ----------------------------------------------------------------------------------------------------

    def evaluate_first(self, evaluate: Callable[[], dict[str, Any]], total: int, shown: Sequence[str]) -> None:
        """Evaluate before the first step; after a resume, make up for an evaluation that failed.

        Args:
            evaluate: gives the metrics, none if nothing is held out.
            total: number of the last step.
            shown: the first of these metrics that there is goes on the screen.

        Raises:
            RewardError: what ``evaluate`` raised, with the step in its words.
        """
        if self.step and not self.evaluation_due:
            return
        if self.step:  # a run that was killed since may have written them
            self._truncate_records(self.step - 1, "samples.jsonl")
        try:
            found = evaluate()
        except RewardError as error:
            words = f"before step 1 of {total}: {error.message}"
            if self.step:
                words = f"the evaluation of step {self.step} of {total}: {error.message}"
            raise RewardError(words, hint=error.hint) from error
        self.evaluation_due = False
        if not found:
            return
        if self.step:  # its record is written again, with the evaluation in it
            self._truncate_records(self.step - 1, "metrics.jsonl")
        self.record({**self._last, **found} if self.step else {"event": "start", "step": 0, **found})
        name = next(name for name in shown if name in found)
        value = f"{found[name]:.4f}"
        self.screen.line(f"step {self.step}: {name} {value}" if self.step else f"before training: {name} {value}")

    @contextmanager
    def steps(self, what: str, total: int) -> Iterator[Iterator[int]]:
        """The numbers of the steps still to do, with progress on the screen and Ctrl-C held until a step is whole.

        Raises:
            RewardError: one that came up inside, with the step and the last checkpoint in its words; up to there all
                is saved.
            NonFiniteError: in fp16, gradients that no scale makes finite.
        """
        running = 0
        if total < self.config.optim.max_steps:
            self.screen.line(
                f"note: {total} steps and not --max-steps {self.config.optim.max_steps}: the data ends there (--epochs)"
            )

        def numbers() -> Iterator[int]:
            nonlocal running
            while self.step < total:
                self._step_started = time.perf_counter()
                self._random = random_states()
                running = self.step + 1
                yield running

        def on_interrupt(signum: int, frame: object) -> None:
            if self.interrupted:  # the second time people mean it
                raise KeyboardInterrupt
            self.interrupted = True
            self.screen.line("stopping after this step; press Ctrl-C again to stop at once without saving")

        # SIGTERM is how launchers and batch systems ask for the same.
        old = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.screen.steps(what, total, self.step):
                yield numbers()
        except RewardError as error:
            # The reward can be mended, and the run goes on: nothing of it has changed since its last whole step.
            # (One process alone cannot save what belongs to several.)
            if self._state is not None and running > self.step and self.world == 1:
                self._save_before_the_reward(self._state())
            hint = f"{self._last_checkpoint()}; {self._resume_command()}"
            raise RewardError(
                f"step {running} of {total}: {error.message}", hint=f"{error.hint}; {hint}" if error.hint else hint
            ) from error
        except SkippedError as error:
            raise NonFiniteError(
                f"the gradient is not finite at step {running}, nor was it in {MOST_SKIPPED} optimiser steps in a row, "
                f"which fp16's loss scaler skipped ({self._last_checkpoint()})",
                hint="compute in another format: --precision bf16 or fp32",
            ) from error
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def finish_step(
        self,
        step: int,
        total: int,
        metrics: dict[str, Any],
        *,
        shown: tuple[str, ...],
        state: Callable[[], dict[str, Any]],
        evaluate: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """Record a step; evaluate and save where due; stop here if asked to.

        Args:
            step: its number.
            total: number of the last step.
            metrics: what the stage measured, ``tokens`` (this step's) among them.
            shown: metrics that go on the screen.
            state: what the stage needs to resume, called when a checkpoint is due.
            evaluate: further metrics, called when an evaluation is due.

        Raises:
            Interrupted: after Ctrl-C, with everything saved; not after the last step, which leaves the model to write.
            NonFiniteError: a loss or gradient is NaN or infinite.
        """
        run = self.config.run
        self.step, self._state = step, state
        seconds = time.perf_counter() - self._step_started
        self.seconds_total += seconds
        self.tokens_total += int(metrics["tokens"])
        record = {
            "step": step,
            **metrics,
            "tokens_total": self.tokens_total,
            "seconds": seconds,
            "tokens_per_second": metrics["tokens"] / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        self._refuse_non_finite(record)
        if evaluate is not None and (step == total or (run.eval_every and step % run.eval_every == 0)):
            self._random = random_states()
            try:
                record |= evaluate()
            except RewardError:  # the step itself is whole
                self.record(record)
                # (A library that holds the model reads it back only when it trains.)
                self.evaluation_due = self.write_state is None
                if self.world == 1:
                    self._save_before_the_reward(state())
                raise
        self.record(record)
        self.screen.step(step, total, record, shown, speak=step % run.log_every == 0 or step == total)
        stop = self._anyone_interrupted()
        if stop or step == total or (run.save_every and step % run.save_every == 0):
            self.save(state())
        if stop and step < total:
            raise Interrupted(f"stopped after step {step} of {total}; everything is saved", hint=self._resume_command())

    def _save_before_the_reward(self, stage_state: dict[str, Any]) -> None:
        """Save with the random states from before a reward was asked, which may have drawn before it failed."""
        if self._random is not None:
            restore_random_states(self._random)
        self.save(stage_state)

    def save(self, stage_state: dict[str, Any]) -> Path:
        """Write a checkpoint of the last finished step."""
        state = {
            "fingerprint": self.fingerprint,
            "world": self.world,
            "precision": self.precision,
            "tokens_total": self.tokens_total,
            "seconds_total": self.seconds_total,
            "last_metrics": self._last,
            "evaluation_due": self.evaluation_due,
            "stage": stage_state,
        }
        return save_checkpoint(self.accelerator, self.out, self.step, state, self.config.run.keep, self.write_state)

    def _refuse_non_finite(self, record: Mapping[str, Any]) -> None:
        bad = [k for k in ("loss", "grad_norm") if not math.isfinite(record[k])]
        if self.precision == "fp16" and bad == ["grad_norm"]:
            return  # the loss scaler found its limit and skipped the step; that is its way of working
        self._refuse(bad, record["step"])

    def _refuse(self, bad: Sequence[str], step: int) -> None:
        """Stop if there is any such number. Where the loop is our own, it has stopped before, naming rows."""
        if bad:
            raise NonFiniteError(
                f"{' and '.join(bad)} at step {step} is not finite ({self._last_checkpoint()})",
                hint="lower --lr, or compute in another format: --precision bf16 or fp32",
            )

    def _last_checkpoint(self) -> str:
        folders = checkpoint_folders(self.out)
        return f"the last good checkpoint is {folders[-1]}" if folders else "there is no checkpoint yet"

    def not_finite(self, what: str, step: int, rows: Sequence[str], hint: str = "") -> NonFiniteError:
        """The error of a step in which ``what`` is NaN or infinite at these rows of the data."""
        shown = ", ".join(rows[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
        return NonFiniteError(
            f"{what} is not finite at step {step}, row {shown} ({self._last_checkpoint()})",
            hint=hint or "lower --lr, or compute in another format: --precision bf16 or fp32",
        )

    def _anyone_interrupted(self) -> bool:
        if self.world == 1:
            return self.interrupted
        # The signal may reach processes in different steps; they have to stop after the same one.
        flags = self.accelerator.gather(torch.tensor([int(self.interrupted)], device=self.device))
        return bool(flags.any())

    def _resume_command(self) -> str:
        if self.world > 1:
            return "go on with the same launch command and --resume"
        return "go on with: " + command_line("--resume")

    # -- records -----------------------------------------------------------------------------------------------------

    def record(self, metrics: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and hand the numbers to the trackers.

        Raises:
            NonFiniteError: an evaluation gave NaN or infinity.
        """
        evaluated = {k: v for k, v in metrics.items() if k.startswith("eval_") and isinstance(v, float)}
        self._refuse([k for k, v in evaluated.items() if not math.isfinite(v)], metrics.get("step", self.step))
        if "event" not in metrics:  # a step: an evaluation of an earlier one says nothing of the model as it is now
            self._last = {k: v for k, v in self._last.items() if not k.startswith("eval_")}
        self._last |= {k: v for k, v in metrics.items() if k != "event"}
        self._append(metrics)
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k != "step"}
        self.accelerator.log(numbers, step=metrics.get("step", self.step))

    def _append(self, row: dict[str, Any]) -> None:
        if self.is_main:
            append_json(self.out / "metrics.jsonl", row)
            self.screen.record(row)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append to samples.jsonl, and hand them to the trackers."""
        if self.is_main:
            for row in rows:
                append_json(self.out / "samples.jsonl", {"step": self.step, **row})
            track_samples(self.accelerator.trackers, rows, self.step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Hand the distribution of some values to the trackers."""
        if self.is_main:
            track_histogram(self.accelerator.trackers, name, values, step)

    def sum_over_processes(self, values: Sequence[float]) -> list[float]:
        """Add numbers up over all processes."""
        if self.world == 1:
            return [float(v) for v in values]
        # MPS has no float64; everything else does, and counts of tokens need it.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total: Tensor = self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=self.device), reduction="sum")
        return [float(v) for v in total.tolist()]

    def finish(self, write_model: Callable[[Path], None]) -> StageResult:
        """Write ``final/`` and the end line."""
        final = self.out / "final"
        partial = self.out / ".partial-final"
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        self.accelerator.wait_for_everyone()
        try:
            write_model(partial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"the model could not be written to {partial}: {error}",
                hint="the last checkpoint is intact; make room and go on with --resume",
            ) from error
        self.accelerator.wait_for_everyone()
        if self.is_main:
            let_others_read(partial)
            shutil.rmtree(final, ignore_errors=True)
            self._write_card(partial)
            os.replace(partial, final)
            end = {k: v for k, v in self._last.items() if k != "seconds"}
            totals = {"seconds_total": self.seconds_total, "tokens_total": self.tokens_total}
            self._append({"event": "end", **end, **totals, "resumed_from": self.resumed_from})
            self.screen.line(f"done: {final}")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return StageResult(self.out, final, dict(self._last))

    def _write_card(self, folder: Path) -> None:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        lora = (folder / "adapter_config.json").is_file()
        card = model_card(read_runs([self.out])[0], base=record["base"], lora=lora, layout=record.get("layout", ""))
        (folder / "README.md").write_text(card, encoding="utf-8")


def default_micro_batch_tokens(device: torch.device, stage: str, precision: Resolved) -> int:
    """A CPU is busy with few tokens, and its memory is slow; a GPU wants many. In float32 a token keeps twice as much,
    and PPO holds further models beside.
    """
    if device.type != "cpu":
        return 4096
    return 512 if stage == "ppo" and precision == "fp32" else 768


def let_others_read(folder: Path) -> None:
    """Give files the permissions that new files have here: safetensors (0.8) makes its own for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: the GPU's allocator's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _flat(config: StageConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for block, values in config.model_dump(mode="json").items():
        for key, value in values.items() if isinstance(values, dict) else [(block, values)]:
            name = f"{block}.{key}" if isinstance(values, dict) else block
            flat[name] = value if isinstance(value, (int, float, bool)) else without_secrets(str(value))
    return flat
