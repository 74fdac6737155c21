"""SFT end to end on a tiny model: equivalences rather than snapshots."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import read_metrics, write_jsonl
from killing import assert_same_weights
from safetensors.torch import load_file

from rlhfkit.chat.messages import Message
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import SftConfig
from rlhfkit.errors import CheckpointError, ConfigError, DataError, Interrupted
from rlhfkit.stages import sft


def train(flags, *sets):
    return sft.run(load_config(SftConfig, flags=flags, sets=sets))


def test_loss_falls_and_final_loads_in_plain_transformers(settings, sft_file):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(settings("run", data__train=[str(sft_file)], data__eval=[str(sft_file)], optim__epochs=8))
    metrics = read_metrics(result.out)
    assert metrics[0]["step"] == 0
    assert metrics[-1]["event"] == "end"
    assert metrics[-1]["eval_loss"] < 0.7 * metrics[0]["eval_loss"]
    always = {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_total",
        "seconds",
        "tokens_per_second",
        "peak_memory_gib",
    }
    assert all(always <= set(row) for row in metrics[1:-1])
    assert metrics[-2]["tokens_total"] == sum(row["tokens"] for row in metrics[1:-1])

    tokenizer = AutoTokenizer.from_pretrained(result.final)
    model = AutoModelForCausalLM.from_pretrained(result.final)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True)
    assert torch.isfinite(model(**ids).logits).all()
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_loss_is_the_mean_cross_entropy_over_supervised_tokens(settings, sft_file, tiny_model):
    """Against plain transformers: one row at a time, labels -100 outside the answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhfkit.chat.template import ChatEncoder, load_template

    result = train(settings("run", data__train=[str(sft_file)], data__eval=[str(sft_file)]), "optim.max_steps=1")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny_model), load_template("chatml"))
    total = count = 0.0
    for line in sft_file.read_text().splitlines():
        row = json.loads(line)
        encoded = encoder.encode([Message("user", row["prompt"]), Message("assistant", row["response"])])
        ids = torch.tensor([encoded.ids])
        labels = torch.tensor([[i if s else -100 for i, s in zip(encoded.ids, encoded.supervised, strict=True)]])
        n = int((labels[:, 1:] != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * n
        count += n
    assert read_metrics(result.out)[0]["eval_loss"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_micro_batches_do_not_change_the_run(settings, sft_file, rank):
    """8x1 and 1x8: the same losses and gradients, full weights and LoRA."""
    flags = {"data__train": [str(sft_file)], "lora__rank": rank, "optim__batch_size": 8}
    whole = read_metrics(train(settings("whole", **flags, optim__micro_batch_tokens=100000)).out)
    single = read_metrics(train(settings("single", **flags, optim__micro_batch_tokens=1)).out)
    for a, b in zip(whole, single, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


@pytest.mark.parametrize("rank", [0, 4])
def test_resume_equals_unbroken_bit_for_bit(settings, sft_file, rank):
    flags = {"data__train": [str(sft_file)], "lora__rank": rank, "optim__epochs": 3}
    unbroken = train(settings("unbroken", **flags))
    broken = settings("broken", **flags)
    config = load_config(SftConfig, flags=broken)

    def stop_after_four(self, record):
        self.interrupted = record["step"] == 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhfkit.runtime.run.Run._refuse_non_finite", stop_after_four)
        with pytest.raises(Interrupted, match="stopped after step 4 of 9; everything is saved"):
            sft.run(config)
    torch.rand(7)  # a resumed process has other random states
    resumed = train({**broken, "run.resume": True})
    a, b = weights(unbroken.final), weights(resumed.final)
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = read_metrics(resumed.out)
    assert [row["step"] for row in rows if "event" not in row] == list(range(1, 10))
    assert rows[-1]["resumed_from"] == 4


def test_checkpoint_of_lora_holds_adapters_only(settings, sft_file):
    result = train(settings("run", data__train=[str(sft_file)], lora__rank=2))
    stored = load_file(next((result.out / "checkpoints").glob("step-*")) / "trained-0.safetensors")
    assert stored
    assert all("lora_" in name for name in stored)


def test_a_used_folder_is_refused_with_both_ways_on(settings, sft_file):
    flags = settings("run", data__train=[str(sft_file)])
    train(flags)
    with pytest.raises(ConfigError) as error:
        train(flags)
    assert "holds a run already" in str(error.value)
    assert "--resume" in str(error.value)
    assert "--out" in str(error.value)


def test_resume_with_other_settings_is_refused_by_name(settings, sft_file):
    flags = settings("run", data__train=[str(sft_file)])
    train(flags)
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.001 -> 0\.01"):
        train({**flags, "run.resume": True, "optim.lr": 0.01})


def test_resume_in_another_number_format_is_refused(settings, sft_file):
    """``auto`` is another one on another machine, and the settings do not tell."""
    flags = settings("run", data__train=[str(sft_file)], optim__epochs=2, run__save_every=1)
    result = train(flags)
    shutil.rmtree(result.final)
    newest = max((result.out / "checkpoints").iterdir(), key=lambda folder: int(folder.name.removeprefix("step-")))
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**state, "precision": "bf16"}))
    with pytest.raises(CheckpointError, match="was computed in bf16, and this run computes in fp32"):
        train({**flags, "run.resume": True})


def test_a_weight_that_leaves_no_row_is_refused(settings, sft_file):
    with pytest.raises(DataError, match=r"=0\.01: 0\.01 of its \d+ rows is no row"):
        train(settings("run", data__train=[str(sft_file), f"{sft_file}=0.01"]))


def test_resuming_a_finished_run_changes_nothing(settings, sft_file):
    flags = settings("run", data__train=[str(sft_file)])
    before = train(flags)
    text = (before.out / "metrics.jsonl").read_text()
    again = train({**flags, "run.resume": True})
    assert again.final == before.final
    assert (before.out / "metrics.jsonl").read_text() == text


def test_bad_data_leaves_no_run_behind(settings, tmp_path):
    from rlhfkit.errors import DataError

    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "response": ""}])
    flags = settings("run", data__train=[str(bad)])
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        train(flags)
    assert not Path(flags["run.out"]).exists()


def test_repeated_from_its_resolved_config(settings, sft_file, tmp_path):
    first = train(settings("first", data__train=[str(sft_file)], optim__epochs=2))
    recipe = str(first.out / "config.resolved.yaml")
    second = sft.run(load_config(SftConfig, recipe=recipe, flags={"run.out": str(tmp_path / "second")}))
    a, b = weights(first.final), weights(second.final)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_final_is_as_open_as_other_new_files(settings, sft_file, mask, mode):
    before = os.umask(mask)
    try:
        final = train(settings("run", data__train=[str(sft_file)], optim__max_steps=1)).final
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in final.iterdir()} == {mode}


def test_a_bf16_base_is_saved_in_bf16_with_one_tied_tensor(settings, sft_file, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "bf16")
    result = train(settings("run", model__path=str(tmp_path / "bf16"), data__train=[str(sft_file)]))
    stored = weights(result.final)
    assert "lm_head.weight" not in stored
    assert {v.dtype for v in stored.values()} == {torch.bfloat16}
    # Whoever loads it as it is gets the same format, and so does a stage that goes on from it.
    assert AutoModelForCausalLM.from_pretrained(result.final, dtype="auto").dtype == torch.bfloat16
    again = train(settings("again", model__path=str(result.final), data__train=[str(sft_file)]))
    assert {v.dtype for v in weights(again.final).values()} == {torch.bfloat16}


def test_resuming_before_the_first_checkpoint_starts_cleanly(settings, sft_file):
    """A run killed before any checkpoint: its records are not doubled."""
    flags = settings("run", data__train=[str(sft_file)], data__eval=[str(sft_file)], run__save_every=0)

    def crash(self, record):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhfkit.runtime.run.Run._refuse_non_finite", crash)
        with pytest.raises(KeyboardInterrupt):
            train(flags)
    result = train({**flags, "run.resume": True})
    rows = read_metrics(result.out)
    assert [row.get("event") for row in rows if "event" in row] == ["start", "end"]


def test_the_default_length_is_what_the_model_has(settings, sft_file):
    """And stands in the run's recipe; a length that was asked for is refused where it does not fit."""
    flags = settings("run", data__train=[str(sft_file)], run__save_every=1)
    del flags["data.max_length"]
    flags |= {"optim.max_steps": 2}
    sft.run(load_config(SftConfig, flags=flags))
    sft.run(load_config(SftConfig, flags=flags | {"run.resume": True}))
    resolved = Path(flags["run.out"]) / "config.resolved.yaml"
    assert yaml.safe_load(resolved.read_text())["data"]["max_length"] == 512
    again = sft.run(load_config(SftConfig, recipe=str(resolved), flags={"run.out": str(resolved.parent) + "-again"}))
    assert_same_weights(again.final, resolved.parent / "final")
    for number in (513, 1024):
        with pytest.raises(ConfigError, match=f"data.max_length: {number} is more than the 512 positions"):
            sft.run(
                load_config(SftConfig, flags=settings("other", data__train=[str(sft_file)], data__max_length=number))
            )
