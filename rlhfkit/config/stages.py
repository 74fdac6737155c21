"""One configuration per stage, and the checks that need more than one field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

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
    RolloutBlock,
    RunConfig,
    ScoreBlock,
    SftBlock,
)
from rlhfkit.config.rewards import RewardSpec, parse_reward
from rlhfkit.config.sources import parse_source
from rlhfkit.config.trl import (
    REFUSED,
    DpoBlock,
    Engine,
    GrpoBlock,
    KtoBlock,
    OnlineBlock,
    OnlineOptimConfig,
    PreferenceOptimConfig,
    RlooBlock,
    refused_online,
)
from rlhfkit.errors import ConfigError

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
        if self.engine == "trl" and find_spec("trl") is None:
            where = "stage" if isinstance(self, TrlConfig) else f"{self.stage}.engine"
            found.append((where, f"{self.stage} would run on TRL, which is not installed: pip install 'rlhfkit[trl]'"))
        if not self.model.path:
            found.append(("model.path", "no model is given; say --model FOLDER_OR_HUB_ID"))
        if not self.data.train:
            found.append(("data.train", "no data is given; say --data FILE"))
        found += _source_problems("data.train", self.data.train)
        found += _source_problems("data.eval", self.data.eval, "has no effect: held-out rows count once each")
        if self.lora.rank == 0 and self.model.quantize != "none":
            words = f"{self.model.quantize} weights cannot be trained; set --lora-rank to train adapters"
            found.append(("model.quantize", words))
        if self.optim.kernels == "liger" and find_spec("liger_kernel") is None:
            found.append(("optim.kernels", "liger-kernel is not installed: pip install liger-kernel"))
        if "none" in self.run.trackers and len(self.run.trackers) > 1:
            found.append(("run.trackers", "'none' stands beside other trackers; leave one of them out"))
        for name in self.run.trackers:
            if name not in ("none", *TRACKERS):
                found.append(("run.trackers", f"'{name}' is no tracker; there are {', '.join(TRACKERS)} and none"))
            elif name != "none" and find_spec(name) is None:
                found.append(("run.trackers", f"'{name}' is not installed: pip install {name}"))
        return found

    @property
    def without_effect(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.lora.rank == 0:
            found |= dict.fromkeys(
                ("lora.alpha", "lora.targets"), "has no effect while lora.rank is 0; set --lora-rank"
            )
        if not self.data.eval:
            found["run.eval_every"] = "has no effect without held-out rows; give --eval-data"
        if self.run.view in ("quiet", "json"):
            found["run.log_every"] = f"has no effect with run.view '{self.run.view}', which shows no lines of steps"
        return found

    @property
    def open_choices(self) -> tuple[str, ...]:
        """Keys whose default leaves a choice to the run, by the model, the device and what is installed."""
        model = ("model.family", "model.template", "model.precision")
        return (*model, "lora.alpha", "lora.targets", "optim.kernels", "optim.optimizer")

    @property
    def chosen(self) -> dict[str, Any]:
        """What a default stands for that other keys decide."""
        return {"run.out": self.out}

    @property
    def engine(self) -> Engine:
        """Whose training loop runs."""
        return "rlhfkit"

    @property
    def rollouts(self) -> RolloutBlock | None:
        """How answers are sampled and rewarded, in a stage that does."""
        return None

    @property
    def row_limit(self) -> int:
        """Tokens of the longest row that is used; of the longest prompt where answers are sampled to it."""
        if (block := self.rollouts) is None:
            return self.data.max_length
        return min(block.max_prompt_length, self.data.max_length - block.max_new_tokens)

    @property
    def row_kind(self) -> str:
        """The stage whose rows it reads, as `rlhfkit.data.parse` knows them."""
        return self.stage

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
    sft: SftBlock = SftBlock()

    @property
    def engine(self) -> Engine:
        return self.sft.engine

    @property
    def without_effect(self) -> dict[str, str]:
        return super().without_effect | _left_out_by_trl(self)


class RmConfig(StageConfig):
    """Reward model."""

    stage: Literal["rm"] = "rm"
    rm: RewardModelConfig = RewardModelConfig()

    @property
    def engine(self) -> Engine:
        return self.rm.engine

    @property
    def without_effect(self) -> dict[str, str]:
        return super().without_effect | _left_out_by_trl(
            self, {"rm.label_smoothing": "TRL's RewardTrainer has no label smoothing"}
        )


def _left_out_by_trl(config: StageConfig, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What has no effect with TRL's engine, and is of use with our own."""
    if config.engine != "trl":
        return {}
    return {path: f"{why}; leave --engine trl out" for path, why in {**REFUSED, **(more or {})}.items()}


class PpoConfig(StageConfig):
    """Proximal policy optimisation."""

    refused: ClassVar[dict[str, str]] = dict.fromkeys(
        ("ppo.top_p", "ppo.top_k"),
        "PPO samples from the whole distribution: an answer drawn from a part of it would be scored with probabilities "
        "it was not drawn with, which biases every ratio and makes the KL negative; use ppo.temperature",
    )
    stage: Literal["ppo"] = "ppo"
    optim: PpoOptimConfig = PpoOptimConfig()
    ppo: PpoBlock = PpoBlock()

    def problems(self) -> list[Problem]:
        found = super().problems()
        ppo, batch = self.ppo, self.optim.batch_size
        found += _rollout_problems(self, ppo)
        if ppo.rollout_size % ppo.samples_per_prompt:
            found.append(
                (
                    "ppo.rollout_size",
                    f"{ppo.rollout_size} episodes do not divide into {ppo.samples_per_prompt} samples per prompt",
                )
            )
        if ppo.episodes % ppo.samples_per_prompt:
            found.append(
                (
                    "ppo.episodes",
                    f"{ppo.episodes} episodes do not divide into {ppo.samples_per_prompt} samples per prompt",
                )
            )
        if ppo.minibatches:
            if ppo.rollout_size % ppo.minibatches:
                found.append(
                    ("ppo.minibatches", f"{ppo.rollout_size} episodes do not divide into {ppo.minibatches} minibatches")
                )
        elif ppo.rollout_size % min(batch, ppo.rollout_size):
            found.append(("optim.batch_size", f"{batch} does not divide ppo.rollout_size {ppo.rollout_size}"))
        if ppo.advantage != "gae" and ppo.samples_per_prompt < 2:
            found.append(("ppo.samples_per_prompt", f"'{ppo.advantage}' compares samples: give at least 2"))
        if ppo.advantage == "grpo" and ppo.kl_estimator == "k1":
            found.append(
                ("ppo.kl_estimator", "k1 has no gradient on average, and grpo's KL is in the loss; give k2 or k3")
            )
        if ppo.kl_target and ppo.kl_horizon < ppo.rollout_size:
            found.append(("ppo.kl_horizon", f"{ppo.kl_horizon} is less than ppo.rollout_size {ppo.rollout_size}"))
        if ppo.kl_target and not ppo.kl_coef:
            found.append(("ppo.kl_target", "has no effect on a KL weight that starts at 0; set --kl-coef"))
        if ppo.value_model == "adapter" and self.lora.rank == 0:
            found.append(("ppo.value_model", "'adapter' puts the value function on a LoRA base: set --lora-rank"))
        return found

    @property
    def without_effect(self) -> dict[str, str]:
        ppo = self.ppo
        found = super().without_effect | _idle_in_rollouts(self, ppo)
        if not self.data.eval:
            found["ppo.eval_samples"] = "has no effect without held-out prompts; give --eval-data"
        if not ppo.kl_target:
            found["ppo.kl_horizon"] = "has no effect while ppo.kl_target is 0"
        if not ppo.kl_coef:
            found["ppo.kl_estimator"] = "has no effect while ppo.kl_coef is 0; metrics always have k1"
        if not ppo.value_coef:
            found["ppo.value_cliprange"] = "has no effect while ppo.value_coef is 0"
        if ppo.ppo_epochs == 1:
            found["ppo.early_stop_kl"] = "has no effect with one pass over each rollout"
        batch, size = self.optim.batch_size, ppo.rollout_size
        if ppo.minibatches and batch * ppo.minibatches != size:
            words = f"{batch} x ppo.minibatches {ppo.minibatches} is not ppo.rollout_size {size}; give two of the three"
            found["optim.batch_size"] = words
        elif not ppo.minibatches and batch > size:
            words = f"{batch} episodes per optimiser step are more than ppo.rollout_size {size}; give {size} or less"
            found["optim.batch_size"] = words
        if ppo.advantage != "gae":
            words = f"has no effect with advantage '{ppo.advantage}', which needs no value model"
            names = ("value_model", "value_coef", "value_cliprange", "gamma", "lam", "whiten_advantages")
            found |= {f"ppo.{name}": words for name in names}
        return found

    @property
    def kl_estimator(self) -> Literal["k1", "k2", "k3"]:
        """The estimator meant: in a reward the unbiased one, in a loss one whose gradient is the KL's."""
        if self.ppo.kl_estimator != "auto":
            return self.ppo.kl_estimator
        return "k3" if self.ppo.advantage == "grpo" else "k1"

    @property
    def open_choices(self) -> tuple[str, ...]:
        return (*super().open_choices, "ppo.kl_estimator")

    @property
    def chosen(self) -> dict[str, Any]:
        idle = "ppo.kl_estimator" in self.without_effect
        return super().chosen | ({} if idle else {"ppo.kl_estimator": self.kl_estimator})

    @property
    def rollouts(self) -> PpoBlock:
        return self.ppo

    @property
    def minibatch_size(self) -> int:
        """Episodes per optimiser step over all processes."""
        if self.ppo.minibatches:
            return self.ppo.rollout_size // self.ppo.minibatches
        return min(self.optim.batch_size, self.ppo.rollout_size)


def _rollout_problems(config: StageConfig, block: RolloutBlock) -> list[Problem]:
    """What is wrong with rewards and with the lengths of prompts and answers, in any stage that samples."""
    found: list[Problem] = []
    stage, most = config.stage, config.data.max_length
    if not block.reward:
        found.append((f"{stage}.reward", "no reward is given; say --reward RM_FOLDER or --reward file.py:function"))
    specs: list[RewardSpec] = []
    for text in block.reward:
        try:
            specs.append(parse_reward(text))
        except ConfigError as error:
            found.append((f"{stage}.reward", f"{error.message}; {error.hint}"))
    names = [spec.name for spec in specs]
    if twice := sorted({spec.label for spec in specs if names.count(spec.name) > 1}):
        found.append((f"{stage}.reward", f"{twice[0]} is given twice; give it once, with the sum of the weights"))
    prompt, new = block.max_prompt_length, block.max_new_tokens
    if most <= new:
        found.append(("data.max_length", f"{most} leaves no room for a prompt beside {new} new tokens"))
    elif changed(block, "max_prompt_length") and prompt > most - new:
        words = f"{prompt} and {new} new tokens do not fit in data.max_length {most}"
        found.append((f"{stage}.max_prompt_length", words))
    return found


def _idle_in_rollouts(config: StageConfig, block: RolloutBlock) -> dict[str, str]:
    """What has no effect in a stage that samples."""
    found: dict[str, str] = {}
    if not any(text.lower().startswith(("http://", "https://")) for text in block.reward):
        names = (f"{config.stage}.reward_timeout", f"{config.stage}.reward_retries")
        found |= dict.fromkeys(names, "has no effect without a reward that is a URL")
    if block.episodes:
        found["optim.epochs"] = f"has no effect beside {config.stage}.episodes; give one of them"
    return found


def _source_problems(path: str, specs: Sequence[str], weight_is_idle: str = "") -> list[Problem]:
    """What is wrong with the names of data sources, and with a weight where it would change nothing."""
    found: list[Problem] = []
    for spec in specs:
        try:
            source = parse_source(spec)
        except ConfigError as error:
            found.append((path, f"{error.message}; {error.hint}"))
        else:
            if weight_is_idle and source.name != spec:
                found.append((path, f"the weight of {spec} {weight_is_idle}; leave it out"))
    return found


class TrlConfig(StageConfig):
    """Base of the stages that TRL has and we have not."""

    refused: ClassVar[dict[str, str]] = REFUSED

    @property
    def engine(self) -> Engine:
        return "trl"


class DpoConfig(TrlConfig):
    """Direct preference optimisation."""

    stage: Literal["dpo"] = "dpo"
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    dpo: DpoBlock = DpoBlock()

    @property
    def without_effect(self) -> dict[str, str]:
        if self.dpo.loss == "robust":
            return super().without_effect
        words = f"has no effect on the loss '{self.dpo.loss}'; give --loss robust"
        return super().without_effect | {"dpo.label_smoothing": words}

    @property
    def row_kind(self) -> str:
        return "rm"


class KtoConfig(TrlConfig):
    """Kahneman-Tversky optimisation."""

    stage: Literal["kto"] = "kto"
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    kto: KtoBlock = KtoBlock()

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.optim.batch_size < 2:
            found.append(("optim.batch_size", "kto measures its KL across the rows of a batch; give at least 2"))
        return found


class OnlineConfig(TrlConfig):
    """Base of GRPO and RLOO."""

    optim: OnlineOptimConfig = OnlineOptimConfig()

    @property
    def rollouts(self) -> OnlineBlock:
        block: OnlineBlock = getattr(self, self.stage)
        return block

    @property
    def row_kind(self) -> str:
        return "ppo"

    @property
    def without_effect(self) -> dict[str, str]:
        return super().without_effect | _idle_in_rollouts(self, self.rollouts)

    def problems(self) -> list[Problem]:
        found = super().problems()
        block, stage, batch = self.rollouts, self.stage, self.optim.batch_size
        found += _rollout_problems(self, block)
        if batch % block.samples_per_prompt:
            found.append(
                (
                    f"{stage}.samples_per_prompt",
                    f"{block.samples_per_prompt} answers to each prompt do not divide optim.batch_size {batch}",
                )
            )
        return found


class GrpoConfig(OnlineConfig):
    """Group relative policy optimisation."""

    refused: ClassVar[dict[str, str]] = refused_online("grpo")
    stage: Literal["grpo"] = "grpo"
    grpo: GrpoBlock = GrpoBlock()


class RlooConfig(OnlineConfig):
    """REINFORCE leave-one-out."""

    refused: ClassVar[dict[str, str]] = refused_online("rloo")
    stage: Literal["rloo"] = "rloo"
    rloo: RlooBlock = RlooBlock()


class GenerateConfig(GenerateBlock):
    """Generation. Its fields stand at the top level: there are no blocks to tell apart."""

    stage: Literal["generate"] = "generate"

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if not self.model and not self.adapter:
            found.append(("model", "no model is given; say --model FOLDER_OR_HUB_ID"))
        if self.prompt and self.input:
            found.append(("prompt", "stands beside input; give one of them"))
        if self.input and not self.output:
            found.append(("output", "is missing; say where the answers go with --output FILE"))
        if self.input:
            found += _source_problems("input", [self.input], "has no effect: each prompt is answered once")
        return found

    @property
    def without_effect(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.input and self.stream:  # to want none is no contradiction
            found["stream"] = "has no effect with input, whose answers go to a file"
        if not self.input:
            found |= dict.fromkeys(("output", "batch_size"), "has no effect without input; give --input FILE")
        if self.temperature == 0:
            # A seed is a promise of equal answers, which greedy decoding keeps without it.
            found["top_p"] = "has no effect at temperature 0"
        return found

    @property
    def endpoint(self) -> str:
        """The hub mirror, empty for the environment's."""
        return self.hf_endpoint


class ScoreConfig(ScoreBlock):
    """Scores of a reward model. As in `GenerateConfig`, there are no blocks."""

    stage: Literal["score"] = "score"

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if not self.model:
            found.append(("model", "no reward model is given; say --model FOLDER_OR_HUB_ID"))
        if not self.data:
            found.append(("data", "no data is given; say --data FILE"))
        found += _source_problems("data", self.data, "has no effect: each row is scored once")
        if 0 < self.max_length < 8:
            found.append(("max_length", f"{self.max_length} tokens hold no conversation; give at least 8, or 0"))
        return found

    @property
    def endpoint(self) -> str:
        """The hub mirror, empty for the environment's."""
        return self.hf_endpoint


AnyConfig = (
    SftConfig | RmConfig | PpoConfig | DpoConfig | KtoConfig | GrpoConfig | RlooConfig | GenerateConfig | ScoreConfig
)
STAGES: dict[str, type[AnyConfig]] = {
    "sft": SftConfig,
    "rm": RmConfig,
    "ppo": PpoConfig,
    "dpo": DpoConfig,
    "kto": KtoConfig,
    "grpo": GrpoConfig,
    "rloo": RlooConfig,
    "generate": GenerateConfig,
    "score": ScoreConfig,
}


def changed(block: BaseModel, name: str) -> bool:
    """Whether a field differs from its default. (Given or not is no test: a resolved recipe gives every field.)"""
    field = type(block).model_fields[name]
    return bool(getattr(block, name) != field.get_default(call_default_factory=True))
