"""What in a run's figures deserves a look, in words. The signs are those of docs/troubleshooting.md."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median

from rlhfkit.report.runs import RunRecord

CLIPPED = 0.9  # share of steps at which gradients were cut
SPIKE = 20.0  # times the median gradient norm
OVERFIT = 1.05  # times the lowest evaluation loss


def findings(run: RunRecord) -> list[str]:
    """Sentences, most important first; none where nothing stands out."""
    if not run.steps:
        return ["no step was finished", *run.data_faults]
    return [*_course(run), *{"sft": _sft, "rm": _rm, "ppo": _ppo}.get(run.stage, _nothing)(run), *run.data_faults]


def _nothing(run: RunRecord) -> Iterator[str]:
    yield from ()


def _course(run: RunRecord) -> Iterator[str]:
    if run.end is None:
        yield (
            f"the run is not finished: its last step is {run.steps[-1]['step']}. Go on with: "
            f"rlhfkit {run.stage} --config {run.folder}/config.resolved.yaml --resume"
        )
    elif run.end.get("resumed_from"):
        yield f"the run was resumed from step {run.end['resumed_from']}"
    norms = run.values("grad_norm")
    limit = run.setting("optim.max_grad_norm")
    if norms and limit:
        share = sum(norm > limit for norm in norms) / len(norms)
        if share >= CLIPPED:
            yield (
                f"gradients were clipped to {limit:g} at {share:.0%} of the steps (median norm {median(norms):.3g}): "
                "their direction alone counted"
            )
    if len(norms) >= 20 and max(norms) > SPIKE * median(norms):
        step = run.steps[norms.index(max(norms))]["step"]
        yield f"the gradient norm jumped to {max(norms):.3g} at step {step}, median {median(norms):.3g}"


def _sft(run: RunRecord) -> Iterator[str]:
    steps, losses = run.series("eval_loss")
    if len(losses) > 2 and losses[-1] > OVERFIT * min(losses):
        best = int(steps[losses.index(min(losses))])
        yield (
            f"the held-out loss rose from {min(losses):.3f} at step {best} to {losses[-1]:.3f}: "
            "fewer --epochs or a lower --lr would do better"
        )


def _rm(run: RunRecord) -> Iterator[str]:
    held_out = run.values("eval_accuracy")
    training = run.values("accuracy")
    if held_out and held_out[-1] < 0.55:
        yield (
            f"held-out accuracy is {held_out[-1]:.1%}, hardly better than a coin: see whether chosen and rejected "
            "differ in more than noise, or raise --lr or --epochs"
        )
    last = fmean(training[-max(1, len(training) // 4) :]) if training else 0.0
    if held_out and last - held_out[-1] > 0.2:
        yield f"training accuracy {last:.1%} is far above held-out {held_out[-1]:.1%}: the pairs are learned by heart"


def _ppo(run: RunRecord) -> Iterator[str]:
    tail = slice(-max(1, len(run.steps) // 4), None)

    def late(key: str) -> float | None:
        values = run.values(key)[tail]
        return fmean(values) if values else None

    kl, target = late("kl"), run.setting("ppo.kl_target")
    if kl is not None and kl < -0.05:
        yield f"KL is {kl:.2f} nats on average over the last steps; sampling noise has mean 0. Try --precision fp32"
    if kl is not None and target and kl > 3 * target:
        yield f"KL is {kl:.2f} nats, far above --kl-target {target:g}: lower --lr, or raise --kl-coef"
    if (ended := late("eos_rate")) is not None and ended < 0.1:
        yield (
            f"only {ended:.0%} of the answers ended by themselves: raise --max-new-tokens, train SFT longer, "
            "or give --missing-eos-penalty"
        )
    if (spread := late("reward_std")) is not None and spread < 1e-6:
        yield "all answers get the same reward, which teaches nothing"
    if (clipped := late("clip_fraction")) is not None and clipped > 0.3:
        yield f"{clipped:.0%} of the tokens were clipped: lower --lr or --ppo-epochs"
    if (explained := late("value_explained_variance")) is not None and explained < 0:
        yield (
            f"the value function explains nothing of the returns ({explained:.2f}): raise --value-coef, "
            "or try --value-model separate or --advantage rloo"
        )
    lengths = run.values("response_tokens")
    if len(lengths) >= 4 and fmean(lengths[tail]) < 0.25 * lengths[0]:
        yield (
            f"answers shrank from {lengths[0]:.0f} to {fmean(lengths[tail]):.0f} tokens: read the samples, "
            "the reward may be easy to please"
        )
