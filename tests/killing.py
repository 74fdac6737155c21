"""Runs of the command line that are killed, many of them in little time.

A process that imports torch takes seconds to start. The nursery imports it once and forks: each child runs one command
line as a process of its own would, and can be killed while its memory and its files are in any state.

    with nursery() as start:
        child = start("sft", "--model", ...)
        child.kill_after(seconds=0.1)
"""

from __future__ import annotations

import builtins
import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from subprocess import PIPE
from tempfile import TemporaryDirectory
from typing import IO, Any, NoReturn

from safetensors.torch import load_file

TIMEOUT = 300.0  # seconds that one command line may take
FILE_CALLS = ("mkdir", "replace", "fsync", "rmdir", "unlink")  # of `os`; shutil.rmtree is made of the last two

PRELOADED = (  # what the commands import when they need it
    "accelerate.utils.fsdp_utils", "datasets", "peft", "rlhfkit.stages.ppo", "rlhfkit.stages.reward",
    "rlhfkit.stages.score", "rlhfkit.stages.sft", "transformers.models.llama.modeling_llama",
)  # fmt: skip


@dataclass
class Child:
    """A command line that runs in a forked process."""

    pid: int
    log: Path  # its standard output and error
    says: IO[bytes]  # the nursery's pipe

    def ended(self, seconds: float = TIMEOUT) -> int | None:
        """Its exit status, negative after a signal; None if it still runs then."""
        return int(self.says.readline()) if select.select([self.says], [], [], seconds)[0] else None

    def kill(self) -> None:
        """Kill it and whatever it has started."""
        with suppress(ProcessLookupError):  # it has no group of its own yet, or has ended
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


Start = Callable[..., Child]


@contextmanager
def nursery(folder: Path) -> Iterator[Start]:
    """A function that starts a command line in a child; ``folder`` takes what children print.

    ``die_at=n`` has the child kill itself at its n-th call that changes a file system, before the call is made.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Without a buffer: what is read ahead is seen by no `select`.
    parent = subprocess.Popen([sys.executable, __file__], stdin=PIPE, stdout=PIPE, env=env, bufsize=0)
    assert parent.stdin is not None
    assert parent.stdout is not None
    stdin, stdout, count = parent.stdin, parent.stdout, 0

    def start(*words: str, die_at: int = 0) -> Child:
        nonlocal count
        count += 1
        log = folder / f"child-{count}.log"
        job = {"words": words, "die_at": die_at, "log": str(log), "at": os.getcwd()}
        stdin.write(json.dumps(job).encode() + b"\n")
        return Child(int(stdout.readline()), log, stdout)

    try:
        yield start
    finally:
        stdin.close()
        parent.wait(TIMEOUT)


def last_step(out: Path) -> int:
    """The last step that stands in a run's metrics; -1 if none does."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return max((json.loads(line).get("step", -1) for line in lines[-1:]), default=-1)


def kill_at_random(
    start: Start, words: list[str], out: Path, *, steps: int, kills: int, seed: int, within: float = 0.06
) -> list[str]:
    """Run a command line with ``--resume`` over and over, killed up to ``within`` seconds after random steps; then let
    it end. Returns what was killed when, for the message of a failing test.

    Args:
        start: from `nursery`.
        words: the command line, ``--out`` among them.
        out: its run folder.
        steps: steps of the whole run.
        kills: how often it is killed.
        seed: of the moments.
        within: seconds; more than writing a checkpoint takes.
    """
    draw = random.Random(seed)
    # The first may fall in the loading of the model, the others in steps or what follows them.
    targets = [-1, *sorted(draw.sample(range(steps - 1), kills - 1))]
    moments = []
    for target in targets:
        delay = draw.uniform(0, within if target >= 0 else 1.0)
        with TemporaryDirectory() as kept:
            before = Path(kept) / "before"
            if out.exists():
                shutil.copytree(out, before, symlinks=True)
            while not _killed(start, words, out, target, delay):
                # Too late: a quick machine had ended the run. That life is taken back, the next is killed earlier.
                shutil.rmtree(out)
                if before.exists():
                    shutil.copytree(before, out, symlinks=True)
                delay /= 2
        moments.append(f"{delay:.4f} s after step {target}: {left_behind(out)}")
    finish(start, words)
    return moments


def _killed(start: Start, words: list[str], out: Path, target: int, delay: float) -> bool:
    """One life, killed ``delay`` seconds after a step; False if it had ended well before that."""
    child = start(*words, "--resume")
    deadline = time.monotonic() + TIMEOUT
    status = None
    while last_step(out) < target and status is None:
        status = child.ended(0.002)
        assert time.monotonic() < deadline, child.log.read_text()
    if status is None:
        time.sleep(delay)
        child.kill()
        status = child.ended()
    assert status in (0, -signal.SIGKILL), f"ended with {status}, {left_behind(out)}: {child.log.read_text()}"
    return status != 0


def kill_at_every_file_call(start: Start, words: list[str], out: Path, *, most: int = 200) -> int:
    """Run a command line with ``--resume`` over and over, the n-th time killed at its n-th call that changes the file
    system, until it ends. Returns how often it was killed."""
    for n in range(1, most):
        child = start(*words, "--resume", die_at=n)
        status = child.ended()
        if status == 0:
            return n - 1
        assert status == -signal.SIGKILL, f"life {n} ended with {status} ({left_behind(out)}): {child.log.read_text()}"
    raise AssertionError(f"killed {most} times and not done: {left_behind(out)}")


def finish(start: Start, words: list[str]) -> None:
    """Let it run to its end."""
    child = start(*words, "--resume")
    status = child.ended()
    if status is None:
        child.kill()
    assert status == 0, f"ended with {status}: {child.log.read_text()}"


def left_behind(out: Path) -> str:
    """The newest metrics and the checkpoint folders of a run."""
    return f"step {last_step(out)}, {sorted(p.name for p in (out / 'checkpoints').glob('*'))}"


def assert_same_weights(a: Path, b: Path) -> None:
    """All safetensors files of two folders, bit for bit."""
    files = [sorted(p.relative_to(x) for p in x.rglob("*.safetensors")) for x in (a, b)]
    assert files[0] == files[1] != []
    for name in files[0]:
        first, second = load_file(a / name), load_file(b / name)
        assert set(first) == set(second)
        differing = [key for key in first if not first[key].equal(second[key])]
        assert not differing, f"{name}: {len(differing)} of {len(first)} tensors differ, {differing[0]} first"


# -- the nursery itself: this file run as a program --------------------------------------------------------------------


def _serve() -> None:
    import torch

    for name in PRELOADED:
        import_module(name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(job)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(job: dict[str, Any]) -> None:
    """The life of a child."""
    os.setsid()
    speak_into(job["log"], job["at"])
    if job["die_at"]:
        _die_at(job["die_at"])
    run_command(job["words"])


def speak_into(path: str, folder: str) -> None:
    """In a forked child: nothing to read, all output into a file, and a working directory of its own."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for here, there in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(here, there)
    os.chdir(folder)


def run_command(words: list[str]) -> NoReturn:
    """In a forked child: a command line as a process of its own would run it, to the end of the process."""
    from rlhfkit.cli import main

    sys.argv = ["rlhfkit", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_at(n: int) -> None:
    left = n

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            if real is not io_open or set("wax") & set(str(options.get("mode", args[1] if len(args) > 1 else "r"))):
                left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    io_open = io.open
    for name in FILE_CALLS:
        setattr(os, name, dying(getattr(os, name)))
    io.open = builtins.open = dying(io_open)  # pathlib uses the one, most others use the other


if __name__ == "__main__":
    _serve()
