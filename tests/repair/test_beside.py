"""What a killed process leaves beside a folder goes with the next one; what a living one writes stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfkit.repair.beside import UNFINISHED, beside

KILLED = """
import os, signal, sys
from pathlib import Path
from rlhfkit.repair.beside import beside

with beside(Path(sys.argv[1]), 0) as new:
    (new / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def unfinished(folder: Path) -> list[Path]:
    return sorted(folder.glob(f".*{UNFINISHED}"))


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    dst = tmp_path / "model[1]"
    assert subprocess.run([sys.executable, "-c", KILLED, str(dst)]).returncode == -9
    (left,) = unfinished(tmp_path)
    other = left.with_name(left.name.replace("model[1]", "model[1]2"))
    other.mkdir()
    with beside(dst, 0) as new:
        (new / "weights").write_text("whole")
        assert unfinished(tmp_path) == sorted([new, other])  # of another destination, which nobody asked about
        with beside(dst, 0) as second:  # of a process that lives
            assert new.is_dir()
            assert str(os.getpid()) in second.name
    assert (dst / "weights").read_text() == "whole"
    assert unfinished(tmp_path) == [other]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def stopped() -> None:
        with beside(tmp_path / "model", 0) as new:
            (new / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not [*tmp_path.iterdir()]
