"""Legacy checkpoints to native classes: weights, config, tokens, refusals, and that wrong tables are found out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from legacy_folders import digest, edit_json, read_json, save_weights
from legacy_models import HIDDEN, ROLES, make_baichuan, make_bare_llama, make_qwen1
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhfkit.errors import CheckpointError, RepairRefusedError
from rlhfkit.families.legacy import LegacyLayout, TensorRule
from rlhfkit.families.registry import find_family
from rlhfkit.repair import stream
from rlhfkit.repair.convert import Conversion, convert, plan_conversion
from rlhfkit.repair.convert_back import convert_back, plan_way_back

MAKERS: dict[str, Callable[..., Path]] = {
    "qwen1": make_qwen1,
    "baichuan1": lambda folder, **k: make_baichuan(folder, 1, **k),
    "baichuan2": lambda folder, **k: make_baichuan(folder, 2, **{"rows": 125696, **k}),
}


def converted(tmp_path: Path, name: str, **settings: Any) -> tuple[Path, Path]:
    src, dst = MAKERS[name](tmp_path / "src", **settings), tmp_path / "dst"
    convert(plan_conversion(src), dst)
    return src, dst


def original_state(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".bin":
            state |= torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            state |= load_file(path)
    return state


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_the_class_of_transformers_loads_it_and_no_code_of_the_folder_runs(name: str, tmp_path: Path) -> None:
    src, dst = converted(tmp_path, name)
    before = digest(src)
    model, info = AutoModelForCausalLM.from_pretrained(dst, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__name__ == ("Qwen2ForCausalLM" if name == "qwen1" else "LlamaForCausalLM")
    tokenizer = AutoTokenizer.from_pretrained(dst)
    assert model(**tokenizer("the film", return_tensors="pt")).logits.isfinite().all()
    assert model.generate(**tokenizer("the film", return_tensors="pt"), max_new_tokens=2).shape[1] > 2
    assert not list(dst.glob("*.py"))
    assert digest(src) == before
    proof = read_json(dst / "conversion.json")["proof"]
    assert proof["logits"] <= 1e-5
    assert proof["ids_equal"] == proof["ids_compared"] > 15


def test_config_of_qwen1(tmp_path: Path) -> None:
    _, dst = converted(tmp_path, "qwen1")
    written, config = read_json(dst / "config.json"), AutoConfig.from_pretrained(dst)
    assert (config.intermediate_size, config.num_key_value_heads, config.max_position_embeddings) == (48, 4, 256)
    # The first is for readers before transformers 5, which would take 10000 for granted.
    assert (
        written["rope_theta"] == written["rope_parameters"]["rope_theta"] == config.rope_parameters["rope_theta"] == 1e6
    )
    assert "auto_map" not in written
    assert written["tie_word_embeddings"] is False


def test_old_spellings_of_qwen1(tmp_path: Path) -> None:
    src = make_qwen1(tmp_path / "src", n_embd=HIDDEN, n_layer=2, n_head=4, ffn_hidden_size=96)
    edit_json(src / "config.json", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    convert(plan_conversion(src), tmp_path / "dst")
    assert read_json(tmp_path / "dst" / "config.json")["intermediate_size"] == 48


@pytest.mark.parametrize(
    ("name", "pad", "eos", "stops"),
    [
        ("qwen1", "<|endoftext|>", "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
        ("baichuan1", "<unk>", "</s>", ["</s>"]),
        ("baichuan2", "<unk>", "</s>", ["</s>"]),
    ],
)
def test_special_tokens_agree_everywhere(name: str, pad: str, eos: str, stops: list[str], tmp_path: Path) -> None:
    _, dst = converted(tmp_path, name)
    tokenizer = AutoTokenizer.from_pretrained(dst)
    config, generation = read_json(dst / "config.json"), read_json(dst / "generation_config.json")
    ids = tokenizer.convert_tokens_to_ids(stops)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (pad, eos)
    assert (config["pad_token_id"], config["eos_token_id"]) == (tokenizer.pad_token_id, ids[0])
    assert (generation["pad_token_id"], generation["eos_token_id"]) == (tokenizer.pad_token_id, ids)
    assert not {"chat_format", "user_token_id"} & generation.keys()
    assert tokenizer.chat_template
    assert read_json(dst / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_head_of_baichuan2_has_rows_of_length_one_and_that_of_baichuan1_is_as_it_was(tmp_path: Path) -> None:
    for name in ("baichuan1", "baichuan2"):
        src, dst = converted(tmp_path / name, name)
        before, after = original_state(src)["lm_head.weight"], original_state(dst)["lm_head.weight"]
        if name == "baichuan1":
            assert torch.equal(before, after)
        else:
            torch.testing.assert_close(after, before / before.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("name", MAKERS)
def test_sixteen_bits_stay_sixteen_bits(name: str, tmp_path: Path) -> None:
    _, dst = converted(tmp_path, name, dtype=torch.bfloat16)
    assert {t.dtype for t in original_state(dst).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(dst, dtype="auto").dtype == torch.bfloat16
    assert read_json(dst / "conversion.json")["proof"]["logits"] <= 1e-5


def test_many_shards_and_small_reads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = converted(tmp_path / "whole", "qwen1")
    monkeypatch.setattr(stream, "SHARD", 20_000)
    monkeypatch.setattr(stream, "CHUNK", 256)
    _, cut = converted(tmp_path / "cut", "qwen1")
    index = read_json(cut / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 3
    one, other = original_state(whole), original_state(cut)
    assert one.keys() == other.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in one.values())
    AutoModelForCausalLM.from_pretrained(cut)


def test_one_old_bin_file(tmp_path: Path) -> None:
    src = make_baichuan(tmp_path / "src", 1)
    state = original_state(src)
    for path in [*src.glob("*.bin"), *src.glob("*.index.json")]:
        path.unlink()
    torch.save(state, src / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(plan_conversion(src), tmp_path / "dst")
    assert torch.equal(original_state(tmp_path / "dst")["lm_head.weight"], state["lm_head.weight"])


# -- LLaMA with a bare vocabulary --------------------------------------------------------------------------------------


def test_a_bare_llama_keeps_its_weights_and_gets_a_tokenizer(tmp_path: Path) -> None:
    src = make_bare_llama(tmp_path / "src")
    proof, changes = convert(plan_conversion(src), tmp_path / "dst")
    assert proof.logits is None
    assert proof.ids_equal == proof.ids_compared
    before, after = original_state(src), original_state(tmp_path / "dst")
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert before.keys() - after.keys() == {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dst")
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.pad_token == "<unk>"
    assert any("pad_token was not set and is now '<unk>' (0)" in change for change in changes)
    # LLaMA 2 chat ships sampling values without do_sample, which transformers refuses to save.
    assert read_json(tmp_path / "dst" / "generation_config.json")["do_sample"] is True


# -- wrong tables are found out ----------------------------------------------------------------------------------------


def with_rules(plan: Conversion, change: Callable[[TensorRule], TensorRule | None]) -> Conversion:
    """The plan as it would be if the adapter's table were another."""
    from rlhfkit.repair.convert import _native_targets
    from rlhfkit.repair.stream import TensorReader

    assert plan.layout is not None
    rules = tuple(found for rule in plan.layout.tensors if (found := change(rule)) is not None)
    layout: LegacyLayout = replace(plan.layout, tensors=rules)
    targets = tuple(_native_targets(layout, plan.src, TensorReader(plan.src), 2))
    return replace(plan, targets=targets)


def swap(one: str, other: str) -> Callable[[TensorRule], TensorRule]:
    def change(rule: TensorRule) -> TensorRule:
        for a, b in ((one, other), (other, one)):
            if a in rule.native[0]:
                return replace(rule, native=tuple(name.replace(a, b) for name in rule.native))
        return rule

    return change


def turned_around(rule: TensorRule) -> TensorRule:
    return replace(rule, native=rule.native[::-1])


def scaled(value: bool) -> Callable[[TensorRule], TensorRule]:
    return lambda rule: replace(rule, unit_rows=value) if rule.original == "lm_head.weight" else rule


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen1", swap("up_proj", "gate_proj")),
        ("baichuan1", swap("up_proj", "gate_proj")),
        ("qwen1", turned_around),
        ("baichuan2", turned_around),
        ("qwen1", swap("input_layernorm", "post_attention_layernorm")),
        ("baichuan2", scaled(False)),
        ("baichuan1", scaled(True)),
    ],
    ids=("w1-w2", "gate-up", "qkv-qwen", "qkv-baichuan", "norms", "head-not-scaled", "head-scaled"),
)
def test_a_wrong_table_is_refused(name: str, change: Callable[[TensorRule], TensorRule], tmp_path: Path) -> None:
    plan = plan_conversion(MAKERS[name](tmp_path / "src"))
    with pytest.raises(CheckpointError, match="logits differ") as caught:
        convert(with_rules(plan, change), tmp_path / "dst")
    assert "nothing was put in place" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_a_wrong_number_in_the_config_is_refused(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhfkit.repair import convert_proof

    plan = plan_conversion(make_qwen1(tmp_path / "src"))
    honest = convert_proof._OneLayer.__init__

    def wrong(self: Any, config: dict[str, Any]) -> None:
        bad = {**config, key: 0.01} if key == "rms_norm_eps" else {**config, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
        honest(self, bad)

    monkeypatch.setattr(convert_proof._OneLayer, "__init__", wrong)
    with pytest.raises(CheckpointError, match="logits differ"):
        convert(plan, tmp_path / "dst")


def test_dropped_biases_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_qwen1(tmp_path / "src")
    plan = plan_conversion(src)
    quiet = tuple(target for target in plan.targets if not target.name.endswith(".bias"))
    with pytest.raises((CheckpointError, KeyError)):
        convert(replace(plan, targets=quiet), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_wrong_tokenizer_is_refused(tmp_path: Path) -> None:
    plan = plan_conversion(make_qwen1(tmp_path / "src"))
    wrong = replace(plan, tokenizer=replace(plan.tokenizer, pattern=r"\S+|\s+"))
    from rlhfkit.repair import convert as module

    honest = module.make_tokenizer
    try:
        module.make_tokenizer = lambda facts, folder: honest(wrong.tokenizer, folder)
        with pytest.raises(CheckpointError, match="other token ids"):
            convert(plan, tmp_path / "dst")
    finally:
        module.make_tokenizer = honest
    assert not (tmp_path / "dst").exists()


# -- refusals ----------------------------------------------------------------------------------------------------------


def drop_tensor(folder: Path, name: str) -> None:
    state = original_state(folder)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_weights(folder, {k: v for k, v in state.items() if k != name})


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("qwen1", lambda f: edit_json(f / "config.json", rotary_pct=0.25), "rotary_pct: 0.25, and only 1.0"),
        ("qwen1", lambda f: edit_json(f / "config.json", no_bias=False), "no_bias: False"),
        ("qwen1", lambda f: edit_json(f / "config.json", kv_channels=16), "kv_channels is 16, but 32 / 4 heads is 8"),
        ("qwen1", lambda f: edit_json(f / "config.json", "seq_length"), "lacks seq_length"),
        ("qwen1", lambda f: edit_json(f / "config.json", num_hidden_layers=3), "lacks 8 of its tensors"),
        ("qwen1", lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "quantization_config"),
        ("qwen1", lambda f: drop_tensor(f, "transformer.h.1.mlp.w2.weight"), "lacks 1 of its tensors (first: transf"),
        ("qwen1", lambda f: (f / "qwen.tiktoken").unlink(), "lacks its vocabulary, qwen.tiktoken"),
        ("qwen1", lambda f: (f / "qwen.tiktoken").write_text("version https://git-lfs"), "no file of tiktoken ranks"),
        ("qwen1", lambda f: (f / "config.json").unlink(), "no config.json"),
        ("qwen1", lambda f: (f / "adapter_config.json").write_text("{}"), "is a LoRA adapter folder"),
        ("baichuan2", lambda f: edit_json(f / "config.json", "max_position_embeddings"), "a Baichuan2 13B: the 13B"),
        ("baichuan1", lambda f: edit_json(f / "config.json", "max_position_embeddings"), "a Baichuan 13B: the 13B"),
        ("baichuan1", lambda f: edit_json(f / "config.json", model_type="llama"), "lacks 6 of its tensors"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name: str, damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    src = MAKERS[name](tmp_path / "src")
    damage(src)
    with pytest.raises(RepairRefusedError) as caught:
        convert(plan_conversion(src), tmp_path / "dst")
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_a_folder_that_is_native_needs_none(tiny_model: Path) -> None:
    with pytest.raises(RepairRefusedError, match="needs no conversion") as caught:
        plan_conversion(tiny_model)
    assert "use it as it is" in caught.value.hint


def test_a_full_destination_is_left_alone(tmp_path: Path) -> None:
    plan = plan_conversion(make_qwen1(tmp_path / "src"))
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine.txt").write_text("mine")
    with pytest.raises(RepairRefusedError, match="not empty"):
        convert(plan, tmp_path / "dst")
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["mine.txt"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    plan = plan_conversion(make_qwen1(tmp_path / "src"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 10))
    with pytest.raises(RepairRefusedError, match="GiB free"):
        convert(plan, tmp_path / "dst")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    src = make_baichuan(tmp_path / "src", 1)
    path = sorted(src.glob("*.bin"))[0]
    torch.save({**torch.load(path, weights_only=True), "trap": Trap()}, path)
    with pytest.raises(RepairRefusedError, match="cannot be used"):
        plan_conversion(src)
    assert not (tmp_path / "ran").exists()


# -- the way back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen1", "baichuan1"])
def test_there_and_back_is_bitwise(name: str, tmp_path: Path) -> None:
    src, dst = converted(tmp_path, name, dtype=torch.bfloat16)
    proof = convert_back(plan_way_back(dst, None), tmp_path / "back")
    assert proof.logits is not None
    assert proof.logits <= 1e-5
    before, after = original_state(src), original_state(tmp_path / "back")
    assert {k for k in before if not k.endswith("inv_freq")} == after.keys()
    assert all(before[k].dtype == v.dtype and torch.equal(before[k], v) for k, v in after.items())
    config = read_json(tmp_path / "back" / "config.json")
    assert {**read_json(src / "config.json"), "torch_dtype": "bfloat16"} == config
    for path in src.iterdir():
        if path.suffix in (".py", ".tiktoken", ".model") or path.name in ("tokenizer_config.json", "LICENSE"):
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_a_scaled_head_goes_back_and_computes_the_same(tmp_path: Path) -> None:
    _, dst = converted(tmp_path, "baichuan2")
    assert (convert_back(plan_way_back(dst, None), tmp_path / "back").logits or 0) <= 1e-5
    convert(plan_conversion(tmp_path / "back"), tmp_path / "again")
    one, other = original_state(dst), original_state(tmp_path / "again")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7)


def test_a_head_that_was_trained_does_not_go_back(tmp_path: Path) -> None:
    _, dst = converted(tmp_path, "baichuan2")
    state = original_state(dst)
    state["lm_head.weight"][7] *= 1.02
    save_weights(dst, state)
    with pytest.raises(RepairRefusedError, match=r"lengths up to 2\.0e-02 away from one"):
        plan_way_back(dst, None)


def test_grown_rows_go_back(tmp_path: Path) -> None:
    src, dst = converted(tmp_path, "qwen1")
    state = original_state(dst)
    rows = len(state["lm_head.weight"])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        state[name] = torch.cat([state[name], state[name][:64]])
    save_weights(dst, state)
    convert_back(plan_way_back(dst, None), tmp_path / "back")
    assert read_json(tmp_path / "back" / "config.json")["vocab_size"] == rows + 64
    assert read_json(src / "config.json")["vocab_size"] == rows


def test_the_original_may_be_named_and_must_be_its_own(tmp_path: Path) -> None:
    src, dst = converted(tmp_path, "qwen1")
    import shutil

    shutil.rmtree(dst / "original")
    (dst / "rlhfkit.json").unlink()
    with pytest.raises(RepairRefusedError, match="does not say what it was converted from") as caught:
        plan_way_back(dst, None)
    assert "--original FOLDER" in caught.value.hint
    convert_back(plan_way_back(dst, src), tmp_path / "back")
    other = make_qwen1(tmp_path / "other", rotary_emb_base=10000)
    with pytest.raises(RepairRefusedError, match="has rope_theta 1000000"):
        plan_way_back(dst, other)
    with pytest.raises(RepairRefusedError, match="model_type 'qwen2', and a converted Baichuan 7B has 'llama'"):
        plan_way_back(dst, make_baichuan(tmp_path / "baichuan", 1))


# -- facts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "positions", "name", "refused"),
    [
        (64000, True, "Baichuan 7B", False),
        (125696, True, "Baichuan2 7B", False),
        (125760, True, "Baichuan2 7B", False),
        (64000, False, "Baichuan 13B", True),
        (125696, False, "Baichuan2 13B", True),
    ],
)
def test_which_baichuan(rows: int, positions: bool, name: str, refused: bool) -> None:
    config = {"model_type": "baichuan", "hidden_size": 4096, **({"max_position_embeddings": 4096} if positions else {})}
    family = find_family(config)
    assert family.legacy_layout is not None
    layout = family.legacy_layout(config, rows)
    assert (layout.name, bool(layout.refused)) == (name, refused)
    assert any(rule.unit_rows for rule in layout.tensors) == (rows > 100_000)
    assert layout.tokenizer.roles == ROLES[2 if rows > 100_000 else 1]  # type: ignore[union-attr]


def test_the_record_tells_what_was_done(tmp_path: Path) -> None:
    src, dst = converted(tmp_path, "qwen1")
    record = json.loads((dst / "conversion.json").read_text(encoding="utf-8"))
    assert record["from"]["folder"] == str(src.resolve())
    assert record["from"]["layout"] == "Qwen 1"
    assert record["to"] == {"class": "Qwen2ForCausalLM", "files": ["model.safetensors"]}
    assert any("eos_token was '<|endoftext|>'" in change for change in record["changes"])
