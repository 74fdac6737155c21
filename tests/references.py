"""Where the references of the original code lie beside the checkout, and the generator of their checkpoints."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[2] / "shared" / "data"
LEGACY, TOKENIZERS = SHARED / "legacy", SHARED / "tokenizers"
PRESENT = (LEGACY / "make_legacy.py").is_file() and TOKENIZERS.is_dir()


@lru_cache
def generator() -> Any:
    """The module that writes the checkpoints."""
    spec = importlib.util.spec_from_file_location("make_legacy", LEGACY / "make_legacy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
