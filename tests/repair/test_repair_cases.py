"""The command as a whole: damaged folders, what they must become, and what must never change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from legacy_folders import (
    ROWS,
    digest,
    edit_json,
    make_original,
    make_tuned,
    overwrite,
    pair,
    prefixed,
    read_json,
    remove,
    remove_weights,
    save_weights,
    state_dict,
    write_json,
)

from rlhfkit.errors import CheckpointError, RepairRefusedError
from rlhfkit.stages.fix_checkpoint import RepairResult, run

QWEN_CODE = (
    "configuration_qwen.py",
    "cpp_kernels.py",
    "modeling_qwen.py",
    "qwen_generation_utils.py",
    "tokenization_qwen.py",
)
BAICHUAN2_FILES = (
    "configuration_baichuan.py",
    "generation_utils.py",
    "modeling_baichuan.py",
    "quantizer.py",
    "tokenization_baichuan.py",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
)


def never(question: str) -> bool:
    raise AssertionError(f"asked: {question}")


def fix(src: Path, dst: Path) -> RepairResult:
    return run(src, dst, dry_run=False, yes=True, confirm=never)


def _prefix_auto_maps(dst: Path) -> None:
    remove(dst, "*.py", "*.cpp", "*.cu")
    for name in ("config.json", "tokenizer_config.json"):
        edit_json(dst / name, auto_map=prefixed(read_json(dst / name)["auto_map"]))


def _resize(dst: Path) -> None:
    remove(dst, "*.py")
    save_weights(dst, state_dict("qwen", rows=ROWS + 16))
    edit_json(dst / "config.json", vocab_size=ROWS + 16)


def _drop_bos_flags(dst: Path) -> None:
    edit_json(
        dst / "tokenizer_config.json", "add_bos_token", "add_eos_token", additional_special_tokens=["<|turn_end|>"]
    )


def _keep_weights_only(dst: Path) -> None:
    for path in dst.iterdir():
        path.unlink()
    save_weights(dst, state_dict("baichuan2"), kind="bin")


def _leave_stale_index(dst: Path) -> None:
    weight_map = dict.fromkeys(state_dict("baichuan"), "model-00001-of-00003.safetensors")
    write_json(dst / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})


def _shard_without_index(kind: str) -> Callable[[Path], None]:
    def damage(dst: Path) -> None:
        remove_weights(dst)
        save_weights(dst, state_dict("qwen"), kind=kind, shards=3, index=False)

    return damage


@dataclass
class Case:
    """A damage and the end state; ``changed`` are all files that may differ from before."""

    family: str
    damage: Callable[[Path], None]
    changed: tuple[str, ...]
    from_src: tuple[str, ...] = ()
    json_from_src: dict[str, tuple[str, ...]] = field(default_factory=dict)
    json_equal: dict[str, dict[str, Any]] = field(default_factory=dict)


IDENTITY = ("auto_map", "architectures", "model_type")
CASES = {
    "code files missing": Case(
        "qwen",
        lambda dst: remove(dst, "*.py", "*.cpp", "*.cu", "LICENSE", "NOTICE"),
        (*QWEN_CODE, "kernel.cpp", "kernel.cu", "LICENSE", "NOTICE"),
        (*QWEN_CODE, "kernel.cpp", "kernel.cu", "LICENSE", "NOTICE"),
    ),
    "auto_map into a hub repository": Case(
        "qwen",
        _prefix_auto_maps,
        (*QWEN_CODE, "kernel.cpp", "kernel.cu", "config.json", "tokenizer_config.json"),
        (*QWEN_CODE, "kernel.cpp", "kernel.cu", "tokenizer_config.json"),
        {"tokenizer_config.json": ("auto_map", "tokenizer_class")},
    ),
    "tokenizer never saved": Case(
        "qwen",
        lambda dst: remove(dst, "qwen.tiktoken", "tokenization_qwen.py", "tokenizer_config.json"),
        ("qwen.tiktoken", "tokenization_qwen.py", "tokenizer_config.json"),
        ("qwen.tiktoken", "tokenization_qwen.py", "tokenizer_config.json"),
    ),
    "generation config lost": Case(
        "qwen",
        lambda dst: remove(dst, "generation_config.json"),
        ("generation_config.json",),
        ("generation_config.json",),
    ),
    "vocab_size below the rows": Case(
        "qwen",
        lambda dst: edit_json(dst / "config.json", vocab_size=ROWS - 8),
        ("config.json",),
        json_equal={"config.json": {"vocab_size": ROWS}},
    ),
    "vocab_size above the rows": Case(
        "baichuan2",
        lambda dst: edit_json(dst / "config.json", vocab_size=ROWS + 64),
        ("config.json",),
        json_equal={"config.json": {"vocab_size": ROWS}},
    ),
    "resized on purpose": Case(
        "qwen", _resize, QWEN_CODE, QWEN_CODE, json_equal={"config.json": {"vocab_size": ROWS + 16}}
    ),
    "pinned to fp32 by a CPU": Case(
        "qwen",
        lambda dst: edit_json(dst / "config.json", fp32=True, use_flash_attn=False),
        ("config.json",),
        json_from_src={"config.json": ("bf16", "fp16", "fp32", "use_flash_attn")},
    ),
    "bos flags dropped": Case(
        "baichuan2",
        _drop_bos_flags,
        ("tokenizer_config.json",),
        json_from_src={"tokenizer_config.json": ("add_bos_token", "add_eos_token", "auto_map", "tokenizer_class")},
        json_equal={
            "tokenizer_config.json": {
                "add_bos_token": False,
                "add_eos_token": False,
                "additional_special_tokens": ["<|turn_end|>"],
            }
        },
    ),
    "weights only": Case(
        "baichuan2",
        _keep_weights_only,
        (*BAICHUAN2_FILES, "config.json", "kernel.cpp", "kernel.cu"),
        (*BAICHUAN2_FILES, "config.json"),
    ),
    "stale index": Case("baichuan", _leave_stale_index, ("model.safetensors.index.json",)),
    "shards without index": Case("qwen", _shard_without_index("safetensors"), ("model.safetensors.index.json",)),
    "bin shards without index": Case("qwen", _shard_without_index("bin"), ("pytorch_model.bin.index.json",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_damaged_folder_is_repaired_and_nothing_else_changes(tmp_path: Path, case: Case) -> None:
    src, dst = pair(tmp_path, case.family, case.damage)
    src_before, dst_before = digest(src), digest(dst)
    config_before = read_json(dst / "config.json") if (dst / "config.json").exists() else {}

    result = fix(src, dst)

    assert result.status == "repaired"
    assert [check for check in result.checks if check.state != "ok"] == []
    after = {name: value for name, value in digest(dst).items() if not name.startswith(".rlhfkit-backup/")}
    changed = {name for name in after.keys() | dst_before.keys() if after.get(name) != dst_before.get(name)}
    assert changed == set(case.changed)
    assert digest(src) == src_before
    for name in case.from_src:
        same = read_json(src / name) == read_json(dst / name) if name.endswith(".json") else None
        assert same or (src / name).read_bytes() == (dst / name).read_bytes(), name
    config = read_json(dst / "config.json")
    assert {key: config[key] for key in IDENTITY} == {key: read_json(src / "config.json")[key] for key in IDENTITY}
    for key in ("_name_or_path", "transformers_version", "hidden_size", "num_hidden_layers", "intermediate_size"):
        assert config.get(key) == config_before.get(key, config.get(key))
    for name, keys in case.json_from_src.items():
        assert {k: read_json(dst / name)[k] for k in keys} == {k: read_json(src / name)[k] for k in keys}
    for name, values in case.json_equal.items():
        assert {key: read_json(dst / name)[key] for key in values} == values

    whole = digest(dst)
    assert fix(src, dst).status == "unchanged"
    assert digest(dst) == whole


def test_null_entry_of_tokenizer_auto_map_is_kept(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", _prefix_auto_maps)
    assert read_json(dst / "tokenizer_config.json")["auto_map"]["AutoTokenizer"][0].startswith("someone/tuned-model--")
    fix(src, dst)
    expected = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    assert read_json(dst / "tokenizer_config.json")["auto_map"] == expected


def test_stale_index_is_gone_and_kept_in_the_backup(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "baichuan", _leave_stale_index)
    before = (dst / "model.safetensors.index.json").read_bytes()
    result = fix(src, dst)
    assert not (dst / "model.safetensors.index.json").exists()
    assert result.backup is not None
    assert (result.backup / "model.safetensors.index.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_written_index_names_every_tensor_in_its_file(tmp_path: Path, kind: str) -> None:
    src, dst = pair(tmp_path, "qwen", _shard_without_index(kind))
    fix(src, dst)
    shutil.rmtree(tmp_path / "expected", ignore_errors=True)
    (tmp_path / "expected").mkdir()
    save_weights(tmp_path / "expected", state_dict("qwen"), kind=kind, shards=3)
    name = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    assert read_json(dst / name) == read_json(tmp_path / "expected" / name)


def test_index_that_misplaces_tensors_is_rewritten(tmp_path: Path) -> None:
    def damage(dst: Path) -> None:
        remove_weights(dst)
        save_weights(dst, state_dict("qwen"), shards=2)
        index = read_json(dst / "model.safetensors.index.json")
        names = list(index["weight_map"])
        index["weight_map"][names[0]] = index["weight_map"][names[1]]
        write_json(dst / "model.safetensors.index.json", index)

    src, dst = pair(tmp_path, "qwen", damage)
    fix(src, dst)
    assert read_json(dst / "model.safetensors.index.json") == read_json(src / "model.safetensors.index.json")


def test_whole_folder_is_left_alone_to_the_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, dst = pair(tmp_path, "baichuan2")
    before = digest(tmp_path)
    assert fix(src, dst).status == "unchanged"
    assert digest(tmp_path) == before
    assert "nothing to do" in capsys.readouterr().out


def _make_adapter(dst: Path) -> None:
    for path in dst.iterdir():
        path.unlink()
    write_json(dst / "adapter_config.json", {"base_model_name_or_path": "Qwen/Qwen-7B-Chat", "peft_type": "LORA"})


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a LoRA adapter": (_make_adapter, "is a LoRA adapter folder, not a model"),
    "another family": (lambda dst: edit_json(dst / "config.json", model_type="llama"), "different model families"),
}


@pytest.mark.parametrize(("damage", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusal_says_why_and_writes_nothing(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    src, dst = pair(tmp_path, "qwen", damage)
    before = digest(tmp_path)
    with pytest.raises(RepairRefusedError, match=words):
        fix(src, dst)
    assert digest(tmp_path) == before


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, dst = pair(tmp_path, "qwen", _prefix_auto_maps)
    before = digest(tmp_path)
    result = run(src, dst, dry_run=True, yes=False, confirm=never)
    assert (result.status, result.backup, result.checks) == ("planned", None, ())
    assert digest(tmp_path) == before
    shown = capsys.readouterr().out
    for name in (*QWEN_CODE, "config.json", "tokenizer_config.json"):
        assert name in shown


def test_answer_no_writes_nothing_and_yes_repairs(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: remove(dst, "*.py"))
    before, asked = digest(tmp_path), []

    def say_no(question: str) -> bool:
        asked.append(question)
        return False

    assert run(src, dst, dry_run=False, yes=False, confirm=say_no).status == "declined"
    assert asked == [f"Make these 5 changes in {dst}?"]
    assert digest(tmp_path) == before
    assert run(src, dst, dry_run=False, yes=False, confirm=lambda question: True).status == "repaired"


def test_replaced_files_are_kept_as_they_were(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", _prefix_auto_maps)
    before = {name: (dst / name).read_bytes() for name in ("config.json", "tokenizer_config.json")}
    result = fix(src, dst)
    assert result.backup is not None
    assert result.backup.parent == dst / ".rlhfkit-backup"
    assert {path.name: path.read_bytes() for path in result.backup.iterdir()} == before


def test_no_backup_folder_when_files_are_only_added(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: remove(dst, "*.py"))
    assert fix(src, dst).backup is None
    assert not (dst / ".rlhfkit-backup").exists()


def test_damaged_config_is_replaced_and_kept(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", lambda dst: overwrite(dst / "config.json", '{"architectures": ['), rows=ROWS + 16)
    result = fix(src, dst)
    assert read_json(dst / "config.json") == {**read_json(src / "config.json"), "vocab_size": ROWS + 16}
    assert result.backup is not None
    assert (result.backup / "config.json").read_text() == '{"architectures": ['


def test_links_are_followed_when_read_and_replaced_when_written(tmp_path: Path) -> None:
    """A snapshot of the hub's cache is a folder of links: the cached files behind them must not change."""
    snapshots, cache = tmp_path / "snapshots", tmp_path / "blobs"
    snapshots.mkdir()
    cache.mkdir()
    src, dst = pair(snapshots, "qwen", lambda dst: edit_json(dst / "config.json", fp32=True))
    (dst / "cpp_kernels.py").unlink()
    for folder in (src, dst):
        for path in list(folder.iterdir()):
            path.rename(cache / f"{folder.name}-{path.name}")
            path.symlink_to(cache / f"{folder.name}-{path.name}")
    before = digest(cache)
    fix(src, dst)
    assert digest(cache) == before
    assert read_json(dst / "config.json")["fp32"] is False


def test_source_without_weights_is_enough(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen", _prefix_auto_maps)
    remove_weights(src)
    result = fix(src, dst)
    assert result.status == "repaired"
    assert any("not compared with SRC" in note for note in result.plan.notes)
    assert [check.name for check in result.checks if check.state == "warning"] == ["tensors"]


def test_fault_that_no_file_of_the_source_mends_is_an_error(tmp_path: Path) -> None:
    src, dst = pair(tmp_path, "qwen")
    for folder in (src, dst):
        (folder / "cpp_kernels.py").unlink()
    with pytest.raises(CheckpointError, match=r"cpp_kernels\.py is needed by auto_map or by an import, and absent"):
        fix(src, dst)


def test_write_that_fails_is_reported_and_leaves_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = pair(tmp_path, "qwen", _prefix_auto_maps)
    before = digest(dst)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        fix(src, dst)
    assert digest(dst) == before


def test_import_of_the_stage_loads_no_torch() -> None:
    code = (
        "import sys, rlhfkit.stages.fix_checkpoint; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_other_family_by_weights_alone(tmp_path: Path) -> None:
    src = make_original(tmp_path / "src", "baichuan2")
    dst = make_tuned(tmp_path / "dst", "qwen")
    (dst / "config.json").unlink()
    (dst / "tokenizer_config.json").unlink()
    with pytest.raises(RepairRefusedError, match="not those of SRC's architecture"):
        fix(src, dst)
