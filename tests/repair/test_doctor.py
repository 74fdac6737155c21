"""A table that finds each fault and no other, on folders in every state of disrepair."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from legacy_folders import (
    digest,
    edit_json,
    make_original,
    make_tuned,
    overwrite,
    prefixed,
    read_json,
    remove,
    save_weights,
)
from legacy_models import make_qwen1
from safetensors.torch import load_file

from rlhfkit.errors import ModelError
from rlhfkit.repair.doctor import examine
from rlhfkit.repair.patient import Finding
from rlhfkit.stages.doctor import run

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def healthy(folder: Path) -> Path:
    make_model(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def found(folder: Path) -> dict[str, Finding]:
    """Findings by check; where a check says several things, the worst."""
    order = {"fail": 0, "warn": 1, "pass": 2}
    findings = sorted(examine(folder), key=lambda f: order[f.state], reverse=True)
    return {finding.check: finding for finding in findings}


def test_healthy_folder_passes_everything(tmp_path: Path) -> None:
    folder = healthy(tmp_path / "m")
    before = digest(folder)
    findings = examine(folder)
    assert {f.state for f in findings} == {"pass"}, [f for f in findings if f.state != "pass"]
    assert {f.check for f in findings} >= {
        "files", "config", "weights", "weight index", "tensors", "vocabulary", "head", "dtype", "pickles",
        "remote code", "tokenizer", "special tokens", "chat template", "stop ids", "generation",
    }  # fmt: skip
    numbers = found(folder)["vocabulary"].detail
    assert "tokenizer.vocab_size 339 (without added tokens), len(tokenizer) 339, config.vocab_size 384" in numbers
    assert "embedding rows 384. 45 rows are padding" in numbers
    assert digest(folder) == before


def _pickled(folder: Path, extra: dict[str, Any] | None = None) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, **(extra or {})}, folder / "pytorch_model.bin", pickle_module=pickle)


def _without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_weights(folder, {k: v for k, v in state.items() if k != name})

    return damage


def _retyped(folder: Path) -> None:
    save_weights(folder, {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()})


def _template(text: str) -> Callable[[Path], None]:
    return lambda folder: overwrite(folder / "chat_template.jinja", text)


def _retokenised(**special: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tokenizer = make_tokenizer(**special)
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folder)

    return damage


FAULTS: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "files", "fail", "config.json is missing"),
    "half a config": (lambda f: overwrite(f / "config.json", '{"a'), "files", "fail", "no JSON object in config.json"),
    "no type": (lambda f: edit_json(f / "config.json", "model_type"), "config", "fail", "names no model_type"),
    "a stranger": (lambda f: edit_json(f / "config.json", model_type="bert"), "config", "warn", "no installed family"),
    "half the weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "weights", "fail", "the file has 5000",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights", "fail", "holds no weights"),
    "stale index": (
        lambda f: overwrite(f / "model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        "weight index", "warn", "names files that are absent",
    ),
    "index that leads out": (
        lambda f: overwrite(f / "model.safetensors.index.json", '{"weight_map": {"a": "../b"}}'),
        "weights", "fail", "no file of its own folder",
    ),
    "a weight lost": (_without("model.layers.1.mlp.up_proj.weight"), "tensors", "fail", "1 missing"),
    "other sizes": (lambda f: edit_json(f / "config.json", intermediate_size=96), "tensors", "fail", "json asks"),
    "vocab_size": (lambda f: edit_json(f / "config.json", vocab_size=339), "vocabulary", "fail", "must be the rows"),
    "untied": (lambda f: edit_json(f / "config.json", tie_word_embeddings=False), "head", "fail", "would be random"),
    "dtype": (_retyped, "dtype", "warn", "the weights are bfloat16, config.json says float32"),
    "pickle": (_pickled, "pickles", "warn", "a pickle can run code"),
    "other pickles": (lambda f: overwrite(f / "training_args.bin", "x"), "pickles", "warn", "training_args.bin beside"),
    "no tokenizer": (
        lambda f: remove(f, "tokenizer*"), "tokenizer", "fail", "there is no vocabulary file",
    ),
    "damaged tokenizer": (
        lambda f: overwrite(f / "tokenizer.json", '{"model": 3}'), "tokenizer", "fail", "transformers cannot load it",
    ),
    "no pad": (_retokenised(pad_token=None), "special tokens", "warn", "batches cannot be padded"),
    "pad is eos": (_retokenised(pad_token="<|im_end|>"), "special tokens", "warn", "pad is eos"),
    "stop ids": (
        lambda f: edit_json(f / "generation_config.json", eos_token_id=0), "stop ids", "fail", "answers never end",
    ),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "chat template", "warn", "'chatml', is used"),
    "damaged template": (_template("{% for m in"), "chat template", "fail", "does not parse"),
    "endless": (_template("{% for m in messages %}{{ m['content'] }}{% endfor %}"), "chat template", "fail", ""),
    "invalid sampling": (
        lambda f: edit_json(f / "generation_config.json", temperature=0.3), "generation", "warn", "refuses to save",
    ),
    "no generation config": (lambda f: (f / "generation_config.json").unlink(), "generation", "warn", "defaults hold"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "check", "state", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_fault_is_found_and_has_a_way_out(
    tmp_path: Path, damage: Callable[[Path], Any], check: str, state: str, words: str
) -> None:
    folder = healthy(tmp_path / "m")
    damage(folder)
    finding = found(folder)[check]
    assert (finding.state, words in finding.detail) == (state, True), finding
    assert finding.fix


def test_token_without_a_row(tmp_path: Path) -> None:
    folder = healthy(tmp_path / "m")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<t{i}>" for i in range(60)])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    finding = found(folder)["vocabulary"]
    assert finding.state == "fail"
    assert "len(tokenizer) 399" in finding.detail
    assert finding.fix.endswith("--pad-vocab 64")


def test_a_qwen1_folder_has_its_four_numbers_and_needs_no_code(tmp_path: Path) -> None:
    """Its tokenizer is code; how many special tokens that adds is a fact of the family."""
    folder = make_qwen1(tmp_path / "m")
    ranks = len((folder / "qwen.tiktoken").read_text().splitlines())
    rows = read_json(folder / "config.json")["vocab_size"]
    numbers = found(folder)["vocabulary"].detail
    assert numbers.startswith(
        f"tokenizer.vocab_size {ranks} (without added tokens), len(tokenizer) {ranks + 208}, config.vocab_size {rows}"
    )
    assert f"{rows - ranks - 208} rows are padding" in numbers
    remove(folder, "*.py")
    code = found(folder)["remote code"]
    assert code.state == "fail"
    assert "none of them is run here" in code.detail


def test_code_in_a_pickle_is_a_fault_and_does_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.write_text, (tmp_path / "trace", "run")

    folder = healthy(tmp_path / "m")
    _pickled(folder, {"x": Path.write_text})
    assert found(folder)["weights"].state == "fail"
    assert not (tmp_path / "trace").exists()


# ---------------------------------------------------------------- remote-code folders


def test_whole_legacy_folder_has_no_fault(tmp_path: Path) -> None:
    for family in ("qwen", "baichuan", "baichuan2"):
        findings = examine(make_tuned(tmp_path / family, family))
        if family == "qwen":  # this one has 48 rows, fewer than special tokens
            findings = [f for f in findings if f.check != "vocabulary"]
        assert {f.check for f in findings if f.state == "fail"} == set()
        assert {f.check for f in findings if f.state == "warn"} - {"config"} == {"remote code"}


LEGACY: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {
    "code missing": ("qwen", lambda f: remove(f, "*.py"), "remote code", "code files missing: configuration_qwen.py"),
    "code elsewhere": (
        "qwen",
        lambda f: edit_json(f / "config.json", auto_map=prefixed(read_json(f / "config.json")["auto_map"])),
        "remote code",
        "on the hub",
    ),
    "vocabulary missing": ("qwen", lambda f: remove(f, "*.tiktoken"), "tokenizer", "there is no vocabulary file"),
    "BOS flags": (
        "baichuan2",
        lambda f: edit_json(f / "tokenizer_config.json", "add_bos_token"),
        "tokenizer",
        "add_bos_token is not stated",
    ),
    "rows": ("qwen", lambda f: edit_json(f / "config.json", vocab_size=40), "vocabulary", "must be the rows"),
}


@pytest.mark.parametrize(("family", "damage", "check", "words"), LEGACY.values(), ids=LEGACY.keys())
def test_fault_of_a_legacy_folder(
    tmp_path: Path, family: str, damage: Callable[[Path], Any], check: str, words: str
) -> None:
    original, folder = make_original(tmp_path / "src", family), make_tuned(tmp_path / "dst", family)
    edit_json(folder / "config.json", _name_or_path=str(original))
    damage(folder)
    findings = [f for f in examine(folder) if f.check == check and f.state == "fail"]
    assert any(words in f.detail for f in findings)
    assert findings[0].fix == f"rlhfkit fix-checkpoint {original} {folder}"


# ---------------------------------------------------------------- adapters, runs, the command


def _adapter(folder: Path, base: Path, *, scores: bool = False) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if scores:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    task = "SEQ_CLS" if scores else "CAUSAL_LM"
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type=task)).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def test_adapter_folder(tmp_path: Path) -> None:
    base = healthy(tmp_path / "base")
    folder = _adapter(tmp_path / "a", base, scores=True)
    assert {f.state for f in examine(folder)} == {"pass"}
    assert found(folder)["reward head"].state == "pass"
    (base / "model.safetensors").unlink()
    assert "holds no weights" in found(folder)["base"].detail
    base.rename(tmp_path / "moved")
    assert "its base is not there" in found(folder)["adapter"].detail
    (folder / "adapter_model.safetensors").unlink()
    assert found(folder)["weights"].state == "fail"
    overwrite(folder / "adapter_config.json", "{")
    assert found(folder)["adapter"].state == "fail"


def test_reward_model_without_its_head(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = healthy(tmp_path / "m")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    assert found(folder)["reward head"].state == "pass"
    _without("score.weight")(folder)
    assert found(folder)["reward head"].state == "fail"


def test_command_on_a_run_and_on_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    healthy(tmp_path / "run" / "final")
    run(tmp_path / "run", as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["path"], report["ok"]) == (str(tmp_path / "run" / "final"), True)
    with pytest.raises(ModelError, match="no folder at"):
        run(tmp_path / "nothing", as_json=False)
    with pytest.raises(ModelError, match="no folder at"):
        run(tmp_path / "nothing", as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["checks"][0]["state"]) == (False, "fail")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert {f.check for f in run(empty, as_json=False) if f.state == "fail"} == {"files", "weights", "tokenizer"}
    assert "→" in capsys.readouterr().out


def test_the_command_mends_the_dtype(tmp_path: Path) -> None:
    folder = healthy(tmp_path / "a b")
    _retyped(folder)
    subprocess.run(found(folder)["dtype"].fix, shell=True, check=True)
    assert found(folder)["dtype"].state == "pass"


def test_exit_code(tmp_path: Path) -> None:
    folder = healthy(tmp_path / "m")
    command = [sys.executable, "-m", "rlhfkit", "doctor", str(folder), "--json"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (folder / "config.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
