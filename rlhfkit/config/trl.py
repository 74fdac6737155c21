"""The blocks of what runs on TRL, and what TRL leaves without effect, each with the reason."""

from __future__ import annotations

from typing import Literal

from rlhfkit.config.blocks import Block, OptimConfig, PpoOptimConfig, RolloutBlock, option

Engine = Literal["rlhfkit", "trl"]

PADS = "TRL computes padded rows: there is nothing to pack"
NO_PLAN = "what a run on TRL holds is not known beforehand; what rlhfkit sft, rm and ppo hold is"
WHOLE_DISTRIBUTION = (
    "answers are sampled from the whole distribution: one drawn from a part of it would be scored with probabilities "
    "it was not drawn with; use {0}.temperature"
)
ONE_UPDATE = (
    "each batch of answers is used for one optimiser step, so that a resumed run equals an unbroken one; rlhfkit ppo "
    "--advantage {0} makes several passes over a rollout"
)
NO_CLIPPING = "with one step for each batch of answers the probability ratio is 1: there is nothing to clip"
NO_VALUE = "{0} compares the answers to a prompt and has no value function; rlhfkit ppo has one"


REFUSED = {"optim.packing": PADS, "run.plan": NO_PLAN}


def refused_online(stage: str) -> dict[str, str]:
    """Keys of PPO that GRPO and RLOO of TRL have no use for, and why."""
    why = {
        "rollout_size": "the answers of a step are optim.batch_size",
        "kl_target": "TRL's KL weight is fixed: kl_coef; rlhfkit ppo adapts it",
        "kl_estimator": "TRL has one estimator: k3 in grpo's loss, k1 in rloo's reward; rlhfkit ppo lets you choose",
        "reward_clip": "TRL does not clip rewards; let the reward do it, or use rlhfkit ppo",
        "entropy_coef": "the entropy bonus is not passed on to TRL; rlhfkit ppo has one",
        "advantage": f"the estimator is {stage}'s own",
        **dict.fromkeys(("top_p", "top_k"), WHOLE_DISTRIBUTION),
        **dict.fromkeys(("ppo_epochs", "minibatches"), ONE_UPDATE),
        **dict.fromkeys(("cliprange",), NO_CLIPPING),
        **dict.fromkeys(("value_cliprange", "value_coef", "value_model", "gamma", "lam"), NO_VALUE),
    }
    return {**REFUSED, **{f"{stage}.{name}": reason.format(stage) for name, reason in why.items()}}


class PreferenceOptimConfig(OptimConfig):
    """The same with small steps: the policy starts where its reference is, and should stay near it."""

    lr: float = option(1e-6, "Peak learning rate.", flag="--lr", gt=0, le=1)


class OnlineOptimConfig(PpoOptimConfig):
    """The same for a step on answers that were sampled for it."""

    batch_size: int = option(64, "Answers per optimiser step.", flag="--batch-size", ge=1)


class DpoBlock(Block):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = option(0.1, "How strongly the policy is held at its reference.", flag="--beta", gt=0)
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = option(
        "sigmoid", "Loss of a pair; robust takes a share of pairs to be ranked the wrong way round.", flag="--loss"
    )
    label_smoothing: float = option(
        0.0,
        "Share of pairs that robust takes to be ranked the wrong way round.",
        flag="--label-smoothing",
        ge=0,
        lt=0.5,
    )
    sft_coef: float = option(
        0.0, "Weight of the cross-entropy of the chosen answer beside the pair's loss.", flag="--sft-coef", ge=0
    )


class KtoBlock(Block):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024): answers that are desirable or not, without pairs."""

    beta: float = option(0.1, "How strongly the policy is held at its reference.", flag="--beta", gt=0)
    desirable_weight: float = option(
        1.0, "Weight of desirable answers, against unequal numbers.", flag="--desirable-weight", gt=0
    )
    undesirable_weight: float = option(
        1.0, "Weight of undesirable answers, against unequal numbers.", flag="--undesirable-weight", gt=0
    )


class OnlineBlock(RolloutBlock):
    """What GRPO and RLOO have in common: several answers to each prompt, compared by their rewards."""

    samples_per_prompt: int = option(8, "Answers sampled to each prompt.", flag="--samples-per-prompt", ge=2)


class GrpoBlock(OnlineBlock):
    """Group relative policy optimisation (Shao et al. 2024), with TRL's loss over all tokens of a batch (DAPO)."""

    kl_coef: float = option(
        0.0, "Weight of the KL to the reference in the loss; 0 holds no reference.", flag="--kl-coef", ge=0
    )


class RlooBlock(OnlineBlock):
    """REINFORCE with the other answers to a prompt as its baseline (Ahmadian et al. 2024)."""

    kl_coef: float = option(
        0.05, "Weight of the KL to the reference in the reward; 0 holds no reference.", flag="--kl-coef", ge=0
    )
