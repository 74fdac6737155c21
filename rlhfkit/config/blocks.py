"""The blocks that stage configurations are made of. No torch in here: `rlhfkit --help` reads this file.

Every field says its meaning, default, bounds and flag in one place; the command line, the recipe's checks and the
documentation are made from it. A field without a flag is reachable from a recipe and by ``--set block.field=value``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Quantize = Literal["none", "8bit", "4bit"]
Optimizer = Literal["auto", "adamw", "adamw8bit", "paged_adamw8bit"]
Kernels = Literal["auto", "plain", "fused", "liger"]


def option(default: Any, help: str, *, flag: str | None = None, **bounds: Any) -> Any:
    """A pydantic field with its help text and, if it has one, its command-line flag."""
    return Field(default, description=help, json_schema_extra={"flag": flag}, **bounds)


class Block(BaseModel):
    """Base of all blocks: unknown keys are errors, values are bounded, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
    refused: ClassVar[dict[str, str]] = {}  # of a stage: keys that people may look for, and why they are not to be had

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        """A lone text is a list of one where a list belongs, as a lone flag is."""
        if not isinstance(given, dict):
            return given
        lists = {name for name, info in cls.model_fields.items() if get_origin(info.annotation) is list}
        return {key: [value] if key in lists and isinstance(value, str) else value for key, value in given.items()}

    @property
    def without_effect(self) -> dict[str, str]:
        """Of a stage: keys that change nothing beside the others, and why."""
        return {}


class ModelConfig(Block):
    """Which model, and in what form it is held."""

    path: str = option("", "Model folder or hub id; a LoRA folder is loaded with its base.", flag="--model")
    family: str = option("auto", "Model family; auto goes by model_type in config.json.", flag="--family")
    template: str = option(
        "auto",
        "Chat template: a shipped name or a .jinja file; auto is the tokenizer's own, else the family's.",
        flag="--template",
    )
    precision: Precision = option(
        "auto", "Number format of the computation; auto is bf16 where the hardware has it.", flag="--precision"
    )
    quantize: Quantize = option("none", "Hold the frozen base in 8 or 4 bits (needs --lora-rank).", flag="--quantize")
    trust_remote_code: bool = option(
        False, "Run the Python files of the model folder. Only for code you have read.", flag="--trust-remote-code"
    )
    hf_endpoint: str = option("", "Hub mirror, such as https://hf-mirror.com; else HF_ENDPOINT.", flag="--hf-endpoint")


class LoraConfig(Block):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: int = option(0, "Rank of the LoRA adapters; 0 trains all weights.", flag="--lora-rank", ge=0, le=1024)
    alpha: float | None = option(None, "LoRA scale; twice the rank by default.", flag="--lora-alpha", gt=0)
    targets: str = option(
        "auto", "Comma-separated names of linear layers to adapt; auto is the family's list.", flag="--lora-targets"
    )


class DataConfig(Block):
    """Where rows come from and how long they may be."""

    train: list[str] = option(
        [], "Training data: file, folder or hub id, optionally =weight. Repeatable.", flag="--data"
    )
    eval: list[str] = option([], "Held-out data for evaluation. Repeatable.", flag="--eval-data")
    max_length: int = option(
        1024,
        "Longest row in tokens, prompt and answer together; unless given, no more than the model has positions.",
        flag="--max-length",
        ge=8,
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "Stop at a row that cannot be used, or skip and count it.", flag="--on-bad-row"
    )


class OptimConfig(Block):
    """One optimiser step and how many there are. AdamW with decoupled weight decay."""

    batch_size: int = option(
        16, "Rows, pairs or episodes per optimiser step, over all processes.", flag="--batch-size", ge=1
    )
    micro_batch_tokens: int = option(
        0,
        "Most tokens in one forward pass; sets memory and speed, never the result. 0 is 4096; on CPUs 768, and 512 for "
        "ppo in float32.",
        flag="--micro-batch-tokens",
        ge=0,
    )
    packing: bool = option(
        True, "Compute rows laid end to end, shared prompts once; off pads rows instead.", flag="--packing"
    )
    kernels: Kernels = option(
        "auto",
        "How norms and SwiGLU are computed: auto is fused on CPUs, and liger on CUDA where liger-kernel is installed "
        "and knows the model, else plain, transformers' own code. fused and liger refuse to start elsewhere.",
        flag="--kernels",
    )
    epochs: float = option(1.0, "Passes over the training data.", flag="--epochs", gt=0)
    max_steps: int = option(0, "Stop after this many steps; 0 goes by --epochs.", flag="--max-steps", ge=0)
    optimizer: Optimizer = option(
        "auto",
        "AdamW with its states in 32 or 8 bits, paged (CUDA) into main memory when the GPU is full; auto is "
        "paged_adamw8bit for a quantised base on CUDA, else adamw.",
        flag="--optimizer",
    )
    lr: float = option(1e-5, "Peak learning rate.", flag="--lr", gt=0, le=1)
    scheduler: Literal["cosine", "linear", "constant"] = option(
        "cosine", "Course of the learning rate after the warm-up.", flag="--scheduler"
    )
    warmup_ratio: float = option(0.03, "Share of all steps spent warming up.", flag="--warmup-ratio", ge=0, lt=1)
    weight_decay: float = option(0.0, "Decay of weight matrices.", flag="--weight-decay", ge=0, lt=1)
    max_grad_norm: float = option(
        1.0, "Gradients are clipped to this norm; 0 does not clip.", flag="--max-grad-norm", ge=0
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, slower.", flag="--gradient-checkpointing"
    )


class PpoOptimConfig(OptimConfig):
    """The same with PPO's defaults: small steps of one size."""

    lr: float = option(1e-6, "Learning rate.", flag="--lr", gt=0, le=1)
    scheduler: Literal["cosine", "linear", "constant"] = option(
        "constant", "Course of the learning rate after the warm-up.", flag="--scheduler"
    )
    warmup_ratio: float = option(0.0, "Share of all steps spent warming up.", flag="--warmup-ratio", ge=0, lt=1)


class RunConfig(Block):
    """The run folder, its checkpoints and what is reported."""

    out: str = option("", "Run folder; runs/STAGE by default.", flag="--out")
    seed: int = option(0, "Seed of data order, initialisation and sampling.", flag="--seed", ge=0, lt=2**31)
    save_every: int = option(500, "Steps between checkpoints; 0 saves only at the end.", flag="--save-every", ge=0)
    keep: int = option(2, "How many newest checkpoints stay.", flag="--keep", ge=1)
    resume: bool = option(False, "Go on from the newest complete checkpoint in --out.", flag="--resume")
    log_every: int = option(
        1, "Steps between lines on the screen; metrics.jsonl has every step.", flag="--log-every", ge=1
    )
    eval_every: int = option(
        0, "Steps between evaluations; 0 evaluates at the start and the end.", flag="--eval-every", ge=0
    )
    trackers: list[str] = option(
        ["tensorboard"], "Accelerate trackers (tensorboard, wandb, ...), or none. Repeatable.", flag="--trackers"
    )
    view: Literal["auto", "plain", "quiet", "json"] = option(
        "auto",
        "What a run shows: auto is a live picture on a terminal, else lines; json prints each metrics record.",
        flag="--view",
    )
    plan: bool = option(False, "Say what would run and how much memory it needs, then stop.", flag="--plan")


class SftBlock(Block):
    """What is special to supervised fine-tuning."""

    engine: Literal["rlhfkit", "trl"] = option(
        "rlhfkit", "Whose training loop runs: ours, or TRL's SFTTrainer on the same rows.", flag="--engine"
    )
    label_smoothing: float = option(
        0.0,
        "Share of each target's probability spread over the whole vocabulary; not in eval_loss.",
        flag="--label-smoothing",
        ge=0,
        lt=1,
    )
    neftune_alpha: float = option(
        0.0,
        "Uniform noise on the embeddings in training, of size alpha / sqrt(tokens of the row x width); 0 is none.",
        flag="--neftune-alpha",
        ge=0,
    )


class RewardModelConfig(Block):
    """What is special to the reward model."""

    engine: Literal["rlhfkit", "trl"] = option(
        "rlhfkit", "Whose training loop runs: ours, or TRL's RewardTrainer on the same pairs.", flag="--engine"
    )
    label_smoothing: float = option(
        0.0,
        "Share of pairs taken to be ranked the wrong way round; not in eval_loss.",
        flag="--label-smoothing",
        ge=0,
        lt=0.5,
    )
    center_coef: float = option(
        0.0, "Weight of (r_chosen + r_rejected)^2, which keeps scores around zero.", flag="--center-coef", ge=0
    )


class RewardsBlock(Block):
    """Where scores come from."""

    reward: list[str] = option(
        [],
        "Reward: a reward-model folder, file.py:function or URL, optionally =weight. Repeatable.",
        flag="--reward",
    )
    reward_timeout: float = option(
        60.0, "Seconds that a reward server may be silent.", flag="--reward-timeout", gt=0, le=86400
    )
    reward_retries: int = option(
        3, "Further tries when a reward server fails, with growing pauses.", flag="--reward-retries", ge=0, le=100
    )


class RolloutBlock(RewardsBlock):
    """Answers that are sampled, and what they are worth."""

    samples_per_prompt: int = option(1, "Answers sampled to each prompt.", flag="--samples-per-prompt", ge=1)
    max_prompt_length: int = option(
        512, "Longest prompt in tokens; longer ones are left out and counted.", flag="--max-prompt-length", ge=1
    )
    max_new_tokens: int = option(256, "Longest answer in tokens.", flag="--max-new-tokens", ge=1)
    temperature: float = option(
        1.0, "Sampling temperature, of the scored distribution too.", flag="--temperature", gt=0
    )
    episodes: int = option(0, "Answers sampled in the whole run; 0 goes by --epochs.", flag="--episodes", ge=0)
    missing_eos_penalty: float = option(
        0.0, "Taken from the score of an answer that was cut off.", flag="--missing-eos-penalty", ge=0
    )


class PpoBlock(RolloutBlock):
    """Rollouts, rewards and the PPO update."""

    rollout_size: int = option(64, "Episodes sampled before each update.", flag="--rollout-size", ge=1)
    ppo_epochs: int = option(4, "Passes over each rollout.", flag="--ppo-epochs", ge=1)
    minibatches: int = option(
        0, "Optimiser steps per pass; 0 is rollout size / batch size.", flag="--minibatches", ge=0
    )
    kl_coef: float = option(0.05, "Weight of the KL penalty in the reward.", flag="--kl-coef", ge=0)
    kl_target: float = option(
        0.0, "Adapt the KL weight towards this KL per answer (nats); 0 keeps it fixed.", flag="--kl-target", ge=0
    )
    kl_horizon: float = option(10000.0, "Episodes over which the adaptive KL weight acts.", gt=0)
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = option(
        "auto", "Estimator of the KL per token; auto is k1, and k3 in grpo's loss.", flag="--kl-estimator"
    )
    cliprange: float = option(0.2, "PPO's clip range of the probability ratio.", flag="--cliprange", gt=0)
    value_cliprange: float = option(
        0.2, "Clip range of value changes; 0 does not clip.", flag="--value-cliprange", ge=0
    )
    value_coef: float = option(0.1, "Weight of the value loss.", flag="--value-coef", ge=0)
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.", flag="--entropy-coef", ge=0)
    gamma: float = option(1.0, "Discount per token.", flag="--gamma", gt=0, le=1)
    lam: float = option(0.95, "Lambda of generalised advantage estimation.", flag="--lam", ge=0, le=1)
    whiten_advantages: bool = option(True, "Whiten advantages over the global batch.")
    reward_clip: float = option(0.0, "Clip scores to plus and minus this; 0 does not clip.", flag="--reward-clip", ge=0)
    reward_normalize: bool = option(
        False, "Divide scores by their running standard deviation.", flag="--reward-normalize"
    )
    eval_samples: int = option(1, "Answers sampled to each held-out prompt in an evaluation.", ge=1)
    early_stop_kl: float = option(
        0.0, "End the passes over a rollout once the policy moved this far (nats per token); 0 never.", ge=0
    )
    advantage: Literal["gae", "rloo", "grpo"] = option(
        "gae",
        "Advantage estimator; rloo and grpo compare the samples of a prompt and need no value model.",
        flag="--advantage",
    )
    value_model: Literal["shared", "adapter", "separate"] = option(
        "shared",
        "Value head on the policy's trunk, on an adapter of its own on the same base, or on a model of its own.",
        flag="--value-model",
    )


class GenerateBlock(Block):
    """Prompts in, answers out."""

    model: str = option("", "Model folder or hub id; LoRA folders load directly.", flag="--model")
    adapter: str = option("", "LoRA folder on top of --model.", flag="--adapter")
    prompt: str = option("", "One prompt; without --prompt and --input a chat starts.", flag="--prompt")
    input: str = option("", "File of prompts, any prompt format.", flag="--input")
    output: str = option("", "File for the answers, JSON lines in the order of --input.", flag="--output")
    system: str = option("", "System message in front of every conversation that has none of its own.", flag="--system")
    max_new_tokens: int = option(256, "Longest answer in tokens.", flag="--max-new-tokens", ge=1)
    temperature: float = option(0.7, "Sampling temperature; 0 takes the likeliest token.", flag="--temperature", ge=0)
    top_p: float = option(1.0, "Sample from the smallest set with this probability.", flag="--top-p", gt=0, le=1)
    seed: int = option(0, "Seed of the sampling.", flag="--seed", ge=0, lt=2**31)
    stream: bool = option(True, "Show tokens as they come.", flag="--stream")
    batch_size: int = option(16, "Prompts answered together.", flag="--batch-size", ge=1)
    family: str = option("auto", "Model family; auto goes by model_type.", flag="--family")
    template: str = option("auto", "Chat template: a shipped name or a .jinja file.", flag="--template")
    precision: Precision = option("auto", "Number format of the computation.", flag="--precision")
    quantize: Quantize = option("none", "Load the model in 8 or 4 bits.", flag="--quantize")
    trust_remote_code: bool = option(False, "Run the Python files of the model folder.", flag="--trust-remote-code")
    hf_endpoint: str = option("", "Hub mirror; else HF_ENDPOINT.", flag="--hf-endpoint")


class ScoreBlock(Block):
    """Rows in, scores out."""

    model: str = option("", "Reward model: folder or hub id; LoRA folders load directly.", flag="--model")
    data: list[str] = option(
        [], "What is scored: preference rows, or rows of prompt and answer. Repeatable.", flag="--data"
    )
    output: str = option("", "File for the scores, JSON lines in the order of the data.", flag="--output")
    json_totals: bool = option(False, "Print the totals as one JSON object on standard output.", flag="--json")
    max_length: int = option(
        0, "Longest row in tokens; 0 is what the model was trained with.", flag="--max-length", ge=0
    )
    micro_batch_tokens: int = option(
        4096,
        "Most tokens, padding included, in one forward pass. Sets memory; scores agree to rounding.",
        flag="--micro-batch-tokens",
        ge=1,
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "Stop at a row that cannot be scored, or skip and count it.", flag="--on-bad-row"
    )
    precision: Precision = option(
        "auto",
        "Number format of the computation; auto is fp32, for scores that depend on their row alone.",
        flag="--precision",
    )
    quantize: Literal["auto", "none", "8bit", "4bit"] = option(
        "auto", "Hold the base in 8 or 4 bits; auto is as in the training.", flag="--quantize"
    )
    trust_remote_code: bool = option(False, "Run the Python files of the model folder.", flag="--trust-remote-code")
    hf_endpoint: str = option("", "Hub mirror; else HF_ENDPOINT.", flag="--hf-endpoint")
