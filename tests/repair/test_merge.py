"""A merged folder, loaded as anybody loads it, against peft's own unmerged model on the base."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhfkit.errors import CheckpointError, ConfigError, ModelError
from rlhfkit.repair import merge as merging
from rlhfkit.repair.tensors import load_tensor
from rlhfkit.stages.merge import run

IDS = torch.arange(5, 45)[None]


def merge(adapter: Path, dst: Path, *, base: str = "", dtype: str = "auto") -> merging.Proof:
    return run(adapter, dst, base=base, dtype=dtype, device="cpu")


def auto(scores: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if scores else AutoModelForCausalLM


def make_base(folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = True, shards: bool = False) -> Path:
    make_model(folder, tie_word_embeddings=tied)
    if dtype != torch.float32 or shards:
        model = auto(False).from_pretrained(folder, dtype=dtype)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="30KB" if shards else "5GB")
    return folder


def make_adapter(folder: Path, base: Path, *, scores: bool = False, noise: float = 0.1, **lora: Any) -> Path:
    """A LoRA folder whose every trained number moved."""
    from peft import LoraConfig, get_peft_model

    options = {"num_labels": 1} if scores else {}
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "SEQ_CLS" if scores else "CAUSAL_LM"}
    model = auto(scores).from_pretrained(base, dtype=torch.float32, **options)
    adapted = get_peft_model(model, LoraConfig(**{**settings, **lora}))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def adapted_logits(base: Path, adapter: Path, *, scores: bool = False) -> Tensor:
    from peft import PeftModel

    options = {"num_labels": 1} if scores else {}
    model = auto(scores).from_pretrained(base, dtype=torch.float32, **options)
    logits: Tensor = PeftModel.from_pretrained(model, adapter).eval()(IDS).logits
    return logits


@torch.no_grad()
def merged_logits(folder: Path, *, scores: bool = False) -> Tensor:
    model, info = auto(scores).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    logits: Tensor = model.eval()(IDS).logits
    return logits


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "shards": ({"shards": True, "tied": False}, {}),
    "rank-stabilised, patterns": (
        {},
        {"use_rslora": True, "alpha_pattern": {"q_proj": 32}, "rank_pattern": {"down_proj": 2}},
    ),
    "DoRA": ({}, {"use_dora": True}),
    "every linear layer": ({"tied": False}, {"target_modules": "all-linear"}),
    "head": ({"tied": False}, {"target_modules": ["lm_head", "v_proj"]}),
    "embedding, tied": ({}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "embedding alone": ({}, {"modules_to_save": ["embed_tokens"]}),
    "embedding and head": ({"tied": False}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "LoRA on the embedding": ({}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "norms trained whole": ({}, {"modules_to_save": ["input_layernorm"]}),
}


@pytest.mark.parametrize(("base_options", "lora"), VARIANTS.values(), ids=VARIANTS.keys())
def test_merged_folder_says_what_base_and_adapter_say(
    tmp_path: Path, base_options: dict[str, Any], lora: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", **base_options)
    adapter = make_adapter(tmp_path / "adapter", base, **lora)
    proof = merge(adapter, tmp_path / "merged")
    wanted, found = adapted_logits(base, adapter), merged_logits(tmp_path / "merged")
    assert (found - wanted).abs().max() < 1e-4
    assert (wanted - auto(False).from_pretrained(base)(IDS).logits).abs().max() > 0.5  # the adapter matters
    assert (proof.fault, proof.what, proof.agreement) == ("", "logits", 1.0)
    stored = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert stored["merged"]["max"] == proof.merged.max < 1e-4 < proof.effect.max
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_biases_that_trained_are_merged(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    base = make_model(tmp_path / "base")
    config = {
        k: v
        for k, v in json.loads((base / "config.json").read_text()).items()
        if k not in ("model_type", "architectures")
    }
    Qwen2ForCausalLM(Qwen2Config(**config)).save_pretrained(base)
    for bias in ("all", "lora_only"):
        adapter = make_adapter(tmp_path / bias, base, bias=bias)
        merge(adapter, tmp_path / f"merged-{bias}")
        assert (merged_logits(tmp_path / f"merged-{bias}") - adapted_logits(base, adapter)).abs().max() < 1e-4
        name = "model.layers.0.self_attn.k_proj.bias"
        before, after = (load_file(f / "model.safetensors")[name] for f in (base, tmp_path / f"merged-{bias}"))
        assert torch.equal(before, after) is (bias == "lora_only")


@pytest.mark.parametrize("tied", [True, False])
def test_reward_model_keeps_its_head_in_float32(tmp_path: Path, tied: bool) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16, tied=tied)
    adapter = make_adapter(tmp_path / "adapter", base, scores=True)
    (adapter / "rlhfkit.json").write_text(json.dumps({"stage": "rm", "pooling": "last_token", "quantize": "4bit"}))
    proof = merge(adapter, tmp_path / "merged", dtype="bf16")
    assert (proof.what, proof.agreement) == ("scores", None)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert weights["score.weight"].dtype == torch.float32
    assert weights["model.norm.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in weights
    trained = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(weights["score.weight"], trained)
    wanted, found = adapted_logits(base, adapter, scores=True), merged_logits(tmp_path / "merged", scores=True)
    assert (found - wanted).abs().max() < 0.05
    # Unless it is asked for, its layers are not rounded either.
    assert merge(adapter, tmp_path / "exact").merged.max < 1e-4
    assert (merged_logits(tmp_path / "exact", scores=True) - wanted).abs().max() < 1e-4
    record = json.loads((tmp_path / "merged" / "rlhfkit.json").read_text())
    assert (record["stage"], record["pooling"], record["quantize"]) == ("rm", "last_token", "none")


def test_float32_on_demand_loses_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16, shards=True)
    adapter = make_adapter(tmp_path / "adapter", base)
    rounded, exact = merge(adapter, tmp_path / "bf16"), merge(adapter, tmp_path / "fp32", dtype="fp32")
    assert exact.merged.max < 1e-4 < rounded.merged.max
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"
    for folder, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found = [load_file(path) for path in (tmp_path / folder).glob("*.safetensors")]
        assert {t.dtype for group in found for t in group.values()} == {dtype}
    # What no adapter touches is copied bit for bit.
    name = "model.layers.0.self_attn.k_proj.weight"
    one = {k: v for path in base.glob("*.safetensors") for k, v in load_file(path).items()}[name]
    two = {k: v for path in (tmp_path / "bf16").glob("*.safetensors") for k, v in load_file(path).items()}[name]
    assert torch.equal(one, two)


def test_adapter_that_rounding_would_swallow_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, noise=1e-4)
    with pytest.raises(CheckpointError, match="too little of it is left") as refusal:
        merge(adapter, tmp_path / "merged")
    assert "--dtype fp32" in refusal.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    merge(adapter, tmp_path / "merged", dtype="fp32")


def _half_scale(layer: Any) -> None:
    layer.scaling = {name: scale / 2 for name, scale in layer.scaling.items()}


@pytest.mark.parametrize("fault", ["scale", "one layer forgotten"])
def test_wrong_merge_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    from peft.tuners.lora import Linear

    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    right, calls = Linear.merge, []

    def wrong(self: Any, **options: Any) -> None:
        calls.append(self)
        if fault == "scale":
            before = dict(self.scaling)
            _half_scale(self)
            right(self, **options)
            self.scaling = before
        elif self is not calls[0]:
            right(self, **options)

    monkeypatch.setattr(Linear, "merge", wrong)
    with pytest.raises(CheckpointError, match="before any rounding"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_grown_vocabulary_is_merged(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    small = auto(False).from_pretrained(base)
    small.resize_token_embeddings(339)
    small.save_pretrained(base)
    model = auto(False).from_pretrained(base)
    model.resize_token_embeddings(384, mean_resizing=False)
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    adapted = get_peft_model(model, settings)
    for parameter in adapted.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    adapted.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    wanted = adapted.eval()(IDS).logits
    assert (merged_logits(tmp_path / "merged") - wanted).abs().max() < 1e-4
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 384


def test_quantisation_gap_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_model(tmp_path / "base", hidden_size=128, intermediate_size=256)  # its blocks are 64 weights long
    adapter = make_adapter(tmp_path / "run" / "final", base)
    (tmp_path / "run" / "config.resolved.yaml").write_text("model:\n  quantize: 4bit\n")
    (tmp_path / "run" / "value").mkdir()
    save_file({"value_head.weight": torch.ones(1, 4)}, tmp_path / "run" / "value" / "value.safetensors")
    proof = merge(tmp_path / "run", tmp_path / "merged")
    assert proof.quantised is not None
    assert proof.quantised.rms > 3 * proof.merged.rms
    assert "trained on a 4bit base" in capsys.readouterr().out
    # The gap is that of the model as bitsandbytes computes it.
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    model = auto(False).from_pretrained(base, dtype=torch.float32, quantization_config=four)
    with torch.no_grad():
        trained = PeftModel.from_pretrained(model, adapter).eval()(IDS).logits
    gap = (trained - adapted_logits(base, adapter)).double()
    assert 0.5 < float(gap.square().mean().sqrt()) / proof.quantised.rms < 2
    assert load_file(tmp_path / "merged" / "value" / "value.safetensors")["value_head.weight"].tolist() == [[1] * 4]


def test_what_stands_beside_the_weights_is_carried(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    base = make_base(tmp_path / "base")
    (base / "LICENSE").write_text("terms")
    (base / "README.md").write_text("about the base")
    adapter = make_adapter(tmp_path / "adapter", base)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(adapter)
    GenerationConfig(eos_token_id=[2, 0], pad_token_id=0).save_pretrained(adapter)
    merge(adapter, tmp_path / "merged")
    merged = tmp_path / "merged"
    assert AutoTokenizer.from_pretrained(merged).chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [2, 0]
    assert (merged / "LICENSE").read_text() == "terms"
    assert not {"README.md", "adapter_config.json", "adapter_model.safetensors"} & {p.name for p in merged.iterdir()}
    config = json.loads((merged / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 2)


# ---------------------------------------------------------------- refusals


def _edit(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another kind of adapter": (lambda a: _edit(a, peft_type="IA3"), "is a IA3 adapter"),
    "tokens trained alone": (lambda a: _edit(a, trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "activated LoRA": (lambda a: _edit(a, alora_invocation_tokens=[5]), "alora_invocation_tokens"),
    "a variant of tomorrow": (lambda a: _edit(a, use_xlora=True), "use_xlora = true, which merge does not know"),
    "a start that changes the base": (lambda a: _edit(a, init_lora_weights="pissa"), "init_lora_weights = pissa"),
    "another rank": (lambda a: _edit(a, r=8), "does not fit its base"),
    "more targets than weights": (
        lambda a: _edit(a, target_modules=["q_proj", "down_proj", "v_proj"]),
        "is not the one its configuration describes",
    ),
    "no base": (
        lambda a: _edit(a, base_model_name_or_path="/nowhere/at/all"),
        "whose base '/nowhere/at/all' is not there",
    ),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "cannot be read"),
}


@pytest.mark.parametrize(("damage", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    damage(adapter)
    with pytest.raises(ModelError, match=words):
        merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_base_that_is_quantised_itself_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="is quantised itself") as refusal:
        merge(adapter, tmp_path / "merged")
    assert "--base" in refusal.value.hint


def test_base_elsewhere_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    wanted = adapted_logits(base, adapter)
    base.rename(tmp_path / "moved")
    merge(adapter, tmp_path / "merged", base=str(tmp_path / "moved"))
    assert (merged_logits(tmp_path / "merged") - wanted).abs().max() < 1e-4


def test_other_base_of_the_same_shape_is_merged_as_what_it_is(tmp_path: Path) -> None:
    """Nothing in an adapter tells two bases of one shape apart; the proof is against the base that was named."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    other = make_model(tmp_path / "other", seed=7)
    merge(adapter, tmp_path / "merged", base=str(other))
    assert (merged_logits(tmp_path / "merged") - adapted_logits(other, adapter)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["", "final"])
def test_whole_model_needs_no_merge(tmp_path: Path, name: str) -> None:
    make_base(tmp_path / "run" / name)
    with pytest.raises(ModelError, match="holds all weights, not an adapter"):
        merge(tmp_path / "run", tmp_path / "merged")


def test_destination_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(CheckpointError, match="is there already"):
        merge(tmp_path, tmp_path / "merged")
    with pytest.raises(ConfigError, match="there is no such format"):
        merge(tmp_path, tmp_path / "other", dtype="int4")
    with pytest.raises(ConfigError, match="there is no such device"):
        run(tmp_path, tmp_path / "other", base="", dtype="auto", device="tpu")


class _Trap:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "run")


def test_code_in_a_pickled_adapter_or_base_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    trace = tmp_path / "trace"
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({**weights, "x": _Trap(trace)}, adapter / "adapter_model.bin", pickle_module=pickle)
    with pytest.raises(ModelError, match="cannot be read"):
        merge(adapter, tmp_path / "merged")
    torch.save(weights, adapter / "adapter_model.bin")
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(state, base / "pytorch_model.bin")
    merge(adapter, tmp_path / "merged")
    shutil.rmtree(tmp_path / "merged")
    torch.save({**state, "x": _Trap(trace)}, base / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(Exception, match="plain weights"):
        merge(adapter, tmp_path / "merged")
    assert not trace.exists()


@pytest.mark.slow
def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight of the base is alive when another one is read: the model never stands in memory."""
    import gc
    import weakref

    base = make_base(tmp_path / "base", tied=False)
    adapter = make_adapter(tmp_path / "adapter", base)
    alive: list[weakref.ref[Tensor]] = []
    most = [0]

    def counted(*arguments: Any) -> Tensor:
        value = load_tensor(*arguments)
        gc.collect()
        alive.append(weakref.ref(value))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return value

    monkeypatch.setattr("rlhfkit.repair.streamed.load_tensor", counted)
    merge(adapter, tmp_path / "merged")
    assert len(alive) > 60
    assert most[0] <= 3  # a layer and what it computes with


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
