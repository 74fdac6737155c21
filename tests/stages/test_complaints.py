"""What users of other toolkits complain about, end to end. The parts are tested beside the code that does them:

the loss mask token by token, the first token of an answer in it       tests/chat/test_masks.py
pad equal to eos in masks and counts                                   tests/chat/test_template.py, data/test_audit.py
one BOS, whoever puts it there                                         tests/chat/test_template.py
rows with nothing to learn left out, named, an error if there are
no others                                                              tests/data/test_tokenize.py
loss and gradient of micro-batches, and of processes                   tests/stages/test_sft.py, tests/test_processes.py
heads that are lost, spoilt or random; scores in other libraries       tests/models/test_reward_trust.py
the same of sharded weights                                            tests/test_sharded.py
pairs dropped for their length                                         tests/data/test_tokenize.py, stages/test_score.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer, read_metrics, write_jsonl
from killing import assert_same_weights

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import RmConfig, SftConfig
from rlhfkit.stages import reward, sft

Settings = Callable[..., dict[str, Any]]


@pytest.fixture(params=["<|im_end|>", None], ids=["pad-is-eos", "no-pad"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose tokenizer pads with the token that ends its turns, or has no pad."""
    folder = make_model(tmp_path / "base", pad_token_id=None)
    make_tokenizer(pad_token=request.param).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_the_end_token_trains_also_where_the_base_pads_with_it(
    settings: Settings, sft_file: Path, tmp_path: Path, packing: bool, kernels: str
) -> None:
    """transformers excludes the row of the config's pad from training, which is the end of turn where pad == eos."""
    base, trained = make_model(tmp_path / "base", tie_word_embeddings=False), []
    config = json.loads((base / "config.json").read_text())
    for name, pad in (("none", None), ("eos", make_tokenizer().eos_token_id)):
        (base / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
        flags = settings(
            name + "-run", model__path=str(base), data__train=[str(sft_file)], optim__packing=packing,
            optim__kernels=kernels,
        )  # fmt: skip
        trained.append(sft.run(load_config(SftConfig, flags=flags)).final)
    assert_same_weights(*trained)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_model_learns_to_stop(base: Path, settings: Settings, sft_file: Path, packing: bool) -> None:
    """trl#976, trl#1623, LLaMA-Factory#7454: answers go on for ever where the end was masked as padding."""
    flags = settings(
        "run", model__path=str(base), data__train=[str(sft_file)], data__eval=[str(sft_file)], optim__epochs=25,
        optim__lr=1e-2, optim__packing=packing,
    )  # fmt: skip
    result = sft.run(load_config(SftConfig, flags=flags))
    samples = [json.loads(line) for line in (result.out / "samples.jsonl").read_text().splitlines()]
    first, last = ([s for s in samples if s["step"] == step] for step in (0, samples[-1]["step"]))
    assert len(first) == len(last) == 4
    assert all(s["ended"] for s in last), last
    assert not all(s["ended"] for s in first), first

    from transformers import AutoModelForCausalLM, AutoTokenizer

    # And elsewhere: plain generation with what the folder itself says.
    tokenizer, model = AutoTokenizer.from_pretrained(result.final), AutoModelForCausalLM.from_pretrained(result.final)
    chat = [{"role": "user", "content": json.loads(sft_file.read_text().splitlines()[0])["prompt"]}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert len(answer) < 64
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_reward_model_takes_batches_elsewhere(base: Path, settings: Settings, pairs_file: Path) -> None:
    """trl#422, transformers#26160: no padding token; transformers#35352: the score read in front of the end."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    flags = settings("rm", model__path=str(base), data__train=[str(pairs_file)], data__eval=[str(pairs_file)])
    result = reward.run(load_config(RmConfig, flags=flags))
    model = AutoModelForSequenceClassification.from_pretrained(result.final).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.final)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token != "<|im_end|>"
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            tokenize=False,
        ).removesuffix("\n")
        for row in map(json.loads, pairs_file.read_text().splitlines())
    ]
    with torch.no_grad():
        batch = model(**tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")).logits[:, 0]
    assert batch.mean().item() == pytest.approx(read_metrics(result.out)[-1]["eval_reward_chosen"], abs=1e-5)


def test_a_text_row_is_learned_whole(settings: Settings, tiny_model: Path, tmp_path: Path) -> None:
    """As transformers trains causal language models: every token is a label."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["the film was good", "what do you think of the story?", "one two three <|im_end|> four"]
    data = str(write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts]))
    result = sft.run(load_config(SftConfig, flags=settings("run", data__train=[data], data__eval=[data])))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    loss = count = 0.0
    for text in texts:
        # What is typed in a text is text; the end is the one control token.
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        whole = torch.tensor([[*ids, tokenizer.eos_token_id]])
        loss += model(input_ids=whole, labels=whole).loss.item() * (whole.shape[1] - 1)
        count += whole.shape[1] - 1
    before, first = read_metrics(result.out)[:2]
    assert first["tokens"] == count
    assert before["eval_loss"] == pytest.approx(loss / count, abs=1e-5)


def test_a_weight_is_a_repetition(settings: Settings, sft_file: Path, tmp_path: Path) -> None:
    """A source of weight 2 trains as if it were given twice; one of weight 0.5 gives half of its rows."""
    other = str(write_jsonl(tmp_path / "other.jsonl", [{"prompt": f"say {i}", "response": "good"} for i in range(8)]))

    def trained(name: str, *data: str) -> Any:
        return sft.run(load_config(SftConfig, flags=settings(name, data__train=list(data), optim__batch_size=4)))

    weighted = trained("weighted", f"{sft_file}=2", other)
    twice = trained("twice", str(sft_file), str(sft_file), other)
    assert_same_weights(weighted.final, twice.final)
    assert read_metrics(weighted.out)[-1]["step"] == (12 + 12 + 8) / 4
    assert read_metrics(trained("half", str(sft_file), f"{other}=0.5").out)[-1]["step"] == (12 + 4) / 4
