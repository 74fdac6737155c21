"""The two repairs that write weights: what is in the new files, against the tensors that were meant."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from legacy_folders import edit_json, index_name, make_original, make_tuned, read_json, remove_weights, save_weights
from safetensors.torch import load_file
from torch import Tensor

from rlhfkit.errors import ConfigError, RepairRefusedError
from rlhfkit.repair.folder import Folder
from rlhfkit.repair.tensors import load_tensor, read_tensors
from rlhfkit.stages.fix_checkpoint import RepairResult, run


def fix(src: Path, dst: Path, **work: Any) -> RepairResult:
    return run(src, dst, dry_run=False, yes=True, confirm=lambda question: False, **work)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def native(folder: Path, **config: Any) -> Path:
    return make_model(folder, vocab_size=340, **config)  # 339 tokens


# ---------------------------------------------------------------- reading


def test_every_kind_of_tensor_in_a_bin_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    table = torch.arange(24.0).reshape(4, 6)
    state = {
        "plain": table,
        "again": table,
        "transposed": table.t(),
        "rows": table[1:3],
        "columns": table[:, 2:4],
        "bf16": table.bfloat16(),
        "ids": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    for old in (False, True):
        torch.save(state, tmp_path / "w.bin", _use_new_zipfile_serialization=not old)
        found = read_tensors(tmp_path / "w.bin")
        assert all((info.offset is None) == old for info in found.values())
        for name, value in state.items():
            assert found[name].shape == value.shape
            assert torch.equal(load_tensor(tmp_path, name, found[name]), value.detach())


# ---------------------------------------------------------------- more rows


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_padded_model_says_what_it_said(tmp_path: Path, tied: bool, shards: int) -> None:
    from transformers import AutoModelForCausalLM

    dst = native(tmp_path / "m", tie_word_embeddings=tied)
    if shards > 1:
        AutoModelForCausalLM.from_pretrained(dst).save_pretrained(dst, max_shard_size="30KB")
        (dst / "model.safetensors").unlink(missing_ok=True)
        assert len(list(dst.glob("*.safetensors"))) > 2
    before, model = weights_of(dst), AutoModelForCausalLM.from_pretrained(dst)
    times = {path.name: path.stat().st_mtime_ns for path in dst.glob("*.safetensors")}
    result = fix(dst, dst, pad_vocab=64)
    assert result.status == "repaired"
    if shards > 1:
        index = read_json(dst / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in weights_of(dst).values())
    after = weights_of(dst)
    assert before.keys() == after.keys()
    grown = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)], value)
        assert len(after[name]) == (384 if name in grown else len(value))
    for name in grown:
        mean = before[name].double().mean(dim=0).float()
        assert torch.equal(after[name][340:], mean.expand(44, -1))
    # Shards without a row of the vocabulary are not written.
    same = [n for n, t in times.items() if (dst / n).stat().st_mtime_ns == t]
    assert len(same) == len(times) - (1 if shards == 1 or tied else 2)
    padded = AutoModelForCausalLM.from_pretrained(dst)
    ids = torch.arange(20)[None]
    assert torch.equal(padded(ids).logits[..., :340], model(ids).logits)
    assert padded.config.vocab_size == 384
    assert fix(dst, dst, pad_vocab=64).status == "unchanged"


def test_bias_of_the_head_grows_with_it(tmp_path: Path) -> None:
    folder = make_tuned(tmp_path / "m", "baichuan")
    state = weights_of(folder)
    state["lm_head.bias"] = torch.arange(48.0)
    save_weights(folder, state)
    fix(folder, folder, pad_vocab=64)
    assert weights_of(folder)["lm_head.bias"].tolist() == [*range(48), *[23.5] * 16]


def test_bf16_rows_are_the_mean_rounded_once(tmp_path: Path) -> None:
    folder = make_tuned(tmp_path / "m", "qwen")
    state = {name: value.bfloat16() for name, value in weights_of(folder).items()}
    save_weights(folder, state)
    fix(folder, folder, pad_vocab=64)
    table = state["transformer.wte.weight"]
    assert torch.equal(weights_of(folder)["transformer.wte.weight"][-1], table.double().mean(dim=0).bfloat16())


def test_rows_reach_every_token_of_the_tokenizer(tmp_path: Path) -> None:
    src, dst = make_original(tmp_path / "src", "baichuan"), make_tuned(tmp_path / "dst", "baichuan")
    edit_json(dst / "tokenizer_config.json", added_tokens_decoder={"70": {"content": "<new>"}})
    fix(src, dst, pad_vocab=16)
    assert len(weights_of(dst)["lm_head.weight"]) == 80
    assert read_json(dst / "config.json")["vocab_size"] == 80


def test_head_that_normalises_its_rows_is_not_padded(tmp_path: Path) -> None:
    dst = make_tuned(tmp_path / "dst", "baichuan2")
    with (dst / "modeling_baichuan.py").open("a") as file:
        file.write("class NormHead: ...\n")
    with pytest.raises(RepairRefusedError, match="NormHead"):
        fix(dst, dst, pad_vocab=64)


def test_quantised_rows_are_not_padded(tmp_path: Path) -> None:
    dst = make_tuned(tmp_path / "dst", "qwen")
    save_weights(dst, {k: (v * 100).to(torch.int8) for k, v in weights_of(dst).items()})
    with pytest.raises(RepairRefusedError, match="quantised rows have no mean"):
        fix(dst, dst, pad_vocab=64)


def test_bin_is_padded_only_on_its_way_to_safetensors(tmp_path: Path) -> None:
    dst = make_original(tmp_path / "dst", "baichuan")
    with pytest.raises(RepairRefusedError, match="cannot be grown piece by piece") as refusal:
        fix(dst, dst, pad_vocab=64)
    assert "--safetensors" in refusal.value.hint
    fix(dst, dst, pad_vocab=64, safetensors=True)
    assert len(weights_of(dst)["lm_head.weight"]) == 64


# ---------------------------------------------------------------- safetensors for .bin


@pytest.mark.parametrize("shards", [1, 2])
def test_safetensors_hold_what_the_bin_held(tmp_path: Path, shards: int) -> None:
    src, dst = make_original(tmp_path / "src", "baichuan2"), make_tuned(tmp_path / "dst", "baichuan2")
    state = weights_of(dst)
    remove_weights(dst)
    save_weights(dst, state, kind="bin", shards=shards)
    old = {path.name: path.read_bytes() for path in dst.glob("pytorch_model*")}
    result = fix(src, dst, safetensors=True)
    after = weights_of(dst)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert not list(dst.glob("*.bin*"))
    assert result.backup is not None
    assert {path.name: path.read_bytes() for path in result.backup.iterdir()} == old
    if shards > 1:
        assert set(read_json(dst / index_name("safetensors"))["weight_map"]) == set(state)
    assert fix(src, dst, safetensors=True).status == "unchanged"


@pytest.mark.parametrize("tied", [True, False])
def test_shared_tensors_are_written_once_only_where_they_are_tied(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    dst = native(tmp_path / "m", tie_word_embeddings=tied)
    state = weights_of(dst)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    both = torch.stack([state["model.layers.0.mlp.up_proj.weight"], state["model.layers.0.mlp.gate_proj.weight"]])
    state["model.layers.0.mlp.up_proj.weight"], state["model.layers.0.mlp.gate_proj.weight"] = both[0], both[1]
    remove_weights(dst)
    torch.save(state, dst / "pytorch_model.bin")
    before = AutoModelForCausalLM.from_pretrained(dst)(torch.arange(9)[None]).logits
    result = fix(dst, dst, safetensors=True)
    assert ("lm_head.weight" in weights_of(dst)) is not tied
    assert any("tied to" in note for note in result.plan.notes) is tied
    assert torch.equal(AutoModelForCausalLM.from_pretrained(dst)(torch.arange(9)[None]).logits, before)


class _Trap:
    """Unpickled by a careless loader, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "run")


def test_code_in_a_pickle_is_refused_unrun(tmp_path: Path) -> None:
    dst = make_original(tmp_path / "dst", "baichuan", weights=False)
    trace = tmp_path / "trace"
    torch.save({"lm_head.weight": torch.ones(2), "x": _Trap(trace)}, dst / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(RepairRefusedError, match="torch cannot read it as plain weights"):
        fix(dst, dst, safetensors=True)
    assert not trace.exists()


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..", "sub\\x.bin"])
def test_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    src, dst = make_original(tmp_path / "src", "qwen"), make_tuned(tmp_path / "dst", "qwen")
    (dst / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(RepairRefusedError, match="no file of its own folder"):
        fix(src, dst)


def test_link_out_of_the_source_is_not_copied(tmp_path: Path) -> None:
    src, dst = make_original(tmp_path / "src", "qwen"), make_tuned(tmp_path / "dst", "qwen")
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    for folder in (src, dst):
        (folder / "LICENSE").unlink()
    (src / "LICENSE").symlink_to(secret)
    with pytest.raises(RepairRefusedError, match=r"is a link to .*id_rsa, outside of SRC"):
        fix(src, dst)


def test_header_with_a_place_outside_the_file_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(RepairRefusedError, match="its header is not that of a safetensors file"):
        _ = Folder(tmp_path, "DST").weights


# ---------------------------------------------------------------- what is said


def test_json_is_one_object_whatever_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, dst = make_original(tmp_path / "src", "qwen"), make_tuned(tmp_path / "dst", "qwen")
    with pytest.raises(ConfigError, match="cannot ask"):
        run(src, dst, dry_run=False, yes=False, confirm=lambda question: True, as_json=True)
    (dst / "modeling_qwen.py").unlink()
    run(src, dst, dry_run=True, yes=False, confirm=lambda question: False, as_json=True)
    planned = json.loads(capsys.readouterr().out)
    assert (planned["status"], [a["file"] for a in planned["actions"]]) == ("planned", ["modeling_qwen.py"])
    fix(src, dst, as_json=True)
    done = json.loads(capsys.readouterr().out)
    assert done["status"] == "repaired"
    assert {check["state"] for check in done["checks"]} == {"ok"}
    edit_json(dst / "config.json", model_type="llama")
    with pytest.raises(RepairRefusedError):
        fix(src, dst, as_json=True)
    refused = json.loads(capsys.readouterr().out)
    assert refused["status"] == "refused"
    assert "different model families" in refused["reason"]


def test_code_that_imports_its_own_folder_gets_a_package(tmp_path: Path) -> None:
    src, dst = make_original(tmp_path / "src", "qwen"), make_tuned(tmp_path / "dst", "qwen")
    for folder in (src, dst):
        with (folder / "modeling_qwen.py").open("a") as file:
            file.write("from . import cpp_kernels\n")
    result = fix(src, dst)
    assert (dst / "__init__.py").read_text() == ""
    assert [action.file for action in result.plan.actions] == ["__init__.py"]
    (dst / "__init__.py").unlink()
    (src / "__init__.py").write_text("# theirs\n")
    fix(src, dst)
    assert (dst / "__init__.py").read_text() == "# theirs\n"


def test_a_folder_is_padded_without_an_original_and_without_its_code(tmp_path: Path) -> None:
    folder = make_original(tmp_path / "qwen", "qwen")
    for file in folder.glob("*.py"):
        file.unlink()
    rows = read_json(folder / "config.json")["vocab_size"]
    fix(folder, folder, pad_vocab=rows + 1)
    assert read_json(folder / "config.json")["vocab_size"] == rows + 1
    assert {tensor.shape[0] for name, tensor in weights_of(folder).items() if "wte" in name or "lm_head" in name} == {
        rows + 1
    }
