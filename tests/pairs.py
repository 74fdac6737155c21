"""Command lines that run on two processes, many of them in little time: see `killing`, which is about one process.

with pair_of_processes(folder) as run:
    status, said = run("ppo", "--model", ...)
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

from killing import run_command, speak_into

TIMEOUT = 300.0  # seconds that one command line may take
RunPair = Callable[..., tuple[list[int], str]]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@contextmanager
def pair_of_processes(folder: Path) -> Iterator[RunPair]:
    """A function that runs a command line on two processes; gives their exit statuses and what they said.

    ``env`` is added to their environment; ``folder`` takes what they print.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Without a buffer: what is read ahead is seen by no `select`.
    parent = subprocess.Popen([sys.executable, __file__], stdin=PIPE, stdout=PIPE, env=env, bufsize=0)
    assert parent.stdin is not None
    assert parent.stdout is not None
    stdin, stdout, count = parent.stdin, parent.stdout, 0

    def run(*words: str, env: Mapping[str, str] | None = None) -> tuple[list[int], str]:
        nonlocal count
        count += 1
        logs = [folder / f"pair-{count}-{rank}.log" for rank in range(2)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"words": words, "env": dict(env or {}), "port": port, "logs": [str(p) for p in logs], "at": os.getcwd()}
        stdin.write(json.dumps(job).encode() + b"\n")
        pids = json.loads(stdout.readline())
        ended = select.select([stdout], [], [], TIMEOUT)[0]
        if not ended:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        statuses = json.loads(stdout.readline())
        said = "\n".join(path.read_text() for path in logs)
        assert ended, f"the processes hang: {said}"
        return statuses, said

    try:
        yield run
    finally:
        stdin.close()
        parent.wait(TIMEOUT)


# -- this file run as a program: it imports everything once, and forks -------------------------------------------------


def _serve() -> None:
    import torch

    import rlhfkit.stages.ppo
    import rlhfkit.stages.sft  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        pids = [os.fork() or _run(job, rank) for rank in range(2)]
        print(json.dumps(pids), flush=True)
        statuses = dict.fromkeys(pids, 0)
        for _ in pids:
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid]:  # as torch's launcher does: the other would wait for it for ever
                for other in pids:
                    if other != pid and not statuses[other]:
                        os.kill(other, signal.SIGTERM)
                        os.kill(other, signal.SIGKILL)
        print(json.dumps(list(statuses.values())), flush=True)


def _run(job: dict[str, Any], rank: int) -> int:
    """The life of one of two processes."""
    speak_into(job["logs"][rank], job["at"])
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": job["port"]}
    os.environ |= {k: str(v) for k, v in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", **job["env"]}
    run_command(job["words"])


if __name__ == "__main__":
    _serve()
