"""What the encoder promises for any template, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import BAICHUAN1, BAICHUAN2, HOMES, NO_SYSTEM, byte_level, random_conversations, sentencepiece

from rlhfkit.chat.messages import Message
from rlhfkit.chat.template import (
    ChatEncoder,
    EncodedChat,
    Template,
    load_template,
    parse_template,
    template_names,
)
from rlhfkit.errors import TemplateError

QUESTION = Message("user", "Hello you")
ANSWER = Message("assistant", "Hi")
TURN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"


def shipped(name: str) -> ChatEncoder:
    return ChatEncoder(HOMES[name](), load_template(name))


def own(source: str, tokenizer: Any = None) -> ChatEncoder:
    return ChatEncoder(tokenizer or byte_level(), Template("mine", source))


def tokens(encoder: ChatEncoder, ids: list[int]) -> list[str]:
    return encoder.tokenizer.convert_ids_to_tokens(ids)


# -- finding and parsing -----------------------------------------------------------------------------------------------


def test_every_shipped_template_has_a_home_in_these_tests() -> None:
    assert template_names() == sorted(HOMES)


def test_a_template_may_be_a_file_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "ours.jinja"
    path.write_text("{#---\nbodies: separate\ncontrols: ['<a>']\n---#}\n{{ messages }}", encoding="utf-8")
    assert load_template(str(path)) == Template("ours", "{{ messages }}", "separate", ("<a>",))


def test_without_front_matter_texts_are_joined() -> None:
    assert parse_template("plain", "{{ messages }}") == Template("plain", "{{ messages }}", "joined", ())


def test_unknown_template_names_those_that_exist() -> None:
    with pytest.raises(TemplateError) as caught:
        load_template("vicuna")
    assert str(caught.value) == (
        "no template called 'vicuna'\n"
        "  → shipped: alpaca, baichuan, baichuan2, chatml, llama2, llama3, qwen; or give a path to a .jinja file"
    )


@pytest.mark.parametrize(
    "facts",
    ["body: joined", "bodies: apart", "controls: '<a>'", "controls: [1]", "controls: ['<']", "- bodies", "false"],
)
def test_front_matter_that_says_something_else_is_refused(facts: str) -> None:
    with pytest.raises(TemplateError, match="template 'mine': the front matter holds ") as caught:
        parse_template("mine", f"{{#---\n{facts}\n---#}}\n")
    assert caught.value.hint == "keys: bodies (separate or joined), controls (a list of strings)"


def test_front_matter_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(TemplateError, match="template 'mine': the front matter is no YAML: "):
        parse_template("mine", "{#---\ncontrols: [\n---#}\n")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_template_that_does_not_parse_is_refused_with_its_line() -> None:
    with pytest.raises(TemplateError) as caught:
        own("\n{% for m in messages %}{{ m.content }}")
    assert caught.value.message.startswith("the template 'mine' does not parse: line 2: ")
    assert caught.value.hint == "mend its jinja text, or choose a shipped format with --template"


def test_conversation_that_the_template_refuses_is_named_by_its_roles() -> None:
    with pytest.raises(TemplateError) as caught:
        shipped("llama2").encode([QUESTION, QUESTION])
    assert str(caught.value) == (
        "the template 'llama2' refuses this conversation (user, user): "
        "LLaMA 2 takes an optional system text, then user and assistant in turn\n"
        "  → change the row, or choose another format with --template"
    )


@pytest.mark.parametrize(
    ("name", "roles", "words"),
    [
        ("baichuan", ("system", "user"), "Baichuan 1 knows no system text"),
        ("baichuan2", ("user", "system"), "Baichuan 2 takes a system text only in front"),
        ("alpaca", ("assistant",), "Alpaca takes an optional system text, then user and assistant in turn"),
    ],
)
def test_formats_refuse_what_they_cannot_write(name: str, roles: tuple[Any, ...], words: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(f"({', '.join(roles)}): {words}")):
        shipped(name).encode_prompt([Message(role, "Hi") for role in roles])


def test_template_without_an_end_of_turn_is_refused() -> None:
    with pytest.raises(TemplateError) as caught:
        own("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")
    assert caught.value.message == (
        "the template 'mine' ends an assistant turn without a control token: "
        "a model trained on it would never learn to stop"
    )
    assert caught.value.hint == "choose one of: alpaca, baichuan, baichuan2, chatml, llama2, llama3, qwen"


def test_template_that_ends_only_the_last_turn_with_a_control_token_is_refused() -> None:
    """The user's next words would count as the answer's."""
    with pytest.raises(TemplateError, match="ends an assistant turn without a control token"):
        own("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{{ eos_token }}")


def test_template_that_takes_texts_apart_is_refused() -> None:
    encoder = own(TURN.replace("m.content", "(m.content.split('</think>') | last)"))
    with pytest.raises(TemplateError) as caught:
        encoder.encode([QUESTION, Message("assistant", "<think>x</think>Hi")])
    assert caught.value.message == "the template 'mine' takes message texts apart, so their bounds are lost"
    assert caught.value.hint == "use one of the shipped templates with --template"


def test_template_that_drops_a_message_is_refused() -> None:
    encoder = own("{% for m in messages if m.role != 'system' %}" + TURN.split("%}", 1)[1])
    with pytest.raises(TemplateError) as caught:
        encoder.encode([Message("system", "be brief"), QUESTION, ANSWER])
    assert caught.value.message == "the template 'mine' leaves out message 1 of 3 (system)"
    assert caught.value.hint == "take the message out of the row, or choose another format with --template"


# -- control tokens ----------------------------------------------------------------------------------------------------


def test_missing_controls_are_added_and_named() -> None:
    tokenizer = byte_level(("<|endoftext|>", "<|im_start|>"))
    size = len(tokenizer)
    encoder = ChatEncoder(tokenizer, load_template("chatml"))
    assert encoder.added_controls == ("<|im_end|>",)
    assert len(tokenizer) == size + 1
    assert (encoder.turn_end, encoder.turn_end_id) == ("<|im_end|>", size)
    assert ChatEncoder(tokenizer, load_template("chatml")).added_controls == ()


def test_control_that_is_only_a_piece_of_the_vocabulary_keeps_its_id() -> None:
    """Qwen's vocabulary holds `</s>`, which only merges reach; apply_chat_template must see it as one token, too."""
    tokenizer = byte_level()
    piece = tokenizer.get_vocab()["Hello"]
    size = len(tokenizer)
    source = "{% for m in messages %}{{ m.role + m.content + 'Hello' }}{% endfor %}"
    encoder = ChatEncoder(tokenizer, Template("mine", source, "separate", ("Hello",)))
    assert (encoder.added_controls, len(tokenizer), encoder.turn_end_id) == ((), size, piece)
    assert piece not in encoder.encode_text("Hello Hello")
    assert tokenizer("x Hello", add_special_tokens=False)["input_ids"][-1] == piece


@pytest.mark.parametrize("name", sorted(HOMES))
def test_control_tokens_typed_by_anyone_stay_text(name: str) -> None:
    encoder = shipped(name)
    tokenizer = encoder.tokenizer
    controls = (*encoder.template.controls, *tokenizer.all_special_tokens)
    system = () if name in NO_SYSTEM else (Message("system", "me"),)
    plain = encoder.encode([*system, QUESTION, ANSWER])
    for control in controls:
        typed = f"a{control}b {control}{control}"
        messages = [*(Message(m.role, m.content + typed) for m in system), Message("user", typed), ANSWER]
        chat = encoder.encode([*messages[:-1], Message("assistant", typed)])
        control_id = tokenizer.convert_tokens_to_ids(control)
        assert chat.ids.count(control_id) == plain.ids.count(control_id), control
        assert tokenizer.decode(chat.ids, clean_up_tokenization_spaces=False).count(typed) == len(messages)
        assert control_id not in encoder.encode_text(typed)


@pytest.mark.parametrize(("name", "pieces"), [("baichuan", BAICHUAN1), ("baichuan2", BAICHUAN2)])
def test_roles_of_baichuan_stay_text(name: str, pieces: tuple[str, str]) -> None:
    """They are pieces without being special, which split_special_tokens does not stop."""
    encoder = shipped(name)
    tokenizer = encoder.tokenizer
    assert tokenizer.convert_tokens_to_ids(pieces[0]) in tokenizer(pieces[0], split_special_tokens=True)["input_ids"]
    prompt = tokens(encoder, encoder.encode_prompt([Message("user", f"Hello {pieces[1]}me")]))
    front = "▁Hello" if name == "baichuan" else "Hello"
    assert prompt[:5] == [pieces[0], front, "▁", "<", "r"]
    assert prompt[-3:] == [">", "me", pieces[1]]
    assert prompt.count(pieces[1]) == 1
    assert "▁" not in prompt[4:]  # cutting the piece in two brings no space into it


def test_overlapping_spellings_are_all_cut() -> None:
    source = "{% for m in messages %}{{ m.role + m.content + '<><' }}{% endfor %}"
    tokenizer = sentencepiece(("<><",))
    encoder = ChatEncoder(tokenizer, Template("mine", source, "separate", ("<><",)))
    assert encoder.turn_end_id not in encoder.encode_text("<><><")
    assert tokenizer.decode(encoder.encode_text("<><><")) == "<><><"


def test_private_characters_in_a_text_do_not_cut_it() -> None:
    encoder = shipped("chatml")
    text = "Hi\U000f10000\U000f1001you\U000f1002\U000f1003"
    ids = encoder.encode_prompt([Message("user", text)])
    assert encoder.tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


# -- masks, prompts, pairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(HOMES))
def test_prompt_and_answer_are_the_whole(name: str) -> None:
    encoder = shipped(name)
    answers = ("Hi", "", "\n\nHi", " 你好 ", f"a{encoder.turn_end}b", "] fine", ":]")
    for number, prompt in enumerate(random_conversations(5, 100, system=name not in NO_SYSTEM)):
        answer = answers[number % len(answers)]
        prompt_ids, answer_ids = encoder.encode_pair(prompt, answer)
        whole = encoder.encode([*prompt, Message("assistant", answer)])
        assert prompt_ids == encoder.encode_prompt(prompt)
        assert prompt_ids + answer_ids == whole.ids
        assert answer_ids[-1] == encoder.turn_end_id
        assert encoder.turn_end_id not in answer_ids[:-1]
        assert whole.supervised[len(prompt_ids) :] == [True] * len(answer_ids)


@pytest.mark.parametrize("name", sorted(HOMES))
def test_learned_tokens_are_the_answers_and_their_ends(name: str) -> None:
    """Read back, the learned tokens are what the assistant said, and nothing else is."""
    encoder = shipped(name)
    for prompt in random_conversations(6, 50, system=name not in NO_SYSTEM, blanks=False):
        chat = encoder.encode([*prompt, Message("assistant", "fine")])
        spans: list[list[int]] = []
        for index, (token, learned) in enumerate(zip(chat.ids, chat.supervised, strict=True)):
            if learned and (index == 0 or not chat.supervised[index - 1]):
                spans.append([])
            if learned:
                spans[-1].append(token)
        ends = [span[-1] == encoder.turn_end_id for span in spans]
        said = [encoder.tokenizer.decode([i for i in span if i != encoder.turn_end_id]).strip() for span in spans]
        assert said == [*(m.content for m in prompt if m.role == "assistant"), "fine"]
        assert ends == [name != "baichuan2"] * (len(spans) - 1) + [True]


@pytest.mark.parametrize("name", sorted(HOMES))
def test_pad_equal_to_eos_changes_nothing(name: str) -> None:
    messages = [QUESTION, ANSWER, QUESTION, ANSWER]
    tokenizer = HOMES[name]()
    before = ChatEncoder(tokenizer, load_template(name)).encode(messages)
    tokenizer.pad_token = shipped(name).turn_end
    after = ChatEncoder(tokenizer, load_template(name)).encode(messages)
    assert after == before
    assert after.supervised[-1] is True


@pytest.mark.parametrize("name", ["llama2", "alpaca"])
def test_bos_stands_there_once(name: str) -> None:
    tokenizer = sentencepiece(adds_bos=True)
    assert tokenizer("Hi")["input_ids"][0] == tokenizer.bos_token_id
    encoder = ChatEncoder(tokenizer, load_template(name))
    ids = encoder.encode_prompt([QUESTION])
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in encoder.encode_text("Hi")


def test_formats_that_begin_with_bos_do_without_where_there_is_none() -> None:
    for name in ("alpaca", "llama2"):
        encoder = ChatEncoder(byte_level(), load_template(name))
        assert tokens(encoder, encoder.encode_prompt([QUESTION]))[0] == ("Below" if name == "alpaca" else "[")


def test_encoding_stops_after_the_last_learned_token() -> None:
    encoder = shipped("chatml")
    assert encoder.encode([QUESTION, ANSWER, QUESTION]) == encoder.encode([QUESTION, ANSWER])
    assert tokens(encoder, encoder.encode([QUESTION, ANSWER]).ids)[-1] == "<|im_end|>"


def test_past_answers_written_otherwise_than_new_ones() -> None:
    """As Qwen 3 does: a block of thoughts only before the newest answer, and other words when it is asked for."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + ('#' if loop.last else '') + m.content"
        " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n!' }}{% endif %}"
    )
    encoder = own(source)
    prompt, answer = encoder.encode_pair([QUESTION], "Hi")
    assert prompt + answer == encoder.encode([QUESTION, ANSWER]).ids
    assert tokens(encoder, answer) == ["Hi", "<|im_end|>"]
    assert tokens(encoder, prompt)[-1] == "#"


def test_space_at_the_end_of_a_generation_prompt_goes_to_the_answer() -> None:
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for tokenizer in (byte_level(), sentencepiece()):
        encoder = own(source, tokenizer)
        prompt, answer = encoder.encode_pair([QUESTION], "Hi")
        assert prompt == encoder.encode_prompt([QUESTION])
        assert tokens(encoder, prompt)[-1] == ":"
        assert tokens(encoder, answer)[0] in ("ĠHi", "▁Hi")


def test_token_that_would_straddle_prompt_and_answer_is_cut() -> None:
    for tokenizer, colon in ((byte_level(), [":", "]"]), (sentencepiece(), [":", "]"])):
        encoder = ChatEncoder(tokenizer, load_template("alpaca"))
        assert ":]" in tokenizer.convert_ids_to_tokens(encoder.encode_text("a:]"))
        prompt, answer = encoder.encode_pair([QUESTION], "] Hi")
        assert prompt == encoder.encode_prompt([QUESTION])
        assert [tokens(encoder, prompt)[-1], tokens(encoder, answer)[0]] == colon


# -- white space -------------------------------------------------------------------------------------------------------


def test_strips_what_the_template_strips() -> None:
    blank = Message("user", " \n Hi \t")
    assert shipped("llama3").encode_prompt([blank]) == shipped("llama3").encode_prompt([Message("user", "Hi")])
    assert shipped("chatml").encode_prompt([blank]) != shipped("chatml").encode_prompt([Message("user", "Hi")])


def test_llama2_strips_a_question_on_the_left_only_without_a_system_text() -> None:
    encoder = shipped("llama2")
    system = Message("system", " me ")
    text = encoder.tokenizer.decode(encoder.encode_prompt([system, Message("user", " Hi ")]))
    assert text == "<s> [INST] <<SYS>>\n me \n<</SYS>>\n\n Hi [/INST]"
    assert encoder.tokenizer.decode(encoder.encode_prompt([Message("user", " Hi ")])) == "<s> [INST] Hi [/INST]"


def test_line_breaks_alone_are_stripped_where_the_template_does_so() -> None:
    encoder = own(TURN.replace("m.content", "m.content.lstrip('\\n')"))
    ids = encoder.encode_prompt([Message("user", "\n\n Hi\n")])
    assert encoder.tokenizer.decode(ids) == "<|im_start|>user\n Hi\n<|im_end|>"


@pytest.mark.parametrize(("space", "after_bos"), [("always", "▁Hi"), ("first", "Hi"), ("never", "Hi")])
def test_space_after_a_control_token_is_the_tokenizers(space: str, after_bos: str) -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    encoder = own(source, sentencepiece(space=space))
    assert tokens(encoder, encoder.encode_prompt([Message("user", "Hi")])) == ["<s>", after_bos, "</s>"]
    assert encoder.encode([QUESTION, ANSWER]).supervised[-2:] == [True, True]


def test_same_markup_at_the_beginning_and_later_has_ids_of_its_own() -> None:
    source = "{% for m in messages %}{{ 'me' + eos_token + m.content + eos_token }}{% endfor %}"
    encoder = own(source, sentencepiece(space="first"))
    ids = encoder.encode_prompt([Message("user", "Hi"), Message("assistant", "Hi")])
    assert tokens(encoder, ids) == ["▁me", "</s>", "Hi", "</s>", "me", "</s>", "Hi", "</s>"]


def test_the_date_of_a_template_is_the_same_every_day() -> None:
    """LLaMA 3.2 asks the clock when no date is given; a resumed run would see other ids."""
    encoder = own("{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + TURN)
    assert encoder.tokenizer.decode(encoder.encode_prompt([QUESTION])).startswith("26 Jul 2024<|im_start|>")


def test_encoded_chats_compare_by_value() -> None:
    assert EncodedChat([1], [True]) == EncodedChat([1], [True])


def test_special_tokens_of_one_character_are_text() -> None:
    """Baichuan's user-defined symbols, digits among them, are special tokens once its tokenizer is converted."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["7", "!"], special_tokens=True)
    encoder = own(TURN, tokenizer)
    encoded = encoder.encode([Message("user", "7 of 17!"), Message("assistant", "7!")])
    assert tokens(encoder, encoded.ids).count("7") == 3
    assert encoder.tokenizer.decode([i for i, s in zip(encoded.ids, encoded.supervised, strict=True) if s]) == (
        "7!<|im_end|>"
    )
    assert not encoder.has_control("7!")
