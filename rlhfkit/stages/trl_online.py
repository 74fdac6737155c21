"""GRPO and RLOO of TRL: answers are sampled by `generate`, scored by our rewards, and compared within a prompt.

Each step has the prompts that the same step of `rlhfkit ppo` would have, and samples answers to them for itself.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn
from torch.utils.data import Sampler

from rlhfkit.chat.messages import last_user_text
from rlhfkit.config.stages import OnlineConfig
from rlhfkit.data.tokenize import PromptRow
from rlhfkit.models.load import LoadedModel
from rlhfkit.models.parts import base_model
from rlhfkit.models.reward_sources import FunctionReward
from rlhfkit.models.text_side import TextSide
from rlhfkit.runtime.run import Run
from rlhfkit.stages.common import columns_of, load_rewards
from rlhfkit.stages.ppo import prompts_of_step
from rlhfkit.stages.trl_engine import TrainerMixin, arguments, numbered, optimizers, prepare_trainer, rows_per_pass

NAMES = {"reward": "reward_mean", "reward_std": "reward_std", "completions/mean_length": "response_tokens"}
SAMPLES = 8  # answers written to samples.jsonl at each evaluation


class PromptSampler(Sampler[int]):
    """Prompts of all steps, as often as a step samples answers to each.

    The trainer asks for a batch in each of a step's passes, and samples in the first of them.
    """

    def __init__(self, config: OnlineConfig, prompts: int, total: int, passes: int) -> None:
        self.config, self.prompts, self.total, self.passes = config, prompts, total, passes

    def __len__(self) -> int:
        return self.total * self.passes * self.config.optim.batch_size

    def __iter__(self) -> Iterator[int]:
        samples = self.config.rollouts.samples_per_prompt
        per_step = self.config.optim.batch_size // samples
        for step in range(1, self.total + 1):
            asked = prompts_of_step(self.prompts, per_step, self.config.run.seed, step)
            yield from [i for i in asked for _ in range(samples)] * self.passes


class Answering(TrainerMixin):
    """What an online trainer does in our way besides."""

    stage: Online

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.stage.prompt(name).prompt.tolist() for name in prompts], None, {}

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started = time.perf_counter()
        made = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        self.stage.seconds_sampled += time.perf_counter() - started
        return made


class Online:
    """GRPO and RLOO; see `rlhfkit.stages.trl_stages.Offline`, whose place it takes."""

    SHOWN = ("reward_mean", "kl_per_token", "response_tokens", "eos_rate", "loss", "eval_reward_mean")

    def __init__(
        self,
        config: OnlineConfig,
        run: Run,
        text: TextSide,
        loaded: LoadedModel,
        rows: Sequence[PromptRow],
        held_out: Sequence[PromptRow],
        functions: Mapping[str, FunctionReward],
        scratch: str,
    ) -> None:
        self.config, self.run, self.text, self.loaded = config, run, text, loaded
        self.prompts = {"training": rows, "held out": held_out}
        self.components: dict[str, list[float]] = {}  # of the last rollout
        self.seconds_sampled = self.seconds_scored = 0.0
        self.answered: list[dict[str, Any]] = []  # in the evaluation that runs
        online, batch = config.rollouts, config.optim.batch_size
        self.reward = load_rewards(config, online, run, columns_of((*rows, *held_out)), functions)
        episodes = online.episodes or round(config.optim.epochs * len(rows)) * online.samples_per_prompt
        total = max(1, -(-episodes // batch))
        self.total = min(total, config.optim.max_steps) if config.optim.max_steps else total
        cells = max(len(row.prompt) for row in [*rows, *held_out]) + online.max_new_tokens
        per_pass = rows_per_pass(batch, cells, run.micro_batch_tokens)
        run.screen.line(f"TRL: {per_pass} answers in a pass, {batch} sampled together")
        self.module = _Holder(loaded.model)
        self.trainer = prepare_trainer(self._make(arguments_of(config, loaded, text), per_pass, scratch))
        self.trainer.stage = self
        self.trainer.order = PromptSampler(config, len(rows), self.total, batch // per_pass)

    def _make(self, settings: dict[str, Any], per_pass: int, scratch: str) -> Any:
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
        from trl.trainer import grpo_trainer, rloo_trainer

        theirs: Any = {"grpo": (GRPOConfig, GRPOTrainer, grpo_trainer), "rloo": (RLOOConfig, RLOOTrainer, rloo_trainer)}
        make_settings, base, module = theirs[self.config.stage]
        trainer = type("Trainer", (Answering, base), {})
        passes = self.config.optim.batch_size // per_pass
        ours = optimizers(self.config, self.run, self.loaded, self.total)  # TRL's settings reset Accelerate's state
        made = arguments(
            make_settings, self.config, self.run, scratch, self.total, per_pass, steps_per_generation=passes, **settings
        )
        with _reference_is_a_copy(module, self.loaded):
            return trainer(
                model=self.loaded.model,
                reward_funcs=[self.score],
                args=made,
                train_dataset=self._numbered("training"),
                eval_dataset=self._numbered("held out") if self.prompts["held out"] else None,
                processing_class=self.text.tokenizer,
                optimizers=ours,
            )

    def _numbered(self, part: str) -> Any:
        names = [f"{part}:{i}" for i in range(len(self.prompts[part]))]
        return numbered(len(names), prompt=names)

    def prompt(self, name: str) -> PromptRow:
        """The row that goes by this name with TRL."""
        part, _, number = name.partition(":")
        return self.prompts[part][int(number)]

    def score(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Rewards of answers; TRL calls it."""
        started = time.perf_counter()
        rows = [self.prompt(name) for name in prompts]
        answers = self.text.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        scores, self.components = self.reward.score([row.record for row in rows], answers)
        ended = [ids[-1] in self.text.tokens.stop_ids for ids in completion_ids]
        if not self.trainer.model.training:
            self.answered += [
                {"row": name, "prompt": last_user_text(row.record.prompt), "answer": a, "reward": s, "ended": e}
                for name, row, a, s, e in zip(prompts, rows, answers, scores, ended, strict=True)
            ]
        penalty = self.config.rollouts.missing_eos_penalty
        shaped = [
            s if e or not self.trainer.model.training else s - penalty for s, e in zip(scores, ended, strict=True)
        ]
        self.seconds_scored += time.perf_counter() - started
        return shaped

    def measured(self, step: int, logs: dict[str, Any]) -> dict[str, Any]:
        batch = self.config.optim.batch_size
        found = {
            "tokens": round(logs["completions/mean_length"] * batch),
            "episodes": step * batch,
            **self._described(logs, ""),
            "kl_coef": self.config.rollouts.kl_coef,  # type: ignore[attr-defined]
            "entropy": logs.get("entropy"),
            "seconds_rollout": self.seconds_sampled - self.seconds_scored,
            "seconds_score": self.seconds_scored,
        }
        self.seconds_sampled = self.seconds_scored = 0.0
        return found

    def _described(self, logs: dict[str, Any], prefix: str) -> dict[str, Any]:
        found = {ours: logs[f"{prefix}{theirs}"] for theirs, ours in NAMES.items()}
        found["eos_rate"] = 1.0 - logs[f"{prefix}completions/clipped_ratio"]
        if logs.get(f"{prefix}kl") is not None:
            found["kl_per_token"] = logs[f"{prefix}kl"]
        if not prefix:
            found |= {f"reward/{name}": sum(scores) / len(scores) for name, scores in self.components.items()}
        return {f"{prefix}{name}": value for name, value in found.items()}

    def evaluate(self) -> dict[str, Any]:
        self.answered = []
        found = self._described(self.trainer.evaluate(), "eval_")
        self.seconds_sampled = self.seconds_scored = 0.0
        order = sorted(self.answered, key=lambda row: int(row["row"].rpartition(":")[2]))
        self.run.samples([{k: v for k, v in row.items() if k != "row"} for row in order[:SAMPLES]])
        return found

    def record(self) -> dict[str, Any]:
        """Further facts for rlhfkit.json."""
        return {}


class _Holder(nn.Module):
    """The model as an attribute, as `save_model` wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


def arguments_of(config: OnlineConfig, loaded: LoadedModel, text: TextSide) -> dict[str, Any]:
    """What GRPO and RLOO of TRL have in common."""
    online = config.rollouts
    suppressed = base_model(loaded.model).generation_config.suppress_tokens  # rows of the head that are no tokens
    return {
        "num_generations": online.samples_per_prompt,
        "num_generations_eval": 1,
        "max_completion_length": online.max_new_tokens,
        "temperature": online.temperature,
        "beta": online.kl_coef,  # type: ignore[attr-defined]
        "disable_dropout": True,
        "generation_kwargs": {"suppress_tokens": suppressed} if suppressed else None,
    }


@contextmanager
def _reference_is_a_copy(module: ModuleType, loaded: LoadedModel) -> Iterator[None]:
    """Inside, TRL's reference is the policy as it stands: it would read the base's folder again, which knows neither of
    rows that the vocabulary has grown by nor of an adapter that was merged."""
    theirs = module.create_model_from_path
    module.create_model_from_path = lambda *_, **__: copy.deepcopy(loaded.model).requires_grad_(False).eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.create_model_from_path = theirs  # type: ignore[attr-defined]
