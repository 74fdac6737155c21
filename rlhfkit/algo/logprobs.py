"""Log-probabilities of given tokens without ever holding a (tokens x vocabulary) tensor for all tokens.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

ROWS_AT_ONCE = 4096  # of a head whose 16-bit gradient is added to a float32 one
ON_CPU, ON_GPU = 32, 128  # tokens whose exponentials exist at one time: on a CPU they stay in its cache
CHUNK_TOKENS = 512  # at a vocabulary of 152k, one chunk of float32 logits takes 0.3 GiB


class TokenStats(NamedTuple):
    """Per token: log-probability of the target, and entropy of the distribution it was drawn from (nats).

    Without ``with_entropy`` the entropies are zeros.
    """

    logprobs: Tensor  # [N] float32
    entropy: Tensor  # [N] float32, with a gradient only where asked for


def token_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    with_entropy: bool = True,
    entropy_gradient: bool = False,
    equal_weights: bool = False,
    chunk_tokens: int = 0,
) -> TokenStats:
    """Log-softmax of ``head(hidden) / temperature`` at ``targets``, chunk by chunk.

    In the backward pass each chunk's logits are computed again, so that memory is one chunk's, whatever N is. Where the
    loss is known to weigh all targets alike, their gradient is made from the first ones instead, up to that weight.

    Args:
        head: maps [n, H] to logits [n, V]. A plain ``nn.Linear`` takes a path with its gradient written out.
        hidden: [N, H].
        targets: [N] token ids.
        temperature: of the distribution that was sampled.
        vocabulary: ids from here on are padding rows of the head; they take no part in the distribution.
        with_entropy: its softmax over the vocabulary costs about as much as the log-probabilities do.
        entropy_gradient: whether the entropy is part of a loss.
        equal_weights: what comes back for the log-probabilities is one number for all of them, as from a mean. Then
            there are no entropies.
        chunk_tokens: tokens whose logits exist at one time; 0 is `CHUNK_TOKENS`, half of it on CPUs.
    """
    chunk_tokens = chunk_tokens or (CHUNK_TOKENS // 2 if hidden.device.type == "cpu" else CHUNK_TOKENS)
    if type(head) is nn.Linear and not isinstance(head.weight, DTensor):
        if equal_weights and torch.is_grad_enabled():
            found: Tensor = _LinearLogprobs.apply(
                hidden, head.weight, head.bias, targets, temperature, vocabulary, chunk_tokens
            )
            return TokenStats(found, torch.zeros_like(found))
        logprobs, entropy = _LinearStats.apply(
            hidden, head.weight, head.bias, targets, temperature, vocabulary, with_entropy, chunk_tokens
        )
        return TokenStats(logprobs, entropy if entropy_gradient else entropy.detach())

    def one_chunk(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(h)[:, :vocabulary].float()
        if temperature != 1.0:
            logits = logits / temperature
        log_z = logits.logsumexp(dim=-1)
        logprobs = logits.gather(1, t[:, None]).squeeze(1) - log_z
        if not with_entropy:
            return logprobs, torch.zeros_like(log_z)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = log_z - (torch.softmax(logits, dim=-1) * logits).sum(-1)
        return logprobs, entropy

    recompute = torch.is_grad_enabled()
    parts = [
        checkpoint(one_chunk, h, t, use_reentrant=False, preserve_rng_state=False) if recompute else one_chunk(h, t)
        for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    return TokenStats(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


class _LinearStats(torch.autograd.Function):
    """`token_logprobs` of a linear head.

    With z the logits over the temperature, p = softmax(z) and S its entropy: d logprob / dz = onehot - p and
    dS / dz = -p (log p + S). One buffer of [chunk, V] float32 serves all chunks of a pass: on a CPU, fresh memory for
    each would cost more than the arithmetic. The last chunk's logits stay in it for the backward pass, which needs the
    buffer anyway, and computes those of the others again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        vocabulary: int | None,
        with_entropy: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        hidden, rows, offset = _as_computed(hidden, weight, bias, vocabulary)
        log_z = hidden.new_empty(len(hidden), dtype=torch.float32)
        logprobs, entropy = torch.empty_like(log_z), torch.zeros_like(log_z)
        ctx.kept = None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _logit_chunks(hidden, rows, offset, temperature, chunk_tokens):
                part, z = chunk.part, chunk.z
                log_z[part] = _log_sum_exp(z, entropy[part] if with_entropy else None)
                logprobs[part] = z.gather(1, targets[part, None]).squeeze(1) - log_z[part]
                ctx.kept = chunk
        ctx.save_for_backward(hidden, rows, offset, targets, log_z, entropy)
        ctx.settings, ctx.weight, ctx.bias = (temperature, chunk_tokens), weight, bias
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, rows, offset, targets, log_z, entropy = ctx.saved_tensors
        temperature, chunk_tokens = ctx.settings
        kept, ctx.kept = ctx.kept, None
        found = _HeadGradient(ctx, hidden, rows, in_place=True)
        by_entropy = bool(grad_entropy.any())
        for part, z, logits in _logit_chunks(hidden, rows, offset, temperature, chunk_tokens, kept):
            log_p = z.sub_(log_z[part, None])
            if by_entropy:
                push = (log_p + entropy[part, None]).mul_(-grad_entropy[part, None]).sub_(grad_logprobs[part, None])
                grad = log_p.exp_().mul_(push)
            else:
                grad = log_p.exp_().mul_(-grad_logprobs[part, None])
            grad.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            found.add(part, grad.div_(temperature) if temperature != 1.0 else grad, logits)
        return *found.result(), *[None] * 5


class _LinearLogprobs(torch.autograd.Function):
    """Log-probabilities of a linear head, and in the same pass their gradient's sum, which waits to be scaled.

    Hsu et al. 2024 (Liger Kernel) do so for a loss. It takes three products with the vocabulary, not four.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        vocabulary: int | None,
        chunk_tokens: int,
    ) -> Tensor:
        ctx.weight, ctx.bias = weight, bias
        hidden, rows, offset = _as_computed(hidden, weight, bias, vocabulary)
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        ctx.found = _HeadGradient(ctx, hidden, rows, in_place=False)
        with torch.autocast(hidden.device.type, enabled=False):
            for part, z, logits in _logit_chunks(hidden, rows, offset, temperature, chunk_tokens):
                here = targets[part, None]
                log_p = z.sub_(_log_sum_exp(z)[:, None])
                logprobs[part] = log_p.gather(1, here).squeeze(1)
                grad = log_p.exp_().neg_()
                grad.scatter_add_(1, here, torch.ones_like(here, dtype=grad.dtype))
                ctx.found.add(part, grad.div_(temperature) if temperature != 1.0 else grad, logits)
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.found = ctx.found, None
        each = grad_logprobs[:1].sum()  # of no targets it is 0
        if bool((grad_logprobs != each).any()):
            raise RuntimeError("equal_weights was said of targets that weigh differently in the loss")
        found.scale(each)
        return *found.result(), *[None] * 4


class _HeadGradient:
    """The gradient of a linear head and of what it reads, added up from that of its logits, chunk by chunk.

    Where the weight has a ``main_grad``, its gradient ends up in there and autograd is given none: it would keep one
    more of that size until the gradient of a tied embedding comes.

    Args:
        ctx: of a function whose inputs begin with hidden, weight, bias.
        hidden, rows: what is multiplied, in the format it is multiplied in.
        in_place: whether it is added to ``main_grad`` as it comes.
    """

    def __init__(self, ctx: Any, hidden: Tensor, rows: Tensor, *, in_place: bool) -> None:
        wanted, weight, bias = ctx.needs_input_grad, ctx.weight, ctx.bias
        self.read, self.rows = hidden, rows
        self.main_grad: Tensor | None = getattr(weight, "main_grad", None)
        self.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = self.bias = None
        if wanted[1]:
            self.weight = self.main_grad if in_place and self.main_grad is not None else _zeros_for(weight)
        if wanted[2]:
            self.bias = hidden.new_zeros(bias.shape, dtype=torch.float32)

    def add(self, part: slice, grad: Tensor, spare: Tensor) -> None:
        """``grad`` [n, V] float32 belongs to the logits of these tokens; ``spare`` is memory of that shape."""
        size, read = len(self.rows), self.read[part]
        if self.bias is not None:
            self.bias[:size] += grad.sum(dim=0)
        narrow = grad if grad.dtype == read.dtype else spare.copy_(grad)
        if self.hidden is not None:
            torch.mm(narrow, self.rows, out=self.hidden[part])
        if self.weight is not None:
            if narrow is grad:
                self.weight[:size].addmm_(narrow.t(), read)
            else:
                # On a CPU a sum of two formats makes a whole copy in the wider one, so it is done by parts.
                at_once = ROWS_AT_ONCE if grad.device.type == "cpu" else size
                for some in self.weight[:size].split(at_once):
                    some += narrow[:, : len(some)].t() @ read
                    narrow = narrow[:, len(some) :]

    def scale(self, factor: Tensor) -> None:
        """Multiply all by a number. Not where the weight's is in ``main_grad`` already."""
        if self.weight is not None and self.main_grad is not None:
            self.main_grad.add_(self.weight, alpha=float(factor))
        for found in (self.hidden, None if self.main_grad is not None else self.weight, self.bias):
            if found is not None:
                found.mul_(factor)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What autograd is given for hidden, weight and bias."""
        for_weight = self.weight if self.main_grad is None else None
        return (
            self.hidden,
            None if for_weight is None else for_weight.to(self.dtypes[0]),
            None if self.bias is None else self.bias.to(self.dtypes[1]),
        )


def _zeros_for(weight: Tensor) -> Tensor:
    """Zeros [V, H] in float32 for a gradient that waits for its backward pass.

    Beside a ``main_grad`` they are made once and stay: nothing else is as large, and each time such a block is freed,
    small ones that outlive a pass settle in it, so that the next finds no place.
    """
    if not hasattr(weight, "main_grad"):
        return torch.zeros_like(weight, dtype=torch.float32)
    kept: Tensor | None = getattr(weight, "waiting_grad", None)
    if kept is None:
        kept = weight.waiting_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        return kept
    return kept.zero_()


def _as_computed(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, vocabulary: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs of a head in the number format that autocast says, without rows beyond the vocabulary."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)[:vocabulary], None if bias is None else bias.to(dtype)[:vocabulary]


class _Chunk(NamedTuple):
    """Logits of some tokens."""

    part: slice  # which
    z: Tensor  # [n, V] float32, logits over the temperature
    logits: Tensor  # [n, V] in the format of the products: memory that is the reader's to use


def _logit_chunks(
    hidden: Tensor,
    rows: Tensor,
    offset: Tensor | None,
    temperature: float,
    chunk_tokens: int,
    kept: _Chunk | None = None,
) -> Iterator[_Chunk]:
    """The logits of all tokens, always in the same memory. The last chunk is a full one, wherever there is one.

    Args:
        kept: the last chunk of an earlier call, its ``z`` untouched: it comes first, and is not computed again.
    """
    ends = list(range(len(hidden), 0, -max(1, min(chunk_tokens, len(hidden)))))[::-1]
    parts = [slice(start, end) for start, end in zip([0, *ends][:-1], ends, strict=True)]
    if kept is not None:
        # Of the forward pass that memory is: what is asked for now has been asked for then.
        buffer, narrow = kept.z, kept.logits
        yield kept
        parts.pop()
    elif parts:
        full = parts[-1].stop - parts[-1].start
        buffer = hidden.new_empty(full, len(rows), dtype=torch.float32)
        narrow = buffer if hidden.dtype == torch.float32 else torch.empty_like(buffer, dtype=hidden.dtype)
    for part in parts:
        count = part.stop - part.start
        logits = torch.mm(hidden[part], rows.t(), out=narrow[:count])
        if offset is not None:
            logits.add_(offset)
        z = logits if narrow is buffer else buffer[:count].copy_(logits)
        yield _Chunk(part, z.div_(temperature) if temperature != 1.0 else z, logits)


def _log_sum_exp(z: Tensor, entropy: Tensor | None = None) -> Tensor:
    """log sum exp [n] of each row of [n, V], a few rows at a time; ``entropy`` [n] takes that of their softmax."""
    at_once = ON_CPU if z.device.type == "cpu" else ON_GPU
    found = z.new_empty(len(z))
    buffer = z.new_empty(min(at_once, len(z)), z.shape[1])
    for start in range(0, len(z), at_once):
        part = slice(start, start + at_once)
        some = z[part]
        top = some.amax(dim=-1)
        weights = torch.sub(some, top[:, None], out=buffer[: len(some)]).exp_()
        total = weights.sum(dim=-1)
        found[part] = top + total.log()
        if entropy is not None:
            entropy[part] = found[part] - weights.mul_(some).sum(dim=-1) / total
    return found


def above_mean(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """The target's logit less the mean logit of the vocabulary, for each token.

    It is what label smoothing needs: with q = (1 - e) onehot + e / V, the cross-entropy -sum q log p is
    -log p(target) + e (z(target) - mean z). Of a linear head the difference is one product for each token, so that no
    logits are made.

    Args:
        head: maps [n, H] to logits [n, V].
        hidden: [N, H].
        targets: [N] token ids.
        chunk_tokens: tokens whose logits exist at one time, where the head is no plain ``nn.Linear``.

    Returns:
        [N] float32.
    """
    if type(head) is nn.Linear and not isinstance(head.weight, DTensor):
        found: Tensor = _LinearAboveMean.apply(hidden, head.weight, targets)
        return found if head.bias is None else found + (head.bias[targets] - head.bias.mean()).float()

    def one_chunk(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h).float()
        return logits.gather(1, t[:, None]).squeeze(1) - logits.mean(dim=-1)

    recompute = torch.is_grad_enabled()
    return torch.cat(
        [
            checkpoint(one_chunk, h, t, use_reentrant=False, preserve_rng_state=False) if recompute else one_chunk(h, t)
            for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        ]
    )


class _LinearAboveMean(torch.autograd.Function):
    """`above_mean` of a linear head: hidden . (w[target] - mean w). Written out, it makes one gradient, not two."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        return (hidden.float() * _rows_above_mean(weight, targets)).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad[:, None] * _rows_above_mean(weight, targets)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            push = grad[:, None] * hidden.float()
            mean = -push.sum(dim=0) / len(weight)
            grad_weight = mean.repeat(len(weight), 1).index_add_(0, targets, push).to(weight.dtype)
        return grad_hidden, grad_weight, None


def _rows_above_mean(weight: Tensor, targets: Tensor) -> Tensor:
    return weight[targets].float() - weight.mean(dim=0, dtype=torch.float32)
