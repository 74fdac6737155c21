"""One place for the numbers of a vocabulary: ids of the tokenizer, rows of the embedding and the head, and who knows.

Checkpoints have more rows than tokens (Qwen: 151,851 tokens in 151,936 rows) or, once a template brought tokens of its
own, fewer. Rows are added and never taken away: those that a tokenizer does not name may be named by the next one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY_MULTIPLE = 64  # tensor cores like it; what the Qwen and Baichuan checkpoints themselves use
_LISTED = 4096  # most padding rows that a generation config lists


def token_count(tokenizer: Any) -> int:
    """One more than a tokenizer's highest id. Where ids have gaps this is more than its number of tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def rows_for(tokens: int, rows: int) -> int:
    """How many rows a model with ``rows`` gets for so many tokens."""
    return rows if tokens <= rows else -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def grow_vocabulary(model: Any, tokens: int) -> str:
    """Give the embedding and the head at least ``tokens`` rows, a multiple of 64; never fewer than before.

    New rows start as the mean of the old ones, so that a new token is an average one and the logits of the old ones
    are not drowned (Hewitt 2021). Config and tied head stay in step.

    Returns:
        A sentence about the change, empty if there was none.
    """
    embedding = model.get_input_embeddings()
    old = embedding.weight.shape[0]
    new = rows_for(tokens, old)
    if new == old:
        return ""
    model.resize_token_embeddings(new, mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for layer in {id(m): m for m in (model.get_input_embeddings(), head) if m is not None}.values():
            for values in (layer.weight, getattr(layer, "bias", None)):
                if values is not None:
                    values[old:] = values[:old].float().mean(dim=0).to(values.dtype)
    return f"vocabulary grown from {old} to {new} rows for {tokens} tokens; new rows start as the mean of the old ones"


def with_rows(values: Tensor, rows: int) -> Tensor:
    """Values [V, ...] of an embedding or a head with ``rows`` rows; those that are new are the mean of the others."""
    if values.shape[0] >= rows:
        return values
    mean = values.float().mean(dim=0, keepdim=True).to(values.dtype)
    return torch.cat([values, mean.expand(rows - values.shape[0], *values.shape[1:])])


def rows_of_adapter(tokenizer: Any, stored_rows: int, rows: int) -> int:
    """How many rows an embedding has that is saved beside a LoRA adapter, for a model that has ``rows`` itself.

    Before peft loads an adapter, it gives the base as many rows as the tokenizer has tokens, if those are more than
    the ``stored_rows`` of its checkpoint. It knows of no multiple, so padding rows stay behind; they hold no token.
    """
    return min(rows, max(len(tokenizer), token_count(tokenizer), stored_rows))


def forbid_padding_rows(generation: Any, tokens: int, rows: int, *, stored_rows: int) -> str:
    """Tell a generation config which rows of the head are no token, so that others do not draw them either.

    Our own sampling and scoring leave them out by themselves (``vocabulary``).

    Args:
        generation: a GenerationConfig, changed in place.
        tokens: ids below this are tokens.
        rows: rows of the head.
        stored_rows: rows in the checkpoint; those at the end of them that were forbidden may be tokens now.

    Returns:
        A sentence about them, empty if there are none.
    """
    others = set(generation.suppress_tokens or ())
    last = stored_rows - 1
    while last in others:
        others.discard(last)
        last -= 1
    padding = list(range(tokens, rows)) if rows - tokens <= _LISTED else []
    generation.suppress_tokens = sorted(others.union(padding)) or None
    if tokens >= rows:
        return ""
    return f"ids {tokens} to {rows - 1} are padding rows of the head, no tokens: they are never drawn when sampling"
