"""Checks of a model folder's text side: tokenizer, special tokens, chat template, and where generation stops."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from rlhfkit.chat.messages import Message, Role
from rlhfkit.chat.template import ChatEncoder, Template, load_template
from rlhfkit.errors import TemplateError, first_line
from rlhfkit.families.base import Family
from rlhfkit.repair.files import is_vocabulary
from rlhfkit.repair.patient import RECORD, Finding, Patient
from rlhfkit.repair.rules import BEAMS_OFF, CONFIG, GENERATION_CONFIG, SAMPLING_OFF, TOKENIZER_CONFIG
from rlhfkit.repair.verify import is_remote

_TALK: tuple[tuple[Role, str], ...] = (
    ("user", "What is 1 + 2?\n\nSay it: {control}"),
    ("assistant", "It is 3. 三。"),
    ("user", "Thanks"),
)
_OWN_PAD = "training here gives it a pad of its own"


def check_tokenizer(patient: Patient) -> Iterator[Finding]:
    tokenizer = patient.tokenizer
    if not isinstance(tokenizer, str):
        yield Finding("tokenizer", "pass", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens")
        return
    settings = patient.folder.json(TOKENIZER_CONFIG) or {}
    if not any(map(is_vocabulary, patient.folder.files)):
        yield Finding("tokenizer", "fail", "there is no vocabulary file", patient.repair)
    elif not is_remote(patient.folder, "AutoTokenizer"):
        yield Finding("tokenizer", "fail", tokenizer, patient.repair)
    elif "tokenizer.model" in patient.folder.files and settings.get("add_bos_token") is None:
        detail = "add_bos_token is not stated: its class puts a BOS in front of every text"
        yield Finding("tokenizer", "fail", detail, patient.repair)
    else:
        yield Finding("tokenizer", "pass", f"not loaded: {tokenizer}")


def check_special_tokens(patient: Patient) -> Iterator[Finding]:
    tokenizer = patient.tokenizer
    if isinstance(tokenizer, str):
        return
    generation = patient.folder.json(GENERATION_CONFIG) or {}
    config = patient.config if patient.adapter is None else {}  # the base's, which knows nothing of the adapter
    parts, clashes = [], []
    for name in ("pad", "eos", "bos"):
        key = f"{name}_token_id"
        own = getattr(tokenizer, key)
        parts.append(f"{name} {getattr(tokenizer, f'{name}_token')!r} ({own})" if own is not None else f"no {name}")
        for file, settings in ((CONFIG, config), (GENERATION_CONFIG, generation)):
            stated = settings.get(key)
            if own is not None and stated is not None and own not in (stated if isinstance(stated, list) else [stated]):
                clashes.append(f"{key} is {stated} in {file} and {own} in the tokenizer")
    shown = ", ".join(parts)
    if tokenizer.pad_token_id is None:
        yield Finding("special tokens", "warn", f"{shown}: batches cannot be padded", _OWN_PAD)
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        detail = f"{shown}: pad is eos, so the end of a turn counts as padding"
        yield Finding("special tokens", "warn", detail, _OWN_PAD)
    elif clashes:
        yield Finding("special tokens", "warn", f"{shown}; {'; '.join(clashes)}", "training here makes them agree")
    else:
        yield Finding("special tokens", "pass", shown)


def check_template(patient: Patient) -> Iterator[Finding]:
    """The chat template: there, round-tripping, and its end of turn among the ids that stop generation."""
    tokenizer = patient.tokenizer
    if isinstance(tokenizer, str):
        return
    recorded = (patient.folder.json(RECORD) or {}).get("template")
    own = tokenizer.chat_template
    try:
        if recorded:
            template = Template(recorded["name"], recorded["source"], recorded["bodies"], tuple(recorded["controls"]))
        elif own:
            template = Template("tokenizer", own["default"] if isinstance(own, dict) else own)
        elif isinstance(patient.family, Family):
            name = patient.family.choose_template(patient.config, tokenizer.get_vocab())
            template = load_template(name)
            detail = f"none in the folder; the family's, '{name}', is used"
            yield Finding("chat template", "warn", detail, _with_template(patient, name))
        else:
            detail = "none in the folder, and no family to take one from"
            yield Finding("chat template", "warn", detail, _with_template(patient))
            return
        encoder = ChatEncoder(tokenizer, template)
        control = encoder.turn_end
        talk = [Message(role, text.format(control=control)) for role, text in _TALK]
        encoded = encoder.encode([*talk[:2]])
        ids = encoder.encode_prompt(talk)
    except (TemplateError, KeyError, TypeError) as error:
        text = error.message if isinstance(error, TemplateError) else f"it is damaged: {first_line(error)}"
        yield Finding("chat template", "fail", text, _with_template(patient))
        return
    text = tokenizer.decode(ids, skip_special_tokens=False)
    lost = [m.content for m in talk if not _holds(text, m.content)]
    ends = sum(
        1 for i, learned in zip(encoded.ids, encoded.supervised, strict=True) if learned and i == encoder.turn_end_id
    )
    if lost:
        detail = f"a message does not come back from its ids: {lost[0]!r}"
        yield Finding("chat template", "fail", detail, _with_template(patient))
    elif ends != 1:
        yield Finding("chat template", "fail", f"an answer ends {ends} times with {control!r}", _with_template(patient))
    elif recorded or own:
        yield Finding("chat template", "pass", f"'{template.name}': round-trips, turns end with {control!r}")
    yield from _stop_ids(patient, encoder.turn_end, encoder.turn_end_id)


def _with_template(patient: Patient, name: str = "NAME") -> str:
    """The command whose run saves its model with a template; all names: rlhfkit sft --help."""
    return f"rlhfkit sft --model {shlex.quote(str(patient.path))} --data DATA --template {name}"


def _holds(text: str, content: str) -> bool:
    """Whether a message is in a decoded text, spaces aside: some tokenizers put one in front of every part."""
    return "".join(content.split()) in "".join(text.split())


def _stop_ids(patient: Patient, turn_end: str, turn_end_id: int) -> Iterator[Finding]:
    if patient.is_reward_model:
        return
    stated = (patient.folder.json(GENERATION_CONFIG) or {}).get("eos_token_id", patient.config.get("eos_token_id"))
    stops = stated if isinstance(stated, list) else [stated] if stated is not None else []
    if turn_end_id in stops:
        yield Finding("stop ids", "pass", f"{stops}, with the end of a turn, {turn_end!r} ({turn_end_id})")
    else:
        detail = f"generation stops at {stops or 'nothing'}, the template ends a turn with {turn_end!r} ({turn_end_id})"
        fix = f'set "eos_token_id": {[turn_end_id, *stops]} in generation_config.json; training here does so'
        yield Finding("stop ids", "fail", f"{detail}: answers never end", fix)


def check_generation(patient: Patient) -> Iterator[Finding]:
    if patient.is_reward_model:
        return
    settings = patient.folder.json(GENERATION_CONFIG)
    if settings is None:
        if GENERATION_CONFIG not in patient.folder.files and patient.config:
            yield Finding("generation", "warn", "no generation_config.json: defaults hold", patient.repair)
        return
    sampling = [k for k, off in SAMPLING_OFF.items() if settings.get(k) is not None and settings[k] != off]
    beams = [k for k, off in BEAMS_OFF.items() if settings.get(k) is not None and settings[k] != off]
    idle = sampling if settings.get("do_sample") is not True else []
    idle += beams if settings.get("num_beams") in (None, 1) else []
    if idle:
        detail = f"{', '.join(idle)} without the setting they belong to: transformers refuses to save the model"
        yield Finding("generation", "warn", detail, patient.repair)
    else:
        yield Finding("generation", "pass", "generation_config.json can be saved again")
