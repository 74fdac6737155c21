"""Chunked log-probabilities against the plain ones: values, gradients, and what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhfkit.algo import logprobs
from rlhfkit.algo.logprobs import above_mean, token_logprobs

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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("vocabulary", [None, 19])
def test_the_written_out_gradient_is_autograds(bias: bool, entropy_gradient: bool, vocabulary: int | None) -> None:
    """A plain linear head takes another path than any other callable; both must agree, chunks or not."""
    torch.manual_seed(0)
    head = nn.Linear(6, 24, bias=bias)
    hidden = torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(19, (11,))
    push, pull = torch.randn(11), torch.randn(11)
    results = []
    for form in (head, lambda h: head(h)):
        found = token_logprobs(
            form, hidden, targets, temperature=0.7, vocabulary=vocabulary, entropy_gradient=entropy_gradient,
            chunk_tokens=4,
        )  # fmt: skip
        loss = (found.logprobs * push).sum() + (found.entropy * pull).sum()
        results.append([*found, *torch.autograd.grad(loss, [hidden, *head.parameters()])])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert results[0][0].grad_fn is not results[1][0].grad_fn


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary", [None, 8])
@pytest.mark.parametrize("tokens", [N, 0])
def test_a_gradient_made_at_once_equals_the_plain_form(temperature: float, vocabulary: int | None, tokens: int) -> None:
    case, reference = (Case(vocabulary=vocabulary, bias=True, tokens=tokens) for _ in range(2))
    found = token_logprobs(
        case.head, case.hidden, case.targets, temperature=temperature, vocabulary=vocabulary, with_entropy=False,
        equal_weights=True, chunk_tokens=5,
    )  # fmt: skip
    log_p = F.log_softmax(reference.head(reference.hidden)[:, :vocabulary] / temperature, dim=-1)
    logprobs = log_p.gather(1, reference.targets[:, None]).squeeze(1)
    torch.testing.assert_close(found.logprobs, logprobs)
    (-0.3 * found.logprobs.sum()).backward()
    (-0.3 * logprobs.sum()).backward()
    for mine, theirs in zip(case.gradients(), reference.gradients(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_gradient_made_at_once_is_refused_where_targets_weigh_differently() -> None:
    case = Case()
    found = token_logprobs(case.head, case.hidden, case.targets, with_entropy=False, equal_weights=True).logprobs
    with pytest.raises(RuntimeError, match="equal_weights"):
        (found * torch.linspace(-1, 2, N)).sum().backward()


@pytest.mark.parametrize("equal_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_added_where_the_weight_says(
    equal_weights: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "ROWS_AT_ONCE", 5)
    case, reference = Case(bias=True), Case(bias=True)
    into = torch.ones(V, H)
    case.head.weight.main_grad = into  # type: ignore[attr-defined]
    for one in (case, reference, case, reference):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = token_logprobs(
                one.head, one.hidden, one.targets, with_entropy=False, equal_weights=equal_weights, chunk_tokens=5
            )
        (-0.3 * found.logprobs.sum()).backward()
    assert case.head.weight.grad is None
    expected = reference.head.weight.grad
    assert expected is not None
    assert case.head.bias.grad is not None
    torch.testing.assert_close(into - 1, expected, rtol=1e-4, atol=1e-5)
    plain = Case(bias=True)
    log_p = F.log_softmax(plain.head(plain.hidden), dim=-1).gather(1, plain.targets[:, None])
    (-0.6 * log_p.sum()).backward()  # twice 0.3
    assert plain.head.weight.grad is not None
    assert (expected - plain.head.weight.grad).norm() < 0.02 * plain.head.weight.grad.norm()
    torch.testing.assert_close(case.hidden.grad, reference.hidden.grad)
    torch.testing.assert_close(case.head.bias.grad, reference.head.bias.grad)


# -- label smoothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "any-head"])
def test_label_smoothing_is_that_of_cross_entropy(smoothing: float, bias: bool, linear: bool) -> None:
    case, reference = Case(bias=bias), Case(bias=bias)
    head = case.head if linear else nn.Sequential(case.head)
    logprobs = token_logprobs(head, case.hidden, case.targets, with_entropy=False, chunk_tokens=5).logprobs
    found = -logprobs + smoothing * above_mean(head, case.hidden, case.targets, chunk_tokens=5)
    logits = reference.head(reference.hidden)
    expected = F.cross_entropy(logits, reference.targets, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 2, N)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, theirs in zip(case.gradients(), reference.gradients(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_label_smoothing_leaves_a_frozen_head_alone() -> None:
    case = Case()
    case.head.requires_grad_(False)
    above_mean(case.head, case.hidden, case.targets).sum().backward()
    assert case.hidden.grad is not None
    assert case.head.weight.grad is None
