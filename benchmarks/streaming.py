"""Peak memory of the commands that rewrite weights, on a synthetic checkpoint.

    python benchmarks/streaming.py --gigabytes 2

Makes a model folder of random bfloat16 weights in 1 GB shards, runs each command in a process of its own and reads that
process's peak resident memory, beside that of a process that only imports what the command needs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMPORTS = "import torch, rlhfkit.stages.fix_checkpoint"


def make_checkpoint(folder: Path, *, gigabytes: float, kind: str = "safetensors", hidden: int = 1024) -> Path:
    """A LLaMA-shaped folder of about this size: an embedding and a head of 151,851 rows, and square layers."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    rows = 151_851
    per_layer = 12 * hidden * hidden * 2
    layers = max(1, int((gigabytes * 1e9 - 2 * rows * hidden * 2) / per_layer) + 1)
    shapes = {
        "model.embed_tokens.weight": (rows, hidden),
        "lm_head.weight": (rows, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (8 * hidden // 3 // 8 * 8, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, 8 * hidden // 3 // 8 * 8)
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > 1e9:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += 2 * int(torch.tensor(shape).prod())
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map, total = {}, 0
    for i, group in enumerate(groups):
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in group.items()}
        file = f"{stem}-{i + 1:05d}-of-{len(groups):05d}.{ending}"
        save_file(tensors, folder / file) if kind == "safetensors" else torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(group, file)
        total += sum(t.numel() * 2 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "intermediate_size": 8 * hidden // 3 // 8 * 8, "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": rows, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peak_of(command: list[str]) -> tuple[float, float]:
    """Peak resident memory in MiB and seconds of a command."""
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024); sys.exit(done.returncode)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout), time.monotonic() - started


def measure(work: Path, *, gigabytes: float, kind: str = "safetensors") -> dict[str, Any]:
    """Pad (or convert and pad) a checkpoint of this size."""
    folder = make_checkpoint(work / kind, gigabytes=gigabytes, kind=kind)
    size = sum(path.stat().st_size for path in folder.iterdir())
    options = ["--pad-vocab", "64", *(["--safetensors"] if kind == "bin" else [])]
    imports, _ = peak_of([sys.executable, "-c", IMPORTS])
    peak, seconds = peak_of(
        [sys.executable, "-m", "rlhfkit", "fix-checkpoint", str(folder), str(folder), *options, "--yes"]
    )
    return {
        "kind": kind, "bytes": size, "peak_mib": round(peak), "imports_mib": round(imports),
        "grown_mib": round(peak - imports), "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for kind in ("safetensors", "bin"):
            print(json.dumps(measure(Path(work), gigabytes=wanted.gigabytes, kind=kind)), flush=True)


if __name__ == "__main__":
    main()
