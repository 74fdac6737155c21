"""``--plan``: what a run would do and how much memory it needs, found without loading a weight."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rlhfkit.algo.logprobs import CHUNK_TOKENS
from rlhfkit.config.stages import PpoConfig, StageConfig
from rlhfkit.data.batch import BatchOrder
from rlhfkit.data.tokenize import tokenize_pairs, tokenize_prompts, tokenize_sft
from rlhfkit.models.folder import open_model
from rlhfkit.models.precision import DTYPES, current_device, resolve_precision
from rlhfkit.models.reward_sources import is_function
from rlhfkit.runtime.run import check_folder
from rlhfkit.runtime.screen import Screen, quiet_libraries
from rlhfkit.stages.common import open_text_side, read_records, say_report
from rlhfkit.stages.ppo import ROLLOUT_BATCH

GIB = 2**30
# Bytes kept for the backward pass, per token and unit of the hidden size, in one LLaMA layer with autocast. Fitted to
# the peak memory of examples/smollm2/sft.yaml on a CPU; the least certain figure here.
KEPT_PER_LAYER = 150


def run(config: StageConfig) -> dict[str, float]:
    """Print the plan; returns the memory estimate in GiB by its parts.

    Raises:
        Whatever the run itself would raise before its first step.
    """
    from pathlib import Path

    quiet_libraries()
    check_folder(config, Path(config.out))
    screen = Screen()
    source, text = open_text_side(config)
    records = read_records(config, config.data.train, screen, mixed=True)
    rows: list[Any]
    if isinstance(config, PpoConfig):
        limit = min(config.ppo.max_prompt_length, config.data.max_length - config.ppo.max_new_tokens)
        rows, report = tokenize_prompts(records, text.encoder, limit)
    elif config.stage == "rm":
        rows, report = tokenize_pairs(records, text.encoder, config.data.max_length)
    else:
        rows, report = tokenize_sft(records, text.encoder, config.data.max_length)
    say_report(screen, "training", report)

    parts = memory_parts(config, source.config, len(text.tokenizer), text.family.lora_targets)
    console = Console()
    table = Table(title=f"rlhfkit {config.stage}: memory on one {current_device().type} device")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in parts.items():
        table.add_row(name, f"{size:.2f}")
    table.add_section()
    table.add_row("in all, about", f"{sum(parts.values()):.2f}")
    console.print(table)
    console.print(_what_runs(config, len(rows)))
    console.print("Less memory: --micro-batch-tokens, --gradient-checkpointing, --lora-rank, --quantize 4bit")
    return parts


def _what_runs(config: StageConfig, rows: int) -> str:
    optim = config.optim
    if isinstance(config, PpoConfig):
        ppo = config.ppo
        episodes = ppo.episodes or round(optim.epochs * rows) * ppo.samples_per_prompt
        steps = max(1, -(-episodes // ppo.rollout_size))
        steps = min(steps, optim.max_steps) if optim.max_steps else steps
        return (
            f"{steps} steps of {ppo.rollout_size} episodes, each with {ppo.ppo_epochs} passes of "
            f"{ppo.rollout_size // config.minibatch_size} minibatches; run folder {config.out}"
        )
    steps = BatchOrder(rows, optim.batch_size, 0).total_steps(optim.epochs, optim.max_steps)
    return f"{steps} steps of {optim.batch_size} rows; run folder {config.out}"


def memory_parts(
    config: StageConfig, model_config: dict[str, Any], tokens: int, lora_targets: tuple[str, ...]
) -> dict[str, float]:
    """Estimate of the peak in GiB. Activations are the uncertain part; the rest follows from shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = model_config["model_type"]
    shape = AutoConfig.for_model(**{k: v for k, v in model_config.items() if k != "quantization_config"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    linear = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    total = sum(p.numel() for p in model.parameters())
    blocks = sum(size for name, size in linear.items() if "lm_head" not in name)
    precision = resolve_precision(config.model.precision, current_device())
    width = DTYPES[precision].itemsize
    rank = config.lora.rank
    if rank == 0:
        trainable, weights = total, 4.0 * total
    else:
        names = lora_targets if config.lora.targets == "auto" else tuple(config.lora.targets.split(","))
        shapes = [m.weight.shape for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in names]
        trainable = sum(rank * (out + into) for out, into in shapes)
        per_block_weight = {"none": float(width), "8bit": 1.0, "4bit": 0.52}[config.model.quantize]
        weights = per_block_weight * blocks + width * (total - blocks) + 4.0 * trainable
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    in_flight = max(config.optim.micro_batch_tokens, config.data.max_length)
    layer = KEPT_PER_LAYER * hidden
    # With checkpointing each layer keeps its input, and one layer at a time is computed again.
    kept = 4 * hidden * layers + layer if config.optim.gradient_checkpointing else layer * layers
    parts = {
        f"weights ({model_type}, {total / 1e9:.2f} billion)": weights,
        f"gradients ({trainable / 1e6:.1f} million train)": 4.0 * trainable,
        "AdamW": 8.0 * trainable,
        f"activations of {in_flight:,} tokens": float(in_flight * kept),
        "logits of one chunk": 3.0 * 4 * min(CHUNK_TOKENS, in_flight) * max(shape.vocab_size, tokens),
    }
    if isinstance(config, PpoConfig):
        parts |= _ppo_parts(config, shape, total, width)
    return {name: size / GIB for name, size in parts.items()}


def _ppo_parts(config: PpoConfig, shape: Any, total: int, width: int) -> dict[str, float]:
    ppo = config.ppo
    parts = {} if config.lora.rank else {"reference": 4.0 * total}
    if ppo.advantage == "gae" and ppo.value_model == "separate":
        parts["value model, its gradients and AdamW"] = 16.0 * total
    for spec in ppo.reward:
        if is_function(spec):
            continue
        reward = open_model(spec if "=" not in spec else spec.rsplit("=", 1)[0])
        size = _parameters(reward.config)
        parts[f"reward {reward.path}"] = float(width * size)
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    per_token = 2 * shape.num_hidden_layers * getattr(shape, "num_key_value_heads", shape.num_attention_heads) * head
    answers = min(ROLLOUT_BATCH, ppo.rollout_size)
    parts[f"cache of {answers} answers"] = float(per_token * width * answers * config.data.max_length)
    return parts


def _parameters(model_config: dict[str, Any]) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return sum(
            p.numel() for p in AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config)).parameters()
        )
