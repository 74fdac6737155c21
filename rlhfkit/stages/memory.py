"""How much memory a run takes, found without loading a weight.

The model is built of tensors without storage, and one pass of the largest micro-batch goes through it: what that pass
would keep for its backward pass is counted, not guessed, whatever the architecture and the kernels. The rest follows
from shapes, but for the constants below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from rlhfkit.algo.logprobs import CHUNK_TOKENS
from rlhfkit.config.blocks import LoraConfig, OptimConfig
from rlhfkit.config.rewards import parse_reward
from rlhfkit.config.stages import PpoConfig, StageConfig
from rlhfkit.data.batch import BatchOrder, collate, micro_batches
from rlhfkit.data.packing import Tree, group_by_tokens
from rlhfkit.data.tokenize import PairRow, PromptRow
from rlhfkit.errors import ModelError
from rlhfkit.models.adapter_folders import adapter_settings, add_lora, refuse_other_lora
from rlhfkit.models.adapters import POLICY, REWARD, add_frozen_shape, add_value_adapter, fits_on
from rlhfkit.models.attention import use_packed_attention
from rlhfkit.models.decoding import FEWEST_ROWS, MOST_BYTES, MOST_ROWS
from rlhfkit.models.folder import ModelSource, open_model
from rlhfkit.models.kernels import chosen_kernels, use_fast_layers
from rlhfkit.models.load import LoadedModel
from rlhfkit.models.lora import use_fast_lora
from rlhfkit.models.parts import Task, backbone, base_model, parameter_counts
from rlhfkit.models.precision import DTYPES, current_device, resolve_precision
from rlhfkit.models.scoring import collate_conversations
from rlhfkit.models.text_side import TextSide
from rlhfkit.models.vocabulary import rows_for
from rlhfkit.models.wrappers import LanguageModel, PolicyModel, RewardModel
from rlhfkit.runtime.optim import choose_optimizer
from rlhfkit.runtime.run import default_micro_batch_tokens
from rlhfkit.stages.episodes import Episode, by_tokens, collate_episodes
from rlhfkit.stages.ppo import ROLLOUT_BATCH, prompts_of_step, rollout_sizes
from rlhfkit.stages.ppo_models import as_multiplied

GIB = 2**30
STEPS_LOOKED_AT = 200  # for the largest micro-batch

# Fitted on 2026-11-25 by benchmarks/plan.py, on a CPU with glibc, to the peaks of SmolLM2-135M. Fit them again after a
# change to the sampler, the kernels, the optimiser or how models are loaded.
LIBRARIES = 0.30 * GIB  # what training loads beyond what planning has loaded already (CPU)
SPARE = 1.05  # memory that is free and in pieces too small to be used
BACKWARD_PER_TOKEN = 16  # bytes per token and unit of the widest layer, while one layer's gradients are computed
DRAWING = 32  # bytes per answer and vocabulary entry, while a token is drawn: logits, probabilities, their sums
PREFILL_PER_TOKEN = 12  # bytes per prompt token and unit of the widest layer

OPTIMISER, GRADIENTS = "states of the optimiser", "gradients"
BYTES_PER_STATE = {"adamw": 8.0}  # others keep theirs in 8 bits
# Bytes of a linear weight in a quantised base.
STORED = {"8bit": 1.0, "4bit": 0.52}


@dataclass
class Estimate:
    """Bytes by part. ``held`` stays all the time; the others come and go, and the largest of them counts."""

    held: dict[str, float] = field(default_factory=dict)
    loading: dict[str, float] = field(default_factory=dict)
    rollout: dict[str, float] = field(default_factory=dict)
    update: dict[str, float] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)  # what is held, in words
    tokens: int = 0  # of the largest micro-batch
    per_token: float = 0.0  # bytes that one more token in a micro-batch takes
    answers: int = 0  # sampled together
    per_answer: float = 0.0

    @property
    def total(self) -> float:
        held = sum(self.held.values())
        # There is no optimiser yet while models are loaded.
        loading = sum(self.loading.values()) - sum(
            v for k, v in self.held.items() if k.startswith((OPTIMISER, GRADIENTS))
        )
        return held + max(loading, sum(self.rollout.values()), sum(self.update.values()))

    def tokens_that_fit(self, available: float) -> int:
        """The largest --micro-batch-tokens, in steps of 256."""
        room = available - sum(self.held.values()) - (sum(self.update.values()) - self.per_token * self.tokens)
        return max(0, int(room / self.per_token) // 256 * 256)

    def answers_that_fit(self, available: float) -> int:
        room = available - sum(self.held.values()) - (sum(self.rollout.values()) - self.per_answer * self.answers)
        return max(0, int(room / self.per_answer))


def estimate(
    config: StageConfig,
    source: ModelSource,
    text: TextSide,
    rows: Sequence[Any],
    device: torch.device,
    held_out: Sequence[Any] = (),
) -> Estimate:
    """Estimate of a run's peak.

    Args:
        config: of the stage.
        source: the model's folder.
        text: its text side.
        rows: the tokenised training rows.
        device: where the run would be.
        held_out: the tokenised rows of its evaluations.

    Raises:
        ModelError: an architecture that transformers does not know itself.
    """
    precision = resolve_precision(config.model.precision, device)
    dtype = DTYPES[precision]
    found = Estimate()
    on_cpu = device.type == "cpu"
    if on_cpu:
        found.held["Python and libraries"] = psutil.Process().memory_info().rss + LIBRARIES
    task: Task = "reward" if config.stage == "rm" else "causal"
    with torch.device("meta"):
        quantize, optim = config.model.quantize, config.optim
        model, stored = _shell(source, text, task, config.lora, dtype, quantize, optim, text.vocabulary)
        loaded = LoadedModel(model, text, source, quantize=quantize)
        module = _module(config, loaded, found, dtype, stored)
    trainable, _ = parameter_counts(module)
    # Of the device meta, tensors know neither autocast nor attention kernels; these know both, and are as empty.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module.to_empty(device="cpu").train()
        if not hasattr(base_model(model).get_output_embeddings(), "modules_to_save"):  # transformers cannot tie copies
            base_model(model).tie_weights()
        batch, found.tokens = _largest(config, rows, device)
        kept = _kept(mode, module, batch, dtype, config)
        doubled, _ = _largest(config, rows, device, copies=2)
        found.per_token = (_kept(mode, module, doubled, dtype, config) - kept) / found.tokens
        if config.optim.gradient_checkpointing:
            # One layer at a time is computed again, and keeps what it would have kept.
            base_model(model).gradient_checkpointing_disable()
            layer = _kept(mode, module, batch, dtype, config) / base_model(model).config.num_hidden_layers
            kept, found.per_token = kept + layer, found.per_token + layer / found.tokens
    shape = base_model(model).config
    vocabulary, hidden = shape.vocab_size, shape.hidden_size
    widest = max(p.shape[0] for n, p in base_model(model).named_parameters() if p.ndim == 2 and "layers." in n)
    quantized = config.model.quantize != "none"
    optimizer = choose_optimizer(config.optim.optimizer, device, quantized=quantized, sharded=False)
    found.held[f"states of the optimiser ({optimizer})"] = BYTES_PER_STATE.get(optimizer, 2.0) * trainable

    found.per_token = SPARE * found.per_token + BACKWARD_PER_TOKEN * widest
    # On a CPU they stay where they are between the updates (`runtime/optim.py`).
    (found.held if on_cpu else found.update)[f"gradients ({trainable / 1e6:,.1f} million train)"] = 4.0 * trainable
    if config.lora.rank == 0 and dtype != torch.float32:
        found.update["16-bit copies of the weights that train"] = float(dtype.itemsize * trainable)
    found.update[f"kept for the backward pass of {found.tokens:,} tokens"] = SPARE * kept
    found.update["intermediate gradients"] = float(BACKWARD_PER_TOKEN * widest * found.tokens)
    if task == "causal":
        chunk = min(CHUNK_TOKENS // 2 if on_cpu else CHUNK_TOKENS, found.tokens)
        # Without entropies the head's gradient is a sum of its own, until it is scaled (`algo/logprobs.py`).
        weights = base_model(model).get_output_embeddings().parameters()
        trains = any(p.requires_grad and p.numel() >= vocabulary * hidden for p in weights)
        head = 8.0 * vocabulary * hidden if trains and config.stage != "ppo" else 0.0
        if quantized and config.stage != "ppo":  # the head stays in 32 bits, and is cast where its gradient is made
            head += dtype.itemsize * vocabulary * hidden
        found.update["logits of one chunk"] = float(8 * chunk * vocabulary) + head
    if isinstance(config, PpoConfig):
        _rollout(found, config, shape, rows, held_out, dtype, widest)
        linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
        used = [m for name, m in linear.items() if ".lora_" not in name or name.endswith(f".{POLICY}")]
        copies = float(dtype.itemsize * sum(m.weight.numel() for m in used))
        if on_cpu and FEWEST_ROWS <= found.answers <= MOST_ROWS and copies <= MOST_BYTES:
            found.rollout["weights laid out for sampling"] = copies
    if on_cpu:
        # Weight files are mapped into memory while their tensors are copied out of them.
        found.loading["the weight files, while they are read"] = float(_files(source.base))
    return found


def _shell(
    source: ModelSource,
    text: TextSide,
    task: Task,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    quantize: str,
    optim: OptimConfig,
    tokens: int = 0,
) -> tuple[Any, float]:
    """What `load_model` would give, of tensors without storage, and the bytes of its weights.

    Its vocabulary has room for ``tokens``.
    """
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    try:
        shape = AutoConfig.for_model(**{k: v for k, v in source.config.items() if k != "quantization_config"})
    except ValueError as error:
        raise ModelError(
            f"the memory of {source.path} cannot be told: transformers has no architecture "
            f"'{source.config.get('model_type')}' of its own",
            hint="leave --plan out",
        ) from error
    tokens = max(tokens, int(source.record.get("vocab_rows", 0)))
    stored_rows, shape.vocab_size = shape.vocab_size, rows_for(tokens, shape.vocab_size)
    new_tokens = shape.vocab_size > stored_rows or bool(text.encoder.added_controls)
    auto = AutoModelForCausalLM
    if task == "reward":
        auto, shape.num_labels = AutoModelForSequenceClassification, 1
    train_all = lora is not None and lora.rank == 0
    shape.name_or_path = source.base
    model = auto.from_config(shape, dtype=torch.float32 if train_all else dtype)
    stored = 0.0
    linear = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n}
    for p in model.parameters():
        if quantize != "none" and id(p) in linear:
            stored += STORED[quantize] * p.numel()
            continue
        if quantize != "none" and lora is not None:
            p.data = p.data.float()  # as peft prepares a quantised base for training
        stored += p.numel() * p.element_size()
    if lora is not None and lora.rank > 0:
        before = {id(p) for p in model.parameters()}
        if source.adapter is not None:
            settings, _ = adapter_settings(model, source.adapter, task)
            refuse_other_lora(settings, lora, source.adapter)
            settings.inference_mode = False
            model = get_peft_model(model, settings)
        else:
            model = add_lora(model, task, lora, text, train_embeddings=new_tokens, base=source.base)
        stored += sum(4.0 * p.numel() for p in model.parameters() if id(p) not in before)
    inner = base_model(model)
    if optim.packing:
        use_packed_attention(inner)
    use_fast_lora(inner)
    if chosen_kernels(optim.kernels, current_device(), shape.model_type) != "plain":
        # The forms for CPUs: liger-kernel's keep the same, and do not take tensors without storage.
        use_fast_layers(inner, torch.device("cpu"))
    inner.config.use_cache = False
    return model, stored


def _module(
    config: StageConfig,
    loaded: LoadedModel,
    found: Estimate,
    dtype: torch.dtype,
    stored: float,
) -> nn.Module:
    """The module that trains; notes the weights of all models that are held beside it."""
    source, text = loaded.source, loaded.text
    what = f"{source.path}, {_billions(loaded.model)}"
    checkpointing = config.optim.gradient_checkpointing
    if checkpointing:
        base_model(loaded.model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not isinstance(config, PpoConfig):
        name = "the reward model" if config.stage == "rm" else "the model"
        found.held[f"weights of {name} ({what})"] = stored
        found.models.append(f"{name} with its adapter" if loaded.is_lora else name)
        return RewardModel(loaded.model) if config.stage == "rm" else LanguageModel(loaded.model)
    ppo = config.ppo
    found.held[f"weights of the policy ({what})"] = stored
    found.models.append("the policy (an adapter on its base)" if loaded.is_lora else "the policy")
    if not loaded.is_lora:
        wide = 4 * sum(p.numel() for p in loaded.model.parameters())
        copied = as_multiplied(loaded.model, dtype).values()
        found.held["weights of the reference, a copy"] = float(
            wide - sum((4 - dtype.itemsize) * p.numel() for p in copied)
        )
        found.models.append("the reference (a frozen copy)")
    elif source.adapter is not None:
        found.held["weights of the reference adapter"] = float(_files(source.adapter))
        found.models.append("the reference (the adapter it starts from, on the same base)")
    else:
        found.models.append("the reference (the base without the adapter)")
    on_base: list[str] = []  # the reward models' adapters beside the policy
    alike: list[ModelSource] = []  # reward models that a value model could start as
    for spec in map(parse_reward, ppo.reward):
        if spec.kind != "model":
            found.models.append(f"reward {spec.label}: no model here")
            continue
        judge = open_model(spec.name)
        stored_as = judge.record.get("quantize", "none")
        if fits_on(loaded, judge) and stored_as == loaded.quantize:
            found.held[f"weights of the reward adapter {spec.name}"] = float(_files(str(judge.adapter)))
            found.models.append(f"reward {spec.name} (an adapter on the policy's base)")
            on_base.append(str(judge.adapter))
            alike.append(judge)
            continue
        _, size = _shell(judge, text, "reward", None, dtype, stored_as, config.optim)
        size += _files(judge.adapter) if judge.adapter else 0
        found.held[f"weights of the reward model {spec.name}"] = size
        found.models.append(f"reward {spec.name} (a model of its own)")
        if all(judge.config.get(name) == source.config.get(name) for name in ("vocab_size", "hidden_size")):
            alike.append(judge)
    if ppo.advantage != "gae":
        return PolicyModel(loaded.model, None, entropy_gradient=ppo.entropy_coef > 0)
    value: str | nn.Module = ppo.value_model
    if ppo.value_model == "shared":
        found.models.append("the value function (a head on the policy)")
    elif ppo.value_model == "adapter":
        for folder in on_base[:1]:
            add_frozen_shape(loaded.model, folder, REWARD)
        add_value_adapter(loaded.model, REWARD if on_base else POLICY)
        adapter = sum(p.numel() for n, p in loaded.model.named_parameters() if ".value." in n)
        found.held["weights of the value adapter"] = 4.0 * adapter
        found.models.append("the value function (an adapter on the policy's base)")
    else:
        fresh, size = _shell(
            alike[0] if alike else source, text, "causal", LoraConfig(), torch.float32, "none", config.optim
        )
        if checkpointing:
            fresh.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        value = backbone(fresh)
        found.held["weights of the value model"] = size
        found.models.append("the value function (a model of its own)")
    return PolicyModel(loaded.model, value, entropy_gradient=ppo.entropy_coef > 0)


def _largest(config: StageConfig, rows: Sequence[Any], device: torch.device, copies: int = 1) -> tuple[Any, int]:
    """The largest micro-batch of the first steps, as the stage would make it, and its tokens; or it several times."""
    precision = resolve_precision(config.model.precision, device)
    limit = config.optim.micro_batch_tokens or default_micro_batch_tokens(device, config.stage, precision)
    groups: list[list[Any]] = []
    if isinstance(config, PpoConfig):
        for minibatch in islice(_minibatches(config, rows), STEPS_LOOKED_AT):
            groups += by_tokens(minibatch, limit)
        best = max(groups, key=_episode_tokens)
        return collate_episodes(best * copies, torch.device("cpu")), _episode_tokens(best)
    order = BatchOrder(len(rows), config.optim.batch_size, config.run.seed)
    steps = min(STEPS_LOOKED_AT, order.total_steps(config.optim.epochs, config.optim.max_steps))
    for step in range(1, steps + 1):
        batch = [rows[i] for i in order.batch(step)]
        if config.stage == "rm":
            trees = [_tree(row) for row in batch]
            grouped = group_by_tokens([(len(t), t.rows, t.longest) for t in trees], limit)
            groups += [[trees[i] for i in group] for group in grouped]
        else:
            groups += micro_batches(batch, limit)
    best = max(groups, key=lambda group: sum(map(len, group)))
    tokens = sum(map(len, best))
    if config.stage == "rm":
        return collate_conversations(best * copies, torch.device("cpu")), tokens
    return collate(best * copies), tokens


def _minibatches(config: PpoConfig, rows: Sequence[PromptRow]) -> Iterator[list[Episode]]:
    """One of the longest prompts, which may come late, and then those of the first passes over each rollout, as if
    every answer were as long as it may be. The longest alone may be cut into micro-batches that are half empty.
    """
    samples, size = config.ppo.samples_per_prompt, config.minibatch_size
    answer = [0] * config.ppo.max_new_tokens

    def episodes(prompts: Sequence[PromptRow]) -> list[Episode]:
        return [Episode(i, prompts[i // samples], answer, True, "") for i in range(len(prompts) * samples)]

    yield episodes(sorted(rows, key=lambda row: -len(row.prompt))[:size])[:size]
    per_step = config.ppo.rollout_size // samples
    for step, sampled in enumerate(rollout_sizes(config, len(rows)), start=1):
        places = prompts_of_step(len(rows), per_step, config.run.seed, step)
        rollout = episodes([rows[i] for i in places[: sampled // samples]])
        order = np.random.default_rng((config.run.seed, step, 1)).permutation(sampled)
        for start in range(0, sampled, size):
            yield [rollout[i] for i in order[start : start + size]]


def _tree(row: PairRow) -> Tree:
    return Tree(row.prompt, row.answers)


def _episode_tokens(group: Sequence[Episode]) -> int:
    prompts = {e.prompt.prompt.tobytes(): len(e.prompt.prompt) for e in group}
    return sum(prompts.values()) + sum(len(e.response) for e in group)


def _kept(mode: FakeTensorMode, module: nn.Module, batch: Any, dtype: torch.dtype, config: StageConfig) -> float:
    """Bytes that a forward pass keeps for its backward pass, weights aside."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage gets its number
        return tensor

    batch = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t, batch)
    arguments = batch if config.stage == "rm" else (batch,)
    narrow = dtype != torch.float32
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", dtype, enabled=narrow):
        module(*arguments)
    return float(sum(storage.nbytes() for number, storage in kept.items() if number not in own))


def _rollout(
    found: Estimate,
    config: PpoConfig,
    shape: Any,
    rows: Sequence[PromptRow],
    held_out: Sequence[PromptRow],
    dtype: torch.dtype,
    widest: int,
) -> None:
    ppo = config.ppo
    found.answers = min(ROLLOUT_BATCH, max(rollout_sizes(config, len(rows))[0], len(held_out) * ppo.eval_samples))
    prompt = max(len(row.prompt) for row in (*rows, *held_out))
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    keys = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    per_token = 2 * shape.num_hidden_layers * keys * head * dtype.itemsize
    cache = per_token * (prompt + ppo.max_new_tokens)
    prefill = PREFILL_PER_TOKEN * widest * prompt / ppo.samples_per_prompt
    found.per_answer = cache + DRAWING * shape.vocab_size + prefill
    found.rollout[f"keys and values of {found.answers} answers"] = cache * found.answers
    found.rollout["reading the prompts"] = prefill * found.answers
    found.rollout["drawing tokens"] = float(DRAWING * shape.vocab_size * found.answers)


def available_memory(device: torch.device) -> float:
    """Bytes that a run on the device can have."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
    # A container may have less than its machine.
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        free = min(free, float(limit) - float(used) + psutil.Process().memory_info().rss)
    except (OSError, ValueError):  # no such limit ("max" is no number)
        pass
    return free


def _files(path: str) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))


def _billions(model: nn.Module) -> str:
    _, total = parameter_counts(model)
    return f"{total / 1e9:.2f} billion" if total >= 1e8 else f"{total / 1e6:.1f} million"
