"""PPO on two processes equals PPO on one: with whole weights on each (DDP), and with sharded ones (FSDP2)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics, write_jsonl
from pairs import FSDP2, RunPair, pair_of_processes
from safetensors.torch import load_file

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig, RmConfig
from rlhfkit.stages import ppo, reward

# Seven prompts, two a step, two answers to each in minibatches of two: in micro-batches of one row, the processes have
# different numbers of passes. In the last step, of one prompt, one process has nothing to sample.
COMMON = {
    "data.max_length": 128,
    "model.precision": "fp32",
    "optim.batch_size": 2,
    "optim.lr": 0.003,
    "optim.micro_batch_tokens": 60,
    "ppo.episodes": 10,
    "ppo.max_new_tokens": 8,
    "ppo.ppo_epochs": 2,
    "ppo.reward_normalize": "true",
    "ppo.rollout_size": 4,
    "ppo.samples_per_prompt": 2,
    "run.keep": 9,
    "run.save_every": 1,
}
SAME = (
    "loss", "grad_norm", "reward_mean", "kl", "value_loss", "policy_loss", "entropy", "ratio_mean", "approx_kl",
    "clip_fraction", "eos_rate", "eval_reward_mean",
)  # fmt: skip
LORA = {"lora.rank": 4}
KINDS = {
    "shared": LORA,
    "adapter": {**LORA, "ppo.value_model": "adapter"},
    "separate": {"ppo.value_model": "separate"},
    "rloo": {**LORA, "ppo.advantage": "rloo"},
    "grpo": {"ppo.advantage": "grpo"},
}


def slow(kind: str) -> Any:
    """A kind that is tried beside the real model, not in the default suite: processes take seconds to begin."""
    return pytest.param(kind, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunPair]:
    with pair_of_processes(tmp_path_factory.mktemp("logs")) as run:
        yield run


@pytest.fixture(scope="module")
def judge(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on the policy's base."""
    folder = tmp_path_factory.mktemp("judge")
    rows = [{"prompt": f"film {i}?", "chosen": "good " * (i + 1), "rejected": f"bad {i}"} for i in range(9)]
    flags = {
        "model.path": str(tiny_model),
        "data.train": [str(write_jsonl(folder / "pairs.jsonl", rows))],
        "data.max_length": 128,
        "lora.rank": 4,
        "model.precision": "fp32",
        "optim.lr": 0.02,
        "run.out": str(folder / "run"),
        "run.trackers": ["none"],
    }
    return reward.run(load_config(RmConfig, flags=flags)).final


@pytest.fixture
def words(tiny_model: Path, judge: Path, tmp_path: Path) -> list[str]:
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {i} words"} for i in range(7)])
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [{"prompt": "say one word"}])
    return ["--model", str(tiny_model), "--data", str(data), "--eval-data", str(held_out), "--reward", str(judge),
            "--trackers", "none"]  # fmt: skip


def command(words: list[str], out: Path, changes: dict[str, object], *more: str) -> list[str]:
    sets = [word for key, value in {**COMMON, **changes}.items() for word in ("--set", f"{key}={value}")]
    return ["ppo", *words, "--out", str(out), *sets, *more]


def one_process(line: list[str]) -> None:
    """The same command line here, its options read as the command reads them."""
    sets = [line[i + 1] for i, word in enumerate(line) if word == "--set"]
    given = {
        word: line[i + 1] for i, word in enumerate(line) if word.startswith("--") and word not in ("--set", "--resume")
    }
    flags = {
        "model.path": given["--model"],
        "data.train": [given["--data"]],
        "data.eval": [given["--eval-data"]],
        "ppo.reward": [given["--reward"]],
        "run.out": given["--out"],
        "run.trackers": ["none"],
        "run.resume": "--resume" in line,
    }
    ppo.run(load_config(PpoConfig, flags=flags, sets=sets))


def assert_same(a: Path, b: Path, *, atol: float) -> None:
    """Metrics and weights of two runs; ``atol`` 0 is the same bits."""
    first, second = read_metrics(a), read_metrics(b)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for one, other in zip(first, second, strict=True):
        for name in SAME:
            assert one.get(name) == pytest.approx(other.get(name), abs=10 * atol), (name, one["step"])
    files = sorted(p.relative_to(a) for part in ("final", "value") for p in (a / part).glob("*.safetensors"))
    assert len(files) == (2 if (a / "value").exists() else 1)
    for file in files:
        mine, theirs = load_file(a / file), load_file(b / file)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=atol, msg=f"{file}: {name}")


@pytest.mark.parametrize("kind", ["adapter", *(slow(kind) for kind in KINDS if kind != "adapter")])
def test_two_processes_equal_one(kind: str, words: list[str], pair: RunPair, tmp_path: Path) -> None:
    one_process(command(words, tmp_path / "one", KINDS[kind]))
    statuses, said = pair(*command(words, tmp_path / "two", KINDS[kind]))
    assert statuses == [0, 0], said
    assert "cpu, fp32, 2 processes" in said
    assert_same(tmp_path / "one", tmp_path / "two", atol=2e-5)


def without_end(out: Path, *, steps: int) -> None:
    """Put a finished run back to where it had made so many steps."""
    shutil.rmtree(out / "final")
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > steps:
            shutil.rmtree(folder)


@pytest.mark.slow  # each is four trainings
@pytest.mark.parametrize("kind", ["adapter", "separate"])
def test_sharded_weights_on_two_processes(kind: str, words: list[str], pair: RunPair, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one_process(command(words, one, KINDS[kind]))
    statuses, said = pair(*command(words, two, KINDS[kind]), env=FSDP2)
    assert statuses == [0, 0], said
    assert_same(one, two, atol=2e-5)

    # It goes on with two processes to the same bits, and with one to the same numbers. And the other way round.
    ways = (("fewer", two, 1), ("again", two, 2), ("more", one, 2))
    for name, whole, processes in ways if kind == "adapter" else ways[:1]:
        out = tmp_path / name
        shutil.copytree(whole, out)
        without_end(out, steps=1)
        line = command(words, out, KINDS[kind], "--resume")
        if processes == 1:
            one_process(line)
        else:
            statuses, said = pair(*line, env=FSDP2)
            assert statuses == [0, 0], said
        assert read_metrics(out)[-1]["resumed_from"] == 1
        assert_same(out, whole, atol=0.0 if name == "again" else 2e-5)


@pytest.mark.slow
def test_sharded_in_bf16(words: list[str], pair: RunPair, tmp_path: Path) -> None:
    """Each process computes with 16-bit copies of float32 shards, heads included."""
    statuses, said = pair(*command(words, tmp_path / "two", {**KINDS["adapter"], "model.precision": "bf16"}), env=FSDP2)
    assert statuses == [0, 0], said
    rows = read_metrics(tmp_path / "two")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert rows[1]["ratio_first"] == 1.0
    assert abs(rows[1]["approx_kl"]) < 0.05
