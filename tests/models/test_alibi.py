"""Baichuan 13B in the class of its adapter: what it computes, written down once more, and every way to compute it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from legacy_folders import TRIPWIRE
from legacy_models import HEADS, HIDDEN, LAYERS, make_baichuan_13b
from rlhfkit_adapters.baichuan_alibi import NormHead, alibi_parts, alibi_slopes
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize, silu

from rlhfkit.config.blocks import LoraConfig
from rlhfkit.data.batch import collate, token_row
from rlhfkit.data.packing import Tree, join, pack
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import LoadedModel, load_model
from rlhfkit.models.sampling import SamplingSettings, sample_answers
from rlhfkit.models.text_side import load_text_side
from rlhfkit.models.vocabulary import grow_vocabulary
from rlhfkit.models.wrappers import LanguageModel, hidden_states

ROWS = {1: 0, 2: 100_001}  # more than 100,000 rows say Baichuan 2
PROMPTS = ([5, 9, 300, 17, 60], [8], [30, 31, 32])


@pytest.fixture(autouse=True)
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(TRIPWIRE, str(tmp_path / "trace"))
    return tmp_path / "trace"


def load(folder: Path, *, packing: bool = True, dtype: torch.dtype = torch.float32, rank: int = -1) -> LoadedModel:
    source = open_model(str(folder))
    lora = LoraConfig(rank=rank) if rank >= 0 else None
    return load_model(source, load_text_side(source), "causal", lora=lora, dtype=dtype, packing=packing)


def original_logits(folder: Path, version: int, ids: list[int]) -> Tensor:
    """The equations of the original in float64, mask and all."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.bin")):
        state |= torch.load(path, weights_only=True)
    w = {name: value.double() for name, value in state.items()}
    slopes = torch.tensor([2 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)], dtype=torch.float64)
    place = torch.arange(len(ids))
    distance = (place[None, :] - place[:, None]).double()
    bias = (slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)

    def norm(x: Tensor, name: str) -> Tensor:
        return w[name] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    x = w["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        q, k, v = (norm(x, p + "input_layernorm.weight") @ w[p + "self_attn.W_pack.weight"].T).chunk(3, dim=-1)
        q, k, v = (part.view(len(ids), HEADS, -1).transpose(0, 1) for part in (q, k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(HIDDEN // HEADS) + bias
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), HIDDEN)
        x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
        y = norm(x, p + "post_attention_layernorm.weight")
        gated = silu(y @ w[p + "mlp.gate_proj.weight"].T) * (y @ w[p + "mlp.up_proj.weight"].T)
        x = x + gated @ w[p + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    return norm(x, "model.norm.weight") @ (head if version == 1 else normalize(head)).T


@pytest.mark.parametrize("version", [1, 2])
def test_logits_are_the_original_s(version: int, tmp_path: Path, trace: Path) -> None:
    src = make_baichuan_13b(tmp_path / "src", version, rows=ROWS[version])
    ids = np.random.default_rng(0).integers(3, 400, 40).tolist()
    expected = original_logits(src, version, ids)
    for packing in (True, False):
        with torch.no_grad():
            found = load(src, packing=packing).model.eval()(torch.tensor([ids])).logits[0]
        assert (found - expected).abs().max() < 1e-4
    assert not trace.exists()


def test_slopes() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    # Press et al. 2022: the next lower power of two, then every second one of the doubled series.
    assert alibi_slopes(5) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1]
    assert len(alibi_slopes(40)) == 40
    assert alibi_slopes(40)[32:34] == [2**-0.125, 2**-0.375]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sixteen_bits_hold_positions(dtype: torch.dtype) -> None:
    """Between near tokens, however far from the beginning; among far ones the weights are nothing."""
    heads, scaling = 40, 128**-0.5
    positions = torch.tensor([[0, 1, 255, 256, 257, 2047, 2048, 4000, 4094, 4095]])
    query, key = alibi_parts(positions, heads, scaling, dtype)
    found = (query.double() @ key.double().transpose(-1, -2))[0] * scaling
    distance = (positions[0][None] - positions[0][:, None]).double()
    expected = torch.tensor(alibi_slopes(heads)).double()[:, None, None] * distance
    # Scores near a query stay small: kernels that round them to 16 bits lose nothing there.
    assert found.diagonal(dim1=1, dim2=2).abs().max() < 0.1
    # What a query adds to all of its keys is nothing to a softmax.
    found, expected = (bias - bias.diagonal(dim1=1, dim2=2)[..., None] for bias in (found, expected))
    assert ((found - expected).abs() <= 1e-3 + 1e-4 * distance.abs()).all()


def test_bf16_stays_near(tmp_path: Path) -> None:
    """A thousand tokens in: positions that bf16 could not tell apart would change everything."""
    src = make_baichuan_13b(tmp_path / "src", 1)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 400, (1, 1000)))
    with torch.no_grad():
        wide = load(src).model.eval()(ids).logits[0, -200:]
        narrow = load(src, dtype=torch.bfloat16).model.eval()(ids).logits[0, -200:].float()
    assert (narrow - wide).abs().max() < 0.1 * wide.abs().max()
    assert (narrow.argmax(-1) == wide.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("packing", [True, False])
def test_answers_are_those_of_whole_passes(packing: bool, tmp_path: Path) -> None:
    """With a cache, several prompts at once, answers that end at different lengths."""
    loaded = load(make_baichuan_13b(tmp_path / "src", 1), packing=packing)
    model = loaded.model.eval()
    settings = SamplingSettings(8, 0.0, (3, 77), vocabulary=loaded.text.vocabulary)
    found = sample_answers(model, PROMPTS, settings, seeds=[(0,), (1,), (2,)], pad_id=0)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for token in answer.ids:
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_a_shared_prompt_is_two_rows(tmp_path: Path) -> None:
    model = load(make_baichuan_13b(tmp_path / "src", 1)).model.eval()
    prompt, *answers = (np.asarray(row, np.int32) for row in PROMPTS)
    with torch.no_grad():
        together = hidden_states(model, pack([Tree(prompt, tuple(answers))]))
        rows = [np.concatenate([prompt, answer]) for answer in answers]
        alone = [hidden_states(model, pack([join([row])])) for row in rows]
    start = len(prompt)
    torch.testing.assert_close(together[:start], alone[0][:start], rtol=1e-4, atol=1e-5)
    for answer, states in zip(answers, alone, strict=True):
        torch.testing.assert_close(together[start : start + len(answer)], states[len(prompt) :], rtol=1e-4, atol=1e-5)
        start += len(answer)


def test_gradients_packed_and_unpacked(tmp_path: Path) -> None:
    src = make_baichuan_13b(tmp_path / "src", 2, rows=ROWS[2])
    batch = collate([token_row(list(p), [True] * len(p)) for p in ([5, 9, 300, 17, 60], [8, 3, 4], [30, 31, 32])])
    found: list[dict[str, Tensor]] = []
    for packing in (True, False):
        model = load(src, packing=packing, rank=0).model.train()
        LanguageModel(model)(batch).logprobs.sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    # A row of the head that is scaled to length one has no gradient along itself.
    head = load(src).model.lm_head.weight
    along = (found[0]["lm_head.weight"] * head).sum(dim=-1)
    assert along.abs().max() < 1e-4


def test_a_grown_vocabulary_keeps_its_kind_of_head(tmp_path: Path) -> None:
    model: Any = load(make_baichuan_13b(tmp_path / "src", 2, rows=ROWS[2])).model
    assert isinstance(model.lm_head, NormHead)
    before = model.eval()(torch.tensor([PROMPTS[0]])).logits
    assert grow_vocabulary(model, ROWS[2] + 1)
    assert isinstance(model.lm_head, NormHead)
    after = model(torch.tensor([PROMPTS[0]])).logits
    torch.testing.assert_close(after[..., : ROWS[2]], before)


def test_what_is_saved_has_the_original_s_names(tmp_path: Path) -> None:
    src = make_baichuan_13b(tmp_path / "src", 1)
    load(src).model.save_pretrained(tmp_path / "dst")
    saved = load_file(tmp_path / "dst" / "model.safetensors")
    state: dict[str, Tensor] = {}
    for path in sorted(src.glob("*.bin")):
        state |= torch.load(path, weights_only=True)
    original = {name: value for name, value in state.items() if not name.endswith("inv_freq")}
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
