"""Tiny model folders in the layout of Qwen-1, Baichuan and Baichuan2, and what training runs do to them.

Code files are placeholders that leave a trace when they are run: a repair must never leave one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TRIPWIRE = "RLHFKIT_TEST_TRIPWIRE"
ROWS = 48
HIDDEN = 8
_CODE = '''"""{name}: a placeholder."""
import os
{imports}
open(os.environ["{variable}"], "a").write("{name}")
'''

_QWEN_CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "model_type": "qwen",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "use_flash_attn": "auto",
    "vocab_size": ROWS,
}
_QWEN_GENERATION = {
    "chat_format": "chatml",
    "eos_token_id": 43,
    "pad_token_id": 43,
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
    "transformers_version": "4.31.0",
}
_QWEN_TOKENIZER = {
    "model_max_length": 64,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}


def token(text: str) -> dict[str, Any]:
    """An added token as tokenizer_config.json of old transformers writes it."""
    return {"__type": "AddedToken", "content": text, "lstrip": False, "normalized": True, "rstrip": False}


def _baichuan_config(name: str) -> dict[str, Any]:
    return {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_baichuan.{name}Config",
            "AutoModelForCausalLM": f"modeling_baichuan.{name}ForCausalLM",
        },
        "tokenizer_class": f"{name}Tokenizer",
        "hidden_size": HIDDEN,
        "intermediate_size": 16,
        "model_type": "baichuan",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "vocab_size": ROWS,
    }


def _baichuan_tokenizer(name: str) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "auto_map": {"AutoTokenizer": [f"tokenization_baichuan.{name}Tokenizer", None]},
        "bos_token": token("<s>"),
        "eos_token": token("</s>"),
        "pad_token": token("<unk>"),
        "tokenizer_class": f"{name}Tokenizer",
        "unk_token": token("<unk>"),
    }


_BAICHUAN_GENERATION = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "user_token_id": 45,
    "assistant_token_id": 46,
    "temperature": 0.3,
    "do_sample": True,
}
_TOKENS_MAP = {
    key: {item: value for item, value in token(text).items() if item != "__type"}
    for key, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<unk>"), ("unk_token", "<unk>"))
}

# family -> (config, generation config, tokenizer files, code files with the names they import)
_LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, tuple[str, ...]]]] = {
    "qwen": (
        _QWEN_CONFIG,
        _QWEN_GENERATION,
        {"qwen.tiktoken": b"YQ== 0\nYg== 1\n", "tokenizer_config.json": _QWEN_TOKENIZER},
        {
            "configuration_qwen.py": (),
            "cpp_kernels.py": (),
            "modeling_qwen.py": ("configuration_qwen", "qwen_generation_utils", "cpp_kernels"),
            "qwen_generation_utils.py": (),
            "tokenization_qwen.py": (),
        },
    ),
    "baichuan": (
        _baichuan_config("BaiChuan"),
        _BAICHUAN_GENERATION,
        {
            "tokenizer.model": b"pieces of v1",
            "tokenizer_config.json": _baichuan_tokenizer("BaiChuan"),
            "special_tokens_map.json": _TOKENS_MAP,
        },
        {"configuration_baichuan.py": (), "modeling_baichuan.py": (), "tokenization_baichuan.py": ()},
    ),
    "baichuan2": (
        _baichuan_config("Baichuan"),
        _BAICHUAN_GENERATION,
        {
            "tokenizer.model": b"pieces of v2",
            "tokenizer_config.json": _baichuan_tokenizer("Baichuan"),
            "special_tokens_map.json": _TOKENS_MAP,
        },
        {
            "configuration_baichuan.py": (),
            "generation_utils.py": (),
            "modeling_baichuan.py": ("configuration_baichuan", "generation_utils", "quantizer"),
            "quantizer.py": (),
            "tokenization_baichuan.py": (),
        },
    ),
}


def state_dict(family: str, *, rows: int = ROWS, hidden: int = HIDDEN, layers: int = 2) -> dict[str, torch.Tensor]:
    """Random weights under the names of the original files."""
    random = torch.Generator().manual_seed(rows + hidden + layers)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random)

    if family == "qwen":
        state = {"transformer.wte.weight": tensor(rows, hidden)}
        for layer in range(layers):
            state[f"transformer.h.{layer}.attn.c_attn.weight"] = tensor(3 * hidden, hidden)
            state[f"transformer.h.{layer}.attn.c_attn.bias"] = tensor(3 * hidden)
            state[f"transformer.h.{layer}.mlp.c_proj.weight"] = tensor(hidden, 16)
        state["transformer.ln_f.weight"] = tensor(hidden)
    else:
        state = {"model.embed_tokens.weight": tensor(rows, hidden)}
        for layer in range(layers):
            state[f"model.layers.{layer}.self_attn.W_pack.weight"] = tensor(3 * hidden, hidden)
            if family == "baichuan":
                state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = tensor(hidden // 4)
            state[f"model.layers.{layer}.mlp.down_proj.weight"] = tensor(hidden, 16)
        state["model.norm.weight"] = tensor(hidden)
    state["lm_head.weight"] = tensor(rows, hidden)
    return state


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, *drop: str, **values: Any) -> None:
    """Drop keys of a JSON file and set others."""
    content = {key: value for key, value in read_json(path).items() if key not in drop}
    write_json(path, {**content, **values})


def index_name(kind: str) -> str:
    return "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"


def overwrite(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save_weights(
    folder: Path, state: dict[str, torch.Tensor], *, kind: str = "safetensors", shards: int = 1, index: bool = True
) -> None:
    """One file, or several with the index that loaders need."""
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = list(state)
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{ending}"
        part = {name: state[name] for name in names[shard::shards]}
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1 and index:
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        write_json(folder / index_name(kind), {"metadata": {"total_size": total}, "weight_map": weight_map})


def remove_weights(folder: Path) -> None:
    for pattern in ("*.safetensors", "*.bin", "*.index.json"):
        remove(folder, pattern)


def remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def make_original(folder: Path, family: str, *, weights: bool = True) -> Path:
    """The folder as its authors published it: two shards of the kind that family came in."""
    config, generation, tokenizer, code = _LAYOUTS[family]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    for name, content in tokenizer.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write_json(folder / name, content)
    for name, imports in code.items():
        lines = "\n".join(f"from .{module} import thing" for module in imports)
        (folder / name).write_text(_CODE.format(name=name, imports=lines, variable=TRIPWIRE))
    for name in ("LICENSE", "NOTICE", "kernel.cpp", "kernel.cu", "README.md"):
        (folder / name).write_text(f"{name} of {family}\n")
    if weights:
        save_weights(folder, state_dict(family), kind="safetensors" if family == "qwen" else "bin", shards=2)
    return folder


def make_tuned(folder: Path, family: str, **sizes: int) -> Path:
    """The same model after fine-tuning, whole: one safetensors file, harmless drift in config.json."""
    make_original(folder, family, weights=False)
    (folder / "README.md").unlink()
    edit_json(folder / "config.json", _name_or_path="a-fine-tuned-model", transformers_version="4.37.2")
    save_weights(folder, state_dict(family, **sizes))
    return folder


def prefixed(value: Any) -> Any:
    """An auto_map as transformers 4 saves it after a load by hub id."""
    if isinstance(value, str):
        return f"someone/tuned-model--{value}"
    if isinstance(value, list):
        return [prefixed(item) for item in value]
    return {key: prefixed(item) for key, item in value.items()} if isinstance(value, dict) else value


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pair(tmp_path: Path, family: str, damage: Callable[[Path], None] | None = None, **sizes: int) -> tuple[Path, Path]:
    """An original folder and a fine-tuned one with a given damage."""
    src, dst = make_original(tmp_path / "src", family), make_tuned(tmp_path / "dst", family, **sizes)
    if damage:
        damage(dst)
    return src, dst
