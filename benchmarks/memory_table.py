"""The tables of docs/memory.md and docs/cookbook.md: what `--plan` computes for models of several sizes on one GPU.

    python benchmarks/memory_table.py
    python benchmarks/memory_table.py --recipes

No weights and no GPU are needed: each model is a folder with the config.json of its shape and the tokenizer of the
bundled model, whose ids do not matter to memory. How near the planner comes to real peaks: benchmarks/plan.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhfkit.chat.messages import Message
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import STAGES
from rlhfkit.data.batch import TokenRow
from rlhfkit.data.records import PromptRecord
from rlhfkit.data.tokenize import PairRow, PromptRow
from rlhfkit.runtime.screen import quiet_libraries
from rlhfkit.stages.common import open_text_side
from rlhfkit.stages.memory import GIB, estimate

BUNDLED = Path(__file__).parents[1] / "rlhfkit" / "assets" / "demo" / "model"
CUDA = torch.device("cuda")

Shape = dict[str, Any]
SHAPES: dict[str, Shape] = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen2.5-1.5B": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "Baichuan2-7B": {  # as it is converted
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 125696, "tie_word_embeddings": False,
    },
    "LLaMA-3-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = {"qwen2.5-7b": "Qwen2.5-7B", "llama3-8b": "LLaMA-3-8B", "baichuan2-7b": "Baichuan2-7B"}  # folder: shape
RANK = 16
FORMS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"lora.rank": RANK},
    "QLoRA": {"lora.rank": RANK, "model.quantize": "4bit"},
}
# Full micro-batches of the longest rows there may be.
ALL = {
    "model.precision": "bf16", "data.max_length": 1024, "data.train": ["rows"],
    "optim.micro_batch_tokens": 2048, "optim.gradient_checkpointing": True,
}  # fmt: skip
ANSWERS = {"ppo.max_new_tokens": 256, "ppo.max_prompt_length": 256}


def model_folder(where: Path, shape: Shape) -> Path:
    """A folder like the model's, without weights."""
    where.mkdir(parents=True)
    for path in BUNDLED.glob("tokenizer*"):
        shutil.copy(path, where)
    (where / "config.json").write_text(json.dumps({"max_position_embeddings": 4096, **shape}), encoding="utf-8")
    return where


def adapter_folder(where: Path, base: Path, shape: Shape, stage: str, quantize: str) -> Path:
    """What a LoRA run on that model leaves, its weights a hole of their size."""
    hidden, middle = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    inputs_and_outputs = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + middle)
    where.mkdir(parents=True)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    (where / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (where / "rlhfkit.json").write_text(json.dumps({"stage": stage, "quantize": quantize}), encoding="utf-8")
    with open(where / "adapter_model.safetensors", "wb") as file:
        file.truncate(4 * RANK * inputs_and_outputs * shape["num_hidden_layers"])
    return where


def rows(config: Any) -> list[Any]:
    """64 rows as long as they may be; of a pair's row the prompt is one half, each answer a quarter."""
    if config.stage == "ppo":
        prompt = np.full(config.row_limit, 5, dtype=np.int32)
        return [PromptRow(prompt, PromptRecord("rows:1", (Message("user", "?"),)))] * 64
    longest = config.data.max_length
    ids = np.full(longest, 5, dtype=np.int32)
    if config.stage == "rm":
        return [PairRow(ids[: longest // 2], (ids[: longest // 4],) * 2, 0.0)] * 64
    return [TokenRow(ids, np.arange(longest) >= longest // 4)] * 64


def planned_gib(work: Path, shape: Shape, stage: str, recipe: str | None = None, **settings: Any) -> float:
    """The largest need of a run in GiB, after the stages before it: an SFT adapter goes on, a reward adapter judges."""

    def config(path: object, reward: object) -> Any:
        places = {"model.path": str(path)} | ({"ppo.reward": [str(reward)]} if stage == "ppo" else {})
        return load_config(STAGES[stage], recipe=recipe, flags={**settings, **places})  # type: ignore[type-var]

    with tempfile.TemporaryDirectory(dir=work) as place:
        path = reward = base = model_folder(Path(place, "base"), shape)
        wanted = config(path, reward)
        if wanted.lora.rank and stage != "sft":
            path = adapter_folder(Path(place, "sft"), base, shape, "sft", wanted.model.quantize)
            reward = adapter_folder(Path(place, "rm"), base, shape, "rm", wanted.model.quantize)
        found = config(path, reward)
        source, text = open_text_side(found)
        return estimate(found, source, text, rows(found), CUDA).total / GIB


def recipe_gib(work: Path, recipe: Path) -> float:
    """The same of a recipe of the cookbook."""
    return planned_gib(work, SHAPES[RECIPES[recipe.parent.name]], recipe.stem.rpartition("-")[2], str(recipe))


def print_table(work: Path, names: Sequence[str]) -> None:
    print("| model | weights | sft | rm | ppo |\n|---|---|---:|---:|---:|")
    for name in names:
        for form, settings in FORMS.items():
            needed = [
                planned_gib(work, SHAPES[name], stage, **ALL, **settings, **(ANSWERS if stage == "ppo" else {}))
                for stage in ("sft", "rm", "ppo")
            ]
            print(f"| {name} | {form} | {' | '.join(f'{gib:.1f}' for gib in needed)} |", flush=True)


def print_recipes(work: Path) -> None:
    print("| recipes | sft | rm | ppo |\n|---|---:|---:|---:|")
    for folder in RECIPES:
        needed = [recipe_gib(work, next((EXAMPLES / folder).glob(f"*-{stage}.yaml"))) for stage in ("sft", "rm", "ppo")]
        print(f"| examples/{folder} | {' | '.join(f'{gib:.1f}' for gib in needed)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--recipes", action="store_true", help="the table of docs/cookbook.md instead")
    given = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as work:
        if given.recipes:
            print_recipes(Path(work))
        else:
            print_table(Path(work), [name for name in SHAPES if given.only in name])


if __name__ == "__main__":
    main()
