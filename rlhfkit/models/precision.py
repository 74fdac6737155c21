"""Number formats: what the hardware is fast at, and what weights are held in."""

from __future__ import annotations

from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

Resolved = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def current_device() -> torch.device:
    """This process's device, after joining the other processes if there are any."""
    # PartialState alone does not look at what `accelerate launch --cpu` says; Accelerator, made later, does.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device


def resolve_precision(wanted: str, device: torch.device) -> Resolved:
    """``auto`` is bf16 on GPUs and CPUs that compute in it, fp16 on older GPUs, else fp32."""
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bf16"
    return "fp32"


def _cpu_has_bf16() -> bool:
    # Without AMX or AVX512-BF16 the CPU emulates bf16, slower than float32.
    probe = getattr(torch.cpu, "get_capabilities", None)
    if probe is not None:
        found = probe()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return False
