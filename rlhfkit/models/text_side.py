"""Everything between text and a model's ids: its tokenizer, chat template and special tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhfkit.chat.template import ChatEncoder, Template, load_template
from rlhfkit.errors import ModelError, first_line
from rlhfkit.families.base import Family
from rlhfkit.families.registry import find_family
from rlhfkit.families.tokens import TokenPolicy, apply_token_policy
from rlhfkit.models.converted import bare_tokenizer, kept_tokenizer
from rlhfkit.models.folder import ModelSource, has_tokenizer
from rlhfkit.models.trust import code_options
from rlhfkit.models.vocabulary import token_count


@dataclass
class TextSide:
    """Everything between text and ids."""

    tokenizer: Any
    encoder: ChatEncoder
    family: Family
    tokens: TokenPolicy
    notes: list[str] = field(default_factory=list)

    @property
    def template(self) -> Template:
        return self.encoder.template

    @property
    def vocabulary(self) -> int:
        """Ids from here on are no tokens."""
        return token_count(self.tokenizer)


def load_text_side(
    source: ModelSource, *, family: str = "auto", template: str = "auto", trust_remote_code: bool = False
) -> TextSide:
    """Tokenizer, chat template and token policy of a model.

    The template is, in this order: the one asked for; the one its run recorded; the tokenizer's own; the family's.

    Raises:
        FamilyError, TemplateError, ModelError: see there; also a folder without a tokenizer.
    """
    chosen = find_family(source.config, name=family, where=source.path)
    if source.layout is not None:
        chosen = replace(chosen, lora_targets=source.layout.lora_targets)
    tokenizer = _load_tokenizer(source, chosen, trust_remote_code)
    encoder = ChatEncoder(tokenizer, _choose_template(source, chosen, tokenizer, template))
    tokens = apply_token_policy(chosen, tokenizer, encoder, generation_eos=_generation_eos(source))
    notes = [f"converted from {source.legacy}: {source.base}"] if source.legacy else []
    if source.layout is not None:
        notes.append(f"{source.layout.name}: read and saved in its own layout, computed by a class of its adapter")
    notes.append(f"chat template: {encoder.template.name}")
    return TextSide(tokenizer, encoder, chosen, tokens, [*notes, *tokens.changes])


def _generation_eos(source: ModelSource) -> int | list[int] | None:
    """Where the checkpoint stops already: rollouts must end where generation will."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source.base).eos_token_id
    except OSError:  # many folders have none
        return None


def _choose_template(source: ModelSource, family: Family, tokenizer: Any, wanted: str) -> Template:
    if wanted != "auto":
        return load_template(wanted)
    if recorded := source.record.get("template"):
        return Template(recorded["name"], recorded["source"], recorded["bodies"], tuple(recorded["controls"]))
    if own := getattr(tokenizer, "chat_template", None):
        # Several named templates may come with a tokenizer; the nameless one is for plain chat.
        return Template("tokenizer", own["default"] if isinstance(own, dict) else own)
    if source.layout is not None:
        return load_template(source.layout.template)
    return load_template(family.choose_template(source.config, tokenizer.get_vocab()))


def _load_tokenizer(source: ModelSource, family: Family, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    path = source.tokenizer_path
    if Path(path).is_dir() and not has_tokenizer(path):
        raise ModelError(
            f"{path} has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json is there",
            hint="copy them from the original model with: rlhfkit fix-checkpoint ORIGINAL_FOLDER " + path,
        )
    if (own := kept_tokenizer(source.layout, path) or bare_tokenizer(family, path)) is not None:
        return own
    code = code_options(path, trust_remote_code and source.layout is None)
    try:
        return AutoTokenizer.from_pretrained(path, **code)
    except Exception as error:  # a damaged file surfaces as many kinds of error, from several libraries
        raise ModelError(
            f"the tokenizer of {path} does not load: {type(error).__name__}: {first_line(error)}",
            hint="mend the folder with: rlhfkit fix-checkpoint ORIGINAL_FOLDER " + path,
        ) from error
