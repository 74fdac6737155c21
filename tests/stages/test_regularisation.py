"""Label smoothing and NEFTune: what they do while training, and that an evaluation knows nothing of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read_metrics
from torch import Tensor

from rlhfkit.chat.messages import Message
from rlhfkit.config.blocks import LoraConfig
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig, RmConfig, SftConfig
from rlhfkit.data.batch import TokenRow, collate
from rlhfkit.errors import ConfigError
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import load_model
from rlhfkit.models.text_side import load_text_side
from rlhfkit.models.wrappers import LanguageModel
from rlhfkit.stages import reward, sft

Settings = Callable[..., dict[str, Any]]
LENGTHS = (5, 12, 3, 9)


def load(folder: Path, *, packing: bool = True, rank: int = 0, **options: float) -> LanguageModel:
    source = open_model(str(folder))
    loaded = load_model(
        source, load_text_side(source), "causal", lora=LoraConfig(rank=rank), dtype=torch.float32, packing=packing
    )
    return LanguageModel(loaded.model, **options).train()


def rows(seed: int = 7) -> list[TokenRow]:
    draw = np.random.default_rng(0)
    return [
        TokenRow(draw.integers(3, 300, n).astype(np.int32), np.arange(n) > 1, (seed, 1, at))
        for at, n in enumerate(LENGTHS)
    ]


def plain_rows(path: Path, model: Any) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of a file of prompts and answers, as plain transformers takes them."""
    encoder = load_text_side(open_model(str(model))).encoder
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        encoded = encoder.encode([Message("user", row["prompt"]), Message("assistant", row["response"])])
        labels = [i if s else -100 for i, s in zip(encoded.ids, encoded.supervised, strict=True)]
        found.append((torch.tensor([encoded.ids]), torch.tensor([labels])))
    return found


# -- label smoothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_the_loss_is_the_smoothed_cross_entropy_and_eval_loss_the_plain_one(
    settings: Settings, sft_file: Path, tiny_model: Path, rank: int
) -> None:
    from transformers import AutoModelForCausalLM

    flags = {"data__train": [str(sft_file)], "data__eval": [str(sft_file)], "optim__batch_size": 12, "lora__rank": rank}
    result = sft.run(load_config(SftConfig, flags=settings("run", **flags, sft__label_smoothing=0.2)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    total = {0.0: 0.0, 0.2: 0.0}
    count = 0
    for ids, labels in plain_rows(sft_file, tiny_model):
        logits, wanted = model(input_ids=ids).logits[0, :-1], labels[0, 1:]
        count += int((wanted != -100).sum())
        for smoothing in total:
            loss = F.cross_entropy(logits, wanted, label_smoothing=smoothing, reduction="sum", ignore_index=-100)
            total[smoothing] += loss.item()
    before, first = read_metrics(result.out)[:2]
    assert before["eval_loss"] == pytest.approx(total[0.0] / count, abs=1e-5)
    assert first["loss"] == pytest.approx(total[0.2] / count, abs=1e-5)


def test_a_smoothed_reward_model_promises_less(settings: Settings, pairs_file: Path) -> None:
    """Pairs are ranked as well, with smaller margins; the loss that is compared, eval_loss, has no smoothing."""
    flags = {"data__train": [str(pairs_file)], "data__eval": [str(pairs_file)], "optim__epochs": 20, "optim__lr": 5e-3}
    plain, smooth = (
        read_metrics(reward.run(load_config(RmConfig, flags=settings(name, **flags, **more))).out)
        for name, more in (("plain", {}), ("smooth", {"rm__label_smoothing": 0.2}))
    )
    assert plain[0]["eval_loss"] == pytest.approx(smooth[0]["eval_loss"])
    assert smooth[-1]["eval_accuracy"] == plain[-1]["eval_accuracy"] == 1
    assert smooth[-1]["eval_margin"] < 0.7 * plain[-1]["eval_margin"]
    assert smooth[-1]["eval_loss"] > plain[-1]["eval_loss"]


# -- NEFTune -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def entering(module: LanguageModel, batch: list[TokenRow]) -> Tensor:
    """What goes into the first layer for each token of a micro-batch, [N, H]."""
    seen: list[Tensor] = []
    layer = module.model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    module(collate(batch))
    handle.remove()
    (states,) = seen
    if states.shape[0] == 1 and len(batch) > 1:
        return states[0]
    return torch.cat([states[i, : len(row)] for i, row in enumerate(batch)])


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_noise_is_uniform_in_the_bounds_of_each_row(tiny_model: Path, packing: bool) -> None:
    module = load(tiny_model, packing=packing, neftune_alpha=5.0)
    batch = rows()
    noise = entering(module, batch) - entering(module.eval(), batch)
    width = noise.shape[1]
    for row, part in zip(batch, noise.split(list(LENGTHS)), strict=True):
        most = 5.0 / (len(row) * width) ** 0.5  # Jain et al. 2023, algorithm 1, with the row's own length
        assert part.abs().max() <= most * 1.001
        assert part.abs().max() > 0.95 * most
        assert part.std() == pytest.approx(most / 3**0.5, rel=0.15)
        assert part.mean().abs() < 0.15 * most


def test_the_noise_of_a_row_is_its_own(tiny_model: Path) -> None:
    """Neither packing nor what stands beside a row changes it; another step or seed does."""
    packed, padded = load(tiny_model, neftune_alpha=5.0), load(tiny_model, packing=False, neftune_alpha=5.0)
    together = packed(collate(rows())).logprobs
    torch.testing.assert_close(padded(collate(rows())).logprobs, together, rtol=1e-4, atol=1e-4)
    alone = torch.cat([packed(collate([row])).logprobs for row in rows()])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(packed(collate(rows(seed=8))).logprobs, together, rtol=1e-2)
    assert not torch.allclose(packed.eval()(collate(rows())).logprobs, together, rtol=1e-2)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_micro_batches_do_not_change_a_noisy_run(settings: Settings, sft_file: Path, rank: int) -> None:
    flags = {"data__train": [str(sft_file)], "data__eval": [str(sft_file)], "lora__rank": rank, "optim__batch_size": 8}

    def metrics(name: str, **more: Any) -> list[dict[str, Any]]:
        return read_metrics(sft.run(load_config(SftConfig, flags=settings(name, **flags, **more))).out)

    whole = metrics("whole", sft__neftune_alpha=5, optim__micro_batch_tokens=10**5)
    single = metrics("single", sft__neftune_alpha=5, optim__micro_batch_tokens=1)
    plain = metrics("plain")
    for a, b in zip(whole, single, strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert whole[0]["eval_loss"] == plain[0]["eval_loss"]
    assert abs(whole[1]["loss"] - plain[1]["loss"]) > 1e-4


# -- where they are not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "key", "value", "words"),
    [
        (SftConfig, "sft.label_smoothing", 1.0, r"sft\.label_smoothing"),
        (SftConfig, "sft.neftune_alpha", -1.0, r"sft\.neftune_alpha"),
        (RmConfig, "rm.label_smoothing", 0.5, r"rm\.label_smoothing"),
        (RmConfig, "sft.neftune_alpha", 5.0, "sft"),
        (PpoConfig, "sft.neftune_alpha", 5.0, "sft"),
    ],
)
def test_elsewhere_and_beyond_their_bounds_they_are_refused(config: Any, key: str, value: float, words: str) -> None:
    given = {"model.path": "m", "data.train": ["d"], key: value}
    if config is PpoConfig:
        given["ppo.reward"] = ["r.py:f"]
    with pytest.raises(ConfigError, match=words):
        load_config(config, flags=given)
