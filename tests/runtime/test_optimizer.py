"""The choice of the optimiser: what it holds, what it makes of a run, and where it is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, read_metrics
from killing import assert_same_weights

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import RmConfig, SftConfig
from rlhfkit.errors import CheckpointError, ConfigError
from rlhfkit.runtime.optim import Optimisation, choose_optimizer
from rlhfkit.stages import reward, sft

Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bitsandbytes keeps weights of fewer than 4,096 values in 32 bits."""
    return make_model(tmp_path_factory.mktemp("models") / "wide", hidden_size=128, intermediate_size=256)


def trained(flags: dict[str, Any], **changes: Any) -> Any:
    return sft.run(load_config(SftConfig, flags={**flags, **changes}))


@pytest.mark.parametrize("how", [{}, {"lora__rank": 32}, {"lora__rank": 32, "model__quantize": "4bit"}])
def test_eight_bits_train_as_well_and_take_a_quarter(
    settings: Settings, sft_file: Path, wide_model: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Optimisation] = []
    real = Optimisation.__init__

    def init(self: Optimisation, *args: Any) -> None:
        real(self, *args)
        made.append(self)

    monkeypatch.setattr(Optimisation, "__init__", init)
    common = {"data__train": [str(sft_file)], "data__eval": [str(sft_file)], "model__path": str(wide_model), **how}
    common |= {"optim__epochs": 4, "optim__lr": 3e-3}
    losses, sizes = [], []
    for name in ("adamw", "adamw8bit"):
        rows = read_metrics(trained(settings(name, **common, optim__optimizer=name)).out)
        losses.append(rows[-1]["eval_loss"])
        assert losses[-1] < 0.7 * rows[0]["eval_loss"]
        states = [
            value
            for p, state in made[-1].optimizer.state.items()
            if p.ndim == 2 and p.numel() >= 4096 and p.shape[0] != 384  # the embedding
            for key, value in state.items()
            if key in ("exp_avg", "exp_avg_sq", "state1", "state2")
        ]
        assert states
        sizes.append(sum(s.numel() * s.element_size() for s in states))
        embedding = [s for p, s in made[-1].optimizer.state.items() if p.shape[0] == 384]
        assert len(embedding) == (0 if how else 1)
        assert all(s.get("state1", s.get("exp_avg")).dtype == torch.float32 for s in embedding)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
    assert sizes[0] == 4 * sizes[1]


@pytest.mark.parametrize("how", [{}, {"lora__rank": 32, "model__quantize": "4bit"}])
def test_a_run_with_eight_bits_resumes_bit_for_bit(
    settings: Settings, sft_file: Path, wide_model: Path, how: dict[str, Any]
) -> None:
    common = {"data__train": [str(sft_file)], "model__path": str(wide_model), "optim__optimizer": "adamw8bit", **how}
    flags = settings("run", **common, optim__epochs=3, run__save_every=4, run__keep=9)
    whole = trained(flags)
    shutil.copytree(whole.final, whole.out.with_name("whole"))
    for name in ("final", "checkpoints/step-8", "checkpoints/step-9"):
        shutil.rmtree(whole.out / name)
    again = trained(flags, **{"run.resume": True})
    assert read_metrics(again.out)[-1]["resumed_from"] == 4
    assert_same_weights(again.final, whole.out.with_name("whole"))


def test_a_reward_model_trains_with_eight_bits(settings: Settings, pairs_file: Path, wide_model: Path) -> None:
    common = {"data__train": [str(pairs_file)], "data__eval": [str(pairs_file)], "model__path": str(wide_model)}
    flags = settings("rm", **common, optim__optimizer="adamw8bit", optim__epochs=4)
    assert read_metrics(reward.run(load_config(RmConfig, flags=flags)).out)[-1]["eval_accuracy"] == 1


def test_other_states_than_the_checkpoint_holds_are_refused(settings: Settings, sft_file: Path) -> None:
    """As `auto` would mean them on another device."""
    flags = settings("run", data__train=[str(sft_file)], run__save_every=1)
    out = trained(flags).out
    shutil.rmtree(out / "final")
    path = next(out.glob("checkpoints/step-3")) / "state.json"
    path.write_text(path.read_text().replace('"optimizer": "adamw"', '"optimizer": "paged_adamw8bit"'))
    with pytest.raises(CheckpointError, match=r"holds the states of paged_adamw8bit, and optim\.optimizer is adamw"):
        trained(flags, **{"run.resume": True})


def test_paging_on_a_cpu_is_refused_before_anything_is_read(settings: Settings) -> None:
    flags = settings("run", data__train=["absent.jsonl"], optim__optimizer="paged_adamw8bit")
    with pytest.raises(ConfigError, match=r"optim\.optimizer: paging has no effect on a cpu device") as error:
        trained(flags)
    assert error.value.hint == "the same states without it: --optimizer adamw8bit"
    assert not Path(flags["run.out"]).exists()


@pytest.mark.parametrize(
    ("wanted", "device", "quantized", "sharded", "chosen"),
    [
        ("auto", "cpu", True, False, "adamw"),
        ("auto", "cuda", False, False, "adamw"),
        ("auto", "cuda", True, False, "paged_adamw8bit"),
        ("auto", "cuda", True, True, "adamw"),
        ("adamw", "cuda", True, False, "adamw"),
        ("adamw8bit", "cuda", False, False, "adamw8bit"),
    ],
)
def test_what_is_chosen_where(wanted: Any, device: str, quantized: bool, sharded: bool, chosen: str) -> None:
    assert choose_optimizer(wanted, torch.device(device), quantized=quantized, sharded=sharded) == chosen


@pytest.mark.parametrize(
    ("wanted", "device", "sharded", "words"),
    [
        ("adamw8bit", "cuda", True, "adamw8bit keeps its states in blocks that FSDP and DeepSpeed cannot shard"),
        ("paged_adamw8bit", "cuda", True, "cannot shard"),
        ("paged_adamw8bit", "mps", False, "paging has no effect on a mps device"),
    ],
)
def test_what_is_refused_where(wanted: Any, device: str, sharded: bool, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_optimizer(wanted, torch.device(device), quantized=False, sharded=sharded)
