"""A repair that is killed: until the first rename the folder is as it was, and between two renames it comes back."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from legacy_folders import digest, edit_json, make_original, make_tuned, remove

from rlhfkit.errors import CheckpointError
from rlhfkit.repair.plan import alone, is_interrupted
from rlhfkit.stages.fix_checkpoint import run

STREAMING = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "streaming.py"))
# The repair in a process of its own, which stops dead at a place of its code.
REPAIR = """
import os, signal, sys
from pathlib import Path
from rlhfkit.repair import plan, tensors
from rlhfkit.stages.fix_checkpoint import run

src, dst, place = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
replace, calls = os.replace, []
def second(source, target):
    calls.append(target)
    die() if len(calls) == 2 else replace(source, target)
if place == "streaming":
    tensors.os.fsync = die
elif place == "renaming":
    os.replace = second
elif place == "clearing":
    plan.shutil.rmtree = die
run(src, dst, dry_run=False, yes=True, confirm=None, pad_vocab=64)
"""


def folders(tmp_path: Path) -> tuple[Path, Path]:
    src, dst = make_original(tmp_path / "src", "qwen"), make_tuned(tmp_path / "dst", "qwen")
    remove(dst, "*.py")
    edit_json(dst / "config.json", fp32=True)
    return src, dst


def killed(src: Path, dst: Path, place: str) -> None:
    done = subprocess.run([sys.executable, "-c", REPAIR, str(src), str(dst), place], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_while_writing(tmp_path: Path) -> None:
    src, dst = folders(tmp_path)
    before = digest(dst)
    killed(src, dst, "streaming")
    assert digest(dst) == before
    assert not is_interrupted(dst)
    assert run(src, dst, dry_run=False, yes=True, confirm=lambda q: False, pad_vocab=64).status == "repaired"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_killed_between_two_renames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, dst = folders(tmp_path)
    before = digest(dst)
    killed(src, dst, "renaming")
    assert digest(dst) != before
    assert is_interrupted(dst)
    with pytest.raises(CheckpointError, match="was stopped while files were being exchanged"):
        run(src, dst, dry_run=True, yes=False, confirm=lambda q: False)
    asked: list[dict[str, str]] = []

    def say_no(question: str) -> bool:
        asked.append(digest(dst))
        return False

    assert run(src, dst, dry_run=False, yes=False, confirm=say_no, pad_vocab=64).status == "declined"
    assert asked == [before]
    assert "put back" in capsys.readouterr().out
    assert digest(dst) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_killed_after_the_last_rename(tmp_path: Path) -> None:
    src, dst = folders(tmp_path)
    killed(src, dst, "clearing")
    assert not is_interrupted(dst)
    assert run(src, dst, dry_run=False, yes=True, confirm=lambda q: False, pad_vocab=64).status == "unchanged"
    assert (dst / ".rlhfkit-backup").is_dir()


def test_control_c_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    src, dst = folders(tmp_path)
    before = digest(dst)
    code = REPAIR.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, "-c", code, str(src), str(dst), "renaming"], capture_output=True, text=True)
    assert "every file in" in done.stderr
    assert digest(dst) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_second_repair_of_a_folder_waits(tmp_path: Path) -> None:
    src, dst = folders(tmp_path)
    before = digest(dst)
    with alone(dst), pytest.raises(CheckpointError, match=r"another repair of .* is running"):
        run(src, dst, dry_run=False, yes=True, confirm=lambda q: False)
    assert digest(dst) == before


def test_folder_whose_parent_cannot_be_written_is_repaired_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = folders(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(src, dst, dry_run=False, yes=True, confirm=lambda q: False).status == "repaired"
    assert not [path for path in dst.iterdir() if path.name == ".rlhfkit-repair"]


@pytest.mark.slow
def test_two_gigabytes_are_padded_in_little_memory(tmp_path: Path) -> None:
    """Prints the figure of docs/checkpoints.md."""
    result = STREAMING["measure"](tmp_path, gigabytes=2.0)
    print(json.dumps(result))
    assert result["bytes"] > 2 * 10**9
    assert result["peak_mib"] < 1024
    assert result["grown_mib"] < 256  # of which a whole shard would be 1,000


# Twenty megabytes, a few rows at a time: it takes a second to write them.
SLOWLY = """
import sys
from rlhfkit.repair import tensors
tensors.PIECE = 2048
from rlhfkit.cli import main
sys.argv = ["rlhfkit", "fix-checkpoint", sys.argv[1], sys.argv[1], "--pad-vocab", "64", "--yes"]
main()
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """However far it came, the folder is as it was, or whole; and the next run brings it to the same end."""
    whole = STREAMING["make_checkpoint"](tmp_path / "whole", gigabytes=0.02, hidden=32)
    dst, killed = tmp_path / "dst", []
    for seconds in (0.0, 0.2, 0.5, 1.0, 2.0, 4.0):
        shutil.copytree(whole, dst)
        before = digest(dst)
        command = [sys.executable, "-c", SLOWLY, str(dst)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / ".dst.rlhfkit-repair").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        killed.append(process.wait() == -signal.SIGKILL)
        assert digest(dst) == before or is_interrupted(dst) or (dst / ".rlhfkit-backup").exists()
        result = run(dst, dst, dry_run=False, yes=True, confirm=lambda q: False, pad_vocab=64)
        assert {check.state for check in result.checks} <= {"ok", "warning"}
        assert run(dst, dst, dry_run=False, yes=True, confirm=lambda q: False, pad_vocab=64).status == "unchanged"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "whole"]
        shutil.rmtree(dst)
    assert sum(killed) >= 2, "it was through before it could be killed"
