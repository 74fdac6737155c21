"""Whether one PPO update is TRL 1.12's: its own answers, replayed by ours, in float32.

python benchmarks/ppo_parity.py --model M --data alpaca_en.jsonl --pairs pairs.jsonl --rival-python rival/bin/python

The rival samples a rollout, and takes its optimiser steps. Ours gets the same answers in place of its own. Compared are
scores, log-probabilities, values, advantages and returns of each token, and what the update has added to the weights.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Job, machine, read_jsonl, refuse_if_absent
from ppo import PPO, TRL, own_process, ppo_options, prepare, reward_model, train_rival
from ppo_learning import as_module, model_scores

RIVAL, OURS = "trl-fp32", "rlhfkit-fp32"
OF_TOKENS = ("logprobs", "ref_logprobs", "values", "advantages", "returns")
WEIGHTS = {"policy": "the policy", "value": "the value model"}


def main() -> None:
    parser = ppo_options(__doc__, prompt_tokens=48, answer_tokens=16, out="runs/bench-parity", rows=16, lr=2e-5)
    parser.add_argument("--epochs", type=int, default=1, help="passes over the rollout, each one optimiser step")
    args = parser.parse_args()
    if args.contestant:
        job: Job = json.loads(args.job.read_text())
        PPO["ppo_epochs"] = job["epochs"]
        found = (rival if args.contestant == RIVAL else ours)(job)
        Path(job["result"]).write_text(json.dumps(found))
        return
    args.rows = args.batch_size
    args.out.mkdir(parents=True, exist_ok=True)
    refuse_if_absent(args.rival_python, "trl", TRL)
    prepare(args)
    merged = reward_model(args)[1]
    job = {
        "model": str(args.model), "reward": str(merged), "prompts": str(args.out / "prompt_ids.jsonl"),
        "texts": str(args.out / "prompts.jsonl"), "batch_size": args.batch_size, "micro_batch": args.batch_size,
        "episodes": args.batch_size, "answer_tokens": args.answer_tokens,
        "lr": args.lr, "seed": args.seed, "epochs": args.epochs,
    }  # fmt: skip
    theirs = own_process(args, args.rival_python, RIVAL, {**job, "out": str(args.out / RIVAL)}, script=__file__)[0]
    job |= {"rollout": str(args.out / f"{RIVAL}.json"), "rival": str(args.out / RIVAL), "out": str(args.out / OURS)}
    mine = own_process(args, sys.executable, OURS, job, script=__file__)[0]
    text = table(theirs, mine)
    print(text)
    (args.out / "result.md").write_text(text + "\n", encoding="utf-8")
    (args.out / "result.json").write_text(json.dumps({"machine": machine(), "weights": mine["weights"]}, indent=2))


# -- contestants -------------------------------------------------------------------------------------------------------


def rival(job: Job) -> dict[str, Any]:
    """TRL's rollout and update; its weights before and after stay in the job's folder."""
    from safetensors.torch import save_file
    from trl.experimental.ppo import PPOTrainer, ppo_trainer

    seen: dict[str, list[Any]] = {}

    def watch(name: str, keep: Any) -> None:
        """Note what a function of the trainer's module is given and returns."""
        plain = getattr(ppo_trainer, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            found = plain(*args, **kwargs)
            seen.setdefault(name, []).append(keep(args, found))
            return found

        setattr(ppo_trainer, name, watched)

    watch("batch_generation", lambda args, found: (args[1].clone(), found[0].clone()))
    watch("selective_log_softmax", lambda args, found: found.detach().clone())
    watch("get_reward", lambda args, found: tuple(x.detach().clone() for x in found[:2]))
    watch("masked_whiten", lambda args, found: (args[0].clone(), args[1].clone(), found.clone()))
    folder = Path(job["out"])
    folder.mkdir(parents=True, exist_ok=True)
    plain_train = PPOTrainer.train

    def train(self: Any) -> None:
        def keep(when: str) -> None:
            for name, model in (("policy", self.model.policy), ("value", self.model.value_model)):
                weights = {k: v.detach().clone() for k, v in model.named_parameters()}
                save_file(weights, folder / f"{name}-{when}.safetensors")

        keep("before")
        plain_train(self)
        keep("after")

    PPOTrainer.train = train
    scores = model_scores(job["reward"])
    train_rival(RIVAL, job, lambda tokenizer: as_module(scores, tokenizer))

    queries, both = seen["batch_generation"][0]
    raw, inside, advantages = seen["masked_whiten"][0]
    start = queries.shape[1]
    values = seen["get_reward"][0][0][:, start - 1 : -1].squeeze(-1)
    logprobs, ref_logprobs = seen["selective_log_softmax"][:2]
    of_tokens = (logprobs, ref_logprobs, values, advantages, raw + values)
    rows = []
    for i, query in enumerate(queries.tolist()):
        answer = both[i, start : start + int(inside[i].sum())].tolist()
        rows.append(row_of(i, query, answer, seen["get_reward"][1][1], of_tokens))
    return {"rows": rows}


def row_of(i: int, query: list[int], answer: list[int], scores: Any, of_tokens: Sequence[Any]) -> dict[str, Any]:
    """What was found of one answer: tensors [E] and, in the order of OF_TOKENS, [E, T]."""
    found = {name: x[i, : len(answer)].tolist() for name, x in zip(OF_TOKENS, of_tokens, strict=True)}
    return {"query": query, "answer": answer, "score": float(scores[i]), **found}


def ours(job: Job) -> dict[str, Any]:
    """Our stage, whose sampler returns the rival's answers."""
    from rlhfkit.config.load import load_config
    from rlhfkit.config.stages import PpoConfig
    from rlhfkit.stages import ppo
    from rlhfkit.stages.episodes import Episode

    given = json.loads(Path(job["rollout"]).read_text())["rows"]
    prompts = [tuple(row["input_ids"]) for row in read_jsonl(job["prompts"])]

    def prompt_of(row: dict[str, Any]) -> tuple[int, ...]:
        """The prompt without the padding in front of it."""
        return next(p for p in sorted(prompts, key=len, reverse=True) if tuple(row["query"][-len(p) :]) == p)

    by_prompt = {prompt_of(row): row for row in given}
    assert len(by_prompt) == len(given), "the same prompt twice"

    def replay(model: Any, prompts: Any, text: Any, settings: Any, **_: Any) -> list[Episode]:
        episodes = []
        for index, row in prompts:
            ids = by_prompt[tuple(row.prompt.tolist())]["answer"]
            words = text.tokenizer.decode(ids, skip_special_tokens=True)
            episodes.append(Episode(index, row, ids, ids[-1] in settings.stop_ids, words))
        return episodes

    kept: dict[str, Any] = {}
    plain = ppo._targets

    def targets(rollout: Any, *args: Any) -> Any:
        kept["rollout"], kept["targets"] = rollout, plain(rollout, *args)
        return kept["targets"]

    ppo.sample_episodes, ppo._targets = replay, targets
    out = Path(job["out"])
    flags = {
        "model.path": job["model"], "data.train": [job["texts"]], "run.out": str(out), "run.seed": job["seed"],
        "ppo.reward": [job["reward"]], "ppo.value_model": "separate", "optim.batch_size": job["batch_size"],
        "ppo.rollout_size": job["batch_size"], "ppo.episodes": job["batch_size"],
        "ppo.max_new_tokens": job["answer_tokens"], "optim.lr": job["lr"], "optim.max_grad_norm": 0.0,
        "run.trackers": ["none"], "model.precision": "fp32", **{f"ppo.{key}": value for key, value in PPO.items()},
    }  # fmt: skip
    ppo.run(load_config(PpoConfig, flags=flags))
    rollout, found = kept["rollout"], kept["targets"]
    of_tokens = (rollout.logprobs, rollout.ref_logprobs, rollout.values, found.advantages, found.returns)
    order = {}
    for i, e in enumerate(rollout.episodes):
        prompt = e.prompt.prompt.tolist()
        order[tuple(prompt)] = row_of(i, prompt, e.response, rollout.scores, of_tokens)
    return {"rows": [order[prompt_of(row)] for row in given], "weights": compare_weights(Path(job["rival"]), out)}


# -- figures -----------------------------------------------------------------------------------------------------------


def compare_weights(rival: Path, run: Path) -> dict[str, dict[str, float]]:
    """What the update has added to each model: the length of both vectors, and the cosine of the angle between them."""
    from safetensors.torch import load_file

    found = {}
    for name in WEIGHTS:
        before, theirs = (load_file(rival / f"{name}-{when}.safetensors") for when in ("before", "after"))
        mine = load_file(run / ("final/model.safetensors" if name == "policy" else "value/value.safetensors"))
        mine = {
            k.replace("value_trunk.", "model.").replace("value_head.", "score."): v.float() for k, v in mine.items()
        }
        pairs = [(theirs[k] - before[k], mine[k] - before[k]) for k in before]
        dot, one, other = (
            math.fsum(float((a.double() * b.double()).sum()) for a, b in parts)
            for parts in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
        )
        found[name] = {"trl": one**0.5, "rlhfkit": other**0.5, "cosine": dot / (one * other) ** 0.5}
    return found


def table(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    """Largest difference and spread of what was found of each token, and how the updates compare."""
    pairs = list(zip(theirs["rows"], mine["rows"], strict=True))
    assert all(a["answer"] == b["answer"] for a, b in pairs)
    lines = ["| of each token | TRL, standard deviation | largest difference |", "|---|---|---|"]
    for name in ("score", *OF_TOKENS):
        of_both = [(a[name], b[name]) for a, b in pairs]
        if name != "score":
            of_both = [both for a, b in of_both for both in zip(a, b, strict=True)]
        worst = max(abs(a - b) for a, b in of_both)
        spread = statistics.pstdev(a for a, _ in of_both)
        lines.append(f"| {name.replace('_', ' ')} | {spread:.4f} | {worst:.2g} |")
    lines += ["", "| added to the weights of | TRL, norm | rlhfkit, norm | cosine |", "|---|---|---|---|"]
    for name, words in WEIGHTS.items():
        w = mine["weights"][name]
        lines.append(f"| {words} | {w['trl']:.5f} | {w['rlhfkit']:.5f} | {w['cosine']:.5f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
