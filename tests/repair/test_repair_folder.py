"""Names and shapes as read from headers, and weight files that cannot be used."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from legacy_folders import ROWS, remove, save_weights, state_dict, write_json

from rlhfkit.errors import RepairRefusedError
from rlhfkit.repair.folder import Folder, WeightSet, embedding_name, head_name, layer_count


def weights(path: Path) -> WeightSet:
    return Folder(path, "DST").weights


def refusal(path: Path) -> str:
    with pytest.raises(RepairRefusedError) as caught:
        weights(path)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_shapes_and_sizes_equal_the_tensors(tmp_path: Path, kind: str, shards: int) -> None:
    state = state_dict("qwen")
    state["transformer.ln_f.weight"] = state["transformer.ln_f.weight"].to(torch.bfloat16)
    save_weights(tmp_path, state, kind=kind, shards=shards, index=False)
    found = weights(tmp_path)
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        n: tuple(t.shape) for n, t in state.items()
    }
    assert found.total_size == sum(t.numel() * t.element_size() for t in state.values())
    assert (found.kind, len(found.files), found.index is None) == (kind, shards, shards == 1)


def test_bin_of_the_old_format(tmp_path: Path) -> None:
    state = state_dict("qwen")
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert {n: t.shape for n, t in weights(tmp_path).tensors.items()} == {n: tuple(t.shape) for n, t in state.items()}


def test_bin_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": torch.zeros(1), "payload": Payload()}, tmp_path / "pytorch_model.bin")
    reason = refusal(tmp_path)
    assert "torch cannot read it as plain weights (it names " in reason
    assert "weights_only" not in reason  # torch's advice is to try without its guard
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2))
    assert "torch cannot read it as plain weights" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_bin_that_is_a_training_state(tmp_path: Path) -> None:
    torch.save({"module": {"weight": torch.zeros(1)}, "step": 3}, tmp_path / "pytorch_model.bin")
    assert "not a plain state dict" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_file_cut_short(tmp_path: Path, name: str) -> None:
    save_weights(tmp_path, state_dict("qwen"), kind="safetensors" if name.endswith("safetensors") else "bin")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-40])
    assert f"{tmp_path / name} cannot be used" in refusal(tmp_path)
    (tmp_path / name).write_bytes(b"")
    assert f"{tmp_path / name} cannot be used" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_lfs_pointer_in_place_of_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    assert "it is a Git LFS pointer" in refusal(tmp_path)


def test_shard_missing(tmp_path: Path) -> None:
    save_weights(tmp_path, state_dict("qwen"), shards=3)
    remove(tmp_path, "model-00002-of-00003.safetensors")
    assert "holds 2 of 3 safetensors shards: number 2 is missing" in refusal(tmp_path)


def test_two_complete_sets_need_an_index(tmp_path: Path) -> None:
    state = state_dict("qwen")
    save_weights(tmp_path, state, shards=2)
    save_weights(tmp_path, state, shards=3, index=False)
    assert weights(tmp_path).files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    remove(tmp_path, "*.index.json")
    assert "several complete sets of safetensors shards (of 2, 3 files)" in refusal(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    state = state_dict("qwen")
    save_weights(tmp_path, state, shards=1)
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(
            (tmp_path / "model.safetensors").read_bytes()
        )
    remove(tmp_path, "model.safetensors")
    assert "is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors" in refusal(tmp_path)


def test_loaders_order_decides(tmp_path: Path) -> None:
    save_weights(tmp_path, state_dict("qwen", rows=ROWS + 16), kind="bin")
    assert weights(tmp_path).kind == "bin"
    save_weights(tmp_path, state_dict("qwen"), shards=2)
    assert weights(tmp_path).index == "model.safetensors.index.json"
    save_weights(tmp_path, state_dict("qwen"))
    assert weights(tmp_path).files == ("model.safetensors",)


def test_no_weights_names_the_folder_inside_that_has_them(tmp_path: Path) -> None:
    assert "holds no weights: neither model.safetensors nor pytorch_model.bin" in refusal(tmp_path)
    (tmp_path / "final").mkdir()
    save_weights(tmp_path / "final", state_dict("qwen"))
    assert "name the folder inside it that does: final" in refusal(tmp_path)


def test_no_weights_but_partitions_of_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "global_step10").mkdir()
    assert "zero_to_fp32.py" in refusal(tmp_path)


def test_broken_files_are_told_from_absent_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "tokenizer.model").touch()
    write_json(tmp_path / "fine.json", {})
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    folder = Folder(tmp_path, "DST")
    names = ("config.json", "list.json", "tokenizer.model", "fine.json", "bom.json", "absent.json")
    assert [folder.is_broken(name) for name in names] == [True, True, True, False, False, False]
    assert folder.json("bom.json") == {"a": 1}


def test_parts_of_a_model_by_name() -> None:
    names = dict.fromkeys(state_dict("qwen", layers=3))
    assert (layer_count(names), embedding_name(names), head_name(names)) == (
        3,
        "transformer.wte.weight",
        "lm_head.weight",
    )
    experts = ["model.layers.0.mlp.experts.63.w.weight", "model.layers.1.mlp.experts.0.w.weight", "model.norm.weight"]
    assert layer_count(experts) == 2
    assert layer_count(["a.weight"]) == 0
    assert head_name({"model.layers.0.attention.output.weight": 0}) is None
