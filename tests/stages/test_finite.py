"""Numbers that are NaN or infinite end sft and rm before the weights have them, with rows, checkpoint and cause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_model, read_metrics, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import RmConfig, SftConfig
from rlhfkit.errors import NonFiniteError
from rlhfkit.models.text_side import TextSide
from rlhfkit.models.wrappers import LanguageModel, RewardModel
from rlhfkit.runtime.screen import Screen
from rlhfkit.stages import reward, sft
from rlhfkit.stages.common import open_text_side, read_rows


def train_sft(flags, *sets):
    return sft.run(load_config(SftConfig, flags=flags, sets=sets))


def train_rm(flags, *sets):
    return reward.run(load_config(RmConfig, flags=flags, sets=sets))


@pytest.fixture
def holed(tmp_path) -> Path:
    """A model that has no number for the token "5", which stands in the sixth row."""
    folder = make_model(tmp_path / "holed", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token_of("5", folder)] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def token_of(text: str, folder: Path) -> int:
    (token,) = AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    return token


@pytest.mark.parametrize(("train", "rows"), [(train_sft, "sft_file"), (train_rm, "pairs_file")], ids=["sft", "rm"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_weights_without_a_number_are_named_with_the_row(settings, holed, request, train, rows, rank):
    file = request.getfixturevalue(rows)
    flags = settings("run", model__path=str(holed), data__train=[str(file)], lora__rank=rank, optim__batch_size=12)
    with pytest.raises(NonFiniteError) as error:
        train(flags)
    assert error.value.message == f"the loss is not finite at step 1, row {file}:6 (there is no checkpoint yet)"
    assert error.value.hint.startswith(f"the weights of {holed} hold NaN or infinite values in fp32, first in ")
    assert "embed_tokens.weight" in error.value.hint
    assert not (Path(flags["run.out"]) / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("train", "rows", "what"),
    [(train_sft, "sft_file", "the loss of held-out rows"), (train_rm, "pairs_file", "the score")],
    ids=["sft", "rm"],
)
def test_the_evaluation_before_training_is_refused_too(settings, holed, request, train, rows, what):
    file = request.getfixturevalue(rows)
    flags = settings("run", model__path=str(holed), data__train=[str(file)], data__eval=[str(file)])
    with pytest.raises(NonFiniteError) as error:
        train(flags)
    assert error.value.message == f"{what} is not finite at step 0, row {file}:6 (there is no checkpoint yet)"
    assert "embed_tokens.weight" in error.value.hint


def test_a_row_without_a_loss_stops_sft_before_the_weights_change(settings, sft_file, tiny_model, monkeypatch):
    """The last good checkpoint is of the step before, and its weights are those that the faulty step was given."""
    flags = settings("run", data__train=[str(sft_file)], run__save_every=1, optim__epochs=2)
    token, modules = token_of("5", tiny_model), []

    def forward(self, batch, real=LanguageModel.forward):
        stats = real(self, batch)
        modules[:] = [self]
        spoiled = bool((batch.tokens.input_ids == token).any())
        return stats._replace(logprobs=stats.logprobs * float("inf")) if spoiled else stats

    monkeypatch.setattr(LanguageModel, "forward", forward)
    monkeypatch.setattr(
        "rlhfkit.stages.sft.BatchOrder.batch", lambda self, step: [step, 5, 7, 9][: 1 if step < 4 else 4]
    )
    with pytest.raises(NonFiniteError) as error:
        train_sft(flags)
    last = Path(flags["run.out"]) / "checkpoints" / "step-3"
    assert error.value.message == (
        f"the loss is not finite at step 4, row {sft_file}:6 (the last good checkpoint is {last})"
    )
    assert error.value.hint == "lower --lr, or compute in another format: --precision bf16 or fp32"
    stored = load_file(last / "trained-0.safetensors")
    assert all(torch.equal(p, stored[name]) for name, p in modules[0].named_parameters() if name in stored)
    assert stored


def test_an_infinite_score_is_refused_though_its_loss_is_0(settings, pairs_file, tiny_model, monkeypatch):
    token = token_of("5", tiny_model)

    def forward(self, tokens, last, real=RewardModel.forward):
        scores = real(self, tokens, last)
        spoiled = (tokens.input_ids == token).any() & (torch.arange(len(scores)) % 2 == 0)  # the better answers
        return scores + torch.where(spoiled, torch.inf, 0.0)

    monkeypatch.setattr(RewardModel, "forward", forward)
    flags = settings("run", data__train=[str(pairs_file)], optim__micro_batch_tokens=1, optim__batch_size=12)
    with pytest.raises(NonFiniteError, match=r"the loss is not finite at step 1, row .*pairs\.jsonl:6 "):
        train_rm(flags)


def test_a_gradient_that_is_not_finite_names_the_rows_of_its_step(settings, sft_file, monkeypatch):
    norms = iter([1.0, float("inf")])
    monkeypatch.setattr("torch.nn.utils.get_total_norm", lambda grads: torch.tensor(next(norms)))
    flags = settings("run", data__train=[str(sft_file)], run__save_every=1, optim__batch_size=6)
    with pytest.raises(NonFiniteError) as error:
        train_sft(flags)
    named = error.value.message.removeprefix("the gradient is not finite at step 2, row ")
    assert named.startswith(f"{sft_file}:")
    assert " and 3 more (the last good checkpoint is " in named
    assert [row["step"] for row in read_metrics(flags["run.out"])] == [1]


def test_rows_know_where_they_came_from(settings, tmp_path, tiny_model):
    """With sources of any weight, with rows that were skipped and rows that left nothing to learn."""
    long = "the film " * 200
    ours = write_jsonl(
        tmp_path / "ours.jsonl",
        [{"prompt": long if i % 3 == 0 else f"say {i}", "response": f"it is {i}"} for i in range(9)],
    )
    theirs = write_jsonl(
        tmp_path / "theirs.jsonl",
        [{"prompt": f"count {i}"} | ({"response": f"{i}"} if i != 2 else {}) for i in range(8)],
    )
    flags = settings("run", data__train=[f"{ours}=1.5", f"{theirs}=0.6"], data__on_bad_row="skip")
    config = load_config(SftConfig, flags=flags)
    _, text = open_text_side(config)
    rows = read_rows(config, config.data.train, text, Screen(), "training").rows
    assert len(rows) == 9 + 4
    for i, row in enumerate(rows):
        (place,) = rows.places([i])
        path, _, line = place.rpartition(":")
        said = f"say {int(line) - 1}<" if path == str(ours) else f"count {int(line) - 1}<"
        assert said in decoded(text, row.ids), place
    assert len(rows.places(range(len(rows)))) == len({rows.places([i])[0] for i in range(len(rows))})


def test_pieces_of_a_text_know_it(settings, tmp_path, tiny_model):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{i} " * length} for i, length in enumerate((5, 300, 5))])
    config = load_config(SftConfig, flags=settings("run", data__train=[str(texts)]))
    _, text = open_text_side(config)
    rows = read_rows(config, config.data.train, text, Screen(), "training").rows
    assert len(rows) > 4
    for i, row in enumerate(rows):
        (place,) = rows.places([i])
        assert str(int(place.rpartition(":")[2]) - 1) in decoded(text, row.ids)


def decoded(text: TextSide, ids) -> str:
    return str(text.tokenizer.decode(ids))
