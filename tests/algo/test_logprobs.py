"""Chunked log-probabilities against the plain ones: values, gradients, and what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhfkit.algo.logprobs import token_logprobs

N, H, V = 23, 6, 11


class Case:
    """A head and hidden states that want gradients, the same for the same seed."""

    def __init__(self, *, vocabulary: int | None = None, bias: bool = False, tokens: int = N) -> None:
        torch.manual_seed(0)
        self.head = nn.Linear(H, V, bias=bias, dtype=torch.float32)
        self.hidden = torch.randn(tokens, H, requires_grad=True)
        self.targets = torch.randint(0, vocabulary or V, (tokens,))

    def gradients(self) -> list[Tensor]:
        found = [p.grad for p in (self.hidden, *self.head.parameters())]
        assert all(g is not None for g in found)
        return [g for g in found if g is not None]


def plain(case: Case, temperature: float, vocabulary: int | None) -> tuple[Tensor, Tensor]:
    """All logits at once, and probabilities with their logarithms."""
    logits = case.head(case.hidden)
    if vocabulary is not None:
        logits = logits[:, :vocabulary]
    log_p = F.log_softmax(logits / temperature, dim=-1)
    entropy = torch.distributions.Categorical(logits=log_p).entropy()
    return log_p.gather(1, case.targets[:, None]).squeeze(1), entropy


@pytest.mark.parametrize("chunk", [1, 3, N, 10 * N])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("vocabulary", [None, 8])
def test_values_and_gradients_equal_the_plain_form(chunk: int, temperature: float, vocabulary: int | None) -> None:
    case, reference = Case(vocabulary=vocabulary, bias=True), Case(vocabulary=vocabulary, bias=True)
    found = token_logprobs(
        case.head, case.hidden, case.targets, temperature=temperature, vocabulary=vocabulary, chunk_tokens=chunk
    )
    logprobs, entropy = plain(reference, temperature, vocabulary)
    torch.testing.assert_close(found.logprobs, logprobs)
    torch.testing.assert_close(found.entropy, entropy)
    assert not found.entropy.requires_grad
    weights = torch.linspace(-1, 2, N)  # every token's gradient with a weight of its own
    (found.logprobs * weights).sum().backward()
    (logprobs * weights).sum().backward()
    for mine, theirs in zip(case.gradients(), reference.gradients(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("chunk", [3, 10 * N])
@pytest.mark.parametrize("vocabulary", [None, 8])
def test_entropy_has_a_gradient_where_asked_for(chunk: int, vocabulary: int | None) -> None:
    case, reference = Case(vocabulary=vocabulary), Case(vocabulary=vocabulary)
    found = token_logprobs(
        case.head, case.hidden, case.targets,
        temperature=0.7, vocabulary=vocabulary, entropy_gradient=True, chunk_tokens=chunk,
    )  # fmt: skip
    logprobs, entropy = plain(reference, 0.7, vocabulary)
    weights = torch.linspace(-1, 2, N)
    (found.entropy * weights + found.logprobs).sum().backward()
    (entropy * weights + logprobs).sum().backward()
    for mine, theirs in zip(case.gradients(), reference.gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_rows_beyond_the_vocabulary_get_no_probability_and_no_gradient() -> None:
    case = Case(vocabulary=8)
    with torch.no_grad():
        case.head.weight[8:] = 50.0
    found = token_logprobs(case.head, case.hidden, case.targets, vocabulary=8)
    every_token = torch.stack(
        [token_logprobs(case.head, case.hidden, torch.full((N,), t), vocabulary=8).logprobs for t in range(8)]
    )
    torch.testing.assert_close(every_token.exp().sum(dim=0), torch.ones(N))
    found.logprobs.sum().backward()
    assert case.head.weight.grad is not None
    assert not case.head.weight.grad[8:].any()
    assert case.head.weight.grad[:8].any()


def test_without_a_gradient_the_numbers_are_the_same() -> None:
    case = Case()
    with torch.no_grad():
        quiet = token_logprobs(case.head, case.hidden, case.targets, chunk_tokens=4)
    loud = token_logprobs(case.head, case.hidden, case.targets, chunk_tokens=4)
    assert torch.equal(quiet.logprobs, loud.logprobs)
    assert torch.equal(quiet.entropy, loud.entropy)
    assert not quiet.logprobs.requires_grad


def test_bf16_logits_are_reduced_in_float32() -> None:
    case = Case()
    head, hidden = case.head.bfloat16(), case.hidden.detach().bfloat16()
    found = token_logprobs(head, hidden, case.targets)
    expected = F.log_softmax(head(hidden).float(), dim=-1).gather(1, case.targets[:, None]).squeeze(1)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.logprobs, expected)


def test_no_targets_still_give_a_gradient_of_zero() -> None:
    case = Case(tokens=0)
    layer = nn.Linear(H, H)
    found = token_logprobs(case.head, layer(case.hidden), case.targets)
    assert found.logprobs.shape == found.entropy.shape == (0,)
    assert found.logprobs.dtype == torch.float32
    found.logprobs.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


# -- memory ------------------------------------------------------------------------------------------------------------


def saved_entries(run: Callable[[], Tensor], parameters: set[int]) -> list[int]:
    """Sizes of the tensors that ``run()`` keeps for its backward pass, weights left out."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    assert kept.requires_grad
    return sizes


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_no_tensor_of_tokens_by_vocabulary_is_kept(entropy_gradient: bool) -> None:
    tokens, vocabulary, chunk = 400, 5000, 16
    torch.manual_seed(0)
    head = nn.Linear(8, vocabulary, bias=False)
    hidden = torch.randn(tokens, 8, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    weights = {head.weight.data_ptr()}
    calls: list[tuple[int, ...]] = []

    def counted(h: Tensor) -> Tensor:
        calls.append(tuple(h.shape))
        return head(h)

    def chunked() -> Tensor:
        found = token_logprobs(
            counted, hidden, targets, temperature=0.7, entropy_gradient=entropy_gradient, chunk_tokens=chunk
        )
        return found.logprobs.sum() + (found.entropy.sum() if entropy_gradient else 0.0)

    def at_once() -> Tensor:
        return F.log_softmax(head(hidden), dim=-1).gather(1, targets[:, None]).sum()

    assert max(saved_entries(at_once, weights)) == tokens * vocabulary  # the measure sees what it is meant to see
    sizes = saved_entries(chunked, weights)
    assert max(sizes, default=0) < tokens * vocabulary
    # Nor the same in pieces: all that is kept together is smaller than the logits of one chunk.
    assert sum(sizes) < chunk * vocabulary
    # Each chunk's logits are made once going forward and once more going back, never for more tokens than a chunk.
    assert calls == [(chunk, 8)] * 25
    chunked().backward()
    assert calls == [(chunk, 8)] * 75
