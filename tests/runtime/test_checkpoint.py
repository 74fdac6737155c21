"""Checkpoints are whole or absent, and a run that goes on from one says what it cannot go on from."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import read_metrics, write_jsonl
from safetensors.torch import load_file

from rlhfkit.config.load import dump_config, load_config
from rlhfkit.config.stages import STAGES, SftConfig
from rlhfkit.errors import CheckpointError, ConfigError
from rlhfkit.runtime.checkpoint import checkpoint_folders
from rlhfkit.runtime.run import Run, StageResult
from rlhfkit.runtime.settings import check_folder
from rlhfkit.stages import sft

Flags = dict[str, Any]
STEPS = 9  # of the run below


def train(flags: Flags, **changes: Any) -> StageResult:
    return sft.run(load_config(SftConfig, flags={**flags, **changes}))


@pytest.fixture
def flags(settings: Callable[..., Flags], sft_file: Path) -> Flags:
    return settings("run", data__train=[str(sft_file)], optim__epochs=3, run__save_every=2, run__keep=9)


@pytest.fixture
def out(flags: Flags) -> Path:
    return Path(flags["run.out"])


class Killed(BaseException):
    """Ends a run as a power cut would: nothing of ours catches it."""


def die_in_step(flags: Flags, step: int) -> None:
    """Train until the metrics of ``step`` are written, then die before anything else is."""
    real = Run.record

    def record(self: Run, metrics: dict[str, Any]) -> None:
        real(self, metrics)
        if metrics["step"] == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "record", record)
        with pytest.raises(Killed):
            train(flags)


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    return set(first) == set(second) and all(first[name].equal(second[name]) for name in first)


def names(out: Path) -> list[str]:
    return [folder.name for folder in checkpoint_folders(out)]


def test_folders_are_ordered_by_step_and_only_whole_ones_count(tmp_path: Path) -> None:
    for name in ("step-2", "step-10", ".partial-step-11", "step-12", "step-x", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("step-2", "step-10", ".partial-step-11", "step-x", "other"):
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    assert names(tmp_path) == ["step-2", "step-10"]
    assert names(tmp_path / "absent") == []


def test_a_run_that_died_goes_on_from_its_newest_whole_checkpoint(flags: Flags, out: Path) -> None:
    whole = train({**flags, "run.out": f"{out}-whole"})
    die_in_step(flags, 7)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 0.')  # the line that was being written
    shutil.copytree(out / "checkpoints/step-2", out / "checkpoints/.partial-step-8")
    shutil.copytree(out / "checkpoints/step-2", out / "checkpoints/.partial-step-1")  # it was being deleted
    (out / "checkpoints/step-8").mkdir()
    resumed = train(flags, **{"run.resume": True})
    assert same_weights(resumed.final, whole.final)
    rows, expected = read_metrics(out), read_metrics(whole.out)
    assert rows[-1]["resumed_from"] == 6
    assert not [p for p in (out / "checkpoints").iterdir() if p.name.startswith(".")]
    for name in ("step", "loss", "grad_norm", "lr", "tokens_total"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    assert [row["step"] for row in rows[:-1]] == list(range(1, STEPS + 1))


def test_samples_after_the_checkpoint_are_dropped(flags: Flags, out: Path) -> None:
    flags |= {"data.eval": flags["data.train"], "run.eval_every": 3, "run.save_every": 3}
    whole = train({**flags, "run.out": f"{out}-whole"})
    die_in_step(flags, 6)  # evaluated, not yet saved
    train(flags, **{"run.resume": True})
    written = [(path / "samples.jsonl").read_text() for path in (out, whole.out)]
    assert written[0] == written[1]
    assert {json.loads(line)["step"] for line in written[0].splitlines()} == {0, 3, 6, 9}


def test_before_the_first_checkpoint_it_starts_again_and_says_so(
    flags: Flags, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags |= {"data.eval": flags["data.train"]}
    die_in_step(flags, 1)
    assert [row["step"] for row in read_metrics(out)] == [0, 1]
    train(flags, **{"run.resume": True})
    assert f"no checkpoint in {out} yet: starting from the beginning" in capfd.readouterr().err
    rows = read_metrics(out)
    assert [row["step"] for row in rows[:-1]] == list(range(STEPS + 1))
    assert rows[-1]["resumed_from"] is None


def test_resume_where_nothing_is_yet(flags: Flags, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(flags, **{"run.resume": True})
    assert f"no checkpoint in {out} yet: starting from the beginning" in capfd.readouterr().err
    assert len(read_metrics(out)) == STEPS + 1


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("state.json", b'{"step": 6, "fing', "JSONDecodeError"),
        ("state.json", b"", "JSONDecodeError"),
        ("optimizer.bin", b"", "EOFError"),
        ("trained-0.safetensors", b"\x00\x00", "SafetensorError"),
        ("trained-0.safetensors", None, "FileNotFoundError"),
    ],
    ids=("state-cut", "state-empty", "optimizer", "weights", "weights-absent"),
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_works(
    flags: Flags, out: Path, file: str, damage: bytes | None, words: str
) -> None:
    die_in_step(flags, 7)
    folder = out / "checkpoints/step-6"
    if damage is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(damage)
    with pytest.raises(CheckpointError) as error:
        train(flags, **{"run.resume": True})
    assert error.value.message.startswith(f"{folder} cannot be read: {words}")
    assert error.value.hint == "delete this folder to go on from the checkpoint before it"
    shutil.rmtree(folder)
    train(flags, **{"run.resume": True})
    assert read_metrics(out)[-1]["resumed_from"] == 4


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "file write failed"),
    ],
    ids=("os", "torch"),
)
def test_a_full_disk_keeps_the_older_checkpoint(flags: Flags, out: Path, fault: Exception, words: str) -> None:
    whole = train({**flags, "run.out": f"{out}-whole"})
    flags["run.keep"] = 1
    real = Accelerator.save_state

    def save_state(self: Accelerator, folder: str, *rest: Any) -> Any:
        saved = real(self, folder, *rest)
        if folder.endswith("step-6"):
            raise fault
        return saved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "save_state", save_state)
        with pytest.raises(CheckpointError) as error:
            train(flags)
    assert error.value.message == f"checkpoint of step 6 could not be written to {out}/checkpoints: {fault}"
    assert words in error.value.message
    assert error.value.hint == "step-4 is intact; make room and go on with --resume"
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-4"]
    resumed = train(flags, **{"run.resume": True})
    assert read_metrics(out)[-1]["resumed_from"] == 4
    assert same_weights(resumed.final, whole.final)


def test_a_full_disk_at_the_first_checkpoint(flags: Flags, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_state(*_: Any) -> None:
        raise RuntimeError("unexpected pos 29248 vs 29136")  # what torch says of it

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    words = "checkpoint of step 2 could not be written to .*: the disk is full: unexpected pos"
    with pytest.raises(CheckpointError, match=words) as error:
        train(flags)
    assert error.value.hint == "make room and start again"
    assert list((out / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(1, 2, ["step-9"]), (2, 4, ["step-8", "step-9"]), (3, 1, ["step-7", "step-8", "step-9"]), (2, 0, ["step-9"])],
)
def test_keep_leaves_the_newest(flags: Flags, out: Path, keep: int, every: int, left: list[str]) -> None:
    train(flags, **{"run.keep": keep, "run.save_every": every})
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == left


def test_other_data_is_refused(flags: Flags, out: Path, sft_file: Path) -> None:
    die_in_step(flags, 5)
    rows = [json.loads(line) for line in sft_file.read_text().splitlines()]
    write_jsonl(sft_file, [*rows[:-1], {**rows[-1], "response": "it was another film"}])
    with pytest.raises(CheckpointError) as error:
        train(flags, **{"run.resume": True})
    assert error.value.message == (
        f"the training data is not what it was when {out}/checkpoints/step-4 was written"
    )  # fmt: skip
    assert error.value.hint == "restore the data files, or start a new run with another --out"
    write_jsonl(sft_file, rows)
    train(flags, **{"run.resume": True})


def test_what_changes_no_weights_may_change(flags: Flags, out: Path) -> None:
    whole = train({**flags, "run.out": f"{out}-whole"})
    die_in_step(flags, 5)
    resumed = train(flags, **{"run.resume": True, "run.keep": 1, "run.save_every": 0, "run.log_every": 3})
    assert same_weights(resumed.final, whole.final)


def test_a_longer_schedule_is_refused(flags: Flags) -> None:
    die_in_step(flags, 5)
    with pytest.raises(ConfigError, match=r"another result: optim\.epochs: 3\.0 -> 4\.0"):
        train(flags, **{"run.resume": True, "optim.epochs": 4})


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rloo"])
def test_the_patience_with_a_reward_server_may_differ(stage: str, settings: Callable[..., Flags], out: Path) -> None:
    url: dict[str, Any] = {f"{stage}__reward": ["http://127.0.0.1:1/score"], "data__train": ["prompts.jsonl"]}
    url |= {f"{stage}__max_new_tokens": 8, "optim__batch_size": 8}
    before, after = (
        load_config(STAGES[stage], flags={**settings("run", **url, **more), "run.resume": bool(more)})
        for more in ({}, {f"{stage}__reward_timeout": 5.0, f"{stage}__reward_retries": 9})
    )
    out.mkdir(exist_ok=True)
    (out / "config.resolved.yaml").write_text(dump_config(before))
    check_folder(after, out)
    changed = load_config(STAGES[stage], flags={**settings("run", **url), "run.resume": True, f"{stage}.kl_coef": 0.3})
    with pytest.raises(ConfigError, match=rf"{stage}\.kl_coef: \S+ -> 0\.3"):
        check_folder(changed, out)
