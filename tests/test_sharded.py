"""A reward model whose weights are spread over two processes by FSDP2: its folder is whole, head and all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, read_metrics, write_jsonl

from rlhfkit.chat.messages import Message
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import RmConfig
from rlhfkit.models.heads import stored_head
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.stages import reward

pytestmark = pytest.mark.slow  # three trainings by two processes

ROWS = [{"prompt": f"film {i}?", "chosen": "good " * (i % 4 + 1), "rejected": f"bad {i}"} for i in range(9)]
FORMS = {"full": (), "lora": ("--lora-rank", "4"), "qlora": ("--lora-rank", "4", "--quantize", "4bit")}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all forms were trained by two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    model = make_model(folder / "model", hidden_size=64, intermediate_size=128)
    write_jsonl(folder / "pairs.jsonl", ROWS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [
        [
            *("rm", "--model", str(model), "--data", "pairs.jsonl", "--eval-data", "pairs.jsonl", "--out", form),
            *("--precision", "fp32", "--max-length", "128", "--batch-size", "4", "--lr", "0.003", "--trackers", "none"),
            *("--micro-batch-tokens", "80", "--save-every", "0", *words),
        ]
        for form, words in FORMS.items()
    ]
    program = str(Path(__file__).with_name("sharded.py"))
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), program)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launch, json.dumps(jobs)], env=env, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    return folder


@pytest.mark.parametrize("form", list(FORMS))
def test_the_head_is_saved_and_scores_as_it_trained(workplace: Path, form: str, tmp_path: Path) -> None:
    out = workplace / form
    head = stored_head(out / "final")
    assert head is not None
    assert head.abs().sum() > 0
    scorer = RewardScorer(str(out / "final"), device=torch.device("cpu"), dtype=torch.float32)
    measured = read_metrics(out)[-1]
    for side in ("chosen", "rejected"):
        scores = scorer.score([[Message("user", row["prompt"])] for row in ROWS], [row[side] for row in ROWS])
        assert len(set(scores)) > 3
        assert sum(scores) / len(scores) == pytest.approx(measured[f"eval_reward_{side}"], abs=2e-5)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_one_process_trains_the_same_head(workplace: Path, form: str, tmp_path: Path) -> None:
    data = str(workplace / "pairs.jsonl")
    flags = {"run.out": str(tmp_path / "one"), "data.train": [data], "data.eval": [data]}
    result = reward.run(load_config(RmConfig, recipe=str(workplace / form / "config.resolved.yaml"), flags=flags))
    one, two = stored_head(result.final), stored_head(workplace / form / "final")
    assert one is not None
    assert two is not None
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    rows, expected = read_metrics(result.out), read_metrics(workplace / form)
    for a, b in zip(rows, expected, strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-3)
