"""A checkpoint of 2 GB is converted in the memory of one layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from legacy_folders import edit_json
from legacy_models import make_qwen1

from rlhfkit.repair.folder import Folder
from rlhfkit.repair.stream import Part, Target, TensorReader, write_tensors

HIDDEN, WIDE, LAYERS, ROWS = 2048, 5504, 8, 151936
MEASURED = """
import json, sys, threading, time
from pathlib import Path

peak = 0

def watch():
    global peak
    while True:  # anonymous memory: pages of mapped files can be dropped at any time
        text = Path("/proc/self/status").read_text()
        peak = max(peak, int(text.split("RssAnon:")[1].split()[0]))
        time.sleep(0.02)

from rlhfkit.repair.convert import convert, plan_conversion

plan = plan_conversion(Path(sys.argv[1]))
before = int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
threading.Thread(target=watch, daemon=True).start()
started = time.monotonic()
proof, _ = convert(plan, Path(sys.argv[2]))
print(json.dumps([proof.logits, before / 2**20, peak / 2**20, time.monotonic() - started]))
"""


class Repeated(TensorReader):
    """Rows of any number from a small table: a big checkpoint without big tensors."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        width = int(name.rsplit("x", 1)[1])
        picked = self._values[(torch.arange(start, stop) * 7919) % len(self._values)]
        return picked[:, :width] if width else picked[:, 0]


@pytest.mark.slow
def test_two_gigabytes(tmp_path: Path) -> None:
    src = make_qwen1(
        tmp_path / "src", n_head=16, num_attention_heads=16, num_hidden_layers=LAYERS, vocab_size=ROWS, hidden_size=32
    )
    for path in [*src.glob("*.safetensors"), *src.glob("*.index.json")]:
        path.unlink()
    edit_json(
        src / "config.json", hidden_size=HIDDEN, intermediate_size=2 * WIDE, kv_channels=HIDDEN // 16, bf16=True
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (ROWS, HIDDEN)}
    for i in range(LAYERS):
        p = f"transformer.h.{i}."
        shapes |= {p + "ln_1.weight": (HIDDEN,), p + "ln_2.weight": (HIDDEN,)}
        shapes |= {p + "attn.c_attn.weight": (3 * HIDDEN, HIDDEN), p + "attn.c_attn.bias": (3 * HIDDEN,)}
        shapes |= {p + "attn.c_proj.weight": (HIDDEN, HIDDEN), p + "mlp.c_proj.weight": (HIDDEN, WIDE)}
        shapes |= {p + "mlp.w1.weight": (WIDE, HIDDEN), p + "mlp.w2.weight": (WIDE, HIDDEN)}
    shapes |= {"transformer.ln_f.weight": (HIDDEN,), "lm_head.weight": (ROWS, HIDDEN)}
    values = (torch.randn(4099, WIDE, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    targets = [
        Target(name, shape, torch.bfloat16, (Part(f"x{shape[1] if len(shape) > 1 else 0}", 0, shape[0]),))
        for name, shape in shapes.items()
    ]
    write_tensors(src, targets, Repeated(values))
    assert Folder(src, "SRC").weights.total_size > 1.9e9
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(src), str(tmp_path / "dst")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    logits, before, peak, seconds = json.loads(done.stdout.splitlines()[-1])
    print(f"GiB before: {before:.2f}, at the peak: {peak:.2f}; {seconds:.0f} s")
    assert logits <= 1e-4
    assert peak < 1.0  # GiB, of a checkpoint of two
