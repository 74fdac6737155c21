"""A folder is made beside the place that it shall have, and renamed when it is whole."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from rlhfkit.errors import RepairRefusedError

UNFINISHED = ".rlhfkit-new"


@contextmanager
def beside(dst: Path, nbytes: int) -> Iterator[Path]:
    """A new folder beside ``dst`` that is renamed to it at the end, or removed when something goes wrong.

    What a killed process has left there goes first.
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise RepairRefusedError(f"{dst} is there already and not empty", hint="name a new folder as DST")
    dst.parent.mkdir(parents=True, exist_ok=True)
    _sweep(dst)
    free = shutil.disk_usage(dst.parent).free
    if free < nbytes:
        raise RepairRefusedError(
            f"{dst.parent} has {free / 2**30:.1f} GiB free, and {nbytes / 2**30:.1f} GiB are needed",
            hint="free some space, or name a DST on another disk",
        )
    new = Path(tempfile.mkdtemp(prefix=f".{dst.name}.{_here()}-{os.getpid()}.", suffix=UNFINISHED, dir=dst.parent))
    try:
        yield new
        new.chmod(0o777 & ~_umask())
        if dst.is_dir():
            dst.rmdir()
        os.replace(new, dst)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _sweep(dst: Path) -> None:
    """Remove unfinished folders of processes of this machine that are no more."""
    for left in dst.parent.glob(f".{glob.escape(dst.name)}.{_here()}-*{UNFINISHED}"):
        process = left.name.removeprefix(f".{dst.name}.{_here()}-").partition(".")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _here() -> str:
    return "".join(c for c in platform.node() if c.isalnum()) or "here"


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
