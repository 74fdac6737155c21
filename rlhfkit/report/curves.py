"""Curves of runs with matplotlib. Runs of one stage lie over one another, a colour each."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rlhfkit.report.runs import RunRecord
from rlhfkit.words import chosen, mark, speaking, tr

# Okabe and Ito's colours without the yellow, which white paper swallows: told apart by colour-blind eyes as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
SIZE = (4.6, 2.9)  # inches; legible when a phone shows it 360 pixels wide
SMOOTHED_FROM = 60  # points; below it every value is plain to see
CHINESE = ("Noto Sans CJK SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "SimHei")
STYLE = {
    "font.family": ["DejaVu Sans", "Verdana", *CHINESE],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # words stay words: smaller, and any script of a run's name is shown
    "svg.hashsalt": "rlhfkit",  # the same figures give the same file
}


class Panel(NamedTuple):
    """One set of axes: metrics against steps, or what ``draw`` makes of the runs."""

    title: str
    y: str
    keys: tuple[tuple[str, str], ...] = ()  # metric and its word in the legend
    x: str = mark("step")
    draw: Callable[[Any, Sequence[RunRecord]], bool] | None = None
    from_zero: bool = False


def _with_spread(axes: Any, runs: Sequence[RunRecord]) -> bool:
    drawn = False
    for run, colour in zip(runs, _colours(runs), strict=True):
        episodes, means = _against(run, "episodes", "reward_mean")
        _, spreads = _against(run, "episodes", "reward_std")
        if not means:
            continue
        axes.plot(episodes, means, color=colour, label=_label(runs, run, mark("rollouts")))
        if len(runs) == 1:
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(
                episodes, low, high, color=colour, alpha=0.15, linewidth=0, label=tr("± one std of answers")
            )
        x, y = run.series("eval_reward_mean")
        if y:
            per_step = episodes[-1] / len(episodes)
            axes.plot(
                [s * per_step for s in x], y, "o--", color=colour, markersize=4, label=_label(runs, run, "held out")
            )
        drawn = True
    return drawn


def _reward_against_kl(axes: Any, runs: Sequence[RunRecord]) -> bool:
    drawn = False
    for run, colour in zip(runs, _colours(runs), strict=True):
        kl, reward = _against(run, "kl", "reward_mean")
        if not kl:
            continue
        axes.plot(kl, reward, color=colour, alpha=0.4, linewidth=1, label=_label(runs, run, "rollouts, pale to dark"))
        axes.scatter(kl, reward, color=colour, s=12, alpha=[0.2 + 0.8 * (i + 1) / len(kl) for i in range(len(kl))])
        drawn = True
    return drawn


def _phases(axes: Any, runs: Sequence[RunRecord]) -> bool:
    names = (mark("rollout"), mark("score"), mark("update"))
    rows = [(run, [run.values(f"seconds_{name}") for name in names]) for run in runs]
    rows = [(run, parts) for run, parts in rows if all(parts)]
    if not rows:
        return False
    for i, name in enumerate(names):
        means = [sum(parts[i]) / len(parts[i]) for _, parts in rows]
        before = [sum(sum(p) / len(p) for p in parts[:i]) for _, parts in rows]
        axes.barh([run.name for run, _ in rows], means, left=before, color=COLOURS[i], label=tr(name), height=0.5)
    axes.invert_yaxis()
    axes.set_xlabel(tr("seconds per step, mean"))
    axes.grid(axis="y", visible=False)
    axes.margins(y=0.6 if len(rows) == 1 else 0.15)
    return True


def _reliability(axes: Any, runs: Sequence[RunRecord]) -> bool:
    drawn = False
    for run, colour in zip(runs, _colours(runs), strict=True):
        bins = [b for b in (run.evaluation or {}).get("reliability", []) if b.get("observed") is not None]
        if not bins:
            continue
        axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], "o-", color=colour, markersize=4,
                  label=_label(runs, run, mark("observed")))  # fmt: skip
        drawn = True
    if drawn:
        axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1, linestyle=":", label=tr("perfect"))
        axes.set_xlabel(tr("predicted probability that the higher score is better"))
    return drawn


def _histogram(axes: Any, runs: Sequence[RunRecord]) -> bool:
    found = (runs[0].evaluation or {}).get("histogram") if len(runs) == 1 else None
    if not found:
        return False
    edges = found["edges"]
    widths = [high - low for low, high in pairwise(edges)]
    for (name, counts), colour in zip(found["counts"].items(), COLOURS, strict=False):
        axes.bar(edges[:-1], counts, width=widths, align="edge", alpha=0.5, color=colour, label=tr(name))
    axes.set_xlabel(tr("score"))
    return True


STEPS = (
    Panel("Learning rate", "", (("lr", "learning rate"),)),
    Panel("Gradient norm before clipping", "", (("grad_norm", "gradient norm"),)),
    Panel("Speed", "tokens per second", (("tokens_per_second", "speed"),), from_zero=True),
    Panel("Peak memory", "GiB", (("peak_memory_gib", "peak memory"),), from_zero=True),
)
PANELS: dict[str, tuple[Panel, ...]] = {
    "sft": (Panel("Loss", "nats per token", (("loss", "training"), ("eval_loss", "held out"))), *STEPS),
    "rm": (
        Panel("Loss", "nats per pair", (("loss", "training"), ("eval_loss", "held out"))),
        Panel("Accuracy", "share of pairs ranked rightly", (("accuracy", "training"), ("eval_accuracy", "held out"))),
        Panel("Margin", "chosen − rejected", (("margin", "training"), ("eval_margin", "held out"))),
        Panel("Scores", "score", (("reward_chosen", "chosen"), ("reward_rejected", "rejected"))),
        Panel("Reliability on held-out pairs", "observed", draw=_reliability),
        Panel("Scores of held-out answers", "answers", draw=_histogram),
        *STEPS,
    ),
    "ppo": (
        Panel("Reward", "reward", x="episodes", draw=_with_spread),
        Panel("Reward against KL", "mean reward", x="KL to the reference (nats per answer)", draw=_reward_against_kl),
        Panel("KL to the reference", "nats per answer", (("kl", "rollouts"), ("eval_kl", "held out"))),
        Panel("KL weight", "β", (("kl_coef", "β"),)),
        Panel("Answer length", "tokens", (("response_tokens", "rollouts"), ("eval_response_tokens", "held out"))),
        Panel("Answers that end by themselves", "share", (("eos_rate", "rollouts"), ("eval_eos_rate", "held out"))),
        Panel("Entropy", "nats per token", (("entropy", "entropy"),)),
        Panel("Policy loss", "", (("policy_loss", "policy loss"),)),
        Panel("Value loss", "", (("value_loss", "value loss"),)),
        Panel("Explained variance of the value function", "1 is perfect",
              (("value_explained_variance", "explained variance"),)),
        Panel("Clipped tokens", "share", (("clip_fraction", "clipped"),)),
        Panel("Time per phase", "", draw=_phases),
        *STEPS,
    ),
}  # fmt: skip


_IMPLICIT = Panel("Implicit rewards", "β × log ratio to the reference",
                  (("reward_chosen", "better"), ("reward_rejected", "worse")))  # fmt: skip
_ONLINE = (
    Panel("Reward", "reward", x="episodes", draw=_with_spread),
    Panel("KL to the reference", "nats per token", (("kl_per_token", "rollouts"), ("eval_kl_per_token", "held out"))),
    *(
        panel
        for panel in PANELS["ppo"]
        if panel.title in ("Answer length", "Answers that end by themselves", "Entropy")
    ),
    *STEPS,
)
# Through TRL.
PANELS |= {
    "dpo": (*PANELS["rm"][:3], _IMPLICIT, *STEPS),
    "kto": (
        Panel("Loss", "", (("loss", "training"), ("eval_loss", "held out"))),
        Panel("Margin", "desirable − undesirable", (("margin", "training"), ("eval_margin", "held out"))),
        _IMPLICIT,
        Panel("KL to the reference", "nats per answer to another prompt", (("kl", "training"),)),
        *STEPS,
    ),
    "grpo": _ONLINE,
    "rloo": _ONLINE,
}


def panels_of(runs: Sequence[RunRecord]) -> list[Panel]:
    """The panels of these runs' stage; components of the reward have one each."""
    stage = runs[0].stage
    parts = sorted({key for run in runs for row in run.steps for key in row if key.startswith("reward/")})
    extra = [Panel(f"Reward: {key.removeprefix('reward/')}", "mean", ((key, "rollouts"), (f"eval_{key}", "held out")))
             for key in parts]  # fmt: skip
    return [*PANELS.get(stage, STEPS), *extra]


def svg_figures(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Title and SVG of each figure of some runs of one stage; figures without data are left out."""
    found = []
    for panel in panels_of(runs):
        with _styled() as pyplot:
            figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
            if _draw(axes, panel, runs):
                text = io.StringIO()
                figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
                found.append((tr(panel.title), text.getvalue()))
            pyplot.close(figure)
    return found


def in_letters_that_are_there() -> AbstractContextManager[None]:
    """English for pictures where no font of this machine has Chinese characters; a browser brings its own."""
    from matplotlib import font_manager

    missing = chosen() == "zh" and not {font.name for font in font_manager.fontManager.ttflist} & {*CHINESE}
    return speaking("en" if missing else chosen())


def write_png(runs: Sequence[RunRecord], path: Path, *, title: str) -> None:
    """All figures of some runs of one stage as one picture."""
    with _styled() as pyplot:
        # A panel has data or not before it is known how many there are.
        trial, axes = pyplot.subplots()
        kept = []
        for panel in panels_of(runs):
            axes.clear()
            if _draw(axes, panel, runs):
                kept.append(panel)
        pyplot.close(trial)
        columns = min(3, max(1, len(kept)))
        lines = max(1, -(-len(kept) // columns))
        figure, grid = pyplot.subplots(
            lines, columns, figsize=(SIZE[0] * columns, SIZE[1] * lines + 0.4), squeeze=False, layout="constrained"
        )
        for axes, panel in zip(grid.flat, kept, strict=False):
            _draw(axes, panel, runs)
            axes.set_title(tr(panel.title), fontsize=10, loc="left", pad=18 if axes.get_legend() else 6)
        for axes in list(grid.flat)[len(kept) :]:
            axes.set_axis_off()
        figure.suptitle(title, fontsize=12)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


class _styled:
    """pyplot without a window, in our style."""

    def __enter__(self) -> Any:
        import logging
        import warnings

        import matplotlib

        matplotlib.use("agg")
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of the fonts, one is enough
        from matplotlib import pyplot

        self._context = ExitStack()
        self._context.enter_context(pyplot.rc_context(STYLE))
        self._context.enter_context(warnings.catch_warnings())
        # Whoever looks at an SVG has the fonts for the names of their runs, whether this machine has them or not.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        return pyplot

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _draw(axes: Any, panel: Panel, runs: Sequence[RunRecord]) -> bool:
    """Draw a panel; says whether there was anything to draw."""
    axes.set_xlabel(tr(panel.x))
    if panel.draw is not None:
        drawn = panel.draw(axes, runs)
    else:
        drawn = _metrics(axes, panel, runs)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if not drawn:
        return False
    axes.set_ylabel(tr(panel.y))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2 if len(labels) == 4 else 3,
                    borderaxespad=0, columnspacing=1.2)  # fmt: skip
    return True


def _metrics(axes: Any, panel: Panel, runs: Sequence[RunRecord]) -> bool:
    drawn = False
    axes.yaxis.set_major_formatter("{x:.3g}")  # a power of ten above the axis would lie under the legend
    for i, (run, colour) in enumerate(zip(runs, _colours(runs), strict=True)):
        for j, (key, word) in enumerate(panel.keys):
            x, y = run.series(key)
            if not y:
                continue
            drawn = True
            # One run: a colour for each metric. Several: a colour for each run, a line style for each metric.
            shade, line = (COLOURS[j], "-") if len(runs) == 1 else (colour, STYLES[j])
            label = tr(word) if len(runs) == 1 else run.name if len(panel.keys) == 1 else f"{run.name}, {tr(word)}"
            if key.startswith("eval_"):
                axes.plot(x, y, "o" + line, color=shade, markersize=4, label=label, zorder=3 + i)
            elif len(y) >= SMOOTHED_FROM:
                axes.plot(x, y, color=shade, alpha=0.2, linewidth=0.8)
                axes.plot(x, _smooth(y), line, color=shade, label=label)
            else:
                axes.plot(x, y, line, color=shade, label=label, marker="." if len(y) < 3 else None)
    return drawn


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a thirtieth of the run, started without a bias towards the first value."""
    keep = 1 - 1 / max(2.0, len(values) / 30)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed


def _against(run: RunRecord, x: str, y: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run.steps if isinstance(row.get(x), (int, float)) and isinstance(row.get(y), (int, float))]
    return [float(row[x]) for row in rows], [float(row[y]) for row in rows]


def _colours(runs: Sequence[RunRecord]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def _label(runs: Sequence[RunRecord], run: RunRecord, word: str) -> str:
    return tr(word) if len(runs) == 1 else run.name if word.startswith("rollouts") else f"{run.name}, {tr(word)}"
