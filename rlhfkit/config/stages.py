"""One configuration per stage, and the checks that need more than one field."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import BaseModel

from rlhfkit.config.blocks import (
    Block,
    DataConfig,
    GenerateBlock,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PpoBlock,
    PpoOptimConfig,
    RewardModelConfig,
    RunConfig,
)

Problem = tuple[str, str]  # dotted path, what is wrong and what to do
# Accelerate's. Each is called like its package, and without the package Accelerate records nothing.
TRACKERS = ("tensorboard", "wandb", "swanlab", "mlflow", "comet_ml", "clearml", "aim", "dvclive", "trackio")


class StageConfig(Block):
    """Base of the training stages. ``problems`` lists faults between fields; the loader shows all of them together."""

    stage: str
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if not self.model.path:
            found.append(("model.path", "no model is given; say --model FOLDER_OR_HUB_ID"))
        if not self.data.train:
            found.append(("data.train", "no data is given; say --data FILE"))
        if self.lora.rank == 0:
            for name in ("alpha", "targets"):
                if changed(self.lora, name):
                    found.append((f"lora.{name}", "has no effect while lora.rank is 0; set --lora-rank"))
            if self.model.quantize != "none":
                found.append(
                    (
                        "model.quantize",
                        f"{self.model.quantize} weights cannot be trained; set --lora-rank to train adapters",
                    )
                )
        if self.run.eval_every and not self.data.eval:
            found.append(("run.eval_every", "has no effect without held-out rows; give --eval-data"))
        if "none" in self.run.trackers and len(self.run.trackers) > 1:
            found.append(("run.trackers", "'none' stands beside other trackers; leave one of them out"))
        for name in self.run.trackers:
            if name not in ("none", *TRACKERS):
                found.append(("run.trackers", f"'{name}' is no tracker; there are {', '.join(TRACKERS)} and none"))
            elif name != "none" and find_spec(name) is None:
                found.append(("run.trackers", f"'{name}' is not installed: pip install {name}"))
        return found

    @property
    def out(self) -> str:
        """The run folder."""
        return self.run.out or f"runs/{self.stage}"

    @property
    def endpoint(self) -> str:
        """The hub mirror, empty for the environment's."""
        return self.model.hf_endpoint


class SftConfig(StageConfig):
    """Supervised fine-tuning."""

    stage: Literal["sft"] = "sft"


class RmConfig(StageConfig):
    """Reward model."""

    stage: Literal["rm"] = "rm"
    rm: RewardModelConfig = RewardModelConfig()


class PpoConfig(StageConfig):
    """Proximal policy optimisation."""

    stage: Literal["ppo"] = "ppo"
    optim: PpoOptimConfig = PpoOptimConfig()
    ppo: PpoBlock = PpoBlock()

    def problems(self) -> list[Problem]:
        found = super().problems()
        ppo, batch = self.ppo, self.optim.batch_size
        if not ppo.reward:
            found.append(("ppo.reward", "no reward is given; say --reward RM_FOLDER or --reward file.py:function"))
        if ppo.rollout_size % ppo.samples_per_prompt:
            found.append(
                (
                    "ppo.rollout_size",
                    f"{ppo.rollout_size} episodes do not divide into {ppo.samples_per_prompt} samples per prompt",
                )
            )
        if ppo.minibatches:
            if ppo.rollout_size % ppo.minibatches:
                found.append(
                    ("ppo.minibatches", f"{ppo.rollout_size} episodes do not divide into {ppo.minibatches} minibatches")
                )
            elif changed(self.optim, "batch_size") and batch * ppo.minibatches != ppo.rollout_size:
                found.append(
                    (
                        "ppo.minibatches",
                        f"{ppo.minibatches} x batch_size {batch} is not rollout_size {ppo.rollout_size}; give two",
                    )
                )
        elif ppo.rollout_size % min(batch, ppo.rollout_size):
            found.append(("optim.batch_size", f"{batch} does not divide ppo.rollout_size {ppo.rollout_size}"))
        if ppo.advantage != "gae":
            for name in ("value_model", "value_coef", "value_cliprange", "gamma", "lam", "whiten_advantages"):
                if changed(ppo, name):
                    found.append(
                        (f"ppo.{name}", f"has no effect with advantage '{ppo.advantage}', which needs no value model")
                    )
            if ppo.samples_per_prompt < 2:
                found.append(("ppo.samples_per_prompt", f"'{ppo.advantage}' compares samples: give at least 2"))
        if ppo.advantage == "grpo" and ppo.kl_estimator == "k1":
            found.append(
                ("ppo.kl_estimator", "k1 has no gradient on average, and grpo's KL is in the loss; give k2 or k3")
            )
        if ppo.kl_target and ppo.kl_horizon < ppo.rollout_size:
            found.append(("ppo.kl_horizon", f"{ppo.kl_horizon} is less than ppo.rollout_size {ppo.rollout_size}"))
        if changed(ppo, "eval_samples") and not self.data.eval:
            found.append(("ppo.eval_samples", "has no effect without held-out prompts; give --eval-data"))
        if not ppo.kl_target and changed(ppo, "kl_horizon"):
            found.append(("ppo.kl_horizon", "has no effect while ppo.kl_target is 0"))
        if ppo.kl_target and not ppo.kl_coef:
            found.append(("ppo.kl_target", "has no effect on a KL weight that starts at 0; set --kl-coef"))
        if ppo.episodes and changed(self.optim, "epochs"):
            found.append(("ppo.episodes", "stands beside optim.epochs; give one of them"))
        if self.data.max_length <= ppo.max_new_tokens:
            found.append(
                (
                    "data.max_length",
                    f"{self.data.max_length} leaves no room for a prompt beside {ppo.max_new_tokens} new tokens",
                )
            )
        elif changed(ppo, "max_prompt_length") and ppo.max_prompt_length > self.data.max_length - ppo.max_new_tokens:
            found.append(
                (
                    "ppo.max_prompt_length",
                    f"{ppo.max_prompt_length} and {ppo.max_new_tokens} new tokens do not fit in "
                    f"data.max_length {self.data.max_length}",
                )
            )
        return found

    @property
    def kl_estimator(self) -> Literal["k1", "k2", "k3"]:
        """The estimator meant: in a reward the unbiased one, in a loss one whose gradient is the KL's."""
        if self.ppo.kl_estimator != "auto":
            return self.ppo.kl_estimator
        return "k3" if self.ppo.advantage == "grpo" else "k1"

    @property
    def minibatch_size(self) -> int:
        """Episodes per optimiser step over all processes."""
        if self.ppo.minibatches:
            return self.ppo.rollout_size // self.ppo.minibatches
        return min(self.optim.batch_size, self.ppo.rollout_size)


class GenerateConfig(GenerateBlock):
    """Generation. Its fields stand at the top level: there are no blocks to tell apart."""

    stage: Literal["generate"] = "generate"

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if not self.model and not self.adapter:
            found.append(("model", "no model is given; say --model FOLDER_OR_HUB_ID"))
        if self.prompt and self.input:
            found.append(("prompt", "stands beside input; give one of them"))
        if self.output and not self.input:
            found.append(("output", "has no effect without input; give --input FILE"))
        if self.input and not self.output:
            found.append(("output", "is missing; say where the answers go with --output FILE"))
        if self.temperature == 0 and self.top_p < 1:
            found.append(("top_p", "has no effect at temperature 0"))
        if not self.input and changed(self, "batch_size"):
            found.append(("batch_size", "has no effect without input"))
        return found

    @property
    def endpoint(self) -> str:
        """The hub mirror, empty for the environment's."""
        return self.hf_endpoint


AnyConfig = SftConfig | RmConfig | PpoConfig | GenerateConfig
STAGES: dict[str, type[AnyConfig]] = {"sft": SftConfig, "rm": RmConfig, "ppo": PpoConfig, "generate": GenerateConfig}


def changed(block: BaseModel, name: str) -> bool:
    """Whether a field differs from its default. (Given or not is no test: a resolved recipe gives every field.)"""
    field = type(block).model_fields[name]
    return bool(getattr(block, name) != field.get_default(call_default_factory=True))
