"""Packed = unpacked = micro-batched, shared prompt = separate rows, in results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhfkit.config.blocks import LoraConfig
from rlhfkit.data.batch import TokenRow, collate, micro_batches, token_row
from rlhfkit.data.packing import Packed, Tree, group_by_tokens, join, pack, part_ends
from rlhfkit.errors import ModelError
from rlhfkit.models.attention import packed_attention, takes_packed
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import load_model
from rlhfkit.models.text_side import load_text_side
from rlhfkit.models.wrappers import LanguageModel, hidden_states


def load(folder: Path, *, packing: bool = True, rank: int = 0) -> Any:
    source = open_model(str(folder))
    loaded = load_model(
        source, load_text_side(source), "causal", lora=LoraConfig(rank=rank), dtype=torch.float32, packing=packing
    )
    return loaded.model


def random_rows(lengths: Sequence[int], seed: int = 0) -> list[TokenRow]:
    draw = np.random.default_rng(seed)
    return [token_row(draw.integers(3, 300, n).tolist(), (draw.random(n) < 0.6).tolist()) for n in lengths]


def ids(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, dtype=np.int32)


LENGTHS = (3, 17, 9, 30, 1, 12, 12, 25)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# -- the layout --------------------------------------------------------------------------------------------------------


def test_a_shared_trunk_to_the_index() -> None:
    packed = pack([Tree(ids(5, 6)), Tree(ids(7, 8), (ids(1), ids(2, 3), ids(4)))])
    assert packed.input_ids.tolist() == [5, 6, 7, 8, 1, 2, 3, 4]
    assert packed.position_ids.tolist() == [0, 1, 0, 1, 2, 2, 3, 2]
    layout = packed.layout
    assert layout.rows.tolist() == [[0, 1, 0, 0], [2, 3, 4, 0], [2, 3, 5, 6], [2, 3, 7, 0]]
    assert layout.lengths.tolist() == [2, 3, 4, 3]
    assert layout.cells.tolist() == [0, 1, 4, 5, 6, 10, 11, 14]
    assert [(t.tolist(), c.tolist()) for t, c in layout.copies] == [([2, 3], [8, 9]), ([2, 3], [12, 13])]
    assert part_ends([Tree(ids(5, 6)), Tree(ids(7, 8), (ids(1), ids(2, 3)))]) == [(2, []), (4, [5, 7])]


@pytest.mark.parametrize("limit", [1, 16, 40, 100, 10**6])
def test_micro_batches_hold_every_tree_once_within_the_limit(limit: int) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 40, size=60).tolist()
    sizes = [(n, 1, n) for n in lengths]
    groups = group_by_tokens(sizes, limit)
    assert sorted(i for group in groups for i in group) == list(range(60))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= limit
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 2 * limit


def test_rows_are_joined_at_what_they_begin_with() -> None:
    tree = join([ids(5, 6, 7), ids(5, 6), ids(5, 6, 7)])
    # The second row is the beginning of the others; its last token stays a branch all the same.
    assert tree.trunk.tolist() == [5]
    assert [branch.tolist() for branch in tree.branches] == [[6, 7], [6], [6, 7]]
    strangers = join([ids(5, 6), ids(7)])
    assert [strangers.trunk.tolist(), *(b.tolist() for b in strangers.branches)] == [[], [5, 6], [7]]
    assert pack([strangers]).layout.copies == ()


def test_no_pass_for_a_last_few_tokens() -> None:
    groups = group_by_tokens([(100, 1, 100)] * 41, 4000)
    assert sorted(map(len, groups)) == [20, 21]


def test_many_short_rows_beside_a_long_one_make_no_huge_rectangle() -> None:
    sizes = [(1000, 1, 1000), *[(10, 1, 10)] * 200]
    for group in group_by_tokens(sizes, 4096):
        assert len(group) * max(sizes[i][2] for i in group) <= 2 * 4096


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_packed_is_unpacked_is_one_row_at_a_time(tiny_model: Path, rank: int) -> None:
    rows = random_rows(LENGTHS)
    packed, unpacked = (
        LanguageModel(load(tiny_model, rank=rank)),
        LanguageModel(load(tiny_model, packing=False, rank=rank)),
    )
    if rank:  # B starts at zero, and gradients of A with it
        torch.manual_seed(1)
        for p in packed.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
    unpacked.load_state_dict(packed.state_dict())
    assert not takes_packed(getattr(unpacked.model, "base_model", unpacked.model))

    def loss(module: LanguageModel, groups: list[list[TokenRow]]) -> Tensor:
        return torch.stack([-module(collate(group)).logprobs.sum() for group in groups]).sum()

    whole = loss(packed, [rows])
    padded = loss(unpacked, [rows])
    alone = loss(unpacked, [[row] for row in rows if row.targets])
    in_parts = loss(packed, [g for g in micro_batches(rows, 40) if any(row.targets for row in g)])
    for other in (padded, alone, in_parts):
        torch.testing.assert_close(whole, other, rtol=1e-5, atol=1e-4)
    reference = gradients(unpacked, alone)
    for module, value in ((packed, whole), (unpacked, padded), (packed, in_parts)):
        assert_same(gradients(module, value), reference)


def test_a_shared_prompt_is_separate_rows(tiny_model: Path) -> None:
    draw = np.random.default_rng(1)

    def some(n: int) -> np.ndarray:
        return draw.integers(3, 300, n).astype(np.int32)

    trees = [
        Tree(some(12), (some(5), some(9))),
        Tree(some(4), (some(1), some(30), some(2), some(8))),
        Tree(some(20)),
        Tree(some(7), (some(3),)),
    ]
    apart = [Tree(np.concatenate([t.trunk, b])) for t in trees for b in t.branches or (t.trunk[:0],)]
    model = load(tiny_model)

    def ends(some_trees: list[Tree]) -> Tensor:
        last = [end - 1 for trunk, ends in part_ends(some_trees) for end in ends or [trunk]]
        return hidden_states(model, pack(some_trees))[torch.tensor(last)]

    weights = torch.randn(len(apart), 1)
    together, separate = ends(trees), ends(apart)
    torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-5)
    assert len(pack(trees).input_ids) < len(pack(apart).input_ids)
    assert_same(gradients(model, (together * weights).sum()), gradients(model, (ends(apart) * weights).sum()))


def test_gradient_checkpointing_changes_nothing(tiny_model: Path) -> None:
    rows = random_rows(LENGTHS)
    module = LanguageModel(load(tiny_model)).train()
    plain = gradients(module, -module(collate(rows)).logprobs.sum())
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(module, -module(collate(rows)).logprobs.sum()), plain)


def _qwen(folder: Path, **config: Any) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    make_model(folder)
    settings = Qwen2Config.from_pretrained(folder).to_dict() | {"model_type": "qwen2", "architectures": None, **config}
    Qwen2ForCausalLM(Qwen2Config(**settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("window", [None, 6])
def test_qwen2_with_and_without_a_sliding_window(tmp_path: Path, window: int | None) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    folder = _qwen(tmp_path / "qwen", **sliding, layer_types=None)
    rows = [row for row in random_rows(LENGTHS) if row.targets]
    packed, padded = LanguageModel(load(folder)), LanguageModel(load(folder, packing=False))
    assert takes_packed(packed.model)
    torch.testing.assert_close(packed(collate(rows)).logprobs, padded(collate(rows)).logprobs, rtol=1e-4, atol=1e-4)


def test_what_packed_attention_does_not_know_is_refused() -> None:
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ModelError, match="softcap"):
        packed_attention(None, states, states, states, None, layout=pack([Tree(ids(1, 2))]).layout, softcap=30.0)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("masked", [None, 1, 6])
def test_a_decoding_step_is_that_of_transformers(groups: int, masked: int | None) -> None:
    """With one mask for all heads, and with one of each (ALiBi)."""
    draw = torch.Generator().manual_seed(groups)
    query = torch.randn(3, 6, 1, 8, generator=draw)
    key, value = (torch.randn(3, groups, 20, 8, generator=draw)[:, :, :11] for _ in range(2))
    mask = None if masked is None else torch.randn(3, masked, 1, 11, generator=draw)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // groups, True
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = packed_attention(module, query, key, value, mask, scaling=0.3)
    assert found.shape == expected.shape == (3, 1, 6, 8)
    torch.testing.assert_close(found, expected)


def test_sampling_goes_on_as_before(tiny_model: Path) -> None:
    model, plain = load(tiny_model), load(tiny_model, packing=False)
    prompt = torch.tensor([[5, 6, 7, 8]])
    found: Callable[..., Tensor] = model.generate
    assert torch.equal(
        found(prompt, max_new_tokens=8, do_sample=False), plain.generate(prompt, max_new_tokens=8, do_sample=False)
    )


def test_the_saved_config_does_not_name_our_attention(tiny_model: Path, tmp_path: Path) -> None:
    load(tiny_model).save_pretrained(tmp_path / "saved")
    assert "rlhfkit" not in (tmp_path / "saved" / "config.json").read_text()


def test_nothing_moves_to_another_device_by_half() -> None:
    packed = pack([Tree(ids(1, 2), (ids(3), ids(4)))]).to(torch.device("meta"))
    assert isinstance(packed, Packed)
    tensors = [
        packed.input_ids,
        packed.position_ids,
        *packed.layout[:3],
        *[t for pair in packed.layout.copies for t in pair],
    ]
    assert {t.device.type for t in tensors} == {"meta"}
