"""Which files of a model folder a repair may copy, and why a model needs them. Weights are never among them."""

from __future__ import annotations

import ast
from fnmatch import fnmatchcase
from pathlib import Path

_WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
)
VOCABULARY = (
    "*.tiktoken",
    "*.model",
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)
_COPIED = (
    (("*.py",), "model code that auto_map or an import names"),
    (("*.cpp", "*.cu", "*.cuh", "*.h"), "kernels that the code compiles; no save writes them"),
    (VOCABULARY, "the vocabulary: no tokenizer loads without it"),
    (("tokenizer_config.json",), "tokenizer class and flags"),
    (("special_tokens_map.json",), "special tokens, for transformers 4"),
    (("chat_template.jinja", "chat_template.json"), "the format of a conversation"),
    (("generation_config.json",), "chat format, stop ids and sampling values"),
    (("*license*", "*licence*", "*notice*", "copying*", "use_policy*", "*许可*"), "the terms travel with the weights"),
)


def reason_to_copy(name: str) -> str | None:
    """Why a repaired folder needs this file of the original; None when it is none of a repair's business."""
    lower = name.lower()
    if any(fnmatchcase(lower, pattern) for pattern in _WEIGHTS):
        return None
    return next((why for patterns, why in _COPIED if any(fnmatchcase(lower, pattern) for pattern in patterns)), None)


def is_vocabulary(name: str) -> bool:
    """Whether a file holds (part of) a tokenizer's vocabulary."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in VOCABULARY)


def imported_files(path: Path) -> set[str]:
    """Files that a code file imports from its own folder, by reading its text; ``__init__.py`` where it imports the
    folder itself (``from . import name``)."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return set()
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            modules |= {node.module} if node.module else {"__init__", *(alias.name for alias in node.names)}
    return {f"{module.split('.')[0]}.py" for module in modules}
