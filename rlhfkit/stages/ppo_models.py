"""The models that PPO holds: policy, reference and value function, on one base where they can be.

full weights   a policy, a frozen copy as its reference; reward models beside them
LoRA           one frozen base; policy, reference, reward models trained on it and value function are adapters
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rlhfkit.config.stages import PpoConfig
from rlhfkit.models.adapter_folders import load_frozen_adapter
from rlhfkit.models.adapters import POLICY, REFERENCE, add_value_adapter, checkpoint_contexts
from rlhfkit.models.heads import reward_head
from rlhfkit.models.load import LoadedModel, load_model
from rlhfkit.models.parts import Task, backbone, base_model
from rlhfkit.models.reward_sources import ModelReward, WeightedReward
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.models.wrappers import AdapterRewardModel, PolicyModel
from rlhfkit.runtime.run import Run


def load_reference(loaded: LoadedModel, run: Run) -> PolicyModel | None:
    """The policy as it is now. With adapters it is the base without them, or a frozen copy of the SFT adapter."""
    if loaded.is_lora:
        if loaded.source.adapter is not None:
            load_frozen_adapter(loaded.model, loaded.source.adapter, REFERENCE)
        return None
    frozen = copy.deepcopy(loaded.model, as_multiplied(loaded.model, run.dtype)).requires_grad_(False).eval()
    return PolicyModel(frozen, None).to(run.device)


def as_multiplied(model: nn.Module, dtype: torch.dtype) -> dict[int, nn.Parameter]:
    """For `copy.deepcopy`: weights of linear layers in the format that autocast casts them to, for good.

    Every number stays the policy's. A difference in rounding would be a KL of its own, so what autocast leaves alone
    stays too: norms, embeddings, and a head that is tied to one.
    """
    others = {id(p) for m in model.modules() if type(m) is not nn.Linear for p in m.parameters(recurse=False)}
    linear = [p for m in model.modules() if type(m) is nn.Linear for p in m.parameters(recurse=False)]
    return {id(p): nn.Parameter(p.detach().to(dtype, copy=True)) for p in linear if id(p) not in others}


def load_policy(config: PpoConfig, run: Run, loaded: LoadedModel, reward: WeightedReward) -> PolicyModel:
    """The policy with the value function that ``ppo.value_model`` names; rloo and grpo have none."""
    ppo = config.ppo
    value: str | nn.Module | None = ppo.value_model if ppo.advantage == "gae" else None
    start = None
    if value == "adapter":
        start = _add_value_adapter(config, run, loaded, reward)
    elif value == "separate":
        value, start = _value_model(config, run, loaded, reward)
    policy = PolicyModel(loaded.model, value, entropy_gradient=ppo.entropy_coef > 0)
    if policy.value_head is not None and start is not None:
        with torch.no_grad():
            policy.value_head.weight.copy_(start)
    return policy


def _add_value_adapter(config: PpoConfig, run: Run, loaded: LoadedModel, reward: WeightedReward) -> Tensor | None:
    """A value function on an adapter of its own: starts as the reward model where that is on the same base (Ouyang et
    al. 2022, section 3.5), else as the policy. Returns what its head starts as."""
    start = next(((w, s) for w, s in reward_models(reward) if s.shared), None)
    if start is None:
        add_value_adapter(loaded.model, POLICY)
        head = None
    else:
        module: AdapterRewardModel = start[1].module  # type: ignore[assignment]
        add_value_adapter(loaded.model, module.adapter)
        head = start[0] * module.head.weight
    if config.optim.gradient_checkpointing:
        base_model(loaded.model).gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts(loaded.model)}
        )
    _say_start(run, (start[1].source if start else loaded.source).path)
    return head


def _value_model(
    config: PpoConfig, run: Run, loaded: LoadedModel, reward: WeightedReward
) -> tuple[nn.Module, Tensor | None]:
    """A value function on a trunk of its own: starts as the reward model where that reads the same ids and is as wide,
    else as the policy. Returns the trunk and what its head starts as."""
    width = backbone(loaded.model).config.hidden_size
    like_policy = [
        (weight, scorer)
        for weight, scorer in reward_models(reward)
        if scorer.text.tokenizer.get_vocab() == loaded.text.tokenizer.get_vocab()
        and backbone(scorer.loaded.model).config.hidden_size == width
    ]
    source, text = (like_policy[0][1].source, like_policy[0][1].text) if like_policy else (loaded.source, loaded.text)
    task: Task = "reward" if like_policy else "causal"
    # All its weights train, so they are float32 whatever the policy's base is held in.
    fresh = load_model(
        source,
        text,
        task,
        lora=type(config.lora)(),
        dtype=torch.float32,
        gradient_checkpointing=config.optim.gradient_checkpointing,
        packing=config.optim.packing,
        kernels=config.optim.kernels,
        trust_remote_code=config.model.trust_remote_code,
    )
    _say_start(run, source.path)
    head = like_policy[0][0] * next(reward_head(fresh.model).parameters()).detach() if like_policy else None
    return backbone(fresh.model), head


def reward_models(reward: WeightedReward) -> list[tuple[float, RewardScorer]]:
    """The reward models among the sources, each with its weight."""
    return [(weight, source.scorer) for _, weight, source in reward.sources if isinstance(source, ModelReward)]


def _say_start(run: Run, path: str) -> None:
    run.screen.line(f"value function: starts as {path}")


def held(loaded: LoadedModel, policy: PolicyModel, reward: WeightedReward) -> str:
    """What is in memory, for the screen: a base is named as often as it is held."""
    if loaded.is_lora:
        names = ["policy" if name == POLICY else name for name in loaded.model.peft_config]
        stored = f" in {loaded.quantize}" if loaded.quantize != "none" else ""
        parts = [f"one base{stored} with the adapters {', '.join(names)}"]
        parts += [] if REFERENCE in names else ["the base alone as the reference"]
    else:
        parts = ["the policy", "a frozen copy as the reference"]
    parts += ["a value model"] if policy.value_trunk is not None else []
    for _, scorer in reward_models(reward):
        if not scorer.shared:
            stored = {"none": "16 bits"}.get(scorer.quantize, scorer.quantize)
            why = ""
            if scorer.other_storage:
                why = f" on a base of its own, since it was trained on one in {stored}"
            elif loaded.is_lora and scorer.source.adapter and scorer.source.base == loaded.source.base:
                why = " on a base of its own, since more than LoRA layers trained in it or in the policy"
            parts.append(f"the reward model {scorer.source.path}{why}")
    return "; ".join(parts)
