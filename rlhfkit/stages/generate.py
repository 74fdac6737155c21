"""Answers: to one prompt, to a file of prompts, or in a chat."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rlhfkit.chat.messages import Message
from rlhfkit.config.load import differing_keys
from rlhfkit.config.stages import GenerateConfig
from rlhfkit.data.records import PromptRecord
from rlhfkit.data.sources import load_records
from rlhfkit.errors import ConfigError, DataError, TemplateError
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import LoadedModel, load_model
from rlhfkit.models.precision import DTYPES, current_device, resolve_precision
from rlhfkit.models.sampling import Answer, SamplingSettings, sample_answers
from rlhfkit.models.text_side import load_text_side
from rlhfkit.runtime.records import replace_text
from rlhfkit.runtime.screen import Screen, quiet_libraries
from rlhfkit.words import mark, told, tr

CHAT_HELP = "type a message; /clear forgets the conversation, /exit or Ctrl-D ends it"


def run(config: GenerateConfig, *, ask: Callable[[str], str] = input) -> None:
    """Generate as configured; ``ask`` reads a line in the chat."""
    quiet_libraries()
    speaker = Speaker(config)
    if config.input:
        answer_file(config, speaker)
    elif config.prompt:
        speaker.say(_conversation(config, [Message("user", config.prompt)]), stream=config.stream)
    else:
        chat(config, speaker, ask)


class Speaker:
    """A loaded model that answers conversations."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.screen = Screen()
        device = current_device()
        self.precision = resolve_precision(config.precision, device)
        dtype = DTYPES[self.precision]
        source = open_model(config.model, adapter=config.adapter)
        self.positions = source.positions
        if self.positions and config.max_new_tokens >= self.positions:
            raise ConfigError(
                f"max_new_tokens: {config.max_new_tokens} leave no room for a prompt in the {self.positions} positions "
                f"of {source.path}",
                hint=f"give --max-new-tokens {self.positions // 2} or less",
            )
        text = load_text_side(
            source, family=config.family, template=config.template, trust_remote_code=config.trust_remote_code
        )
        self.loaded: LoadedModel = load_model(
            source,
            text,
            "causal",
            lora=None,
            dtype=dtype,
            quantize=config.quantize,
            trust_remote_code=config.trust_remote_code,
            device=device,
        )
        if config.quantize == "none":
            self.loaded.model.to(device)
        self.loaded.model.eval()
        for note in self.loaded.notes:
            self.screen.line(f"note: {note}")
        self.text = text
        # Adapters are float32 on a bf16 base: autocast brings them together.
        self.autocast = dtype if dtype != torch.float32 else None
        self.settings = SamplingSettings(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop_ids=text.tokens.stop_ids,
            vocabulary=text.vocabulary,
        )

    def room(self, conversation: Sequence[Message]) -> int:
        """How many tokens an answer may have: what was asked for, or what is left of the model's positions; below 1
        there is none left."""
        used = len(self.text.encoder.encode_prompt(conversation))  # or the template's refusal, whatever the positions
        most = self.settings.max_new_tokens
        return min(most, self.positions - used) if self.positions else most

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        seeds: Sequence[tuple[int, ...]],
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answers to several conversations, sampled together; as long as all of them have room for."""
        return sample_answers(
            self.loaded.model,
            [self.text.encoder.encode_prompt(c) for c in conversations],
            replace(self.settings, max_new_tokens=min(map(self.room, conversations))),
            seeds=seeds,
            pad_id=self.text.tokens.pad_id,
            autocast=self.autocast,
            on_token=on_token,
        )

    def too_long(self, what: str, conversation: Sequence[Message], new_tokens: int) -> DataError:
        tokens = len(self.text.encoder.encode_prompt(conversation))
        return DataError(
            f"{what} has {tokens} tokens, which with {new_tokens} of an answer are more than the model's "
            f"{self.positions} positions",
            hint=f"shorten it to {self.positions - new_tokens} tokens"
            + (", or give a smaller --max-new-tokens" if new_tokens > 1 else ""),
        )

    def words(self, ids: Sequence[int]) -> str:
        return str(self.text.tokenizer.decode(ids, skip_special_tokens=True))

    def say(self, conversation: Sequence[Message], *, stream: bool, turn: int = 0) -> str:
        """Answer one conversation on standard output, token by token if ``stream``.

        Raises:
            DataError: it leaves no position for an answer.
        """
        if (room := self.room(conversation)) < 1:
            raise self.too_long("the prompt", conversation, 1)
        if room < self.settings.max_new_tokens:
            self.screen.line(f"note: {room} of the model's {self.positions} positions are left for the answer")
        ids: list[int] = []
        shown = ""

        def show(_: int, token: int) -> None:
            nonlocal shown
            ids.append(token)
            words = self.words(ids)
            # A character may take several tokens; until it is whole the decoder says U+FFFD.
            if not words.endswith("�"):
                sys.stdout.write(words[len(shown) :])
                sys.stdout.flush()
                shown = words

        answer = self.answer([conversation], [(self.config.seed, turn)], show if stream else None)[0]
        words = self.words(answer.ids)
        sys.stdout.write(words[len(shown) :] + "\n")
        sys.stdout.flush()
        return words


def answer_file(config: GenerateConfig, speaker: Speaker) -> None:
    """A file of prompts to a file of answers, in its order. A run that was stopped goes on where it was.

    Raises:
        DataError: the output holds answers to other prompts, or a prompt leaves too few positions for its answer.
        TemplateError: the template refuses a prompt; names its row.
    """
    groups, _ = load_records([config.input], "ppo", on_bad_row="error")
    records = [r for group in groups for r in group if isinstance(r, PromptRecord)]
    for record in records:
        # All before the first answer; and refused, not cut: an answer must not depend on what it is sampled beside.
        conversation = _conversation(config, record.prompt)
        try:
            room = speaker.room(conversation)
        except TemplateError as error:
            raise TemplateError(f"{record.where}: {error.message}", hint=error.hint) from None
        if room < config.max_new_tokens:
            raise speaker.too_long(f"{record.where}: the prompt", conversation, config.max_new_tokens)
    output = Path(config.output)
    done = _answers_done(output, records, config)
    output.parent.mkdir(parents=True, exist_ok=True)
    _refuse_other_settings(output, config, speaker.precision, done)
    if done:
        speaker.screen.line(f"{output} holds {done} of {len(records)} answers already: going on from there")
    ended = 0
    with (
        output.open("a", encoding="utf-8") as file,
        speaker.screen.counting(mark("answering"), len(records) - done) as tick,
    ):
        for start in range(done, len(records), config.batch_size):
            part = records[start : start + config.batch_size]
            seeds = [(config.seed, start + i) for i in range(len(part))]
            answers = speaker.answer([_conversation(config, r.prompt) for r in part], seeds)
            for record, answer in zip(part, answers, strict=True):
                row = {
                    **record.columns,
                    "prompt": [m.as_dict() for m in record.prompt],
                    "response": speaker.words(answer.ids),
                    "ended": answer.ended,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                ended += answer.ended
                tick()
            file.flush()
    speaker.screen.line(
        f"{len(records)} answers in {output}; {len(records) - done - ended} of the new ones were cut off"
    )


def _refuse_other_settings(output: Path, config: GenerateConfig, precision: str, done: int) -> None:
    """Remember beside the answers how they were made; going on with another model or temperature would mix them."""
    beside = output.with_name(f"{output.name}.settings.json")
    settings = config.model_dump(mode="json", exclude={"output", "stream", "batch_size", "hf_endpoint"})
    settings["precision"] = precision
    if done and beside.is_file():
        old = json.loads(beside.read_text(encoding="utf-8"))
        if old.get("precision") == "auto":  # an older version did not say which
            old["precision"] = precision
        if changed := differing_keys(old, settings):
            values = "; ".join(f"{key}: {old.get(key)!r} -> {settings.get(key)!r}" for key in changed)
            raise DataError(
                f"{output} holds {done} answers made with other settings: {values}",
                hint="give another --output, or delete this one to start again",
            )
    replace_text(beside, json.dumps(settings, ensure_ascii=False, indent=2) + "\n")


def _answers_done(output: Path, records: Sequence[PromptRecord], config: GenerateConfig) -> int:
    """How many whole lines the output has; a half line at its end is taken off."""
    if not output.is_file():
        return 0
    raw = output.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    lines = whole.decode("utf-8").split("\n")[:-1]
    for i, line in enumerate(lines):
        expected = [m.as_dict() for m in records[i].prompt] if i < len(records) else None
        try:
            found = json.loads(line).get("prompt")
        except (json.JSONDecodeError, AttributeError):
            found = None
        if found != expected:
            raise DataError(
                f"{output}:{i + 1} is not the answer to row {i + 1} of {config.input}",
                hint="give another --output, or delete this one to start again",
            )
    if len(whole) < len(raw):
        with output.open("r+b") as file:
            os.truncate(file.fileno(), len(whole))
    return len(lines)


def chat(config: GenerateConfig, speaker: Speaker, ask: Callable[[str], str]) -> None:
    """Turns typed by a person; Ctrl-C stops an answer, Ctrl-D ends the chat."""
    speaker.screen.line(CHAT_HELP)
    history: list[Message] = []
    turn = 0
    while True:
        try:
            words = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            speaker.screen.line("")
            return
        if words in ("/exit", "/quit"):
            return
        if words == "/clear":
            history = []
            speaker.screen.line("the conversation is forgotten")
            continue
        if not words:
            continue
        question = Message("user", words)
        forgotten = 0
        while history and speaker.room(_conversation(config, [*history, question])) < config.max_new_tokens:
            history = history[2:]  # a question and its answer
            forgotten += 1
        if forgotten:
            speaker.screen.line(
                f"note: the {forgotten} oldest questions and answers are forgotten: with an answer of "
                f"{config.max_new_tokens} tokens they do not fit in the model's {speaker.positions} positions"
            )
        try:
            answer = speaker.say(_conversation(config, [*history, question]), stream=config.stream, turn=turn)
        except KeyboardInterrupt:
            speaker.screen.line("\n(stopped; this turn is forgotten)")
            continue
        except DataError as error:  # one that is too long by itself
            speaker.screen.line(tr("error: ") + told(error))
            continue
        history += [question, Message("assistant", answer)]
        turn += 1


def _conversation(config: GenerateConfig, messages: Sequence[Message]) -> list[Message]:
    if not config.system or (messages and messages[0].role == "system"):
        return list(messages)
    return [Message("system", config.system), *messages]
