"""Messages to token ids, through a jinja template, with a mask over what the assistant says.

A rendered string cannot tell a user's text from markup, so a user could type ``<|im_end|>`` and end their own turn.
Here every message body is wrapped in sentinel characters before rendering; afterwards the string falls apart into
*markup* (the template's words, where control tokens are honoured) and *bodies* (where they stay text). The same cut
gives the loss mask: an assistant body and the control token that ends its turn. No id is ever compared with pad.

Two ways to cut text into calls of the tokenizer exist in the official formats, and a template names its own:

- ``separate``: markup and each body are encoded on their own (ChatML as Qwen's ``make_context``; LLaMA 3; Baichuan).
- ``joined``: all text between two control tokens is encoded in one go (LLaMA 2, Alpaca, and whatever the tokenizer's
  own ``apply_chat_template`` renders, since that encodes the whole string at once).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml
from jinja2 import TemplateSyntaxError

from rlhfkit.chat.messages import Message, Role
from rlhfkit.errors import TemplateError

Bodies = Literal["separate", "joined"]
_Spaces = Literal["never", "first", "always"]
# What is stripped from the left and from the right: these characters, or all white space (None), as in str.strip.
_Strip = tuple[str | None, str | None]

# Supplementary private use area: begin, after the index, end. Another triple is taken if a text holds one of these.
_SENTINEL_START = 0xF1000

# What some templates ask for beside the messages; the others do not look.
RENDER_SETTINGS: dict[str, Any] = {
    "enable_thinking": False,  # Qwen 3
    # LLaMA 3.x writes a date into its system text. Today's would give a row other ids on another day, and a resumed
    # run another course; this is the date that its own template falls back to.
    "date_string": "26 Jul 2024",
}

_FRONT_MATTER_HINT = "keys: bodies (separate or joined), controls (a list of strings)"
_FRONT_MATTER = re.compile(r"\A\s*\{#-?\s*---\n(.*?)---\s*-?#\}\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template and what its text alone does not say.

    Args:
        name: as in ``--template``; ``tokenizer`` for one that came with the tokenizer.
        source: jinja text, front matter removed.
        bodies: see the module's first lines.
        controls: strings that are control tokens in this format. Missing ones are added to the vocabulary.
    """

    name: str
    source: str
    bodies: Bodies = "joined"
    controls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Token ids of a conversation; ``supervised[i]`` is true where the assistant says token i, turn ends included."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of rendered text: a control token, literal markup, or (with ``role``) part of a message body."""

    text: str
    control: bool = False
    role: Role | None = None


def template_names() -> list[str]:
    """Names of the templates that ship with the toolkit."""
    return sorted(
        p.name.removesuffix(".jinja") for p in files("rlhfkit_templates").iterdir() if p.name.endswith(".jinja")
    )


def parse_template(name: str, text: str) -> Template:
    """A template from jinja text, reading the optional YAML front matter (``{#---`` … ``---#}``).

    Raises:
        TemplateError: front matter that is not a mapping of the known keys to values of their kind.
    """
    match = _FRONT_MATTER.match(text)
    if match is None:
        return Template(name, text)
    try:
        facts = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        raise TemplateError(
            f"template '{name}': the front matter is no YAML: {error}", hint=_FRONT_MATTER_HINT
        ) from error
    facts = {} if facts is None else facts
    if not _is_front_matter(facts):
        raise TemplateError(f"template '{name}': the front matter holds {facts!r}", hint=_FRONT_MATTER_HINT)
    return Template(name, text[match.end() :], facts.get("bodies", "joined"), tuple(facts.get("controls", ())))


def _is_front_matter(facts: object) -> bool:
    if not isinstance(facts, dict) or set(facts) - {"bodies", "controls"}:
        return False
    controls = facts.get("controls", [])
    # A control of one character could not be told from text: there is no way to cut it in two.
    return facts.get("bodies", "separate") in ("separate", "joined") and (
        isinstance(controls, list) and all(isinstance(c, str) and len(c) > 1 for c in controls)
    )


def load_template(name: str) -> Template:
    """A shipped template by name, or one from a ``.jinja`` file by path.

    Raises:
        TemplateError: neither exists.
    """
    if name in template_names():
        return parse_template(name, files("rlhfkit_templates").joinpath(f"{name}.jinja").read_text(encoding="utf-8"))
    path = Path(name).expanduser()
    if path.is_file():
        return parse_template(path.stem, path.read_text(encoding="utf-8"))
    raise TemplateError(
        f"no template called '{name}'", hint=f"shipped: {', '.join(template_names())}; or give a path to a .jinja file"
    )


class ChatEncoder:
    """Encodes conversations for one tokenizer and one template.

    Args:
        tokenizer: a transformers tokenizer. Control tokens that the template names and the vocabulary lacks are
            added to it; ``added_controls`` lists them, so that the caller grows the embedding.
        template: the chat format.

    Raises:
        TemplateError: the template does not render, or does not end an assistant turn with a control token (a model
            trained on it would never stop).
    """

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.added_controls = _register_controls(tokenizer, template.controls)
        controls = {str(t) for t in tokenizer.all_special_tokens} | set(template.controls)
        controls |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        # Baichuan's has digits and punctuation among its special tokens. They are text, and cannot be cut in two.
        controls = {control for control in controls if len(control) > 1}
        self._control_ids: dict[str, int] = {c: tokenizer.convert_tokens_to_ids(c) for c in controls}
        self._control_pattern = re.compile(
            "(" + "|".join(re.escape(c) for c in sorted(controls, key=len, reverse=True)) + ")"
        )
        # Markup comes from the template alone, so there are few different strings of it: each is cut and encoded once.
        self._markup_pieces: dict[str, list[_Piece]] = {}
        self._markup_ids: dict[tuple[str, bool], list[int]] = {}
        self._strip_rules: dict[tuple[Role, ...], list[_Strip]] = {}
        # Pieces such as Baichuan's role tokens are no "special tokens": split_special_tokens does not stop them.
        self._unsplit = [c for c, i in self._control_ids.items() if i in self._encode_literal(c)]
        self._spaces = _prefix_spaces(tokenizer, min(controls, default=""))
        self.turn_end = self._probe_turn_end()
        self.turn_end_id: int = self._control_ids[self.turn_end]

    # -- public --------------------------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """Ids and assistant mask of a whole conversation, cut after its last supervised token.

        What a template writes after the last turn end (ChatML's line break) is never learned and would move the
        place where a reward model reads its score.
        """
        ids, supervised = self._encode_pieces(self._pieces(messages, generation_prompt=False))
        end = len(ids)
        while end and not supervised[end - 1]:
            end -= 1
        return EncodedChat(ids[:end], supervised[:end])

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that waits for the assistant, generation prompt included."""
        pieces = self._pieces(messages, generation_prompt=True)
        if self.template.bodies == "joined" and pieces and pieces[-1].role is None:
            # As in _encode_joined: a space at the very end belongs to the answer's first token.
            pieces = [*pieces[:-1], replace(pieces[-1], text=pieces[-1].text.rstrip(" "))]
        ids, _ = self._encode_pieces(pieces)
        return ids

    def encode_pair(self, prompt: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of one answer with its turn end; together they are the whole conversation."""
        whole = self.encode([*prompt, Message("assistant", answer)])
        prompt_ids = self.encode_prompt(prompt)
        length = len(prompt_ids)
        if whole.ids[:length] == prompt_ids:
            return prompt_ids, whole.ids[length:]
        # A template may write a past assistant turn differently from one that is being generated (Qwen 3's thinking).
        start = len(whole.ids)
        while start and whole.supervised[start - 1]:
            start -= 1
        return whole.ids[:start], whole.ids[start:]

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; strings that look like control tokens stay text."""
        return self._encode_free(text, spaced=True)

    @cached_property
    def text_bos(self) -> int | None:
        """What the tokenizer of its own accord puts in front of a text: its bos, or nothing.

        Not whatever it calls bos: some name the token that opens a chat turn so, and never write it in front of text.
        """
        ids = list(self.tokenizer("a")["input_ids"])
        return ids[0] if ids and ids[0] == self.tokenizer.bos_token_id else None

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens. In what is encoded they come from the template alone."""
        return frozenset(self._control_ids.values())

    def has_control(self, text: str) -> bool:
        """Whether a text holds the spelling of a control token. It stays text all the same."""
        return self._control_pattern.search(text) is not None

    @cached_property
    def digest(self) -> str:
        """Of everything that ids and masks depend on, the texts aside: the template and all files of the tokenizer."""
        found = hashlib.sha256(repr((astuple(self.template), RENDER_SETTINGS)).encode())
        with TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
                found.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
        return found.hexdigest()

    # -- rendering -----------------------------------------------------------------------------------------------

    def _render(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template.source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **RENDER_SETTINGS,
            )
        except TemplateSyntaxError as error:
            raise TemplateError(
                f"the template '{self.template.name}' does not parse: line {error.lineno}: {error.message}",
                hint="mend its jinja text, or choose a shipped format with --template",
            ) from error
        except Exception as error:  # jinja raises many kinds; a template's own raise_exception is one of them
            raise TemplateError(
                f"the template '{self.template.name}' refuses this conversation "
                f"({', '.join(m['role'] for m in messages)}): {error}",
                hint="change the row, or choose another format with --template",
            ) from error
        return str(text)

    def _pieces(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[_Piece]:
        begin, middle, end = _sentinels("".join(m.content for m in messages))

        def wrap(index: int, text: str) -> str:
            return f"{begin}{index}{middle}{text}{end}"

        count = len(messages)
        wrapped = []
        for index, (message, content) in enumerate(zip(messages, self._stripped(messages), strict=True)):
            given = {"role": message.role, "content": wrap(index, content)}
            if message.input:
                # Beside the whole, for a template that renders them apart; what it does not ask for is not there.
                given["instruction"] = wrap(count + index, message.instruction)
                given["input"] = wrap(2 * count + index, message.input)
            wrapped.append(given)
        rendered = self._render(wrapped, generation_prompt=generation_prompt)

        pieces: list[_Piece] = []
        found: set[int] = set()
        position = 0
        for match in re.finditer(f"{begin}(\\d+){middle}([^{end}]*){end}", rendered):
            index = int(match.group(1))
            found.add(index)
            pieces += self._split_markup(rendered[position : match.start()])
            pieces.append(_Piece(match.group(2), role=messages[index % count].role))
            position = match.end()
        pieces += self._split_markup(rendered[position:])
        if any(mark in piece.text for piece in pieces for mark in (begin, middle, end)):
            raise TemplateError(
                f"the template '{self.template.name}' takes message texts apart, so their bounds are lost",
                hint="use one of the shipped templates with --template",
            )
        missing = [i for i in range(count) if i not in found and not {count + i, 2 * count + i} <= found]
        if missing:
            raise TemplateError(
                f"the template '{self.template.name}' leaves out message {missing[0] + 1} of {len(messages)} "
                f"({messages[missing[0]].role})",
                hint="take the message out of the row, or choose another format with --template",
            )
        return pieces

    def _split_markup(self, text: str) -> list[_Piece]:
        pieces = self._markup_pieces.get(text)
        if pieces is None:
            parts = [part for part in self._control_pattern.split(text) if part]
            pieces = [_Piece(part, control=part in self._control_ids) for part in parts]
            self._markup_pieces[text] = pieces
        return pieces

    # -- encoding ------------------------------------------------------------------------------------------------

    def _encode_literal(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _continue_literal(self, text: str) -> list[int]:
        """Ids of text that goes on where other text stopped: the tokenizer's space in front must not come in."""
        if self._spaces == "never":
            return self._encode_literal(text)
        line_break = self._encode_literal("\n")
        ids = self._encode_literal("\n" + text)
        return ids[len(line_break) :] if ids[: len(line_break)] == line_break else self._encode_literal(text)

    def _encode_free(self, text: str, *, spaced: bool) -> list[int]:
        """Ids of text in which no control token counts; ``spaced``: with the tokenizer's own space in front, if any."""
        parts = [text]
        for control in self._unsplit:
            parts = [piece for part in parts for piece in _cut_inside(part, control)]
        ids: list[int] = []
        for part in parts:
            ids += self._encode_literal(part) if spaced else self._continue_literal(part)
            spaced = False
        return ids

    def _encode_markup(self, text: str, *, spaced: bool) -> list[int]:
        ids = self._markup_ids.get((text, spaced))
        if ids is None:
            ids = self._markup_ids[text, spaced] = self._encode_free(text, spaced=spaced)
        return ids

    def _encode_pieces(self, pieces: list[_Piece]) -> tuple[list[int], list[bool]]:
        """Ids and mask; a run is what lies between two control tokens."""
        ids: list[int] = []
        supervised: list[bool] = []
        run: list[_Piece] = []
        for piece in [*pieces, None]:
            if piece is not None and not piece.control:
                run.append(piece)
                continue
            answer = next((i for i, p in enumerate(run) if p.role == "assistant"), None)
            spaced = self._spaces == "always" or not ids
            encode_run = self._encode_separate if self.template.bodies == "separate" else self._encode_joined
            run_ids, run_mask = encode_run(run, answer, spaced)
            ids += run_ids
            supervised += run_mask
            run = []
            if piece is not None:
                ids.append(self._control_ids[piece.text])
                # Baichuan 2 has no turn end inside a conversation: there the next user's role token follows an answer.
                supervised.append(answer is not None and piece.text == self.turn_end)
        return ids, supervised

    def _encode_separate(self, run: list[_Piece], answer: int | None, spaced: bool) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        for index, piece in enumerate(run):
            encode = self._encode_markup if piece.role is None else self._encode_free
            piece_ids = encode(piece.text, spaced=spaced and index == 0)
            ids += piece_ids
            mask += [answer is not None and index >= answer] * len(piece_ids)
        return ids, mask

    def _encode_joined(self, run: list[_Piece], answer: int | None, spaced: bool) -> tuple[list[int], list[bool]]:
        text = "".join(p.text for p in run)
        before = run[:answer]
        encode = self._encode_free if any(p.role for p in before) else self._encode_markup
        if answer is None:
            ids = encode(text, spaced=spaced)
            return ids, [False] * len(ids)
        # The prompt must get the ids that it has when the model is asked, so it is encoded as it stands then:
        # without the space in front of the answer, which becomes part of the answer's first token.
        prompt = "".join(p.text for p in before).rstrip(" ")
        prompt_ids = encode(prompt, spaced=spaced)
        ids = self._encode_free(text, spaced=spaced)
        if ids[: len(prompt_ids)] != prompt_ids:  # a token would straddle the border
            ids = prompt_ids + self._encode_free(text[len(prompt) :], spaced=False)
        return ids, [i >= len(prompt_ids) for i in range(len(ids))]

    # -- probes --------------------------------------------------------------------------------------------------

    def _stripped(self, messages: Sequence[Message]) -> list[str]:
        """The message texts as the template would strip them: it cannot strip what stands inside sentinels."""
        texts = [message.content for message in messages]
        if all(text == text.strip() for text in texts):
            return texts
        roles = tuple(message.role for message in messages)
        if roles not in self._strip_rules:
            self._strip_rules[roles] = self._probe_stripping(roles)
        return [
            text.lstrip(left).rstrip(right) for text, (left, right) in zip(texts, self._strip_rules[roles], strict=True)
        ]

    def _probe_stripping(self, roles: tuple[Role, ...]) -> list[_Strip]:
        """What the template strips from each message of a conversation with these roles.

        It may differ between messages of one role: LLaMA 2 strips the user's first text together with the system's.
        """
        words = [f"PROBE{index}WORD" for index in range(len(roles))]
        # More in a row than a header has, or the header's line breaks would pass for the text's.
        tabs, breaks = "\t" * 9, "\n" * 9
        with_tabs, with_breaks = (
            self._render(
                [{"role": r, "content": blank + w + blank} for r, w in zip(roles, words, strict=True)],
                generation_prompt=False,
            )
            for blank in (tabs, breaks)
        )
        return [
            (
                _strip_rule(tabs + word in with_tabs, breaks + word in with_breaks),
                _strip_rule(word + tabs in with_tabs, word + breaks in with_breaks),
            )
            for word in words
        ]

    def _probe_turn_end(self) -> str:
        exchange = [Message("user", "question"), Message("assistant", "answer")]
        pieces = self._pieces([*exchange, *exchange], generation_prompt=False)
        turn_end = ""
        for index, piece in enumerate(pieces):
            if piece.role == "assistant":
                after = next((p for p in pieces[index + 1 :] if p.control or p.role), None)
                if after is None or not after.control:
                    raise TemplateError(
                        f"the template '{self.template.name}' ends an assistant turn without a control token: "
                        "a model trained on it would never learn to stop",
                        hint=f"choose one of: {', '.join(template_names())}",
                    )
                turn_end = after.text
        return turn_end


def _register_controls(tokenizer: Any, controls: Sequence[str]) -> tuple[str, ...]:
    """Make every control one token in any text that the tokenizer reads; returns those that are new to it."""
    vocabulary = tokenizer.get_vocab()
    whole = {t.content for t in tokenizer.added_tokens_decoder.values()}
    # Some are mere pieces of the vocabulary (`</s>` in Qwen's), which only merges reach; they keep their id.
    loose = [c for c in controls if c not in whole]
    if loose:
        tokenizer.add_tokens(loose, special_tokens=True)
    return tuple(c for c in loose if c not in vocabulary)


def _sentinels(text: str) -> tuple[str, str, str]:
    start = _SENTINEL_START
    while any(chr(start + k) in text for k in range(3)):
        start += 3
    return chr(start), chr(start + 1), chr(start + 2)


def _cut_inside(text: str, control: str) -> list[str]:
    """The text cut in the middle of every occurrence of ``control``, so that no part holds it whole."""
    parts = []
    middle = len(control) // 2
    while (start := text.find(control)) >= 0:
        parts.append(text[: start + middle])
        text = text[start + middle :]
    return [*parts, text]


def _strip_rule(tabs_stay: bool, breaks_stay: bool) -> str | None:
    """What ``str.strip`` is to take away: nothing, line breaks, or (None) all white space."""
    if breaks_stay:
        return ""
    return "\n" if tabs_stay else None


def _prefix_spaces(tokenizer: Any, control: str) -> _Spaces:
    """Where the tokenizer puts a space in front of text: nowhere, at the very beginning, or after controls as well."""

    def token_at(text: str, index: int) -> str:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        return str(tokens[index]) if index < len(tokens) else ""

    if not token_at("a", 0).startswith(("▁", "Ġ")):
        return "never"
    return "first" if control and not token_at(control + "a", 1).startswith(("▁", "Ġ")) else "always"
