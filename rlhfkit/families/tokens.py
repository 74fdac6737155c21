"""Which token pads, which one ends a turn, and at which ones generation stops; no torch.

Half of the checkpoints people train from disagree with themselves here: no pad at all (LLaMA), a pad equal to eos
(SmolLM2), an eos that the chat template never writes (the base models of Qwen and LLaMA 3), a generation config that
refuses to be saved (LLaMA 2 chat). One function decides for the tokenizer, one carries the decision into the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhfkit.chat.template import ChatEncoder
from rlhfkit.families.base import Family

NEW_PAD = "<|pad|>"
_WHY_NOT_EOS = "with pad equal to eos the end of a turn counts as padding, and a reward is read one token early"

# Settings of a GenerationConfig that only sampling reads, with the values that say nothing. Any other value beside
# do_sample=False makes save_pretrained raise as soon as something else in the config was changed.
_SAMPLING_NEUTRAL: dict[str, float | None] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


@dataclass(frozen=True, slots=True)
class TokenPolicy:
    """The special tokens of a training run.

    Args:
        pad_token: fills batches; never the token that ends a turn.
        pad_id: its id.
        eos_token: ends a turn in the chat template.
        eos_id: its id.
        bos_id: the tokenizer's, or None.
        stop_ids: where generation stops, the end of a turn first.
        changes: what was changed in the tokenizer, from what to what and why, one sentence each.
    """

    pad_token: str
    pad_id: int
    eos_token: str
    eos_id: int
    bos_id: int | None
    stop_ids: tuple[int, ...]
    changes: tuple[str, ...]


def apply_token_policy(
    family: Family, tokenizer: Any, encoder: ChatEncoder, *, generation_eos: int | Sequence[int] | None = None
) -> TokenPolicy:
    """Give the tokenizer a pad of its own and the eos that ends a turn.

    ``padding_side`` stays as it is. When no fit pad is in the vocabulary, ``<|pad|>`` is added: the caller compares
    ``len(tokenizer)`` with the embedding and grows it where needed.

    Args:
        family: its candidates for pad and stop are asked, in their order.
        tokenizer: changed in place.
        encoder: says which token ends a turn.
        generation_eos: ``eos_token_id`` of the checkpoint's generation_config.json; kept in the stop list.
    """
    vocabulary = tokenizer.get_vocab()
    changes: list[str] = []
    if encoder.added_controls:
        added = ", ".join(_name(tokenizer, control) for control in encoder.added_controls)
        changes.append(
            f"{added} came into the vocabulary: the template '{encoder.template.name}' is written with them."
        )

    eos_before = tokenizer.eos_token
    if eos_before != encoder.turn_end:
        changes.append(
            f"eos_token was {_name(tokenizer, eos_before)} and is now {_name(tokenizer, encoder.turn_end)}: "
            f"the template '{encoder.template.name}' ends a turn with it, so this is the stop that training teaches."
        )
        tokenizer.eos_token = encoder.turn_end

    pad_before = tokenizer.pad_token
    if pad_before is None or pad_before == encoder.turn_end:
        pad = next((c for c in family.pad_candidates if c in vocabulary and c != encoder.turn_end), NEW_PAD)
        if pad not in vocabulary:
            tokenizer.add_tokens([pad], special_tokens=True)
            changes.append(
                f"{_name(tokenizer, pad)} was added to the vocabulary: none of the family's pad tokens "
                f"({', '.join(family.pad_candidates) or 'it names none'}) is there and free."
            )
        tokenizer.pad_token = pad
        reason = "batches cannot be filled without one" if pad_before is None else _WHY_NOT_EOS
        changes.append(f"pad_token was {_name(tokenizer, pad_before)} and is now {_name(tokenizer, pad)}: {reason}.")

    stops = [encoder.turn_end, *(c for c in family.stop_candidates if c in vocabulary)]
    stop_ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    if eos_before is not None:
        stop_ids.append(tokenizer.convert_tokens_to_ids(eos_before))
    return TokenPolicy(
        pad_token=tokenizer.pad_token,
        pad_id=tokenizer.pad_token_id,
        eos_token=encoder.turn_end,
        eos_id=encoder.turn_end_id,
        bos_id=tokenizer.bos_token_id,
        stop_ids=_distinct([*stop_ids, *_as_ids(generation_eos)]),
        changes=tuple(changes),
    )


def align_model(policy: TokenPolicy, model: Any) -> None:
    """Carry the policy into ``model.config`` and ``model.generation_config``, which do not follow each other.

    Generation gets the list of stops, and those that it had stay. A generation config whose sampling values would
    make ``save_pretrained`` refuse it gets ``do_sample=True`` (a temperature of 0 becomes 1 instead: it meant greedy).
    Nothing else moves; a bos that the tokenizer lacks is left as the checkpoint has it.
    """
    config = model.config
    config.pad_token_id = policy.pad_id
    config.eos_token_id = policy.eos_id
    if policy.bos_id is not None:
        config.bos_token_id = policy.bos_id

    generation = getattr(model, "generation_config", None)
    if generation is None:  # a sequence classifier has none
        return
    generation.pad_token_id = policy.pad_id
    generation.eos_token_id = list(_distinct([*policy.stop_ids, *_as_ids(generation.eos_token_id)]))
    if policy.bos_id is not None:
        generation.bos_token_id = policy.bos_id
    if generation.do_sample:
        return
    if generation.temperature == 0:  # greedy was meant, and sampling at 0 is an error
        generation.temperature = 1.0
    if any(getattr(generation, name, None) not in (None, neutral) for name, neutral in _SAMPLING_NEUTRAL.items()):
        generation.do_sample = True


def _name(tokenizer: Any, token: str | None) -> str:
    return "not set" if token is None else f"'{token}' ({tokenizer.convert_tokens_to_ids(token)})"


def _as_ids(ids: int | Sequence[int] | None) -> Sequence[int]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else ids


def _distinct(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))
