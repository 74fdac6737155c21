"""TRL's trainers on our rows: the ids that reach them, losses that equal our own, resumes, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics, write_jsonl
from safetensors.torch import load_file

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import STAGES, GenerateConfig
from rlhfkit.errors import CheckpointError, ConfigError, Interrupted, RewardError
from rlhfkit.runtime.run import Run
from rlhfkit.stages import generate, pairs, reward, sft, trl_stages
from rlhfkit.stages.trl_engine import TrainerMixin, rows_per_pass

RUNS = {"sft": sft.run, "rm": reward.run}
ALWAYS = {
    "step", "loss", "lr", "grad_norm", "tokens", "tokens_total", "seconds", "tokens_per_second", "peak_memory_gib",
}  # fmt: skip
OWN = {
    "sft": {"token_accuracy"},
    "rm": {"accuracy", "margin", "reward_chosen", "reward_rejected"},
    "dpo": {"accuracy", "margin", "reward_chosen", "reward_rejected"},
    "kto": {"kl", "reward_chosen", "reward_rejected", "margin"},
    "grpo": {"episodes", "reward_mean", "reward_std", "kl_per_token", "kl_coef", "entropy", "response_tokens",
             "eos_rate", "seconds_rollout", "seconds_score"},
    "rloo": {"episodes", "reward_mean", "reward_std", "kl_per_token", "kl_coef", "entropy", "response_tokens",
             "eos_rate", "seconds_rollout", "seconds_score"},
}  # fmt: skip


def train(stage: str, flags: dict[str, Any]) -> Any:
    config = load_config(STAGES[stage], flags=flags)  # type: ignore[type-var]
    return RUNS.get(stage, trl_stages.run)(config)  # type: ignore[arg-type]


Make = Callable[..., dict[str, Any]]


@pytest.fixture
def of(
    settings: Make, sft_file: Path, pairs_file: Path, prompts_file: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Flags of a small run of a stage on TRL."""
    rows = [
        {"prompt": f"what of film {i}?", "completion": "good " * (i % 4 + 1), "label": i % 3 > 0} for i in range(10)
    ]
    kto_file = write_jsonl(tmp_path / "labelled.jsonl", rows)
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "def letters(prompts, responses, n, **_):\n"
        "    assert all(p == f'say one word {i}' for p, i in zip(prompts, n))\n"
        "    return [r.count('o') - 0.1 * len(r) for r in responses]\n"
    )

    def make(stage: str, out: str, **changes: Any) -> dict[str, Any]:
        data = {"sft": sft_file, "rm": pairs_file, "dpo": pairs_file, "kto": kto_file}.get(stage, prompts_file)
        more: dict[str, Any] = {"data__train": [str(data)], "data__eval": [str(data)]}
        if stage in ("sft", "rm"):
            more[f"{stage}__engine"] = "trl"
        if stage in ("grpo", "rloo"):
            online = {"reward": [f"{rewards}:letters"], "samples_per_prompt": 2, "max_new_tokens": 6, "kl_coef": 0.02}
            more |= {f"{stage}__{name}": value for name, value in online.items()}
            more |= {"optim__micro_batch_tokens": 60}  # two passes and more in a step
        return settings(out, **{**more, **changes})

    return make


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto", "grpo", "rloo"])
def test_run_folder(of: Make, stage: str) -> None:
    result = train(stage, of(stage, "run", optim__max_steps=2))
    rows = read_metrics(result.out)
    steps = [row for row in rows if "event" not in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(set(row) >= ALWAYS for row in steps)
    assert set().union(*steps) >= OWN[stage]
    assert (rows[0]["event"], rows[-1]["event"]) == ("start", "end")
    evaluated = "eval_reward_mean" if stage in ("grpo", "rloo") else "eval_loss"
    assert evaluated in rows[0]
    assert evaluated in steps[-1]
    assert rows[-1]["tokens_total"] == sum(row["tokens"] for row in steps)
    assert sorted(p.name for p in (result.out / "checkpoints").iterdir()) == ["step-2"]
    assert (result.final / "README.md").read_text().startswith("---")
    record = json.loads((result.final / "rlhfkit.json").read_text())
    assert record["stage"] == stage
    if stage == "rm":
        assert record["pooling"] == "last_token"
        assert (result.out / "evaluation.json").is_file()
        return
    samples = [json.loads(line) for line in (result.out / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 2}
    generate.run(load_config(GenerateConfig, flags={"model": str(result.final), "prompt": "hi", "max_new_tokens": 4}))


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.parametrize("rank", [0, 4], ids=("all", "lora"))
def test_engines_agree_step_by_step(of: Make, stage: str, rank: int) -> None:
    """The same rows in the same steps: losses, gradients, held-out figures and weights, to float error."""
    more = {"lora__rank": rank, "optim__epochs": 2.5, "optim__batch_size": 5, "optim__weight_decay": 0.1}
    if stage == "sft":
        more["sft__label_smoothing"] = 0.1
    else:
        more["rm__center_coef"] = 0.01
    theirs = train(stage, of(stage, "theirs", **more))
    ours = train(stage, of(stage, "ours", **more, **{f"{stage}__engine": "rlhfkit"}))
    a, b = read_metrics(theirs.out), read_metrics(ours.out)
    assert len(a) == len(b) > 7
    names = ["loss", "grad_norm", "lr", "tokens", "eval_loss", *sorted(OWN[stage] & {"accuracy", "margin"})]
    for one, other in zip(a, b, strict=True):
        assert {name for name in names if name in one} == {name for name in names if name in other}
        for name in (name for name in names if name in one):
            assert one[name] == pytest.approx(other[name], rel=2e-4, abs=2e-5), (one.get("step"), name)
    file = "adapter_model.safetensors" if rank else "model.safetensors"
    first, second = load_file(theirs.final / file), load_file(ours.final / file)
    assert set(first) == set(second)
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def caught(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the trainers' losses are given, pass by pass, in training."""
    seen: list[dict[str, Any]] = []

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        if model.training:
            seen.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        return super(TrainerMixin, self).compute_loss(model, inputs, *args, **options)  # type: ignore[misc]

    monkeypatch.setattr(TrainerMixin, "compute_loss", compute_loss, raising=False)
    return seen


def test_sft_ids_and_labels_are_those_of_our_own_stage(of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[Any]] = []
    monkeypatch.setattr(sft, "micro_batches", lambda rows, most: given.append(list(rows)) or [list(rows)])
    train("sft", of("sft", "ours", sft__engine="rlhfkit", data__eval=[]))
    ours = [(row.ids.tolist(), row.supervised.tolist()) for batch in given for row in batch]
    seen = caught(monkeypatch)
    train("sft", of("sft", "theirs", data__eval=[]))
    theirs = []
    for batch in seen:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            kept, wanted = ids[mask.bool()].tolist(), labels[mask.bool()].tolist()
            assert all(w in (-100, i) for i, w in zip(kept, wanted, strict=True))
            theirs.append((kept, [w != -100 for w in wanted]))
    assert theirs == ours
    assert len(theirs) == 12


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_pairs_are_those_of_our_own_stage(of: Make, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    collate = pairs.collate_pairs
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "collate_pairs", lambda rows, device: given.extend(rows) or collate(rows, device))
        train("rm", of("rm", "ours", rm__engine="rlhfkit", data__eval=[], optim__batch_size=12))
    ours = {(*row.prompt.tolist(), *answer.tolist()) for row in given for answer in row.answers}
    seen = caught(monkeypatch)
    train(stage, of(stage, "theirs", data__eval=[]))
    theirs = set()
    for batch in seen:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            theirs.add(tuple(ids[mask.bool()].tolist()))
    assert theirs == ours
    if stage == "dpo":  # the answer carries the loss, its end included
        end = seen[0]["input_ids"][0][seen[0]["attention_mask"][0].bool()][-1]
        lengths = {tuple(m[a.bool()].tolist()) for b in seen for m, a in
                   zip(b["completion_mask"], b["attention_mask"], strict=True)}  # fmt: skip
        answers = {len(answer) for row in given for answer in row.answers}
        assert {sum(mask) for mask in lengths} == answers
        assert all(mask[-1] == 1 and mask[: -sum(mask)] == (0,) * (len(mask) - sum(mask)) for mask in lengths)
        assert int(end) in {int(answer[-1]) for row in given for answer in row.answers}


def test_dpo_starts_at_ln_2_and_equals_the_formula(of: Make, tiny_model: Path) -> None:
    """The second step against log-probabilities of plain transformers, from the weights after the first."""
    flags = of("dpo", "run", optim__max_steps=1, optim__batch_size=12, dpo__beta=0.3)
    result = train("dpo", flags)
    rows = read_metrics(result.out)
    assert rows[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhfkit.chat.messages import Message
    from rlhfkit.chat.template import ChatEncoder, load_template

    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny_model), load_template("chatml"))
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (result.final, tiny_model)]

    def logprob(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + answer])
        logps = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
        return logps[len(prompt) - 1 :].gather(1, ids[0, len(prompt) :, None]).sum()

    losses = []
    for line in Path(flags["data.train"][0]).read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            sides = []
            for name in ("chosen", "rejected"):
                prompt, answer = encoder.encode_pair([Message("user", row["prompt"])], row[name])
                sides.append(logprob(models[0], prompt, answer) - logprob(models[1], prompt, answer))
        losses.append(-torch.nn.functional.logsigmoid(0.3 * (sides[0] - sides[1])))
    assert rows[1]["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("rm", "dpo", "kto", "rloo")]


@pytest.mark.parametrize("stage", ["sft", "grpo", *SLOW])
def test_resume_equals_unbroken(of: Make, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within the second epoch, evaluated once more than the unbroken run: the same weights, bit for bit."""
    more = {"optim__epochs": 2.5, "optim__batch_size": 5 if stage != "kto" else 4, "run__keep": 9}
    if stage == "sft":
        more |= {"sft__neftune_alpha": 5.0}
    if stage in ("grpo", "rloo"):
        more |= {"optim__batch_size": 6, "optim__max_steps": 6}
    unbroken = train(stage, of(stage, "unbroken", **more))
    broken = of(stage, "broken", **more, run__eval_every=2)

    def stop_after_four(self: Run, record: dict[str, Any]) -> None:
        self.interrupted = record["step"] == 4

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_refuse_non_finite", stop_after_four)
        with pytest.raises(Interrupted, match="stopped after step 4 of "):
            train(stage, broken)
    torch.rand(7)  # a resumed process has other random states
    resumed = train(stage, {**broken, "run.resume": True})
    a, b = load_file(unbroken.final / "model.safetensors"), load_file(resumed.final / "model.safetensors")
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = read_metrics(unbroken.out), read_metrics(resumed.out)
    for name in ("loss", "grad_norm", "lr", "tokens_total"):
        assert [r[name] for r in first if "event" not in r] == [r[name] for r in second if "event" not in r]
    assert second[-1]["resumed_from"] == 4


@pytest.mark.parametrize("stage", ["dpo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_an_adapter_goes_on_against_a_copy_of_itself(of: Make, stage: str, sft_file: Path) -> None:
    """The reference of an SFT adapter is that adapter, not its base; only one is saved."""
    first = train("sft", of("sft", "first", lora__rank=4, optim__epochs=4))
    more = {"model__path": str(first.final), "lora__rank": 4, "optim__max_steps": 2, "optim__epochs": 2}
    result = train(stage, of(stage, "run", **more))
    rows = read_metrics(result.out)
    if stage == "dpo":
        assert rows[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    else:
        assert rows[0].get("eval_kl_per_token") == pytest.approx(0, abs=1e-6)
    assert rows[1]["grad_norm"] > 0
    names = [p.relative_to(result.final).as_posix() for p in result.final.rglob("*.safetensors")]
    assert names == ["adapter_model.safetensors"]
    before, after = (load_file(p / "adapter_model.safetensors") for p in (first.final, result.final))
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_reference_of_a_merged_adapter_is_what_was_merged(of: Make) -> None:
    """TRL would read the base's folder once more, without the adapter."""
    first = train("sft", of("sft", "first", lora__rank=4, optim__epochs=4, optim__lr=0.02))
    result = train("rloo", of("rloo", "run", model__path=str(first.final), optim__max_steps=1))
    assert read_metrics(result.out)[0]["eval_kl_per_token"] == pytest.approx(0, abs=1e-6)


def test_qlora_trains_in_float32(of: Make) -> None:
    result = train("dpo", of("dpo", "run", lora__rank=4, model__quantize="4bit", optim__max_steps=1))
    weights = load_file(result.final / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_a_reward_that_fails_names_itself(of: Make, tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def one(prompts, responses):\n    return [1.0]\n")
    with pytest.raises(RewardError, match=r"bad\.py:one"):
        train("grpo", of("grpo", "run", grpo__reward=[f"{bad}:one"], data__eval=[]))
    with pytest.raises(RewardError, match="no file"):
        train("rloo", of("rloo", "other", rloo__reward=[f"{tmp_path}/none.py:one"]))
    assert not (tmp_path / "other").exists()


def test_missing_eos_penalty_reaches_the_reward(of: Make) -> None:
    plain = read_metrics(train("grpo", of("grpo", "plain", optim__max_steps=1)).out)[1]
    fined = read_metrics(train("grpo", of("grpo", "fined", optim__max_steps=1, grpo__missing_eos_penalty=2.0)).out)[1]
    assert plain["eos_rate"] == fined["eos_rate"] < 1
    assert plain["reward_mean"] - fined["reward_mean"] == pytest.approx(2 * (1 - plain["eos_rate"]), abs=1e-5)


def test_nobody_is_told(of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.base_trainer as base

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base, "send_telemetry", lambda **_: pytest.fail("told of the run"))
    train("sft", of("sft", "run", optim__max_steps=1))


def test_a_damaged_checkpoint_is_named(of: Make) -> None:
    flags = of("sft", "run", optim__max_steps=2)
    result = train("sft", flags)
    (result.out / "checkpoints/step-2/optimizer.pt").write_bytes(b"cut short")
    lines = (result.out / "metrics.jsonl").read_text().splitlines()
    (result.out / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    resolved = result.out / "config.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("max_steps: 2", "max_steps: 3"))
    with pytest.raises(CheckpointError, match=r"step-2 cannot be read"):
        train("sft", {**flags, "optim.max_steps": 3, "run.resume": True})


def test_the_size_of_a_pass_is_kept_on_resume(of: Make) -> None:
    flags = of("kto", "run", optim__max_steps=1, data__eval=[])
    train("kto", flags)
    with pytest.raises(ConfigError, match=r"optim\.micro_batch_tokens: 0 -> 100"):
        train("kto", {**flags, "optim.micro_batch_tokens": 100, "run.resume": True})


def test_kto_labels_and_answers_to_other_prompts(of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = caught(monkeypatch)
    train("kto", of("kto", "run", data__eval=[], optim__batch_size=4))
    labels = [bool(x) for batch in seen for x in batch["label"]]
    assert (len(labels), sum(labels)) == (10, 6)
    for batch in seen:
        own = [ids[m.bool()].tolist() for ids, m in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
        other = [i[m.bool()].tolist() for i, m in zip(batch["KL_input_ids"], batch["KL_completion_mask"], strict=True)]
        assert other == [own[-1], *own[:-1]]


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("sft", {"optim__packing": False}, "nothing to pack; leave --engine trl out"),
        ("rm", {"optim__packing": True}, "nothing to pack; leave --engine trl out"),  # its default, asked for
        ("rm", {"rm__label_smoothing": 0.1}, "no label smoothing; leave --engine trl out"),
        ("rm", {"run__plan": True}, r"run\.plan: what a run on TRL holds is not known beforehand"),
        ("dpo", {"optim__packing": True}, r"optim\.packing: TRL computes padded rows"),
        ("dpo", {"dpo__label_smoothing": 0.1}, "has no effect on the loss 'sigmoid'"),
        ("kto", {"optim__batch_size": 1}, "give at least 2"),
        ("grpo", {"grpo__cliprange": 0.3}, r"grpo\.cliprange: .* there is nothing to clip"),
        ("grpo", {"grpo__top_p": 0.9}, r"use grpo\.temperature"),
        ("rloo", {"rloo__gamma": 0.9}, r"rloo\.gamma: rloo compares the answers to a prompt"),
        ("rloo", {"optim__batch_size": 5}, r"2 answers to each prompt do not divide optim\.batch_size 5"),
        ("grpo", {"grpo__reward": []}, "no reward is given"),
        ("grpo", {"grpo__reward_timeout": 3.0}, "has no effect without a reward that is a URL"),
    ],
)
def test_what_has_no_effect_is_refused(of: Make, stage: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(stage, of(stage, "run", **changes))


def test_without_the_extra(of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhfkit.config.stages.find_spec", lambda name: None if name == "trl" else object())
    for stage in ("dpo", "sft"):
        with pytest.raises(ConfigError, match=r"which is not installed: pip install 'rlhfkit\[trl\]'"):
            train(stage, of(stage, "run"))


@pytest.mark.parametrize(
    ("batch", "cells", "budget", "least", "expected"),
    [(16, 100, 768, 1, 4), (16, 1000, 768, 1, 1), (7, 10, 50, 1, 1), (7, 10, 70, 1, 7), (6, 100, 100, 2, 2),
     (9, 100, 100, 2, 3)],
)  # fmt: skip
def test_rows_of_a_pass(batch: int, cells: int, budget: int, least: int, expected: int) -> None:
    assert rows_per_pass(batch, cells, budget, least=least) == expected
