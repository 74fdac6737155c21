"""A reward model's folder gives the scores of its training: here, in plain transformers and in plain peft.

Full, LoRA and QLoRA, trained and saved by the stage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import make_model, make_tokenizer, run_card, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rlhfkit.chat.messages import Message
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import RmConfig
from rlhfkit.errors import ModelError
from rlhfkit.models.heads import reward_head
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.stages import pairs, reward

CPU = torch.device("cpu")
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora.rank": 4},
    "qlora": {"lora.rank": 4, "model.quantize": "4bit"},
}
ROWS = [
    {"prompt": f"what about film {i}?", "chosen": f"it was good {i % 3}", "rejected": "very bad " * (i % 4 + 1)}
    for i in range(8)
]


class Judge(NamedTuple):
    """A reward model and what its training measured last: pairs of scores, sorted."""

    form: str
    folder: Path
    scores: list[tuple[float, float]]


def train(model: Path, folder: Path, form: str, **flags: Any) -> Judge:
    data = str(write_jsonl(folder / "pairs.jsonl", ROWS))
    given = {
        "model.path": str(model), "model.precision": "fp32", "data.train": [data], "data.eval": [data],
        "data.max_length": 128, "optim.lr": 5e-3, "optim.batch_size": 4, "run.out": str(folder / "run"),
        "run.trackers": ["none"], **FORMS[form], **flags,
    }  # fmt: skip
    seen: list[tuple[float, float]] = []

    def spy(chosen: Any, rejected: Any, weights: Any) -> Any:
        seen.extend(zip(chosen, rejected, strict=True))
        return real(chosen, rejected, weights)

    with pytest.MonkeyPatch.context() as patch:
        real = pairs.evaluation_report
        patch.setattr(pairs, "evaluation_report", spy)
        result = reward.run(load_config(RmConfig, flags=given))
    return Judge(form, result.final, sorted(seen))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose pad is its eos, which ends its turns, stored in bf16: what people start from.

    Wide enough for quantisation, which works on blocks of 64 weights.
    """
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path_factory.mktemp("bases") / "bf16", hidden_size=64, intermediate_size=128)
    tokenizer = make_tokenizer(pad_token="<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(FORMS))
def judge(request: Any, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return train(bases, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def copy(judge: Judge, tmp_path: Path) -> Path:
    """The folder, to be spoilt."""
    shutil.copytree(judge.folder, tmp_path / "copy")
    return tmp_path / "copy"


def scorer(folder: Path, dtype: torch.dtype = torch.float32) -> RewardScorer:
    return RewardScorer(str(folder), device=CPU, dtype=dtype)


def ours(folder: Path) -> list[tuple[float, float]]:
    model = scorer(folder)
    asked = [[Message("user", row["prompt"])] for row in ROWS]
    sides = [model.score(asked, [row[side] for row in ROWS]) for side in ("chosen", "rejected")]
    return list(zip(*sides, strict=True))


# -- without rlhfkit: the code that docs/reward-model.md shows ---------------------------------------------------------


def shown_code() -> dict[str, Any]:
    page = Path(__file__).parents[2] / "docs" / "reward-model.md"
    block = page.read_text(encoding="utf-8").split("```python\n", 1)[1].split("```", 1)[0]
    names: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), names)
    return names


def plain_scores(judge: Judge, side: str) -> list[float]:
    shown = shown_code()
    if judge.form == "full":
        model = shown["load_full"](judge.folder)
    else:
        options = {"quantization_config": shown["NF4"]} if judge.form == "qlora" else {}
        model = shown["load_adapter"](judge.folder, **options)
    chats = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}] for row in ROWS]
    found: list[float] = shown["scores"](model, judge.folder, chats)
    return found


# -- tests -------------------------------------------------------------------------------------------------------------


def test_loaded_again_it_gives_the_scores_of_the_training(judge: Judge) -> None:
    again = sorted(ours(judge.folder))
    assert len({score for pair in again for score in pair}) == 2 * len(ROWS)
    for one, other in zip(again, judge.scores, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_plain_libraries_give_the_same_scores(judge: Judge) -> None:
    """In one padded batch: pad was eos in the base, and would have hidden the token at which the score is read."""
    for number, side in enumerate(("chosen", "rejected")):
        assert plain_scores(judge, side) == pytest.approx([pair[number] for pair in ours(judge.folder)], abs=2e-5)


def test_the_code_of_the_card_gives_the_same_score(judge: Judge) -> None:
    names = run_card(judge.folder)
    asked, answer = (message["content"] for message in names["chat"])
    (score,) = scorer(judge.folder).score([[Message("user", asked)]], [answer])
    assert names["score"] == pytest.approx(score, abs=2e-5)


def test_what_trained_is_stored_as_it_was(judge: Judge) -> None:
    """float32, though the base is bf16; and the head is not rounded where the rest is loaded in bf16."""
    weights: dict[str, torch.Tensor] = {}
    for path in judge.folder.glob("*.safetensors"):
        weights |= load_file(path)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    (head,) = (value for name, value in weights.items() if "score" in name)
    assert not torch.equal(head, head.bfloat16().float())
    loaded = reward_head(scorer(judge.folder, torch.bfloat16).loaded.model)
    active: Any = getattr(loaded, "modules_to_save", {"default": loaded})["default"]
    assert torch.equal(active.weight, head)


def test_how_scores_are_made_stands_beside_them(judge: Judge) -> None:
    record = json.loads((judge.folder / "rlhfkit.json").read_text())
    assert (record["pooling"], record["max_length"], record["precision"]) == ("last_token", 128, "fp32")
    assert record["quantize"] == ("4bit" if judge.form == "qlora" else "none")
    flat = torch.tensor(judge.scores, dtype=torch.float64)
    assert record["score_mean"] == pytest.approx(flat.mean().item(), abs=1e-9)
    assert record["score_std"] == pytest.approx(flat.std(correction=0).item(), abs=1e-9)
    assert record["template"]["source"] == (judge.folder / "chat_template.jinja").read_text()


def drop(head: str, weights: dict[str, torch.Tensor]) -> None:
    del weights[head]


def rename(head: str, weights: dict[str, torch.Tensor]) -> None:
    weights[head.replace("score", "v_head")] = weights.pop(head)


def empty(head: str, weights: dict[str, torch.Tensor]) -> None:
    weights[head] = weights[head] * float("nan")


def widen(head: str, weights: dict[str, torch.Tensor]) -> None:
    weights[head] = weights[head].repeat(2, 1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop, "has no reward head"),
        (rename, "has no reward head"),
        (empty, "values that are no numbers"),
        (widen, r"size mismatch|does not fit|do not load|has the shape"),
    ],
)
def test_a_spoilt_head_is_refused(judge: Judge, copy: Path, spoil: Callable[..., None], words: str) -> None:
    (path,) = copy.glob("*.safetensors")
    weights = load_file(path)
    spoil(next(name for name in weights if "score" in name), weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        scorer(copy)


@pytest.mark.parametrize("judge", ["lora", "qlora"], indirect=True)
def test_an_adapter_config_of_another_tool_cannot_lose_the_head(judge: Judge, copy: Path) -> None:
    path = copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "CAUSAL_LM", "modules_to_save": None}))
    for one, other in zip(ours(copy), ours(judge.folder), strict=True):
        assert one == pytest.approx(other)


def test_saving_without_the_head_is_an_error(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be if a library's way of saving changed."""
    real = PreTrainedModel.save_pretrained

    def forgetful(self: Any, folder: Path, state_dict: dict[str, Any]) -> None:
        real(self, folder, state_dict={name: value for name, value in state_dict.items() if "score" not in name})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", forgetful)
    with pytest.raises(ModelError, match="the reward head was not written"):
        train(bases, tmp_path, "full")
    assert not (tmp_path / "run" / "final").exists()


def test_a_run_in_bf16_scores_as_it_trained_to_the_rounding_of_bf16(bases: Path, tmp_path: Path) -> None:
    judge = train(bases, tmp_path, "full", **{"model.precision": "bf16"})
    spread = torch.tensor(judge.scores).std().item()
    for one, other in zip(sorted(ours(judge.folder)), judge.scores, strict=True):
        assert one == pytest.approx(other, abs=0.1 * spread)
