"""Every refusal, by its words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from legacy_folders import (
    HIDDEN,
    ROWS,
    edit_json,
    make_original,
    make_tuned,
    pair,
    remove,
    remove_weights,
    save_weights,
    state_dict,
    write_json,
)

from rlhfkit.errors import RepairRefusedError
from rlhfkit.repair.fit import refuse_unless_fitting
from rlhfkit.repair.folder import Folder

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


def refusal(src: Path, dst: Path) -> RepairRefusedError:
    with pytest.raises(RepairRefusedError) as caught:
        refuse_unless_fitting(Folder(src, "SRC"), Folder(dst, "DST"))
    return caught.value


def _with_weights(state: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    def damage(dst: Path) -> None:
        remove_weights(dst)
        save_weights(dst, state)

    return damage


def _qwen(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor | None] = {**state_dict("qwen"), **changes}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def test_folders_that_fit_are_not_refused(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen")
    refuse_unless_fitting(Folder(src, "SRC"), Folder(dst, "DST"))


@pytest.mark.parametrize("role", ["SRC", "DST"])
def test_no_folder(tmp_path: Path, role: str) -> None:
    with pytest.raises(RepairRefusedError, match=f"{role} must be a model folder, but .*absent is not there"):
        Folder(tmp_path / "absent", role)
    (tmp_path / "file").touch()
    with pytest.raises(RepairRefusedError, match=f"{role} must be a model folder, but .*file is a file"):
        Folder(tmp_path / "file", role)


def test_same_folder_under_two_names(tmp_path: Path) -> None:
    src = make_original(tmp_path / "src", "qwen")
    (tmp_path / "link").symlink_to(src)
    assert "SRC and DST are the same folder" in refusal(src, tmp_path / "link").message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_folder(tmp_path: Path, name: str) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: write_json(dst / name, {"base_model_name_or_path": "Qwen/Qwen-7B"}))
    error = refusal(src, dst)
    assert f"DST is a LoRA adapter folder, not a model: {dst} holds {name}" in error.message
    assert "rlhfkit generate --model" in error.hint


def test_source_that_is_an_adapter(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen")
    write_json(src / "adapter_config.json", {})
    assert "SRC is a LoRA adapter folder" in refusal(src, dst).message


def test_source_without_config(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen")
    (src / "config.json").unlink()
    assert refusal(src, dst).message == f"SRC is not a model folder: {src} holds no config.json"


def test_source_with_damaged_tokenizer_config(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen")
    (src / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json does not hold a JSON object" in refusal(src, dst).message


def test_source_cloned_without_lfs(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "baichuan2", lambda dst: remove(dst, "tokenizer.model"))
    (src / "tokenizer.model").write_text(LFS)
    assert "tokenizer.model is a Git LFS pointer" in refusal(src, dst).message


def test_other_model_type(tmp_path: Path) -> None:
    src, dst = make_original(tmp_path / "src", "baichuan2"), make_tuned(tmp_path / "dst", "qwen")
    message = refusal(src, dst).message
    assert f"{dst}/config.json has model_type 'qwen', {src}/config.json has 'baichuan'" in message


def test_other_release_of_the_same_model_type(tmp_path: Path) -> None:
    src, dst = make_original(tmp_path / "src", "baichuan"), make_tuned(tmp_path / "dst", "baichuan2")
    assert "auto_map.AutoConfig is BaichuanConfig" in refusal(src, dst).message


def test_source_that_lacks_its_own_code(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: remove(dst, "*.py"))
    remove(src, "modeling_qwen.py")
    message = refusal(src, dst).message
    assert "config.json names code in modeling_qwen.py, which neither SRC nor DST holds" in message


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 16), ("num_hidden_layers", 3), ("num_attention_heads", 4), ("n_embd", 16)]
)
def test_other_size_in_config(tmp_path: Path, key: str, value: int) -> None:
    drop = ("hidden_size",) if key == "n_embd" else ()
    src, dst = pair(tmp_path, "qwen", lambda dst: edit_json(dst / "config.json", *drop, **{key: value}))
    name = "hidden_size" if key == "n_embd" else key
    assert f"{name} is {value} in {dst}/config.json and " in refusal(src, dst).message


@pytest.mark.parametrize("source_weights", ["there", "index only", "absent"])
def test_other_layers_or_width_in_weights(tmp_path: Path, source_weights: str) -> None:
    src = make_original(tmp_path / "src", "qwen")
    if source_weights != "there":
        remove(src, "*.safetensors")
    if source_weights == "absent":
        remove(src, "*.index.json")
    deep = make_tuned(tmp_path / "deep", "qwen", layers=3)
    wide = make_tuned(tmp_path / "wide", "qwen", hidden=2 * HIDDEN)
    assert "have 3 layers" in refusal(src, deep).message
    message = refusal(src, wide).message
    if source_weights == "there":
        assert f"has shape [{ROWS}, 16] in {wide} and [{ROWS}, 8] in {src}" in message
    else:
        assert "has width 16" in message


@pytest.mark.parametrize("source_weights", ["there", "absent"])
def test_reward_model(tmp_path: Path, source_weights: str) -> None:
    state = _qwen(**{"lm_head.weight": None, "score.weight": torch.zeros(1, HIDDEN)})
    src, dst = pair(tmp_path, "qwen", _with_weights(state))
    if source_weights == "absent":
        remove_weights(src)
    assert "holds a reward or classification model (score.weight)" in refusal(src, dst).message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformer.ln_f.weight": None}, "architecture: missing: transformer.ln_f.weight"),
        ({"transformer.extra.weight": torch.zeros(2)}, "architecture: not known to SRC: transformer.extra.weight"),
        (
            {"transformer.ln_f.weight": None, "transformer.extra.weight": torch.zeros(2)},
            "missing: transformer.ln_f.weight; not known to SRC: transformer.extra.weight",
        ),
    ],
)
def test_missing_and_unknown_tensors_are_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], words: str
) -> None:
    src, dst = pair(tmp_path, "qwen", _with_weights(_qwen(**changes)))
    assert refusal(src, dst).message.endswith(words)


def test_recomputed_tables_need_not_match(tmp_path: Path) -> None:
    state = {name: t for name, t in state_dict("baichuan").items() if not name.endswith("inv_freq")}
    src, dst = pair(tmp_path, "baichuan", _with_weights(state))
    refuse_unless_fitting(Folder(src, "SRC"), Folder(dst, "DST"))


@pytest.mark.parametrize("tied", [True, False])
def test_missing_head_is_fine_only_when_tied(tmp_path: Path, tied: bool) -> None:
    src, dst = pair(tmp_path, "qwen", _with_weights(_qwen(**{"lm_head.weight": None})))
    for folder in (src, dst):
        edit_json(folder / "config.json", tie_word_embeddings=tied)
    if tied:
        refuse_unless_fitting(Folder(src, "SRC"), Folder(dst, "DST"))
    else:
        assert "missing: lm_head.weight" in refusal(src, dst).message


def test_missing_head_without_source_weights(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", _with_weights(_qwen(**{"lm_head.weight": None})))
    remove_weights(src)
    assert "have no output head" in refusal(src, dst).message


def test_head_and_embedding_of_different_rows(tmp_path: Path) -> None:
    state = _qwen(**{"transformer.wte.weight": torch.zeros(ROWS + 16, HIDDEN)})
    src, dst = pair(tmp_path, "qwen", _with_weights(state))
    message = refusal(src, dst).message
    assert f"transformer.wte.weight has {ROWS + 16} rows, lm_head.weight has {ROWS}" in message


def test_vocabulary_of_another_model(tmp_path: Path) -> None:
    src = make_original(tmp_path / "src", "qwen")
    dst = tmp_path / "dst"
    dst.mkdir()
    save_weights(dst, state_dict("qwen", rows=ROWS + 5000))
    assert "they are different vocabularies" in refusal(src, dst).message
    (dst / "qwen.tiktoken").write_text("a vocabulary of its own")
    refuse_unless_fitting(Folder(src, "SRC"), Folder(dst, "DST"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_of_a_wrapper(tmp_path: Path, prefix: str) -> None:
    state = {f"{prefix}{name}": tensor for name, tensor in state_dict("qwen").items()}
    src, dst = pair(tmp_path, "qwen", _with_weights(state))
    assert f"every tensor name in {dst} starts with '{prefix}'" in refusal(src, dst).message


def test_unmerged_lora_matrices(tmp_path: Path) -> None:
    state = _qwen(**{"transformer.h.0.attn.c_attn.lora_A.default.weight": torch.zeros(2, HIDDEN)})
    src, dst = pair(tmp_path, "qwen", _with_weights(state))
    assert "LoRA matrices that were never merged" in refusal(src, dst).message


def test_placeholders_of_zero_3(tmp_path: Path) -> None:
    state = {name: torch.zeros(0) for name in state_dict("qwen")}
    src, dst = pair(tmp_path, "qwen", _with_weights(state))
    assert "holds empty tensors" in refusal(src, dst).message
