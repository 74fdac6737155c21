"""Proximal policy optimisation on a language model, for one GPU or one CPU.

Each step: prompts -> n sampled answers each -> scores -> KL to the reference -> advantages -> epochs of clipped
updates. Schulman et al. 2017 (PPO); Ziegler et al. 2019 and Ouyang et al. 2022 (on language models); Huang et al. 2024
(the details that matter).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rlhfkit.algo.advantages import gae, grpo, moments, rloo, whiten
from rlhfkit.algo.kl import KlController, kl_estimate
from rlhfkit.algo.losses import policy_loss, value_loss
from rlhfkit.algo.rewards import RunningMoments, apply_missing_eos_penalty, token_rewards
from rlhfkit.chat.messages import last_user_text
from rlhfkit.config.stages import PpoConfig
from rlhfkit.data.batch import TokenBatch, share
from rlhfkit.data.tokenize import PromptRow
from rlhfkit.errors import CheckpointError, ConfigError, NonFiniteError
from rlhfkit.models.adapters import VALUE
from rlhfkit.models.reward_sources import WeightedReward, check_rewards, open_functions
from rlhfkit.models.sampling import SamplingSettings
from rlhfkit.models.save import save_model
from rlhfkit.models.wrappers import PolicyOutput
from rlhfkit.runtime.optim import Optimisation, StepResult
from rlhfkit.runtime.run import Run, StageResult
from rlhfkit.runtime.start import finished_result, start_run
from rlhfkit.stages.common import columns_of, fit_length, load_for_training, load_rewards, open_text_side, read_rows
from rlhfkit.stages.episodes import (
    Episode,
    Rollout,
    by_tokens,
    collate_episodes,
    look_back,
    sample_episodes,
    score_episodes,
    stack,
)
from rlhfkit.stages.ppo_models import held, load_policy, load_reference, reward_models

SHOWN = ("reward_mean", "kl", "response_tokens", "eos_rate", "loss", "eval_reward_mean")
ROLLOUT_BATCH = 64  # answers sampled together; the cache of keys and values grows with it
SAMPLES = 8  # episodes written to samples.jsonl at each evaluation
EVALUATION = 2**30  # evaluation rollouts have this in place of the step in their seed: always the same noise


class Targets(NamedTuple):
    """What the update aims at; all [E, T]."""

    advantages: Tensor
    returns: Tensor


class UpdateBatch(NamedTuple):
    """A micro-batch of episodes for the update; [N] are answer tokens in the order of the batch's positions."""

    tokens: TokenBatch
    old_logprobs: Tensor  # [N]
    ref_logprobs: Tensor  # [N]
    old_values: Tensor  # [N]
    advantages: Tensor  # [N]
    returns: Tensor  # [N]
    rows: Tensor  # [N] episode of the token


def run(config: PpoConfig) -> StageResult:
    """Train; see the module's first lines. ``final/`` holds the policy, ``value/`` its value function."""
    config = fit_length(config)
    if (done := finished_result(config)) is not None:
        return done
    run = start_run(config)
    ppo = config.ppo
    if run.sharded and not run.accelerator.is_fsdp2:
        raise ConfigError(
            "PPO gathers sharded weights for its rollouts, which is built for FSDP2 alone",
            hint="launch it with FSDP2 (docs/distributed.md) or with plain data parallelism (DDP)",
        )
    if config.minibatch_size < run.world:
        raise ConfigError(
            f"optim.batch_size: {config.minibatch_size} episodes per optimiser step for {run.world} processes",
            hint=f"give --batch-size {run.world} or more",
        )

    # 1. Prompts.
    check_rewards(ppo.reward, ppo.reward_timeout)
    source, text = open_text_side(config)
    rows, digest, faults = read_rows(config, config.data.train, text, run.screen, "training")
    held_out, _, more = read_rows(config, config.data.eval, text, run.screen, "held out")
    run.note_data(digest, faults + more)

    # 2. Policy, reference, value function, rewards.
    columns = columns_of((*rows, *held_out))
    functions = open_functions(ppo.reward, columns)
    loaded = load_for_training(config, run, source, text, "causal")
    reference = load_reference(loaded, run)
    reward = load_rewards(config, ppo, run, columns, functions, policy=loaded)
    policy = load_policy(config, run, loaded, reward)
    run.screen.line(f"models held: {held(loaded, policy, reward)}")
    run.screen.line(f"rewards: {reward.described}")
    settings = SamplingSettings(ppo.max_new_tokens, ppo.temperature, text.tokens.stop_ids, vocabulary=text.vocabulary)

    # 3. Optimiser and the state that a resume needs.
    per_step = ppo.rollout_size // ppo.samples_per_prompt  # prompts
    sizes = rollout_sizes(config, len(rows))
    total = len(sizes)
    shown = (*SHOWN, *(f"reward/{name}" for name in reward.names if len(reward.names) > 1))
    minibatches = sum(-(-size // config.minibatch_size) for size in sizes)
    update = Optimisation(run.accelerator, policy, config.optim, minibatches * ppo.ppo_epochs)
    controller = KlController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
    running = RunningMoments()
    said_cut = False

    def state() -> dict[str, Any]:
        return {**update.state_dict(), "kl_coef": controller.coef, "running": vars(running)}

    def load_state(stored: dict[str, Any]) -> None:
        update.load_state_dict(stored)
        controller.coef = stored["kl_coef"]
        vars(running).update(stored["running"])

    run.begin(load_state)

    def roll_out(
        prompts: Sequence[PromptRow], samples: int, step: int, seed: tuple[int, ...]
    ) -> tuple[Rollout, dict[str, float]]:
        """Sample, score and look back; processes share the work by prompt and exchange the results."""
        started = time.perf_counter()
        indexed = [(i * samples + k, row) for i, row in enumerate(prompts) for k in range(samples)]
        mine = [item for item in indexed if item[0] // samples % run.world == run.rank]
        policy.eval()
        with update.whole_weights():
            episodes = sample_episodes(
                loaded.model, mine, text, settings, seed=seed, batch_size=ROLLOUT_BATCH, autocast=run.autocast
            )
            sampled = time.perf_counter()
            score_episodes(episodes, reward)
            look_back(
                episodes,
                policy,
                reference,
                settings,
                device=run.device,
                micro_batch_tokens=run.scoring_tokens,
                autocast=run.autocast,
            )
        everyone = gather_object(episodes) if run.world > 1 else episodes
        rollout = stack(sorted(everyone, key=lambda e: e.index), run.device)
        _refuse_not_finite(rollout, run, step)
        nonlocal said_cut
        said_cut = said_cut or _say_cut(rollout, reward, run)
        scored = time.perf_counter()
        return rollout, {"seconds_rollout": sampled - started, "seconds_score": scored - sampled}

    def evaluate() -> dict[str, Any]:
        if not held_out:
            return {}
        rollout, _ = roll_out(held_out, ppo.eval_samples, run.step, (config.run.seed, EVALUATION))
        run.samples([_sample(e) for e in rollout.episodes[:: ppo.eval_samples][:SAMPLES]])
        return {f"eval_{name}": value for name, value in _describe(rollout).items()}

    run.evaluate_first(evaluate, total, shown=SHOWN)

    # 4. The loop.
    with run.steps("ppo", total) as steps:
        for step in steps:
            size = sizes[step - 1]
            places = prompts_of_step(len(rows), per_step, config.run.seed, step)
            prompts = [rows[i] for i in places[: size // ppo.samples_per_prompt]]
            rollout, seconds = roll_out(prompts, ppo.samples_per_prompt, step, (config.run.seed, step))
            scores = _shape_scores(rollout, config, running)
            targets = _targets(rollout, scores, controller.coef, config)
            started = time.perf_counter()
            lr, kl_coef = update.lr, controller.coef
            measured = _update(rollout, targets, update, config, run, settings, step, kl_coef)
            metrics = {
                **measured,
                "lr": lr,
                "tokens": int(rollout.mask.sum()),
                "episodes": sum(sizes[:step]),
                **_describe(rollout),
                "kl_coef": kl_coef,
                "value_explained_variance": _explained_variance(rollout, targets) if ppo.advantage == "gae" else None,
                **seconds,
                "seconds_update": time.perf_counter() - started,
            }
            controller.update(metrics["kl"], size)
            run.histogram("rewards", rollout.scores.tolist(), step)
            run.finish_step(step, total, metrics, shown=shown, state=state, evaluate=evaluate)

    # 5. The result.
    _save_value(update.module, run)
    return run.finish(lambda folder: save_model(folder, run.accelerator, update.module, loaded, "ppo", {}))


# -- the update --------------------------------------------------------------------------------------------------------


def _update(
    rollout: Rollout,
    targets: Targets,
    update: Optimisation,
    config: PpoConfig,
    run: Run,
    settings: SamplingSettings,
    step: int,
    kl_coef: float,
) -> dict[str, Any]:
    """Epochs of minibatches over one rollout; means over everything that was done, zeros where nothing was."""
    ppo = config.ppo
    names = ("policy_loss", "value_loss", "clip_fraction", "ratio_mean", "entropy", "approx_kl")
    totals = dict.fromkeys(names, 0.0)
    results: list[StepResult] = []
    shuffled = np.random.default_rng((config.run.seed, step, 1))
    update.module.train()
    ratio_first = None
    passes = looked_at = 0
    starts = range(config.minibatch_size, len(rollout.episodes), config.minibatch_size)  # of all but the first
    while passes < ppo.ppo_epochs:
        passes += 1
        with_entropy = passes == 1 or ppo.entropy_coef > 0  # of the policy that sampled, and where it is in the loss
        order = shuffled.permutation(len(rollout.episodes))
        kl_of_epoch = []
        for minibatch in np.split(order, starts):
            tokens = int(rollout.mask[torch.as_tensor(minibatch, device=rollout.mask.device)].sum())
            if not tokens:  # all of its answers are empty: there is nothing to learn from, and no step to take
                continue
            mine = share(minibatch.tolist(), run.rank, run.world)
            micro_batches = [
                _gather(rollout, targets, group, run.device)
                for group in by_tokens([rollout.episodes[i] for i in mine], run.micro_batch_tokens)
            ]
            seen: list[tuple[Tensor, Tensor]] = []  # of each pass: loss per token, sums of what is measured

            def loss_of(
                micro: UpdateBatch,
                n: int = tokens,
                seen: list[tuple[Tensor, Tensor]] = seen,
                first: bool = not results,
                with_entropy: bool = with_entropy,
            ) -> Tensor:
                out: PolicyOutput = update.module(
                    micro.tokens, settings.temperature, settings.vocabulary, with_entropy=with_entropy
                )
                # Before the first step the policy is the one that sampled. Its ratio is 1, and not 1 up to the rounding
                # of two passes that were packed differently.
                old_logprobs = out.logprobs.detach() if first else micro.old_logprobs
                policy = policy_loss(out.logprobs, old_logprobs, micro.advantages, ppo.cliprange)
                loss, value = policy.loss, torch.zeros_like(policy.loss)
                if ppo.advantage == "gae":
                    value = value_loss(out.values, micro.old_values, micro.returns, ppo.value_cliprange)
                    loss = loss + ppo.value_coef * value
                if ppo.advantage == "grpo":  # there the KL is part of the loss, not of the reward
                    loss = loss + kl_coef * kl_estimate(out.logprobs, micro.ref_logprobs, config.kl_estimator)
                if ppo.entropy_coef:
                    loss = loss - ppo.entropy_coef * out.entropy
                with torch.no_grad():
                    moved = kl_estimate(micro.old_logprobs, out.logprobs, "k3")
                    of_tokens = (policy.loss, value, policy.clipped, policy.ratio, out.entropy, moved)
                    seen.append((loss.detach(), torch.stack([x.float().sum() for x in of_tokens])))
                return loss.sum() / n

            spare = _gather(rollout, targets, [rollout.episodes[int(minibatch[0])]], run.device)
            result = update.step(micro_batches, loss_of, spare)
            del seen[len(micro_batches) :]  # passes over the spare
            if not math.isfinite(result.loss):
                found = [m.rows[~loss.isfinite()] for m, (loss, _) in zip(micro_batches, seen, strict=True)]
                raise _not_finite("the loss", rollout, [i for rows in found for i in rows.tolist()], run, step)
            if not math.isfinite(result.grad_norm) and run.precision != "fp16":  # whose loss scaler skips such steps
                raise _not_finite("the gradient", rollout, minibatch.tolist(), run, step)
            sums = torch.stack([s for _, s in seen]).sum(dim=0).tolist() if seen else [0.0] * len(names)
            means = [v / tokens for v in run.sum_over_processes(sums)]
            for name, mean in zip(names, means, strict=True):
                totals[name] += mean
            ratio_first = means[3] if ratio_first is None else ratio_first
            kl_of_epoch.append(means[5])
            looked_at += with_entropy
            results.append(result)
        if ppo.early_stop_kl and kl_of_epoch and np.mean(kl_of_epoch) > ppo.early_stop_kl:
            break
    # Steps that were planned and not taken have their place in the learning rate's course.
    update.pass_over(ppo.ppo_epochs * (len(starts) + 1) - len(results))
    count = max(1, len(results))
    return {
        "loss": sum(r.loss for r in results) / count,
        "grad_norm": sum(r.grad_norm for r in results) / count,
        **{name: total / count for name, total in totals.items()},
        "entropy": totals["entropy"] / max(1, looked_at),
        "ratio_first": ratio_first,
        "ppo_epochs": passes,
    }


def _refuse_not_finite(rollout: Rollout, run: Run, step: int) -> None:
    """Stop before such numbers reach the weights."""
    for what, values in (
        ("the policy's log-probability", rollout.logprobs),
        ("the reference's log-probability", rollout.ref_logprobs),
        ("the value", rollout.values),
        ("the score", rollout.scores[:, None]),
    ):
        if bad := (~values.isfinite()).any(dim=1).nonzero().flatten().tolist():
            raise _not_finite(what, rollout, bad, run, step)


def _not_finite(what: str, rollout: Rollout, rows: Sequence[int], run: Run, step: int) -> NonFiniteError:
    """The error that names the prompts of these episodes, wherever they were computed."""
    everywhere = gather_object(list(rows)) if run.world > 1 else rows
    places = sorted({rollout.episodes[i].prompt.record.where for i in everywhere})
    return run.not_finite(what, step, places)


def _gather(rollout: Rollout, targets: Targets, episodes: Sequence[Episode], device: torch.device) -> UpdateBatch:
    """Some episodes, with what was found out about each of their answer tokens."""
    rows = torch.tensor([e.index for e in episodes], device=device)
    mask = rollout.mask[rows]

    def flat(values: Tensor) -> Tensor:
        return values[rows][mask]

    return UpdateBatch(
        collate_episodes(episodes, device),
        flat(rollout.logprobs),
        flat(rollout.ref_logprobs),
        flat(rollout.values),
        flat(targets.advantages),
        flat(targets.returns),
        rows[:, None].expand_as(mask)[mask],
    )


def _shape_scores(rollout: Rollout, config: PpoConfig, running: RunningMoments) -> Tensor:
    """Scores [E] as the update sees them: normalised, clipped, and less where an answer was cut off."""
    ppo, scores = config.ppo, rollout.scores
    if ppo.reward_normalize:
        running.update(scores)
        # Scores that are all alike (a fresh reward, a rule that nothing meets yet) have no scale to divide by.
        scores = scores / running.std if running.std > 1e-6 else scores
    if ppo.reward_clip:
        scores = scores.clamp(-ppo.reward_clip, ppo.reward_clip)
    return apply_missing_eos_penalty(scores, rollout.ended, ppo.missing_eos_penalty)


def _targets(rollout: Rollout, scores: Tensor, kl_coef: float, config: PpoConfig) -> Targets:
    """Advantages and returns of a rollout, whitened over all of it."""
    ppo, mask = config.ppo, rollout.mask
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, config.kl_estimator) * mask
    if ppo.advantage == "gae":
        rewards = token_rewards(scores, kl, mask, kl_coef)
        found = gae(rewards, rollout.values, mask, gamma=ppo.gamma, lam=ppo.lam)
        advantages = found.advantages
        if ppo.whiten_advantages:
            advantages = whiten(advantages, mask, moments(advantages, mask))
        return Targets(advantages, found.returns)
    if ppo.advantage == "rloo":
        per_answer = rloo(scores - kl_coef * kl.sum(dim=1), ppo.samples_per_prompt)
    else:
        per_answer = grpo(scores, ppo.samples_per_prompt)
    return Targets(per_answer[:, None] * mask, torch.zeros_like(kl))


def rollout_sizes(config: PpoConfig, rows: int) -> list[int]:
    """How many episodes each step samples, of so many prompts: the last takes what is left."""
    ppo = config.ppo
    wanted = ppo.episodes or max(1, round(config.optim.epochs * rows)) * ppo.samples_per_prompt
    sizes = [min(ppo.rollout_size, wanted - done) for done in range(0, wanted, ppo.rollout_size)]
    return sizes[: config.optim.max_steps or None]


def prompts_of_step(count: int, per_step: int, seed: int, step: int) -> list[int]:
    """Indices of the prompts of a step: shuffled epochs laid end to end, a pure function of seed and step."""
    places = [divmod(place, count) for place in range((step - 1) * per_step, step * per_step)]
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in {e for e, _ in places}}
    return [int(orders[epoch][within]) for epoch, within in places]


# -- records ----------------------------------------------------------------------------------------------------------


def _save_value(module: Any, run: Run) -> None:
    """The value function, in a folder of its own: other loaders would stumble over it beside the policy."""
    state = run.accelerator.get_state_dict(module)
    values = {
        k: v.contiguous()
        for k, v in state.items()
        if k.startswith(("value_head", "value_trunk")) or f".{VALUE}." in f"{k}."
    }
    if run.is_main and values:
        folder = run.out / "value"
        try:
            folder.mkdir(exist_ok=True)
            save_file(values, folder / "value.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the value function could not be written to {folder}: {error}",
                hint="the last checkpoint is intact; make room and go on with --resume",
            ) from error


def _say_cut(rollout: Rollout, reward: WeightedReward, run: Run) -> bool:
    """Tell of conversations that a reward model did not see whole; returns whether there were any."""
    if cut := sum(bool(e.cut) for e in rollout.episodes):
        limit = min(scorer.max_length for _, scorer in reward_models(reward))
        run.screen.line(
            f"note: {cut} of {len(rollout.episodes)} conversations are longer than the {limit} tokens that the reward "
            "model reads, and lost the beginning of their prompt (reward_cut goes on counting)"
        )
    return cut > 0


def _describe(rollout: Rollout) -> dict[str, float]:
    """What a rollout was like: plain scores, KL to the reference per answer in nats (k1, the unbiased one), lengths."""
    kl = (kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1") * rollout.mask).sum(dim=1)
    found = {
        "reward_mean": float(rollout.scores.mean()),
        "reward_std": float(rollout.scores.std(correction=0)),
        "kl": float(kl.mean()),
        "response_tokens": float(rollout.mask.sum(dim=1).float().mean()),
        "eos_rate": float(rollout.ended.float().mean()),
    }
    for name in rollout.episodes[0].components:
        found[f"reward/{name}"] = sum(e.components[name] for e in rollout.episodes) / len(rollout.episodes)
    if rollout.episodes[0].cut is not None:
        found["reward_cut"] = sum(bool(e.cut) for e in rollout.episodes) / len(rollout.episodes)
    return found


def _explained_variance(rollout: Rollout, targets: Targets) -> float:
    """1 - Var(return - value) / Var(return): 1 is a perfect value function, 0 one that says the mean."""
    returns, values = targets.returns[rollout.mask], rollout.values[rollout.mask]
    variance = float(returns.var(correction=0)) if returns.numel() else 0.0
    return 1.0 - float((returns - values).var(correction=0)) / variance if variance > 0 else 0.0


def _sample(episode: Episode) -> dict[str, Any]:
    return {
        "prompt": last_user_text(episode.prompt.record.prompt),
        "answer": episode.text,
        "reward": episode.score,
        "ended": episode.ended,
    }
