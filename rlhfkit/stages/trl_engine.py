"""TRL's trainers as our engine: their losses and their loop, our rows, models, optimiser, checkpoints and records.

A trainer is given the numbers of rows. Our collators make of them the token ids that our own stages train on, so that
templates, masks and ends of turns are ours whatever TRL would have made of the text. Rows come in the order of
`BatchOrder`: a step of TRL's engine has the rows of the same step of ours.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from rlhfkit.config.stages import StageConfig
from rlhfkit.data.batch import BatchOrder
from rlhfkit.errors import ConfigError
from rlhfkit.models.load import LoadedModel
from rlhfkit.runtime.checkpoint import load_trained, readable, save_trained
from rlhfkit.runtime.optim import make_optimizer, make_schedule
from rlhfkit.runtime.run import Run

REFERENCE = "ref"  # TRL's name for the frozen copy of an adapter


class TrainerMixin:
    """What every trainer does in our way; stands before TRL's class among the bases."""

    accelerator: Any
    args: Any
    model: Any
    state: Any
    order: Sampler[int]  # of the training rows; set by the stage

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # the collators make the ids

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        return self.order

    def _send_telemetry(self) -> None:
        """Nobody is told of a run."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """``final/`` has a card of ours."""

    def save_model(self, output_dir: str, _internal_call: bool = False) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_trained(self.accelerator, [self.model], Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with readable(Path(resume_from_checkpoint)):
            load_trained(self.accelerator, [self.model], Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with readable(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with readable(Path(checkpoint)):
                super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def write_state(self, folder: Path) -> None:
        """The trainer's own files into a checkpoint of ours."""
        self.args.output_dir = str(folder)
        self._save_checkpoint(self.model, None)  # type: ignore[attr-defined]
        inner = folder / f"checkpoint-{self.state.global_step}"
        for path in inner.iterdir():
            path.rename(folder / path.name)
        inner.rmdir()


class RowSampler(Sampler[int]):
    """The rows of an epoch as `BatchOrder` has them; which epoch it is, the trainer's steps say."""

    def __init__(self, order: BatchOrder, trainer: TrainerMixin) -> None:
        self.order = order
        self.trainer = trainer

    def __len__(self) -> int:
        return self.order.rows

    def __iter__(self) -> Iterator[int]:
        each = self.order.steps_per_epoch
        first = self.trainer.state.global_step // each * each + 1
        for step in range(first, first + each):
            yield from self.order.batch(step)


def recorder(steps: Iterator[int], finish: Callable[[dict[str, Any]], None]) -> Any:
    """A callback that tells a run of each step as it begins and as it ends."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            next(steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            state.log_history.clear()  # metrics.jsonl has it; in every checkpoint it would grow with the run
            if "loss" in logs:
                finish(logs)

    return Recorder()


def rows_per_pass(batch_size: int, cells: int, budget: int, *, least: int = 1) -> int:
    """How many rows a forward pass takes: as many as keep to a budget of tokens, padded to the longest.

    Args:
        batch_size: rows of a step, which passes divide evenly.
        cells: tokens of the longest row, of both answers in a pair.
        budget: ``optim.micro_batch_tokens``.
        least: fewer make no sense.
    """
    fitting = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and n >= least and n * cells <= budget]
    return max(fitting, default=min(n for n in range(least, batch_size + 1) if batch_size % n == 0))


def arguments(make: type, config: StageConfig, run: Run, scratch: str, total: int, per_pass: int, **own: Any) -> Any:
    """TRL's settings from ours.

    Args:
        make: TRL's class of settings.
        config: ours.
        run: device and number format.
        scratch: an empty folder; TRL wants one at once, a run has its own only when data and model are good.
        total: steps.
        per_pass: rows of a forward pass.
        own: settings of this trainer.
    """
    optim = config.optim
    made = make(
        output_dir=scratch,
        max_steps=total,
        per_device_train_batch_size=per_pass,
        per_device_eval_batch_size=per_pass,
        gradient_accumulation_steps=optim.batch_size // per_pass,
        max_grad_norm=optim.max_grad_norm or math.inf,
        gradient_checkpointing=optim.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if optim.gradient_checkpointing else None,
        bf16=run.precision == "bf16",
        fp16=run.precision == "fp16",
        use_cpu=run.device.type == "cpu",
        seed=config.run.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=run.device.type == "cuda",
        **own,
    )
    made._n_gpu = min(made.n_gpu, 1)  # one process has one device; others on the machine are other processes' to use
    return made


def optimizers(config: StageConfig, run: Run, loaded: LoadedModel, total: int) -> tuple[Any, Any]:
    """The optimiser and schedule of our own stages."""
    _, optimizer = make_optimizer(loaded.model, config.optim, run.device, sharded=False)
    return optimizer, make_schedule(optimizer, config.optim, total)


def numbered(count: int, **columns: Any) -> Dataset:
    """A data set of row numbers."""
    return Dataset.from_dict({"row": list(range(count)), **columns})


def collator(theirs: Callable[..., Any], example: Callable[[int], dict[str, Any]]) -> Callable[..., Any]:
    """A collator of TRL's that takes row numbers."""
    return lambda rows: theirs([example(row["row"]) for row in rows])


def prepare_trainer(trainer: Any) -> Any:
    """A trainer as it was made, put right."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    for name, parameter in trainer.model.named_parameters():
        if f".{REFERENCE}." in name:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            parameter.data = parameter.data.float()  # TRL rounds the adapters of a quantised base to 16 bits
    return trainer


def refuse_processes(run: Run) -> None:
    """
    Raises:
        ConfigError: more than one.
    """
    if run.world > 1:
        raise ConfigError(
            f"{run.config.stage} on TRL runs in one process here, {run.world} were started",
            hint="start it without accelerate launch; rlhfkit's own sft, rm and ppo run in several",
        )


@contextmanager
def quiet_trl() -> Iterator[None]:
    """Inside, TRL and Trainer say nothing: what matters of it is said by us."""
    loggers = [logging.getLogger(name) for name in ("trl", "accelerate", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"(trl|transformers|torch)\b")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def same_noise_after(run: Run, seed: int | None = None) -> Iterator[None]:
    """Inside, random numbers are others, from ``seed`` if there is one; afterwards they go on as if nothing had been
    drawn: an evaluation must not change the training."""
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
