"""The reward model end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import read_metrics, write_jsonl

from rlhfkit.chat.messages import Message
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import RmConfig, SftConfig
from rlhfkit.errors import ModelError
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.stages import reward, sft

CPU = torch.device("cpu")


def train(flags, *sets):
    return reward.run(load_config(RmConfig, flags=flags, sets=sets))


def scorer(folder: Path, **options) -> RewardScorer:
    return RewardScorer(str(folder), device=CPU, dtype=torch.float32, **options)


def answers_of(path: Path) -> tuple[list[list[Message]], list[str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = [[Message("user", row["prompt"])] for row in rows for _ in range(2)]
    return prompts, [row[key] for row in rows for key in ("chosen", "rejected")]


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_head_survives_saving_and_scores_are_the_same(settings, pairs_file, rank):
    """Loaded again it gives the scores that the evaluation at the end of the training saw."""
    changes = {
        "data__train": [str(pairs_file)],
        "data__eval": [str(pairs_file)],
        "optim__epochs": 6,
        "lora__rank": rank,
    }
    result = train(settings("rm", **changes, optim__lr=5e-3))
    metrics = read_metrics(result.out)
    assert metrics[-1]["eval_accuracy"] > 0.9
    assert metrics[0]["eval_loss"] > metrics[-1]["eval_loss"]

    prompts, answers = answers_of(pairs_file)
    scores = scorer(result.final).score(prompts, answers)
    chosen, rejected = scores[0::2], scores[1::2]
    assert sum(chosen) / len(chosen) == pytest.approx(metrics[-1]["eval_reward_chosen"], abs=1e-5)
    assert sum(rejected) / len(rejected) == pytest.approx(metrics[-1]["eval_reward_rejected"], abs=1e-5)
    record = json.loads((result.final / "rlhfkit.json").read_text())
    assert record["pooling"] == "last_token"
    assert record["score_mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    # One at a time, in another order: the same numbers.
    alone = scorer(result.final, micro_batch_tokens=1)
    assert alone.score(prompts[::-1], answers[::-1]) == pytest.approx(scores[::-1], abs=1e-5)


def test_full_model_scores_the_same_in_plain_transformers(settings, pairs_file):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = train(settings("rm", data__train=[str(pairs_file)], optim__epochs=2))
    prompts, answers = answers_of(pairs_file)
    ours = scorer(result.final).score(prompts, answers)
    tokenizer = AutoTokenizer.from_pretrained(result.final)
    model = AutoModelForSequenceClassification.from_pretrained(result.final)
    for prompt, answer, score in zip(prompts, answers, ours, strict=True):
        chat = [prompt[0].as_dict(), {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        assert float(model(**ids).logits.detach()) == pytest.approx(score, abs=1e-5)


def test_score_is_read_at_the_last_real_token_with_pad_equal_to_eos(settings, pairs_file):
    """Pad ids decide nothing: another fill gives the same scores."""
    result = train(settings("rm", data__train=[str(pairs_file)]))
    prompts, answers = answers_of(pairs_file)
    model = scorer(result.final)
    before = model.score(prompts, answers)
    assert len({len(model.encode(p, a)) for p, a in zip(prompts, answers, strict=True)}) > 1
    object.__setattr__(model.text.tokens, "pad_id", model.text.tokens.eos_id)
    assert model.score(prompts, answers) == pytest.approx(before, abs=1e-6)


def test_ranked_answers_equal_their_pairs(settings, tmp_path):
    """Three answers in one row: the loss is the mean over the three pairs."""
    ranked = [{"prompt": "say one word", "answers": ["good", "bad", "very bad"]}]
    pairs = [
        {"prompt": "say one word", "chosen": a, "rejected": b}
        for a, b in (("good", "bad"), ("good", "very bad"), ("bad", "very bad"))
    ]
    one = train(settings("k", data__train=[str(write_jsonl(tmp_path / "k.jsonl", ranked))]))
    three = train(settings("p", data__train=[str(write_jsonl(tmp_path / "p.jsonl", pairs))]))
    a, b = read_metrics(one.out)[0], read_metrics(three.out)[0]
    for name in ("loss", "accuracy", "margin", "grad_norm"):
        assert a[name] == pytest.approx(b[name], abs=1e-5)


def test_micro_batches_do_not_change_the_run(settings, pairs_file):
    flags = {"data__train": [str(pairs_file)], "optim__batch_size": 8}
    whole = read_metrics(train(settings("whole", **flags, optim__micro_batch_tokens=10**6)).out)
    single = read_metrics(train(settings("single", **flags, optim__micro_batch_tokens=1)).out)
    for a, b in zip(whole, single, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_model_without_a_head_is_no_reward_model(tiny_model):
    with pytest.raises(ModelError, match="has no reward head") as error:
        scorer(tiny_model)
    assert "rlhfkit rm --model" in str(error.value)


def test_an_adapter_without_its_head_is_no_reward_model(settings, pairs_file):
    from safetensors.torch import load_file, save_file

    result = train(settings("rm", data__train=[str(pairs_file)], lora__rank=4))
    path = result.final / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "score" not in k}, path)
    with pytest.raises(ModelError, match="has no reward head"):
        scorer(result.final)


def test_sft_adapter_becomes_a_reward_adapter(settings, sft_file, pairs_file):
    tuned = sft.run(load_config(SftConfig, flags=settings("sft", data__train=[str(sft_file)], lora__rank=4)))
    result = train(settings("rm", model__path=str(tuned.final), data__train=[str(pairs_file)], lora__rank=4))
    prompts, answers = answers_of(pairs_file)
    assert len(set(scorer(result.final).score(prompts, answers))) > 1


def test_resume_equals_unbroken(settings, pairs_file):
    from safetensors.torch import load_file

    from rlhfkit.errors import Interrupted

    changes = {"data__train": [str(pairs_file)], "optim__epochs": 3}
    unbroken = train(settings("unbroken", **changes))
    broken = settings("broken", **changes)

    def stop_after_four(self, record):
        self.interrupted = record["step"] == 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhfkit.runtime.run.Run._refuse_non_finite", stop_after_four)
        with pytest.raises(Interrupted):
            train(broken)
    resumed = train({**broken, "run.resume": True})
    a, b = (load_file(r.final / "model.safetensors") for r in (unbroken, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
