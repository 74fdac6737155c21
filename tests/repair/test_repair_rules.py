"""Rules one by one, on what the whole-folder cases do not reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from legacy_folders import (
    ROWS,
    edit_json,
    overwrite,
    pair,
    prefixed,
    read_json,
    remove,
    save_weights,
    state_dict,
    token,
    write_json,
)

from rlhfkit.repair.auto_map import class_names, code_files, restored, without_owner
from rlhfkit.repair.files import reason_to_copy
from rlhfkit.repair.folder import Folder
from rlhfkit.repair.plan import apply
from rlhfkit.repair.rules import plan_repair

Damage = Callable[[Path], None]


def repair(src: Path, dst: Path) -> tuple[str, ...]:
    """Apply the plan, check that a second one is empty, and return the files of the first."""
    plan = plan_repair(Folder(src, "SRC"), Folder(dst, "DST"))
    apply(plan)
    assert plan_repair(Folder(src, "SRC"), Folder(dst, "DST")).is_empty
    return plan.files


# ---------------------------------------------------------------- auto_map


def test_owner_is_removed_everywhere_and_none_stays() -> None:
    value = {"AutoTokenizer": ["a/b--t.Slow", None], "AutoModel": "a/b--m.Model", "AutoConfig": "c.Config"}
    assert without_owner(value) == {"AutoTokenizer": ["t.Slow", None], "AutoModel": "m.Model", "AutoConfig": "c.Config"}
    assert without_owner(["a/b--t.Slow", "a/b--None"]) == ["t.Slow", None]
    assert code_files(value) == {"t.py", "m.py", "c.py"}
    assert class_names(value) == {"AutoTokenizer": ("Slow",), "AutoModel": ("Model",), "AutoConfig": ("Config",)}


def test_entries_beyond_the_originals_are_kept() -> None:
    src = {"AutoConfig": "c.Config"}
    dst = {"AutoConfig": "o/n--c.Config", "AutoModel": "o/n--mine.Model", "AutoModelForCausalLM": "o/n--far.Model"}
    available = frozenset({"c.py", "mine.py"})
    assert restored(src, dst, available) == {
        "AutoConfig": "c.Config",
        "AutoModel": "mine.Model",
        "AutoModelForCausalLM": "o/n--far.Model",
    }
    assert restored(None, {"AutoConfig": "o/n--c.Config"}, available) == {"AutoConfig": "c.Config"}
    assert restored(None, None, available) is None
    assert restored(["o/n--t.Slow", None], None, available) == ["t.Slow", None]


def test_source_with_owner_gives_a_plain_auto_map(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: remove(dst, "config.json", "tokenizer_config.json"))
    plain = {name: read_json(src / name)["auto_map"] for name in ("config.json", "tokenizer_config.json")}
    for name, value in plain.items():
        edit_json(src / name, auto_map=prefixed(value))
    repair(src, dst)
    assert {name: read_json(dst / name)["auto_map"] for name in plain} == plain


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name",
    [
        "modeling_qwen.py", "cache.cpp", "cache.cu", "qwen.tiktoken", "tokenizer.model", "tokenizer.json", "merges.txt",
        "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
        "generation_config.json", "LICENSE", "LICENSE.txt", "Tongyi Qianwen LICENSE AGREEMENT", "NOTICE", "Notice.txt",
        "added_tokens.json",
    ],
)  # fmt: skip
def test_files_that_are_copied(name: str) -> None:
    assert reason_to_copy(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
        "model-00001-of-00002.safetensors", "training_args.bin", "config.json", "README.md", "optimizer.pt",
        "tf_model.h5", "model.gguf", "license.bin",
    ],
)  # fmt: skip
def test_files_that_are_not(name: str) -> None:
    assert reason_to_copy(name) is None


def test_no_weight_or_index_of_the_source_arrives(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: remove(dst, "[!m]*", "modeling*"))
    repair(src, dst)
    names = {path.name for path in dst.iterdir()}
    assert {name for name in names if "safetensors" in name or name.endswith(".bin")} == {"model.safetensors"}
    assert "README.md" not in names


def test_empty_and_pointer_files_are_replaced(tmp_path: Path) -> None:
    def damage(dst: Path) -> None:
        (dst / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        (dst / "quantizer.py").write_text("")
        (dst / "generation_config.json").write_text("{")

    src, dst = pair(tmp_path, "baichuan2", damage)
    assert set(repair(src, dst)) == {"tokenizer.model", "quantizer.py", "generation_config.json"}
    for name in ("tokenizer.model", "quantizer.py", "generation_config.json"):
        assert (dst / name).read_bytes() == (src / name).read_bytes()


def test_changed_code_of_the_user_stays(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: overwrite(dst / "modeling_qwen.py", "# mine"))
    assert repair(src, dst) == ()


def test_extended_vocabulary_is_not_shadowed(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "baichuan2", lambda dst: overwrite(dst / "tokenizer.model", "pieces and mine"))
    write_json(src / "tokenizer.json", {"added_tokens": []})
    assert repair(src, dst) == ()
    # With SRC's own model file there is nothing to shadow.
    (dst / "tokenizer.model").write_bytes((src / "tokenizer.model").read_bytes())
    assert repair(src, dst) == ("tokenizer.json",)


def test_own_fast_tokenizer_does_not_keep_the_slow_files_away(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "baichuan2", lambda dst: remove(dst, "tokenizer.model"))
    for folder, tokens in ((src, []), (dst, [{"id": 47, "content": "<|mine|>"}])):
        write_json(folder / "tokenizer.json", {"added_tokens": tokens})
    assert repair(src, dst) == ("tokenizer.model",)


def test_own_chat_template_is_not_shadowed(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: edit_json(dst / "tokenizer_config.json", chat_template="mine"))
    (src / "chat_template.jinja").write_text("theirs")
    assert repair(src, dst) == ()
    edit_json(dst / "tokenizer_config.json", "chat_template")
    assert repair(src, dst) == ("chat_template.jinja",)


def test_chat_template_inside_the_tokenizer_config_is_restored(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen")
    edit_json(src / "tokenizer_config.json", chat_template="theirs")
    repair(src, dst)
    assert read_json(dst / "tokenizer_config.json")["chat_template"] == "theirs"


# ---------------------------------------------------------------- config.json


def test_identity_is_restored_and_the_rest_kept(tmp_path: Path) -> None:
    def damage(dst: Path) -> None:
        edit_json(dst / "config.json", "model_type", "tokenizer_class", architectures=["Wrapped"], mine=[1])

    src, dst = pair(tmp_path, "qwen", damage)
    before = read_json(src / "config.json")
    repair(src, dst)
    after = read_json(dst / "config.json")
    drift = {"_name_or_path": "a-fine-tuned-model", "transformers_version": "4.37.2", "mine": [1]}
    assert after == {**before, **drift}


def test_lost_size_is_restored(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: edit_json(dst / "config.json", "num_attention_heads"))
    repair(src, dst)
    assert read_json(dst / "config.json")["num_attention_heads"] == 2


def test_second_spelling_of_the_vocabulary_follows(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: edit_json(dst / "config.json", padded_vocab_size=7), rows=ROWS + 16)
    repair(src, dst)
    config = read_json(dst / "config.json")
    assert (config["vocab_size"], config["padded_vocab_size"]) == (ROWS + 16, ROWS + 16)


# ---------------------------------------------------------------- tokenizer


def test_lost_special_tokens_come_back_and_own_ones_stay(tmp_path: Path) -> None:
    def damage(dst: Path) -> None:
        edit_json(dst / "tokenizer_config.json", "eos_token", bos_token=None, pad_token="<|pad|>")

    src, dst = pair(tmp_path, "baichuan2", damage)
    repair(src, dst)
    config = read_json(dst / "tokenizer_config.json")
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (token("<s>"), token("</s>"), "<|pad|>")


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_further_special_tokens_are_united(tmp_path: Path, key: str) -> None:
    src, dst = pair(
        tmp_path, "qwen", lambda dst: edit_json(dst / "tokenizer_config.json", **{key: ["<|b|>", "<|mine|>"]})
    )
    edit_json(src / "tokenizer_config.json", additional_special_tokens=[token("<|a|>"), token("<|b|>")])
    repair(src, dst)
    assert read_json(dst / "tokenizer_config.json")[key] == [token("<|a|>"), "<|b|>", "<|mine|>"]


def test_added_tokens_by_id_are_united(tmp_path: Path) -> None:
    own = {"40": {"content": "<|mine|>"}, "41": {"content": "<|b|>"}}
    src, dst = pair(tmp_path, "qwen", lambda dst: edit_json(dst / "tokenizer_config.json", added_tokens_decoder=own))
    theirs = {"9": {"content": "<|a|>"}, "40": {"content": "<|taken|>"}, "42": {"content": "<|b|>"}}
    edit_json(src / "tokenizer_config.json", added_tokens_decoder=theirs)
    repair(src, dst)
    after = read_json(dst / "tokenizer_config.json")["added_tokens_decoder"]
    assert list(after.items()) == [("9", {"content": "<|a|>"}), *own.items()]


def test_added_tokens_inside_tokenizer_json_are_not_lost(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "baichuan2")
    edit_json(src / "tokenizer_config.json", added_tokens_decoder={"9": {"content": "<|a|>"}})
    for folder in (src, dst):
        write_json(folder / "tokenizer.json", {"added_tokens": [{"id": 9, "content": "<|a|>"}]})
    assert repair(src, dst) == ()


def test_flag_that_the_user_chose_stays(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "baichuan2", lambda dst: edit_json(dst / "tokenizer_config.json", add_bos_token=True))
    assert repair(src, dst) == ()


def test_class_that_cannot_read_the_vocabulary_is_replaced(tmp_path: Path) -> None:
    wrong = "PreTrainedTokenizerFast"
    src, dst = pair(tmp_path, "qwen", lambda dst: edit_json(dst / "tokenizer_config.json", tokenizer_class=wrong))
    repair(src, dst)
    assert read_json(dst / "tokenizer_config.json")["tokenizer_class"] == "QWenTokenizer"


def test_converted_tokenizer_keeps_its_class(tmp_path: Path) -> None:
    def damage(dst: Path) -> None:
        write_json(dst / "tokenizer.json", {"added_tokens": []})
        write_json(dst / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})

    src, dst = pair(tmp_path, "baichuan2", damage)
    repair(src, dst)
    config = read_json(dst / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"auto_map", "add_bos_token"} & config.keys()
    assert "DST's tokenizer was converted" in "".join(plan_repair(Folder(src, "SRC"), Folder(dst, "DST")).notes)


def test_copied_tokens_map_follows_the_tokens_of_dst(tmp_path: Path) -> None:
    def damage(dst: Path) -> None:
        remove(dst, "special_tokens_map.json")
        edit_json(dst / "tokenizer_config.json", pad_token=token("<|pad|>"), additional_special_tokens=["<|mine|>"])

    src, dst = pair(tmp_path, "baichuan2", damage)
    edit_json(src / "special_tokens_map.json", additional_special_tokens=["<|a|>"])
    repair(src, dst)
    after = read_json(dst / "special_tokens_map.json")
    assert after["pad_token"]["content"] == "<|pad|>"
    assert "__type" not in after["pad_token"]
    assert after["eos_token"] == read_json(src / "special_tokens_map.json")["eos_token"]
    assert after["additional_special_tokens"] == ["<|a|>", "<|mine|>"]


def test_tokens_map_that_lost_a_token(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "baichuan2", lambda dst: edit_json(dst / "special_tokens_map.json", "eos_token"))
    assert repair(src, dst) == ("special_tokens_map.json",)
    assert read_json(dst / "special_tokens_map.json") == read_json(src / "special_tokens_map.json")


# ---------------------------------------------------------------- generation_config.json


def _generation(tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any] | None) -> dict[str, Any]:
    src, dst = pair(tmp_path, "qwen")
    write_json(src / "generation_config.json", theirs)
    if ours is None:
        remove(dst, "generation_config.json")
    else:
        write_json(dst / "generation_config.json", ours)
    repair(src, dst)
    after: dict[str, Any] = read_json(dst / "generation_config.json")
    return after


FULL = {"chat_format": "chatml", "stop_words_ids": [[43]], "eos_token_id": 43, "do_sample": True, "top_p": 0.8}


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        # The file was made anew out of config.json: everything the original said is back.
        (FULL, {"eos_token_id": 43, "transformers_version": "5"}, {**FULL, "transformers_version": "5"}),
        (FULL, {**FULL, "_from_model_config": True}, FULL),
        # Sampling values that alone are absent were reset by the user.
        (FULL, {k: v for k, v in FULL.items() if k not in ("do_sample", "top_p")}, None),
        # Values of DST win.
        (FULL, {**FULL, "top_p": 0.5, "chat_format": "raw"}, None),
        ({"user_token_id": 45}, {"assistant_token_id": 46}, {"assistant_token_id": 46, "user_token_id": 45}),
        # Lists of stop ids.
        ({"eos_token_id": [1, 2, 3]}, {"eos_token_id": 2}, {"eos_token_id": [1, 2, 3]}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": [1]}, {"eos_token_id": [1, 2]}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": [9, 1]}, {"eos_token_id": [9, 1, 2]}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": [9, 2, 1]}, None),
        ({"eos_token_id": [1, 2]}, {"top_k": 50}, {"top_k": 50, "eos_token_id": [1, 2]}),
        ({"eos_token_id": 1}, {"eos_token_id": 9}, None),
        # Values that make the next save fail.
        ({"temperature": 0.6}, None, {"temperature": 0.6, "do_sample": True}),
        ({}, {"top_p": 0.9, "do_sample": False}, {"do_sample": False}),
        ({}, {"top_p": 1.0, "temperature": 1.0, "top_k": 50}, None),
        ({}, {"length_penalty": 2.0, "num_beams": 1}, {"num_beams": 1}),
        ({}, {"length_penalty": 2.0, "num_beams": 4}, None),
        ({}, {"pad_token_id": -1, "eos_token_id": 2}, {"eos_token_id": 2}),
    ],
)
def test_generation_config(
    tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any] | None, expected: dict[str, Any] | None
) -> None:
    assert _generation(tmp_path, theirs, ours) == (ours if expected is None else expected)


# ---------------------------------------------------------------- weight index


def test_index_of_the_kind_that_is_not_read_goes_only_when_stale(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen")
    save_weights(dst, state_dict("qwen"), kind="bin", shards=2)
    assert repair(src, dst) == ()
    remove(dst, "*.bin")
    assert repair(src, dst) == ("pytorch_model.bin.index.json",)
    assert not (dst / "pytorch_model.bin.index.json").exists()


def test_stale_index_beside_complete_shards_is_rewritten(tmp_path: Path) -> None:
    def damage(dst: Path) -> None:
        remove(dst, "model.safetensors")
        save_weights(dst, state_dict("qwen"), shards=2)
        old = dict.fromkeys(state_dict("qwen"), "model-00001-of-00005.safetensors")
        write_json(dst / "model.safetensors.index.json", {"weight_map": old})

    src, dst = pair(tmp_path, "qwen", damage)
    assert repair(src, dst) == ("model.safetensors.index.json",)
    assert read_json(dst / "model.safetensors.index.json") == read_json(src / "model.safetensors.index.json")


def test_notes_on_weights_that_loaders_ignore(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen")
    save_weights(dst, state_dict("qwen"), kind="bin")
    save_weights(dst, state_dict("qwen"), shards=2)
    notes = plan_repair(Folder(src, "SRC"), Folder(dst, "DST")).notes
    assert any("other .safetensors files are ignored" in note for note in notes)
    assert any("ignore the .bin" in note for note in notes)
