"""Command lines on FSDP2 over CPUs, one after the other in the same processes: a program for torch's launcher.

Accelerate shards on GPUs only; PyTorch does so anywhere. What Accelerate would read off its configuration file stands
in the environment, and its state is told afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def shard_on_cpus() -> None:
    real = Accelerator.__init__

    def init(self: Accelerator, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP

    Accelerator.__init__ = init  # type: ignore[method-assign]
    # The end of one command line is not the end of the processes.
    PartialState.destroy_process_group = lambda self, group=None: None  # type: ignore[method-assign]


def main() -> None:
    from rlhfkit.cli import main as command

    torch.set_num_threads(1)
    os.environ.update(ENVIRONMENT)
    shard_on_cpus()
    for words in json.loads(sys.argv[1]):
        sys.argv = ["rlhfkit", *words]
        try:
            command()
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main()
