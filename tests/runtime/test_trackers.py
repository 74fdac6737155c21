"""What arrives at trackers, read back from TensorBoard's files and from stand-ins for the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import read_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig
from rlhfkit.errors import ConfigError
from rlhfkit.runtime.trackers import check_trackers, track_histogram, track_samples
from rlhfkit.stages import ppo

ROWS = [{"prompt": "a|b", "answer": "one\ntwo", "reward": 0.123456}]


@pytest.fixture
def ppo_run(settings: Callable[..., Any], prompts_file: Path, tmp_path: Path) -> Path:
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def length(prompts, responses, **columns):\n    return [float(len(r)) for r in responses]\n")
    flags = settings(
        "run", data__train=[str(prompts_file)], data__eval=[str(prompts_file)], ppo__reward=[f"{rewards}:length"],
        ppo__max_new_tokens=8, ppo__rollout_size=8, run__trackers=["tensorboard"],
    )  # fmt: skip
    return ppo.run(load_config(PpoConfig, flags=flags)).out


def test_everything_is_in_tensorboards_files(ppo_run: Path) -> None:
    folder = ppo_run / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "tensors": 0, "scalars": 0}).Reload()
    steps = [row for row in read_metrics(ppo_run) if "event" not in row]
    for name in ("loss", "reward_mean", "kl", "eval_reward_mean", "seconds_rollout"):
        seen = {e.step: e.value for e in events.Scalars(name)}
        for row in steps:
            if name in row:
                assert seen[row["step"]] == pytest.approx(row[name], rel=1e-5)
    (histogram,) = events.Histograms("rewards")
    assert histogram.step == 1
    assert histogram.histogram_value.num == 8
    assert histogram.histogram_value.sum / 8 == pytest.approx(steps[0]["reward_mean"], rel=1e-5)
    texts = [make_ndarray(e.tensor_proto)[0].decode() for e in events.Tensors("samples/text_summary")]
    assert len(texts) == 2  # before and after
    assert "| say one word 0 |" in texts[0]
    hparams = list(folder.rglob("hparams.yml"))
    assert "ppo.kl_coef: 0.05" in hparams[0].read_text()


def test_an_absent_tracker_is_an_error() -> None:
    with pytest.raises(ConfigError, match="there is no tracker 'tensorbord'"):
        check_trackers(["tensorbord"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhfkit.runtime.trackers.get_available_trackers", list)
        with pytest.raises(ConfigError, match="wandb is not installed") as error:
            check_trackers(["wandb"])
    assert "pip install 'rlhfkit[wandb]'" in str(error.value)
    check_trackers(["tensorboard"])


class StandIn(SimpleNamespace):
    """A tracker that remembers what it is given."""

    def log(self, values: dict[str, Any], step: int) -> None:
        self.got = (values, step)

    def log_table(self, name: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.got = (name, columns, data, step)


def test_the_forms_of_other_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[Any] = []
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_table=lambda *given: tables.append(given)))
    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace(Text=lambda text: text))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=lambda values: ("histogram", values)))
    wandb, swanlab, mlflow, board = (StandIn(name=n) for n in ("wandb", "swanlab", "mlflow", "tensorboard"))
    track_samples([wandb, swanlab, mlflow, board], ROWS, 3)
    assert wandb.got == ("samples", ["prompt", "answer", "reward"], [["a|b", "one\ntwo", 0.123456]], 3)
    assert swanlab.got == ({"samples": ["prompt: a|b\nanswer: one\ntwo\nreward: 0.123456"]}, 3)
    assert tables == [({"prompt": ["a|b"], "answer": ["one\ntwo"], "reward": [0.123456]}, "samples/step-3.json")]
    assert board.got[0]["samples"].splitlines()[2] == "| a\\|b | one<br>two | 0.1235 |"
    track_histogram([wandb, swanlab, mlflow], "rewards", [float(i) for i in range(11)], 4)
    assert wandb.got == ({"rewards": ("histogram", [float(i) for i in range(11)])}, 4)
    assert swanlab.got == mlflow.got == ({"rewards/p10": 1.0, "rewards/p50": 5.0, "rewards/p90": 9.0}, 4)
