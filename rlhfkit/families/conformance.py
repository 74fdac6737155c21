"""What every family and every chat format must satisfy; ours are held to it, and plug-in authors can be as well.

Both checks return faults as sentences, none when all is well, so that a test reads
``assert check_family(FAMILY) == []``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rlhfkit.chat.messages import Message
from rlhfkit.chat.template import RENDER_SETTINGS, ChatEncoder, load_template
from rlhfkit.errors import FamilyError, TemplateError
from rlhfkit.families.base import Family
from rlhfkit.families.registry import installed_families

_QUESTION = "What does `print(1 + 2)` show?"
_ANSWER = "It shows 3.\n\nDo you want more? 还要例子吗？"
_EXCHANGES: tuple[tuple[Message, ...], ...] = (
    (Message("user", _QUESTION),),
    (
        Message("user", "你好，请介绍一下你自己。"),
        Message("assistant", "我是一个助手。"),
        Message("user", "再短一点。"),
    ),
    (
        Message("user", "  two spaces\n  and more \n"),
        Message("assistant", "\n1. one\n2. two "),
        Message("user", "\tok"),
    ),
)


def check_family(family: Family) -> list[str]:
    """Faults in the facts of a family, and clashes with the other families that are installed."""
    faults = []
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", family.name):
        faults.append(
            f"name is '{family.name}': it is typed after --family, so small letters, digits, '-', '_', '.' only"
        )
    if not family.title:
        faults.append("title is empty: it is the family's line in `rlhfkit families`")
    if not family.model_types:
        faults.append("model_types is empty: no checkpoint would ever be found to be of this family")
    if not family.lora_targets:
        faults.append("lora_targets is empty: --lora-targets auto would adapt nothing")
    for name in ("model_types", "compatible_model_types", "pad_candidates", "stop_candidates", "lora_targets"):
        doubles = [value for value, count in Counter(getattr(family, name)).items() if count > 1]
        if doubles:
            faults.append(f"{name} names {', '.join(doubles)} twice")
    both = [t for t in family.compatible_model_types if t in family.model_types]
    if both:
        faults.append(f"compatible_model_types repeats {', '.join(both)}, which model_types claims already")
    unclaimed = [t for t in family.requires_conversion if t not in family.model_types + family.compatible_model_types]
    if unclaimed:
        faults.append(f"requires_conversion names {', '.join(unclaimed)}, which model_types does not claim")
    elif family.requires_conversion and family.legacy_layout is None:
        faults.append("requires_conversion names model types, and there is no legacy_layout to convert them by")
    return faults + _pad_faults(family) + _template_faults(family) + _clashes(family)


def check_encoder(encoder: ChatEncoder) -> list[str]:
    """Faults in what a tokenizer and a template make of conversations."""
    faults: list[str] = []
    for messages in [*_EXCHANGES, *_with_system(encoder)]:
        shape = ", ".join(m.role for m in messages)
        faults += [f"({shape}) {fault}" for fault in _conversation_faults(encoder, messages)]
    faults += _forgery_faults(encoder)
    return list(dict.fromkeys(faults))


def byte_tokenizer(
    specials: Sequence[str], *, bos: str | None = None, eos: str | None = None, pieces: Sequence[str] = ()
) -> Any:
    """A tokenizer of 256 bytes and the given strings: enough to check a chat format without a download.

    Args:
        specials: special tokens, in the order of their ids, which follow the bytes.
        bos: which of them is the tokenizer's bos.
        eos: which of them is its eos.
        pieces: strings that are single tokens without being special, as Baichuan's roles are.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    backend.add_tokens([AddedToken(p, special=False, normalized=False) for p in pieces])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


# -- families ----------------------------------------------------------------------------------------------------------


def _pad_faults(family: Family) -> list[str]:
    """A stop may pad where nothing else can (Qwen has only ``<|endoftext|>``), so it must stand last."""
    pads = family.pad_candidates
    return [
        f"pad_candidates names '{pad}', which also stops generation, before '{pads[index + 1]}': put it last"
        for index, pad in enumerate(pads[:-1])
        if pad in family.stop_candidates and any(later not in family.stop_candidates for later in pads[index + 1 :])
    ]


def _template_faults(family: Family) -> list[str]:
    names = [family.template]
    if family.template_for is not None:
        try:
            names.append(family.template_for({}, {}))
        except Exception as error:
            return [f"template_for fails on an empty config and vocabulary: {type(error).__name__}: {error}"]
    faults = []
    for name in dict.fromkeys(names):
        try:
            load_template(name)
        except TemplateError as error:
            faults.append(f"template '{name}' cannot be loaded: {error.message}")
    return faults


def _clashes(family: Family) -> list[str]:
    try:
        others = [item for item in installed_families() if item.family != family]
    except FamilyError as error:
        return [error.message]
    faults = [
        f"package '{o.package}' has a family called '{family.name}' too" for o in others if o.family.name == family.name
    ]
    for other in others:
        shared = [t for t in family.model_types if t in other.family.model_types]
        if shared and other.family.name != family.name:
            faults.append(
                f"model_types claims {', '.join(shared)}, which the family '{other.family.name}' holds too: every user "
                "would have to name one with --family; put it into compatible_model_types"
            )
    return faults


# -- encoders ----------------------------------------------------------------------------------------------------------


def _with_system(encoder: ChatEncoder) -> list[tuple[Message, ...]]:
    messages = (Message("system", "You are terse."), *_EXCHANGES[0])
    try:
        encoder.encode_prompt(messages)
    except TemplateError:  # some formats know no system text
        return []
    return [messages]


def _conversation_faults(encoder: ChatEncoder, prompt: tuple[Message, ...]) -> list[str]:
    tokenizer = encoder.tokenizer
    faults = []
    prompt_ids = encoder.encode_prompt(prompt)
    whole = encoder.encode([*prompt, Message("assistant", _ANSWER)])
    if not whole.ids or whole.ids[-1] != encoder.turn_end_id or not whole.supervised[-1]:
        faults.append(f"the last token learned is not the turn end {encoder.turn_end}")
    if whole.ids[: len(prompt_ids)] != prompt_ids:
        faults.append("the prompt's ids are not the beginning of the whole conversation's ids")
    else:
        start = len(prompt_ids)
        if whole.supervised[start:] != [True] * (len(whole.ids) - start):
            faults.append("not every token of the answer is learned")
        if _decode(tokenizer, whole.ids[start:-1]).strip() != _ANSWER:
            faults.append(f"the answer is read back as {_decode(tokenizer, whole.ids[start:-1])!r}")
    if encoder.encode_pair(prompt, _ANSWER) != (whole.ids[: len(prompt_ids)], whole.ids[len(prompt_ids) :]):
        faults.append("encode_pair cuts the conversation elsewhere than encode_prompt")
    if tokenizer.bos_token_id is not None and prompt_ids[:2] == [tokenizer.bos_token_id] * 2:
        faults.append(f"the text begins with two {tokenizer.bos_token}")
    read_back = _decode(tokenizer, prompt_ids)
    faults += [f"a {m.role}'s text is lost: {m.content!r}" for m in prompt if m.content.strip() not in read_back]
    if all(m.content == m.content.strip() for m in prompt) and prompt_ids != _official_ids(encoder, prompt):
        faults.append("the prompt's ids are not those of the tokenizer's apply_chat_template with this template")
    return faults


def _official_ids(encoder: ChatEncoder, prompt: Iterable[Message]) -> list[int]:
    ids = encoder.tokenizer.apply_chat_template(
        [m.as_dict() for m in prompt],
        chat_template=encoder.template.source,
        add_generation_prompt=True,
        return_dict=False,
        **RENDER_SETTINGS,
    )
    return list(ids)


def _forgery_faults(encoder: ChatEncoder) -> list[str]:
    """Control tokens in a user's text must not change how often each control token's id occurs."""
    tokenizer = encoder.tokenizer
    controls = dict.fromkeys([*encoder.template.controls, *map(str, tokenizer.all_special_tokens)])
    honest = Counter(encoder.encode_prompt([Message("user", "a")]))
    faults = []
    for control in controls:
        forged = Counter(encoder.encode_prompt([Message("user", f"a{control}{control}\n{control}")]))
        control_id = tokenizer.convert_tokens_to_ids(control)
        if forged[control_id] != honest[control_id]:
            faults.append(f"a user who types {control} gets the control token: a turn can be forged")
    return faults


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
