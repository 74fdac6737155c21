"""The commands of the stages from end to end on a tiny model."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics
from safetensors.torch import load_file

from rlhfkit.stages import sft

SMALL = ("--precision", "fp32", "--max-length", "128", "--batch-size", "4", "--max-steps", "2", "--trackers", "none")


def test_version(cli: Any) -> None:
    outcome = cli("--version")
    assert (outcome.code, outcome.out) == (0, f"rlhfkit {importlib.metadata.version('rlhfkit')}\n")


def test_three_stages_and_an_answer(cli: Any, sft_file: Path, pairs_file: Path, prompts_file: Path) -> None:
    """Each stage takes what the one before has left; nothing but paths is handed on."""
    Path("configs").mkdir()
    Path("configs/mine.yaml").write_text("stage: sft\nmodel: {path: nowhere}\ndata: {train: [sft.jsonl]}\n")
    tuned = cli("sft", "mine", "--model", "tiny", "--out", "sft", *SMALL, "--set", "optim.max_steps=1")
    assert tuned.code == 0, tuned.err
    assert "step 1/1  loss " in tuned.err
    assert tuned.err.endswith("done: sft/final\n")
    assert tuned.out == ""

    rm = cli("rm", "--model", "sft/final", "--data", pairs_file, "--eval-data", pairs_file, "--out", "rm", *SMALL)
    assert rm.code == 0, rm.err
    assert "before training: eval_accuracy " in rm.err

    rollouts = ("--rollout-size", "8", "--max-new-tokens", "8", "--ppo-epochs", "1", "--epochs", "2")
    data = ("--data", prompts_file, "--reward", "rm/final")
    ppo = cli("ppo", "--model", "sft/final", *data, *rollouts, "--out", "ppo", *SMALL)
    assert ppo.code == 0, ppo.err

    for stage, steps in (("sft", 1), ("rm", 2), ("ppo", 2)):
        rows = read_metrics(stage)
        assert [row["step"] for row in rows if row.get("step") and "event" not in row] == list(range(1, steps + 1))
        assert rows[-1]["event"] == "end"
        assert Path(stage, "config.resolved.yaml").is_file()
        assert not Path(stage, "tensorboard").exists()

    answer = cli("generate", "--model", "ppo/final", "--prompt", "say one word", "--max-new-tokens", "8")
    assert answer.code == 0, answer.err
    assert answer.out.endswith("\n")


def test_tensorboard_has_the_loss(cli: Any, sft_file: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli("sft", "--model", "tiny", "--data", sft_file, "--out", "run", *SMALL[:-2]).code == 0
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    rows = read_metrics("run")[:-1]
    assert len(rows) == 2
    for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
        points = events.Scalars(name)
        assert [point.step for point in points] == [1, 2]
        assert [point.value for point in points] == pytest.approx([row[name] for row in rows])


@pytest.mark.parametrize(
    ("stage", "flags", "words"),
    [
        ("sft", (), "3 steps of 4 rows; run folder run"),
        ("sft", ("--lora-rank", "4", "--quantize", "4bit"), "3 steps of 4 rows; run folder run"),
        ("rm", ("--gradient-checkpointing",), "3 steps of 4 rows; run folder run"),
        ("ppo", ("--rollout-size", "8", "--max-new-tokens", "8"), "1 steps of 8 episodes, each with 4 passes of 2"),
    ],
    ids=("sft", "sft-qlora", "rm", "ppo"),
)
def test_plan_says_the_memory_and_stops(
    cli: Any, stage: str, flags: tuple[str, ...], words: str, sft_file: Path, pairs_file: Path, prompts_file: Path
) -> None:
    data = {"sft": sft_file, "rm": pairs_file, "ppo": prompts_file}[stage]
    if stage == "ppo":
        Path("rewards.py").write_text("def zero(prompts, responses):\n    return [0.0] * len(responses)\n")
        flags = (*flags, "--reward", "rewards.py:zero")
    base = ("--model", "tiny", "--data", data, "--out", "run", "--max-length", "128", "--batch-size", "4")
    outcome = cli(stage, *base, *flags, "--plan")
    assert outcome.code == 0, outcome.err
    assert f"rlhfkit {stage}: memory on one cpu device" in outcome.out
    assert "the most at one time, about" in outcome.out
    assert words in outcome.out
    assert not Path("run").exists()
    assert not Path("runs").exists()


def test_where_an_error_came_up_is_shown_when_asked_for(
    cli: Any, sft_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("sft", "--model", "tiny", "--data", sft_file, "--out", "/proc/run", *SMALL)
    short = cli(*run)
    assert (short.code, short.out) == (1, "")
    assert "RLHFKIT_DEBUG=1" in short.err
    assert "Traceback" not in short.err
    monkeypatch.setenv("RLHFKIT_DEBUG", "1")
    shown = cli(*run)
    assert shown.code == 1
    assert "Traceback (most recent call last)" in shown.err
    assert re.search(r"run\.py\", line \d+, in begin", shown.err)
    assert "No such file or directory: '/proc/run'" in shown.err or "error: /proc/run: " in shown.err
    assert "in find_recipe" in cli("sft", "absent-recipe").err  # our own kind of error too


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_full_memory_is_told_with_what_takes_less(
    cli: Any, sft_file: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def full(config: Any) -> None:
        raise fault

    monkeypatch.setattr(sft, "run", full)
    outcome = cli("sft", "--model", "tiny", "--data", sft_file, "--out", "run", *SMALL)
    assert (outcome.code, outcome.out) == (1, "")
    told, hint = outcome.err.splitlines()
    assert told == "error: memory is full: " + str(fault).partition("\n")[0]
    assert "--micro-batch-tokens" in hint
    assert "--plan" in hint


def test_a_damaged_folder_is_mended_by_the_command_its_error_names(cli: Any, tiny_model: Path, sft_file: Path) -> None:
    broken = Path("broken")
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_bytes((tiny_model / name).read_bytes())
    run = ("sft", "--model", "broken", "--data", sft_file, "--out", "run", *SMALL)
    refused = cli(*run)
    assert refused.code == 1
    assert re.search(r"rlhfkit fix-checkpoint ORIGINAL_FOLDER \S*broken$", refused.err, re.MULTILINE)
    planned = cli("fix-checkpoint", "tiny", "broken", "--dry-run")
    assert (planned.code, planned.out.splitlines()[-1]) == (0, "Dry run: nothing was changed.")
    assert sorted(p.name for p in broken.iterdir()) == ["config.json", "model.safetensors"]
    both = cli("fix-checkpoint", "tiny", "broken", "--dry-run", "--yes")
    assert (both.code, both.err.splitlines()[0]) == (
        2,
        "error: --yes has no effect with --dry-run, which asks nothing",
    )
    assert cli("fix-checkpoint", "tiny", "broken", "--yes").code == 0
    assert cli(*run).code == 0


def test_families_are_listed(cli: Any) -> None:
    outcome = cli("families")
    assert outcome.code == 0
    for name in ("qwen", "llama", "baichuan"):
        assert name in outcome.out


def test_ctrl_c_before_the_first_step(cli: Any, sft_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhfkit.stages.sft.open_text_side", interrupted)
    run = ("sft", "--model", "tiny", "--data", "sft.jsonl", "--out", "run", *SMALL)
    outcome = cli(*run)
    assert outcome.code == 130
    assert outcome.err.endswith(
        "stopped: no step is saved: there is no checkpoint in run to go on from\n"
        f"  → start from the beginning with: rlhfkit {' '.join(run)}\n"
    )
    assert not Path("run").exists()


def test_ctrl_c_outside_a_step_of_a_run_that_has_begun(
    cli: Any, sft_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first step, whose command without --resume would be refused now; and after the last."""
    run = ("sft", "--model", "tiny", "--data", "sft.jsonl", "--eval-data", "sft.jsonl", "--out", "run", *SMALL)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rlhfkit.stages.sft.Optimisation.step", interrupted)
        outcome = cli(*run)
    assert outcome.code == 130
    assert outcome.err.endswith(f"  → start from the beginning with: rlhfkit {' '.join(run)} --resume\n")
    assert [row["step"] for row in read_metrics("run")] == [0]

    with monkeypatch.context() as patch:
        patch.setattr("rlhfkit.runtime.run.Run.finish", interrupted)
        outcome = cli(*run, "--resume")
    assert outcome.code == 130
    assert outcome.err.endswith(
        "stopped: nothing after run/checkpoints/step-2 is saved\n"
        f"  → go on from there with: rlhfkit {' '.join(run)} --resume\n"
    )
    assert cli(*run, "--resume").code == 0

    monkeypatch.setattr("rlhfkit.stages.plan.run", interrupted)
    assert cli(*run, "--resume", "--plan").err == "stopped: the plan is not finished\n"


def test_a_finished_run_is_refused_and_its_resolved_recipe_repeats_it(cli: Any, sft_file: Path) -> None:
    run = ("sft", "--model", "tiny", "--data", sft_file, *SMALL)
    assert cli(*run, "--out", "run").code == 0
    again = cli(*run, "--out", "run")
    assert again.code == 2
    assert again.err == (
        "error: run.out: run holds a run already\n"
        "  → go on with it: --resume; or start another: --out OTHER_FOLDER\n"
    )  # fmt: skip
    assert cli("sft", "--config", "run/config.resolved.yaml", "--out", "other").code == 0
    first, second = (load_file(f"{out}/final/model.safetensors") for out in ("run", "other"))
    assert all(first[name].equal(second[name]) for name in first)
    other = cli(*run, "--out", "run", "--resume", "--lr", "0.5")
    assert other.code == 2
    assert "optim.lr: 1e-05 -> 0.5" in other.err
    assert "--config run/config.resolved.yaml --resume" in other.err


def test_adapters_are_saved_as_adapters(cli: Any, sft_file: Path) -> None:
    assert cli("sft", "--model", "tiny", "--data", sft_file, "--out", "run", "--lora-rank", "4", *SMALL).code == 0
    assert json.loads(Path("run/final/adapter_config.json").read_text())["r"] == 4
    assert not Path("run/final/model.safetensors").exists()
