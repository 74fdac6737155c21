"""Each check of the verification goes red on the fault it is for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from legacy_folders import (
    ROWS,
    edit_json,
    pair,
    read_json,
    remove,
    remove_weights,
    save_weights,
    state_dict,
    write_json,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from rlhfkit.repair.folder import Folder
from rlhfkit.repair.verify import PROBE, Check, verify


def checks(src: Path, dst: Path) -> dict[str, Check]:
    return {check.name: check for check in verify(Folder(src, "SRC"), Folder(dst, "DST"))}


def _save_fast_tokenizer(folder: Path, *, shift: int = 0, bos: bool = False) -> None:
    """A whole word-level tokenizer that transformers reads without code of the folder."""
    words = ["<unk>", "<s>", *sorted({piece for piece, _ in Whitespace().pre_tokenize_str(PROBE)})]
    tokenizer = Tokenizer(
        WordLevel({word: (i + shift) % len(words) for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = Whitespace()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})


def _native(tmp_path: Path) -> tuple[Path, Path]:
    """A pair whose tokenizer is data only."""
    src, dst = pair(tmp_path, "qwen")
    for folder in (src, dst):
        remove(folder, "qwen.tiktoken", "*.py")
        edit_json(folder / "config.json", "auto_map", "tokenizer_class", model_type="qwen2")
        _save_fast_tokenizer(folder)
    return src, dst


def test_whole_folder_passes(tmp_path: Path) -> None:
    assert {check.state for check in checks(*pair(tmp_path, "qwen")).values()} == {"ok"}


def _break_index(dst: Path) -> None:
    remove_weights(dst)
    save_weights(dst, state_dict("qwen"), shards=2, index=False)


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "json": (lambda dst: (dst / "tokenizer_config.json").write_text("{"), "JSON files", "in tokenizer_config.json"),
    "vocabulary": (lambda dst: edit_json(dst / "config.json", vocab_size=7), "vocabulary", f"says 7, .* {ROWS} rows"),
    "index": (_break_index, "weight index", "model.safetensors.index.json does not fit the weights"),
    "code": (lambda dst: remove(dst, "tokenization_qwen.py"), "code files", "tokenization_qwen.py is needed"),
    "import": (lambda dst: remove(dst, "cpp_kernels.py"), "code files", "cpp_kernels.py is needed"),
    "tokenizer": (lambda dst: remove(dst, "qwen.tiktoken"), "tokenizer files", "qwen.tiktoken of SRC is absent"),
    "second run": (lambda dst: remove(dst, "LICENSE"), "second run", "would still change LICENSE"),
}


@pytest.mark.parametrize(("damage", "name", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_fault_is_found(tmp_path: Path, damage: Callable[[Path], object], name: str, words: str) -> None:
    src, dst = pair(tmp_path, "qwen")
    damage(dst)
    check = checks(src, dst)[name]
    assert check.state == "failed"
    assert re.search(words, check.detail), check.detail


def test_added_token_beyond_the_rows_is_a_warning(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen")
    added = {str(ROWS): {"content": "<|mine|>"}}
    edit_json(dst / "tokenizer_config.json", added_tokens_decoder=added)
    check = checks(src, dst)["vocabulary"]
    assert check.state == "warning"
    assert f"'<|mine|>' has id {ROWS}, but the embedding ends at row {ROWS - 1}" in check.detail


def test_remote_tokenizer_is_not_encoded(tmp_path: Path) -> None:
    assert "which is not run" in checks(*pair(tmp_path, "qwen"))["probe text"].detail


def test_equal_tokenizers_give_equal_ids(tmp_path: Path) -> None:
    check = checks(*_native(tmp_path))["probe text"]
    assert check.state == "ok"
    assert check.detail.endswith("ids, equal to SRC's")


@pytest.mark.parametrize("change", [{"shift": 1}, {"bos": True}])
def test_other_ids_of_an_own_tokenizer_are_a_warning(tmp_path: Path, change: dict[str, int]) -> None:
    src, dst = _native(tmp_path)
    _save_fast_tokenizer(dst, **change)  # type: ignore[arg-type]
    check = checks(src, dst)["probe text"]
    assert check.state == "warning"
    assert "the ids differ from SRC's" in check.detail
    assert "DST has its own tokenizer.json" in check.detail


def test_tokenizer_that_no_longer_loads_fails(tmp_path: Path) -> None:
    src, dst = _native(tmp_path)
    tokenizer = read_json(dst / "tokenizer.json")
    write_json(dst / "tokenizer.json", {**tokenizer, "model": {"type": "Nonsense"}})
    check = checks(src, dst)["probe text"]
    assert check.state == "failed"
    assert "transformers cannot load the tokenizer" in check.detail
