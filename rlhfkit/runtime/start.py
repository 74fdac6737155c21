"""How a run begins: devices, number format, seed and run folder; or that it is finished already."""

from __future__ import annotations

import json
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
    set_seed,
)

from rlhfkit.config.stages import StageConfig
from rlhfkit.errors import ConfigError
from rlhfkit.models.precision import current_device, resolve_precision
from rlhfkit.runtime.allocator import keep_freed_memory
from rlhfkit.runtime.checkpoint import save_only_what_trains
from rlhfkit.runtime.optim import choose_optimizer
from rlhfkit.runtime.records import json_lines
from rlhfkit.runtime.run import Run, StageResult
from rlhfkit.runtime.screen import Screen, quiet_libraries
from rlhfkit.runtime.settings import check_folder
from rlhfkit.runtime.trackers import check_trackers


def start_run(config: StageConfig) -> Run:
    """Devices, number format, seed and run folder.

    Raises:
        ConfigError: the folder holds a run already, or a resume with other settings.
    """
    quiet_libraries()
    out = Path(config.out)
    trackers = [t for t in config.run.trackers if t != "none"]
    check_trackers(trackers)
    # Knows the device before the number format is chosen, which can be chosen only once in a process.
    device = current_device()
    if device.type == "cpu":
        keep_freed_memory()
    precision = resolve_precision(config.model.precision, device)
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("model.precision: fp16 does not train on a CPU", hint="give --precision bf16 or fp32")
    AcceleratorState._reset_state()  # stages may follow each other in one process, as in `rlhfkit demo`
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=trackers or None,
        project_dir=str(out),
        # Our buffers are constants. Broadcasting them at each pass would hang processes with fewer passes than others.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if device.type == "cpu" and accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # PyTorch shards on CPUs too; Accelerate asks for it on GPUs only.
        plugin = FullyShardedDataParallelPlugin()
        if precision != "fp32":
            plugin.set_mixed_precision(precision)
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # DeepSpeed wants to know batches beforehand. Ours differ from step to step, and are summed, not averaged.
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            raise ConfigError(
                "DeepSpeed's ZeRO stage 3 does not work with how these stages call their models: losses become NaN",
                hint="use ZeRO stage 1 or 2, or shard the weights with FSDP2: docs/distributed.md",
            )
        settings = plugin.deepspeed_config
        settings.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
        settings["gradient_clipping"] = config.optim.max_grad_norm
    screen = Screen(accelerator.is_main_process, config.run.view)
    run = Run(config=config, accelerator=accelerator, screen=screen, precision=precision, out=out)
    # Refused now rather than when data and model are read.
    quantized = config.model.quantize != "none"
    optimizer = choose_optimizer(config.optim.optimizer, device, quantized=quantized, sharded=run.sharded)
    run.chosen |= {**config.chosen, "model.precision": precision, "optim.optimizer": optimizer}
    check_folder(config, out)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    # The same on every process: all build the same new weights. Data order and sampling have seeds of their own.
    set_seed(config.run.seed)
    save_only_what_trains(accelerator)
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    screen.line(f"rlhfkit {config.stage}: {accelerator.device.type}, {precision}{processes}, run folder {out}")
    return run


def finished_result(config: StageConfig) -> StageResult | None:
    """The result of a run that is finished already, when it is asked to resume."""
    out = Path(config.out)
    check_folder(config, out)
    metrics = out / "metrics.jsonl"
    if not (config.run.resume and metrics.is_file() and (out / "final").is_dir()):
        return None
    lines = json_lines(metrics)
    try:
        end = json.loads(lines[-1]) if lines and '"event": "end"' in lines[-1] else None
    except json.JSONDecodeError:  # killed in the middle of the line
        end = None
    if end is None:
        return None
    Screen(os.environ.get("RANK", "0") == "0", config.run.view).line(f"{out} is finished already: {out / 'final'}")
    return StageResult(out, out / "final", end)
