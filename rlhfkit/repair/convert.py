"""Legacy checkpoints to transformers' own classes, and back. No code of a model folder is imported or run.

`plan_conversion` reads names, shapes and JSON files and refuses what does not fit; `convert` writes a folder beside the
destination, proves it and renames it into place. The table of what goes where is in the family's adapter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhfkit import __version__
from rlhfkit.chat.template import ChatEncoder, load_template
from rlhfkit.errors import RepairRefusedError
from rlhfkit.families.base import Family
from rlhfkit.families.legacy import LegacyLayout, Sentencepiece, Tiktoken
from rlhfkit.families.registry import find_family
from rlhfkit.families.tokens import align_model, apply_token_policy
from rlhfkit.models.vocabulary import forbid_padding_rows, token_count
from rlhfkit.repair.beside import beside
from rlhfkit.repair.convert_proof import Proof, compare_ids, compare_logits, require
from rlhfkit.repair.convert_tokenizer import from_sentencepiece, from_tiktoken
from rlhfkit.repair.files import reason_to_copy
from rlhfkit.repair.folder import Folder, embedding_name
from rlhfkit.repair.stream import Part, Target, TensorReader, write_tensors

PROOF_FILE = "conversion.json"
ORIGINALS = "original"  # the folder's files that are no weights, for the way back
RECORD = "rlhfkit.json"
_CONFIG, _GENERATION, _TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the plan: which files, what becomes of them, and why."""

    file: str
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that fits, not carried out yet.

    Args:
        src: the folder that is read.
        family: its family.
        layout: its layout; None where the weights are native already and the tokenizer alone is made.
        tokenizer: facts of the vocabulary.
        config: the native config.json, without the special tokens.
        targets: every tensor that will be written.
        steps: the plan as a table.
    """

    src: Folder
    family: Family
    layout: LegacyLayout | None
    tokenizer: Tiktoken | Sentencepiece
    config: dict[str, Any]
    targets: tuple[Target, ...]
    steps: tuple[Step, ...]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)


@dataclass(frozen=True, slots=True)
class TextSide:
    """What the vocabulary file and the token policy come to; ``changes`` say what was decided, and why."""

    tokenizer: Any
    config: dict[str, Any]
    changes: tuple[str, ...]


# -- what a folder is --------------------------------------------------------------------------------------------------


def needs_conversion(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's own code would have to run to load it as it is."""
    return str(config.get("model_type", "")) in family.requires_conversion


def kept_layout(family: Family, config: Mapping[str, Any]) -> LegacyLayout | None:
    """The layout of a checkpoint that no class of transformers computes, but one of its adapter's."""
    if not needs_conversion(family, config) or family.legacy_layout is None:
        return None
    layout = family.legacy_layout(config, int(config.get("vocab_size") or 0))
    return layout if layout.classes else None


def has_bare_vocabulary(family: Family, path: Path) -> bool:
    """Whether a folder has a sentencepiece model and no fast tokenizer, which transformers 5 makes wrongly."""
    facts = family.bare_sentencepiece
    return facts is not None and (path / facts.file).is_file() and not (path / "tokenizer.json").is_file()


def open_folder(path: Path, role: str = "SRC") -> Folder:
    """A model folder.

    Raises:
        RepairRefusedError: none is there.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise RepairRefusedError(
            f"{role} must be a model folder, but {path} is {found}", hint="usage: rlhfkit convert SRC DST"
        )
    folder = Folder(path, role)
    if "adapter_config.json" in folder.files:
        base = (folder.json("adapter_config.json") or {}).get("base_model_name_or_path") or "an unnamed base"
        raise RepairRefusedError(
            f"{path} is a LoRA adapter folder, not a model (trained on {base})",
            hint=f"make one model of both first: rlhfkit merge {path} DST"
            if RECORD in folder.files
            else "its matrices fit the projections of the base as it was; merge them with the code they were trained "
            "with, and convert the result",
        )
    if folder.json(_CONFIG) is None:
        raise RepairRefusedError(
            f"{path} has no config.json that can be read",
            hint="mend it first: rlhfkit fix-checkpoint ORIGINAL " + str(path),
        )
    return folder


# -- plan --------------------------------------------------------------------------------------------------------------


def plan_conversion(path: Path) -> Conversion:
    """Read a legacy folder and say what would be written.

    Raises:
        RepairRefusedError: it is none, or one that no native class computes.
        FamilyError: no family holds it.
    """
    src = open_folder(path)
    config = src.json(_CONFIG) or {}
    family = find_family(config, where=str(path))
    reader = TensorReader(src)
    if needs_conversion(family, config) and family.legacy_layout is not None:
        layout = family.legacy_layout(config, _rows(src, _embedding(src)))
        if layout.refused:
            raise RepairRefusedError(
                f"{path} is a {layout.name}: {layout.refused}",
                hint=f"train and use it as it is: rlhfkit sft --model {path}"
                if layout.classes
                else "there is no way to train it here",
            )
        targets = tuple(_native_targets(layout, src, reader, _layers(layout, config, path)))
        native = native_config(layout, config, path)
        tokenizer = layout.tokenizer
    elif has_bare_vocabulary(family, path) and family.bare_sentencepiece is not None:
        layout, tokenizer = None, family.bare_sentencepiece
        kept = [name for name in src.weights.tensors if not name.endswith(".rotary_emb.inv_freq")]
        same_names(_names_of_class(config), set(kept), path, str(config["model_type"]))
        targets = tuple(_copied(name, name, src, reader) for name in kept)
        native = {key: value for key, value in config.items() if key != "auto_map"}
    else:
        raise RepairRefusedError(
            f"{path} needs no conversion: transformers has a class for its model_type '{config['model_type']}'",
            hint=f"use it as it is: rlhfkit generate --model {path}",
        )
    if tokenizer.file not in src.files:
        raise RepairRefusedError(
            f"{path} lacks its vocabulary, {tokenizer.file}",
            hint=f"bring it back from the original: rlhfkit fix-checkpoint ORIGINAL {path}",
        )
    rows = next(target.shape[0] for target in targets if target.name == _EMBEDDING)
    dtype = str(next(target.dtype for target in targets if target.name == _EMBEDDING)).removeprefix("torch.")
    native |= {"vocab_size": rows, "dtype": dtype, "torch_dtype": dtype}
    return Conversion(src, family, layout, tokenizer, native, targets, _steps(src, layout, tokenizer, native, targets))


def native_config(layout: LegacyLayout, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """config.json of the native class; see `LegacyLayout`.

    Raises:
        RepairRefusedError: a key is missing, or says something that the class does not compute.
    """
    file = path / _CONFIG
    for condition in layout.conditions:
        key = next((key for key in condition.keys if key in config), None)
        if key is not None and config[key] not in (condition.value, None):
            raise RepairRefusedError(
                f"{file} says {key}: {config[key]!r}, and only {condition.value!r} can be converted: otherwise "
                f"{condition.why}",
                hint="there is no native class for this checkpoint",
            )
    native: dict[str, Any] = {"architectures": [layout.native_class], "model_type": layout.native_type}
    for rule in layout.config:
        value = next((config[key] for key in rule.original if config.get(key) is not None), rule.default)
        if not isinstance(value, int | float):
            raise RepairRefusedError(
                f"{file} lacks {' or '.join(rule.original)}",
                hint="restore it from the original model folder: rlhfkit fix-checkpoint ORIGINAL " + str(path),
            )
        native[rule.native] = value // rule.divide if rule.divide > 1 else value
    hidden, heads = native["hidden_size"], native["num_attention_heads"]
    for key in layout.head_width:
        if config.get(key) not in (None, hidden / heads):
            raise RepairRefusedError(
                f"{file}: {key} is {config[key]}, but {hidden} / {heads} heads is {hidden / heads:g}",
                hint="there is no native class for heads of another width",
            )
    # Readers before transformers 5 know the first, later ones write the second.
    native["rope_parameters"] = {"rope_type": "default", "rope_theta": native["rope_theta"]}
    return {**native, **layout.constants}


def _names_of_class(config: Mapping[str, Any]) -> set[str]:
    """Names of the tensors that transformers' class for a config.json stores."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    tied = {_HEAD} if model.config.tie_word_embeddings else set()
    return set(model.state_dict()) - tied


def _layers(layout: LegacyLayout, config: Mapping[str, Any], path: Path) -> int:
    rule = next(rule for rule in layout.config if rule.native == "num_hidden_layers")
    layers = next((config[key] for key in rule.original if key in config), None)
    if not isinstance(layers, int):
        raise RepairRefusedError(f"{path / _CONFIG} lacks {' or '.join(rule.original)}")
    return layers


def _embedding(src: Folder) -> str:
    name = embedding_name(src.weights.tensors)
    if name is None:
        raise RepairRefusedError(f"{src.path} holds no embedding", hint="it is no language model, or an incomplete one")
    return name


def _rows(src: Folder, name: str) -> int:
    return src.weights.tensors[name].shape[0]


def tensor_names(layout: LegacyLayout, layers: int) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Original name, native names and whether rows are scaled, for every tensor."""
    for rule in layout.tensors:
        numbers: Iterable[int] = range(layers) if "{i}" in rule.original else (0,)
        for i in numbers:
            yield rule.original.format(i=i), tuple(name.format(i=i) for name in rule.native), rule.unit_rows


def _native_targets(layout: LegacyLayout, src: Folder, reader: TensorReader, layers: int) -> Iterator[Target]:
    found = {name for name in src.weights.tensors if not name.endswith(layout.dropped)}
    same_names({original for original, _, _ in tensor_names(layout, layers)}, found, src.path, layout.name)
    if _rows(src, _original_name(layout, _HEAD)) != _rows(src, _original_name(layout, _EMBEDDING)):
        raise RepairRefusedError(
            f"{src.path}: the embedding has {_rows(src, _original_name(layout, _EMBEDDING))} rows and the head "
            f"{_rows(src, _original_name(layout, _HEAD))}",
            hint="one of them was resized alone; save the model again with both",
        )
    hidden = src.weights.tensors[_original_name(layout, _EMBEDDING)].shape[1]
    for original, natives, scaled in tensor_names(layout, layers):
        shape = reader.shape(original)
        size, left = divmod(shape[0], len(natives))
        if left or (len(natives) > 1 and size != hidden):
            raise RepairRefusedError(
                f"{src.path}: {original} has the shape {list(shape)}, which is not {len(natives)} times the hidden "
                f"size {hidden}",
                hint="heads of another width, or shared key heads: there is no mapping for this checkpoint",
            )
        for i, native in enumerate(natives):
            part = Part(original, i * size, (i + 1) * size)
            yield Target(native, (size, *shape[1:]), reader.dtype(original), (part,), scaled)


def _copied(source: str, name: str, src: Folder, reader: TensorReader) -> Target:
    shape = src.weights.tensors[source].shape
    return Target(name, shape, reader.dtype(source), (Part(source, 0, shape[0]),))


def _original_name(layout: LegacyLayout, native: str) -> str:
    return next(rule.original for rule in layout.tensors if rule.native == (native,))


def same_names(expected: set[str], found: set[str], path: Path, name: str) -> None:
    """Refuse files that hold other tensors than a layout or class has."""
    absent, strange = sorted(expected - found), sorted(found - expected)
    if not absent and not strange:
        return
    words = [f"lacks {len(absent)} of its tensors (first: {absent[0]})"] if absent else []
    words += [f"holds {len(strange)} that do not belong to it (first: {strange[0]})"] if strange else []
    raise RepairRefusedError(
        f"{path} is no whole {name}: it {' and '.join(words)}",
        hint="quantised, pruned and merged files have other tensors; convert the plain 16- or 32-bit checkpoint",
    )


def _steps(
    src: Folder,
    layout: LegacyLayout | None,
    tokenizer: Tiktoken | Sentencepiece,
    config: Mapping[str, Any],
    targets: Iterable[Target],
) -> tuple[Step, ...]:
    gib = sum(target.nbytes for target in targets) / 2**30
    count = len(src.weights.tensors)
    if layout is None:
        weights = Step("weights", f"{count} tensors copied, {gib:.2f} GiB", "they have native names already")
        settings = Step(_CONFIG, "kept; special tokens set", "tokenizer, config and generation must agree")
        proof = Step(PROOF_FILE, "token ids compared with the original's", "the weights are copies, equal bit for bit")
    else:
        head = ", head rows scaled to length one" if any(target.unit_rows for target in targets) else ""
        weights = Step(
            "weights",
            f"{count} tensors to {layout.native_class}, {gib:.2f} GiB{head}",
            "transformers has this class; the original code no longer loads rightly",
        )
        settings = Step(
            _CONFIG,
            f"model_type {config['model_type']}, {config['max_position_embeddings']} positions, rope_theta "
            f"{config['rope_theta']:g}, {config['vocab_size']} rows",
            "no auto_map: nothing of the folder is run",
        )
        proof = Step(
            PROOF_FILE, "logits and token ids compared with the original's", "nothing is put in place unproved"
        )
    return (
        weights,
        settings,
        Step("tokenizer.json", f"fast tokenizer from {tokenizer.file}", "same ids, without the tokenizer's own code"),
        Step(f"{_TOKENIZER_CONFIG}, {_GENERATION}", "chat template, pad, list of stops", "the original code held them"),
        proof,
        Step(f"{ORIGINALS}/", "the original's other files, never run", "for the way back: --to original"),
    )


# -- carrying it out ---------------------------------------------------------------------------------------------------


def convert(plan: Conversion, dst: Path) -> tuple[Proof, tuple[str, ...]]:
    """Write, prove, and put in place.

    Returns:
        the proof, and what the token policy changed.

    Raises:
        RepairRefusedError: the destination is not free.
        CheckpointError: the result computes something else than the original; nothing is put in place.
    """
    with beside(dst, plan.nbytes) as new:
        text = write_text_side(plan, new)
        proof = write_weights(plan, new, text)
    return proof, text.changes


def make_tokenizer(facts: Tiktoken | Sentencepiece, folder: Path) -> Any:
    """The fast tokenizer of a folder, special tokens as its own configuration names them."""
    from transformers import PreTrainedTokenizerFast

    path = folder / facts.file
    if isinstance(facts, Tiktoken):
        # Its code declares none. Where a text ends is the first special token in all of these vocabularies.
        backend = from_tiktoken(path, pattern=facts.pattern, specials=facts.specials)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=facts.specials[0], clean_up_tokenization_spaces=False
        )
    settings = _read_object(folder / _TOKENIZER_CONFIG)
    backend = from_sentencepiece(path, roles=facts.roles, bos=bool(settings.get("add_bos_token", facts.adds_bos)))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    pad = _token_text(settings.get("pad_token"))
    special = {key: _token_text(settings.get(key)) or usual for key, usual in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{**special, **({"pad_token": pad} if pad else {})},
    )


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_text_side(plan: Conversion, folder: Path) -> TextSide:
    """All of a converted folder but its weights and the proof."""
    from transformers import GenerationConfig

    src = plan.src
    tokenizer = make_tokenizer(plan.tokenizer, src.path)
    positions = plan.config.get("max_position_embeddings")
    tokenizer.model_max_length = positions or tokenizer.model_max_length
    name = plan.layout.template if plan.layout else plan.family.choose_template(plan.config, tokenizer.get_vocab())
    template = load_template(name)
    encoder = ChatEncoder(tokenizer, template)
    kept = dict(src.json(_GENERATION) or {})
    for key in plan.layout.not_generation if plan.layout else ():
        kept.pop(key, None)
    policy = apply_token_policy(plan.family, tokenizer, encoder, generation_eos=kept.get("eos_token_id"))
    model = SimpleNamespace(config=SimpleNamespace(), generation_config=GenerationConfig(**kept))
    align_model(policy, model)
    rows = plan.config["vocab_size"]
    padding = forbid_padding_rows(model.generation_config, token_count(tokenizer), rows, stored_rows=rows)
    config = {**plan.config, "bos_token_id": None, **vars(model.config)}

    tokenizer.chat_template = template.source
    tokenizer.save_pretrained(folder)
    _edit_json(folder / _TOKENIZER_CONFIG, tokenizer_class="PreTrainedTokenizerFast")
    model.generation_config.save_pretrained(folder)
    write_json(folder / _CONFIG, config)
    facts = {
        "rlhfkit": __version__,
        "stage": "convert",
        "family": plan.family.name,
        "base": str(src.path.resolve()),
        "template": {
            "name": template.name,
            "source": template.source,
            "bodies": template.bodies,
            "controls": list(template.controls),
        },
        "vocab_rows": rows,
    }
    write_json(folder / RECORD, facts)
    _copy_originals(src, folder)
    return TextSide(tokenizer, config, (*policy.changes, *([padding] if padding else [])))


def _copy_originals(src: Folder, folder: Path) -> None:
    (folder / ORIGINALS).mkdir()
    for name in sorted(src.files):
        if name == _CONFIG or reason_to_copy(name):
            shutil.copyfile(src.path / name, folder / ORIGINALS / name)
        if any(word in name.lower() for word in ("license", "licence", "notice")):
            shutil.copyfile(src.path / name, folder / name)


def write_weights(plan: Conversion, folder: Path, text: TextSide) -> Proof:
    """Weights, the proof that they are right, and its record."""
    src = plan.src
    path = src.path / plan.tokenizer.file
    equal, compared = compare_ids(text.tokenizer, plan.tokenizer, path)
    original = TensorReader(src)
    written = write_tensors(folder, plan.targets, original)
    if plan.layout is None:
        proof = Proof(None, 0.0, 0, equal, compared)
    else:
        tokens = min(token_count(text.tokenizer), plan.config["vocab_size"])
        native = TensorReader(Folder(folder, "DST"))
        difference, largest, positions = compare_logits(plan.layout, text.config, original, native, tokens)
        proof = Proof(difference, largest, positions, equal, compared)
    require(proof, f"the conversion of {src.path}")
    record = {
        "rlhfkit": __version__,
        "from": {
            "folder": str(src.path.resolve()),
            "layout": plan.layout.name if plan.layout else "native weights, bare vocabulary",
            "files": list(src.weights.files),
        },
        "to": {"class": plan.config["architectures"][0], "files": list(written)},
        "proof": asdict(proof),
        "changes": list(text.changes),
    }
    write_json(folder / PROOF_FILE, record)
    return proof


def _edit_json(path: Path, **values: Any) -> None:
    write_json(path, {**_read_object(path), **values})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As transformers writes its files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
