"""DPO, KTO, GRPO and RLOO, and SFT and the reward model with ``engine: trl``: TRL's trainers on our rows.

Which rows, ids, masks, model, optimiser and order there are is ours and the same as in our own stages; the loss and
its passes are TRL's. `rlhfkit.stages.trl_engine` tells how the two are joined.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import combinations
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import torch

from rlhfkit.config.stages import DpoConfig, KtoConfig, OnlineConfig, RmConfig, SftConfig, StageConfig
from rlhfkit.data.batch import BatchOrder, TokenRow, collate, micro_batches
from rlhfkit.models.load import LoadedModel
from rlhfkit.models.reward_sources import FunctionReward, check_rewards, open_functions
from rlhfkit.models.save import save_model
from rlhfkit.models.text_side import TextSide
from rlhfkit.models.wrappers import LanguageModel, RewardModel
from rlhfkit.runtime.run import Run, StageResult
from rlhfkit.runtime.start import finished_result, start_run
from rlhfkit.stages.common import (
    columns_of,
    first_prompts,
    fit_length,
    load_for_training,
    open_text_side,
    read_rows,
    write_answers,
)
from rlhfkit.stages.pairs import STATISTICS_ROWS, Scored, held_out_metrics, pair_batches, score_pairs, score_record
from rlhfkit.stages.trl_engine import (
    RowSampler,
    TrainerMixin,
    arguments,
    collator,
    numbered,
    optimizers,
    prepare_trainer,
    quiet_trl,
    recorder,
    refuse_processes,
    rows_per_pass,
    same_noise_after,
)


class Data(NamedTuple):
    """Token rows, what the held-out ones ask, and the reward functions of a stage that samples."""

    rows: Sequence[Any]
    held_out: Sequence[Any]
    asked: Sequence[Any]
    functions: Mapping[str, FunctionReward]


def run(config: StageConfig) -> StageResult:
    """Train; see the module's first lines. ``final/`` holds what the stage of our own would leave there."""
    config = fit_length(config)
    if (done := finished_result(config)) is not None:
        return done
    run = start_run(config)
    refuse_processes(run)
    with quiet_trl(), TemporaryDirectory(prefix="rlhfkit-trl-") as scratch:
        if isinstance(config, OnlineConfig):
            check_rewards(config.rollouts.reward, config.rollouts.reward_timeout)

        # 1. Rows.
        source, text = open_text_side(config)
        rows, digest, faults = read_rows(config, config.data.train, text, run.screen, "training")
        held_out, _, more = read_rows(config, config.data.eval, text, run.screen, "held out")
        functions = {}
        if isinstance(config, OnlineConfig):
            functions = open_functions(config.rollouts.reward, columns_of((*rows, *held_out)))
        data = Data(rows, held_out, first_prompts(config, config.data.eval), functions)
        run.note_data(digest, faults + more)

        # 2. Model and trainer.
        loaded = load_for_training(config, run, source, text, "reward" if config.stage == "rm" else "causal")
        loaded.model.to(run.device)
        stage = _stage(config, run, text, loaded, data, scratch)
        trainer, total = stage.trainer, stage.total
        run.write_state = trainer.write_state
        run.read_state = lambda folder: None  # the trainer reads it when it starts
        run.begin(lambda state: None)

        def evaluate() -> dict[str, Any]:
            if not held_out:
                return {}
            with same_noise_after(run, config.run.seed):
                found = stage.evaluate()
            trainer.model.train()
            return found

        def finish_step(logs: dict[str, Any]) -> None:
            step = trainer.state.global_step
            metrics = {
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": float(logs["grad_norm"]),
                **stage.measured(step, logs),
            }
            run.finish_step(step, total, metrics, shown=stage.SHOWN, state=dict, evaluate=evaluate)

        run.evaluate_first(evaluate, total, shown=(*stage.SHOWN, "eval_loss"))

        # 3. The loop.
        with run.steps(config.stage, total) as steps:
            if run.step < total:
                trainer.add_callback(recorder(steps, finish_step))
                newest = run.out / "checkpoints" / f"step-{run.step}"
                trainer.train(resume_from_checkpoint=str(newest) if run.step else None)

        # 4. The result.
        record = stage.record()
        return run.finish(
            lambda folder: save_model(folder, run.accelerator, stage.module, loaded, config.stage, record)
        )


def _stage(config: Any, run: Run, text: TextSide, loaded: LoadedModel, data: Data, scratch: str) -> Any:
    """What is special to a stage."""
    if isinstance(config, OnlineConfig):
        from rlhfkit.stages.trl_online import Online

        return Online(config, run, text, loaded, data.rows, data.held_out, data.functions, scratch)
    make: Any = {"sft": Sft, "rm": Rm, "dpo": Dpo, "kto": Kto}[config.stage]
    return make(config, run, text, loaded, data, scratch)


class Offline(ABC):
    """Base of the stages that learn from rows as they are.

    A subclass says what a row is to TRL (`example`), how many tokens it has (`cells`) and how many of them are learned
    (`learned`), makes the trainer (`make`), and tells what was measured.
    """

    SHOWN: tuple[str, ...] = ()
    LEAST = 1  # rows of a pass
    NAMES: ClassVar[dict[str, str]] = {}  # of metrics, ours by TRL's

    def __init__(self, config: Any, run: Run, text: TextSide, loaded: LoadedModel, data: Data, scratch: str) -> None:
        self.config, self.run, self.text, self.loaded, self.data = config, run, text, loaded, data
        self.items, self.held_out = self.items_of(data.rows), self.items_of(data.held_out)
        self.order = BatchOrder(len(self.items), config.optim.batch_size, config.run.seed)
        self.total = self.order.total_steps(config.optim.epochs, config.optim.max_steps)
        cells = max(self.cells(item) for items in (self.items, self.held_out) for item in items)
        self.per_pass = rows_per_pass(config.optim.batch_size, cells, run.micro_batch_tokens, least=self.LEAST)
        run.screen.line(f"TRL: {self.per_pass} rows in a pass, padded to the longest of them")
        self.scratch = scratch
        self.module: Any = LanguageModel(loaded.model)
        self.trainer: Any = prepare_trainer(self.make(optimizers(config, run, loaded, self.total)))
        self.trainer.order = RowSampler(self.order, self.trainer)

    def items_of(self, rows: Sequence[Any]) -> Sequence[Any]:
        return rows

    @abstractmethod
    def example(self, item: Any) -> dict[str, Any]: ...

    @abstractmethod
    def cells(self, item: Any) -> int: ...

    @abstractmethod
    def learned(self, item: Any) -> int: ...

    @abstractmethod
    def make(self, optimizers: tuple[Any, Any]) -> Any: ...

    def settings(self, make: type, **own: Any) -> Any:
        return arguments(make, self.config, self.run, self.scratch, self.total, self.per_pass, **own)

    def parts(self, theirs: Any) -> dict[str, Any]:
        """What all trainers take. Held-out rows stand behind the training rows in one numbering."""
        count, held_out = len(self.items), len(self.held_out)

        def example(number: int) -> dict[str, Any]:
            return self.example(self.items[number] if number < count else self.held_out[number - count])

        behind = numbered(count + held_out).select(range(count, count + held_out)) if held_out else None
        return {
            "model": self.loaded.model,
            "train_dataset": numbered(count),
            "eval_dataset": behind,
            "data_collator": collator(theirs, example),
            "processing_class": self.text.tokenizer,
        }

    def measured(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        tokens = sum(self.learned(self.items[i]) for i in self.order.batch(step))
        return {"tokens": tokens, **named(logs, self.NAMES)}

    def evaluate(self) -> dict[str, Any]:
        found = self.trainer.evaluate()
        write_answers(self.run, self.loaded.model, self.text, self.data.asked, self.config.data.max_length)
        ours = named(found, {f"eval_{theirs}": f"eval_{ours}" for theirs, ours in self.NAMES.items()})
        return {"eval_loss": found["eval_loss"], **ours}

    def record(self) -> dict[str, Any]:
        """Further facts for rlhfkit.json."""
        return {}

    def reference(self) -> Any:
        """A frozen copy of the policy; None where it is the adapter's base, or a copy of the adapter beside it."""
        return None if self.loaded.is_lora else copy.deepcopy(self.loaded.model).requires_grad_(False).eval()


def named(logs: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Some of TRL's metrics by our names."""
    return {ours: logs[theirs] for theirs, ours in names.items() if logs.get(theirs) is not None}


class Sft(Offline):
    """Supervised fine-tuning. Held-out loss and answers are measured by our own code, as in our own engine."""

    SHOWN = ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_second")
    NAMES: ClassVar[dict[str, str]] = {"mean_token_accuracy": "token_accuracy", "entropy": "entropy"}
    config: SftConfig

    def example(self, item: TokenRow) -> dict[str, Any]:
        labels = [int(i) if learned else -100 for i, learned in zip(item.ids, item.supervised, strict=True)]
        return {"input_ids": item.ids.tolist(), "labels": labels}

    def cells(self, item: TokenRow) -> int:
        return len(item)

    def learned(self, item: TokenRow) -> int:
        return item.targets

    def make(self, optimizers: tuple[Any, Any]) -> Any:
        from trl import SFTConfig, SFTTrainer
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        class Trainer(TrainerMixin, SFTTrainer):
            pass

        smoothing = self.config.sft.label_smoothing
        settings = self.settings(
            SFTConfig,
            max_length=None,  # rows are cut already
            label_smoothing_factor=smoothing,
            **({"loss_type": "nll"} if smoothing else {}),  # TRL 1.14 takes another, which has no smoothing
            neftune_noise_alpha=self.config.sft.neftune_alpha or None,
        )
        theirs = DataCollatorForLanguageModeling(self.text.tokens.pad_id)
        return Trainer(args=settings, optimizers=optimizers, **self.parts(theirs))

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        run, rows = self.run, self.data.held_out
        self.module.eval()
        loss = 0.0
        with torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None):
            for micro in micro_batches(rows, run.micro_batch_tokens):
                loss -= float(self.module(collate(micro).to(run.device)).logprobs.sum())
        write_answers(run, self.loaded.model, self.text, self.data.asked, self.config.data.max_length)
        return {"eval_loss": loss / sum(row.targets for row in rows)}


class Pair(NamedTuple):
    """Two answers to a prompt, as token ids, and by how much the better one should lead."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float


class Pairs(Sequence[Pair]):
    """All pairs of answers in rows of ranked answers; each is an item of its own."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows
        self.places = [(i, a, b) for i, row in enumerate(rows) for a, b in combinations(range(len(row.answers)), 2)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        i, a, b = self.places[index]
        row = self.rows[i]
        return Pair(row.prompt.tolist(), row.answers[a].tolist(), row.answers[b].tolist(), row.margin)


class Ranked(Offline):
    """Base of the stages that compare two answers."""

    def items_of(self, rows: Sequence[Any]) -> Sequence[Pair]:
        return Pairs(rows)

    def cells(self, item: Pair) -> int:
        return 2 * (len(item.prompt) + max(len(item.chosen), len(item.rejected)))

    def learned(self, item: Pair) -> int:
        return len(item.chosen) + len(item.rejected)


class Rm(Ranked):
    """Reward model. Held-out pairs are measured by our own code, as in our own engine."""

    SHOWN = ("loss", "accuracy", "margin", "eval_accuracy", "lr", "tokens_per_second")
    config: RmConfig
    latest: Scored | None = None  # of the held-out pairs, at the last evaluation

    def example(self, item: Pair) -> dict[str, Any]:
        return {
            "chosen_ids": item.prompt + item.chosen,
            "rejected_ids": item.prompt + item.rejected,
            "margin": item.margin,
        }

    def learned(self, item: Pair) -> int:
        return 2 * len(item.prompt) + len(item.chosen) + len(item.rejected)

    def make(self, optimizers: tuple[Any, Any]) -> Any:
        from trl import RewardConfig, RewardTrainer
        from trl.trainer.reward_trainer import DataCollatorForPreference

        class Trainer(TrainerMixin, RewardTrainer):
            pass

        self.module = RewardModel(self.loaded.model)
        settings = self.settings(
            RewardConfig,
            max_length=None,
            disable_dropout=False,
            center_rewards_coefficient=self.config.rm.center_coef or None,
        )
        theirs = DataCollatorForPreference(self.text.tokens.pad_id)
        return Trainer(args=settings, optimizers=optimizers, **self.parts(theirs))

    def measured(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        mean, margin = logs["mean_reward"], logs["margin"]
        scores = {"reward_chosen": mean + margin / 2, "reward_rejected": mean - margin / 2}
        return {**super().measured(step, logs), "accuracy": logs["accuracy"], "margin": margin, **scores}

    def evaluate(self) -> dict[str, Any]:
        rows = self.data.held_out
        self.latest = self.scores_of(rows)
        return held_out_metrics(self.latest, len(rows), self.config, self.run)

    def record(self) -> dict[str, Any]:
        scored = self.latest or self.scores_of(self.data.held_out or self.data.rows[:STATISTICS_ROWS])
        return score_record(scored, self.config, self.run, held_out=bool(self.data.held_out))

    def scores_of(self, rows: Sequence[Any]) -> Scored:
        with torch.autocast(self.run.device.type, self.run.autocast, enabled=self.run.autocast is not None):
            return score_pairs(self.module, [(micro, 1.0) for micro in pair_batches(rows, self.run)])


class Dpo(Ranked):
    """Direct preference optimisation."""

    SHOWN = ("loss", "accuracy", "margin", "eval_accuracy", "lr", "tokens_per_second")
    NAMES: ClassVar[dict[str, str]] = {
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
        "logps/chosen": "logprob_chosen",
        "logps/rejected": "logprob_rejected",
        "entropy": "entropy",
    }
    config: DpoConfig

    def example(self, item: Pair) -> dict[str, Any]:
        return {"prompt_ids": item.prompt, "chosen_ids": item.chosen, "rejected_ids": item.rejected}

    def make(self, optimizers: tuple[Any, Any]) -> Any:
        from trl import DPOConfig, DPOTrainer
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        class Trainer(TrainerMixin, DPOTrainer):
            pass

        if count := sum(item.margin != 0 for item in self.items):
            self.run.screen.line(f"  {count:,} pairs have a margin, which dpo has no use for")
        dpo = self.config.dpo
        losses: dict[str, Any] = {"loss_type": [dpo.loss]}
        if dpo.sft_coef:
            losses = {"loss_type": [dpo.loss, "sft"], "loss_weights": [1.0, dpo.sft_coef]}
        settings = self.settings(
            DPOConfig, max_length=None, beta=dpo.beta, label_smoothing=dpo.label_smoothing, **losses
        )
        theirs = DataCollatorForPreference(self.text.tokens.pad_id)
        return Trainer(args=settings, ref_model=self.reference(), optimizers=optimizers, **self.parts(theirs))


class Labelled(NamedTuple):
    """An answer to a prompt, as token ids, and whether it is desirable."""

    prompt: list[int]
    answer: list[int]
    desirable: bool


class LabelledAnswers(Sequence[Labelled]):
    """All answers in rows of labelled answers; each is an item of its own."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows
        self.places = [(i, a) for i, row in enumerate(rows) for a in range(len(row.answers))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        i, a = self.places[index]
        row = self.rows[i]
        return Labelled(row.prompt.tolist(), row.answers[a].tolist(), row.labels[a])


class Kto(Offline):
    """Kahneman-Tversky optimisation. The KL is measured on answers to other prompts of the same pass."""

    SHOWN = ("loss", "margin", "kl", "eval_margin", "lr", "tokens_per_second")
    LEAST = 2
    NAMES: ClassVar[dict[str, str]] = {
        "rewards/margins": "margin",
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
        "logps/chosen": "logprob_chosen",
        "logps/rejected": "logprob_rejected",
        "kl": "kl",
        "entropy": "entropy",
    }
    config: KtoConfig

    def items_of(self, rows: Sequence[Any]) -> Sequence[Labelled]:
        return LabelledAnswers(rows)

    def example(self, item: Labelled) -> dict[str, Any]:
        return {"prompt_ids": item.prompt, "completion_ids": item.answer, "label": item.desirable}

    def cells(self, item: Labelled) -> int:
        return len(item.prompt) + len(item.answer)

    def learned(self, item: Labelled) -> int:
        return len(item.answer)

    def make(self, optimizers: tuple[Any, Any]) -> Any:
        from trl import KTOConfig, KTOTrainer
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

        class Trainer(TrainerMixin, KTOTrainer):
            pass

        kto = self.config.kto
        settings = self.settings(
            KTOConfig,
            max_length=None,
            beta=kto.beta,
            desirable_weight=kto.desirable_weight,
            undesirable_weight=kto.undesirable_weight,
        )
        theirs = DataCollatorForUnpairedPreference(self.text.tokens.pad_id)

        def with_others(examples: list[dict[str, Any]]) -> Any:
            answers = [example["completion_ids"] for example in examples]
            if len(answers) == 1:  # the last of an epoch, alone: the answer of any other row
                answers = [next((i.answer for i in self.items if i.answer != answers[0]), answers[0])]
            moved = [answers[-1], *answers[:-1]]
            return theirs([{**e, "KL_completion_ids": other} for e, other in zip(examples, moved, strict=True)])

        return Trainer(args=settings, ref_model=self.reference(), optimizers=optimizers, **self.parts(with_others))
