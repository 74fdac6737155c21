"""Whether PPO learns, against TRL 1.12 on the same settings: reward by episodes and by KL, three seeds.

python benchmarks/ppo_learning.py --model M --data alpaca_en.jsonl --reward-model RM --rival-python rival/bin/python

Two rewards: a rule with a known optimum (the share of an answer's words that begin with a capital letter: at most 1),
and a reward model. TRL takes models alone as rewards, so the rule reaches it as a module; the reward model does too,
because TRL would score an answer that was cut off at whatever token it was cut, and ours at the end of the turn, as in
its training. ``--plot-only`` draws again; needs matplotlib.
Started again with the same ``--out``, an interrupted comparison goes on.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from capitals import reward
from common import Job, machine, refuse_if_absent, run_measured
from ppo import PPO, TRL, metric, own_process, ppo_options, prepare, reward_model, train_rival

ASSISTANT = "<|im_start|>assistant\n"  # what stands in front of an answer in the model's template
COLOURS = {"rlhfkit": "tab:blue", "trl": "tab:orange"}
Curve = dict[str, list[float]]  # reward, kl


def main() -> None:
    parser = ppo_options(__doc__, prompt_tokens=48, answer_tokens=16, out="runs/bench-learning", rows=128, lr=1e-5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rewards", nargs="+", default=["rule", "model"], choices=["rule", "model"])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--plot", type=Path, help="picture to write; default learning.png in --out")
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    if args.contestant:
        job: Job = json.loads(args.job.read_text())
        scores = rule_scores if job["rule"] else model_scores(job["reward"])
        found = train_rival(f"trl-{job['precision']}", job, lambda tokenizer: as_module(scores, tokenizer))
        Path(job["result"]).write_text(json.dumps(found))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    figures = args.out / "learning.json"
    curves: dict[str, Curve] = json.loads(figures.read_text())["curves"] if figures.is_file() else {}
    if not args.plot_only:
        if set(args.only) - set(COLOURS):
            raise SystemExit(f"--only {', '.join(args.only)}: there are {', '.join(COLOURS)}")
        if "trl" in (args.only or COLOURS):
            refuse_if_absent(args.rival_python, "trl", TRL)
        prepare(args)
        merged = reward_model(args)[1]
        given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        for seed in range(args.seeds):
            for kind in args.rewards:
                for who in args.only or COLOURS:
                    name = f"{kind}-{who}-{seed}"
                    if name in curves:  # an interrupted comparison goes on
                        continue
                    curves[name] = (ours if who == "rlhfkit" else rivals)(args, name, kind, merged, seed)
                    figures.write_text(json.dumps({"machine": machine(), "options": given, "curves": curves}, indent=1))
                    print(
                        f"{name}: reward {curves[name]['reward'][0]:.3f} to {curves[name]['reward'][-1]:.3f}",
                        flush=True,
                    )
    print(table(curves))
    print(table_by_kl(curves))
    draw(curves, args.batch_size, args.plot or args.out / "learning.png")


def ours(args: Any, name: str, kind: str, merged: Path, seed: int) -> Curve:
    out = args.out / name
    rule = f"{Path(__file__).with_name('capitals.py')}:reward"
    command = [
        sys.executable, "-m", "rlhfkit", "ppo", "--model", args.model, "--data", str(args.out / "prompts.jsonl"),
        "--reward", rule if kind == "rule" else str(merged), "--out", str(out),
        "--value-model", "separate" if kind == "model" else "shared", "--batch-size", str(args.batch_size),
        "--rollout-size", str(args.batch_size), "--episodes", str(args.rows), "--max-prompt-length",
        str(args.prompt_tokens), "--max-new-tokens", str(args.answer_tokens), "--lr", str(args.lr),
        "--max-grad-norm", "0", "--seed", str(seed), "--save-every", "0", "--trackers", "none", "--precision",
        args.precision,
    ]  # fmt: skip
    for key, value in PPO.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    run_measured(command, args.out / f"{name}.log")
    return {"reward": metric(out, "reward_mean"), "kl": metric(out, "kl")}


def rivals(args: Any, name: str, kind: str, merged: Path, seed: int) -> Curve:
    job = {
        "model": args.model, "reward": str(merged), "prompts": str(args.out / "prompt_ids.jsonl"), "seed": seed,
        "out": str(args.out / name), "batch_size": args.batch_size, "answer_tokens": args.answer_tokens,
        "lr": args.lr, "episodes": args.rows, "rule": kind == "rule",
        "precision": args.precision,
    }  # fmt: skip
    found = own_process(args, args.rival_python, name, job, script=__file__)[0]
    return {"reward": found["rewards"], "kl": found["kl"]}


def rule_scores(rows: list[list[int]], tokenizer: Any) -> list[float]:
    answers = [tokenizer.decode(row).rpartition(ASSISTANT)[2].replace(tokenizer.eos_token, "") for row in rows]
    return reward([], answers)


def model_scores(path: str) -> Any:
    """The reward model's scores of conversations whose last turn is ended, as it was in its training."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32).eval()

    def scores(rows: list[list[int]], tokenizer: Any) -> list[float]:
        ended = [row if row[-1] == tokenizer.eos_token_id else [*row, tokenizer.eos_token_id] for row in rows]
        padded = tokenizer.pad({"input_ids": ended}, padding_side="right", return_tensors="pt")
        with torch.no_grad():
            hidden = model.base_model(**padded).last_hidden_state
            last = hidden[torch.arange(len(ended)), torch.tensor([len(row) - 1 for row in ended])]
            return [float(score) for score in model.score(last.float())]

    return scores


def as_module(scores: Any, tokenizer: Any) -> Any:
    """Scores behind what TRL calls: a backbone whose last hidden state is the score, and a head that leaves it."""
    import torch
    from torch import nn

    class Backbone(nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, **further: Any) -> Any:
            rows = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
            found = torch.tensor(scores(rows, tokenizer), device=input_ids.device)
            return SimpleNamespace(hidden_states=[found[:, None, None].expand(*input_ids.shape, 1)])

    class Reward(nn.Module):
        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone()
            self.score = nn.Identity()

    return Reward()


# -- figures -----------------------------------------------------------------------------------------------------------


def of(curves: dict[str, Curve], kind: str, who: str) -> list[Curve]:
    return [curve for name, curve in sorted(curves.items()) if name.startswith(f"{kind}-{who}-")]


def table(curves: dict[str, Curve]) -> str:
    """First and last quarter of the episodes and all of them, mean over the seeds, with the seeds' spread."""
    lines = [
        "| reward | contestant | seeds | first quarter | last quarter | KL in the last quarter | all rollouts |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("rule", "model"):
        for who in COLOURS:
            runs = of(curves, kind, who)
            if not runs:
                continue
            quarter = max(1, len(runs[0]["reward"]) // 4)
            cells = []
            for key, part in (
                ("reward", slice(None, quarter)),
                ("reward", slice(-quarter, None)),
                ("kl", slice(-quarter, None)),
                ("reward", slice(None)),
            ):
                means = [statistics.mean(run[key][part]) for run in runs]
                cells.append(f"{statistics.mean(means):.3f} ({min(means):.3f} to {max(means):.3f})")
            lines.append(f"| {kind} | {who} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_by_kl(curves: dict[str, Curve]) -> str:
    """Mean reward of the rollouts of all seeds at about the same KL, with its standard error and their number; the
    bounds are the quartiles of both contestants' rollouts."""
    lines = []
    for kind in ("rule", "model"):
        points = {
            who: [p for run in of(curves, kind, who) for p in zip(run["kl"], run["reward"], strict=True)]
            for who in COLOURS
        }
        if not all(points.values()):
            continue
        bounds = [
            -math.inf,
            *statistics.quantiles([kl for all_of in points.values() for kl, _ in all_of], n=4),
            math.inf,
        ]
        lines += [
            f"| {kind}: KL | below {bounds[1]:.2f} | {bounds[1]:.2f} to {bounds[2]:.2f} "
            f"| {bounds[2]:.2f} to {bounds[3]:.2f} | above |",
            "|---|---|---|---|---|",
        ]
        for who, all_of in points.items():
            cells = []
            for low, high in pairwise(bounds):
                rewards = [reward for kl, reward in all_of if low <= kl < high]
                error = statistics.stdev(rewards) / len(rewards) ** 0.5 if len(rewards) > 1 else math.nan
                cells.append(f"{statistics.mean(rewards):.2f} ± {error:.2f} ({len(rewards)})" if rewards else "")
            lines.append(f"| {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(curves: dict[str, Curve], per_step: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in ("rule", "model") if any(name.startswith(kind) for name in curves)]
    figure, axes = pyplot.subplots(len(kinds), 2, figsize=(10, 3.6 * len(kinds)), squeeze=False)
    titles = {"rule": "rule (optimum 1)", "model": "reward model"}
    for (by_episode, by_kl), kind in zip(axes, kinds, strict=True):
        for who, colour in COLOURS.items():
            runs = of(curves, kind, who)
            if not runs:
                continue
            episodes = [per_step * (i + 1) for i in range(len(runs[0]["reward"]))]
            for run in runs:
                by_episode.plot(episodes, run["reward"], color=colour, alpha=0.3, linewidth=1)
                by_kl.plot(run["kl"], run["reward"], ".", color=colour, alpha=0.35)
            mean = {
                key: [statistics.mean(values) for values in zip(*(run[key] for run in runs), strict=True)]
                for key in ("reward", "kl")
            }
            by_episode.plot(episodes, mean["reward"], color=colour, linewidth=2.2, label=who)
            by_kl.plot(mean["kl"], mean["reward"], color=colour, linewidth=2.2, label=who)
        by_episode.set(title=titles[kind], xlabel="episodes", ylabel="reward of the rollout")
        by_kl.set(title=titles[kind], xlabel="KL to the reference, nats per answer", ylabel="reward of the rollout")
        for axis in (by_episode, by_kl):
            axis.grid(alpha=0.3)
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
