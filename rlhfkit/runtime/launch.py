"""Several processes on a CPU: ``accelerate launch --cpu --num_processes N -m rlhfkit ...``.

Accelerate leaves CPU processes to mpirun: without it the command starts one process and says nothing about the others
(Accelerate 1.15, ``simple_launcher``). What it meant to start can still be read off: it sets an address for processes
to meet at, and its own command line holds their number. Here that one process becomes torch's launcher of all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from rlhfkit.errors import ConfigError

# Whoever really starts several processes sets one of these: torch's launcher, or an mpirun.
_STARTED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def wanted_cpu_processes(environment: Mapping[str, str], parent: Sequence[str]) -> int:
    """How many CPU processes `accelerate launch` was asked for but did not start; 1 if there is nothing to do.

    Args:
        environment: of this process.
        parent: command line of the process that started this one.

    Raises:
        ConfigError: several are wanted, on several machines or in a number that cannot be found.
    """
    meant = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and "MASTER_ADDR" in environment
    if not meant or any(name in environment for name in _STARTED):
        return 1
    hint = "start them with: ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m rlhfkit ..."
    for word, following in zip(parent, [*parent[1:], ""], strict=True):
        name, equals, value = word.replace("_", "-").partition("=")
        if name == "--num-machines" and (value if equals else following) not in ("", "1"):
            raise ConfigError("accelerate launch starts no CPU processes on several machines by itself", hint=hint)
    for word, following in zip(parent, [*parent[1:], ""], strict=True):
        name, equals, value = word.replace("_", "-").partition("=")
        if name == "--num-processes" and (number := value if equals else following).isdigit():
            return int(number)
    raise ConfigError("accelerate launch was to start several CPU processes, and started one", hint=hint)


def start_cpu_processes() -> None:
    """Turn this process into the launcher of all processes that `accelerate launch --cpu` was asked for."""
    if "ACCELERATE_USE_CPU" not in os.environ:  # the usual case, without a further import
        return
    import psutil

    try:
        parent = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        parent = []
    count = wanted_cpu_processes(os.environ, parent)
    if count > 1:
        # A step is finished and saved after Ctrl-C; torch's launcher would kill the processes after 30 seconds.
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
        port = os.environ.get("MASTER_PORT", "29500")
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", port]
        os.execv(sys.executable, [sys.executable, *launcher, "-m", "rlhfkit", *sys.argv[1:]])
