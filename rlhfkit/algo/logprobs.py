"""Log-probabilities of given tokens without ever holding a (tokens x vocabulary) tensor for all tokens.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenStats:
    """Log-softmax of ``head(hidden) / temperature`` at ``targets``, chunk by chunk.

    In the backward pass each chunk's logits are computed again, so that memory is one chunk's, whatever N is.

    Args:
        head: maps [n, H] to logits [n, V].
        hidden: [N, H].
        targets: [N] token ids.
        temperature: of the distribution that was sampled.
        vocabulary: ids from here on are padding rows of the head; they take no part in the distribution.
        with_entropy: its softmax over the vocabulary costs about as much as the log-probabilities do.
        entropy_gradient: whether the entropy is part of a loss.
        chunk_tokens: tokens whose logits exist at one time.
    """

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
