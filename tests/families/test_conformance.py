"""The checks hold for every shipped family and template, and each fault that they know is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rlhfkit.chat.messages import Message
from rlhfkit.chat.template import ChatEncoder, Template, load_template, template_names
from rlhfkit.families.base import Family
from rlhfkit.families.conformance import byte_tokenizer, check_encoder, check_family
from rlhfkit.families.registry import installed_families

SHIPPED = {item.family.name: item.family for item in installed_families()}
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
# A vocabulary as the family's checkpoints have it, for every format that its members use.
TOKENIZERS: dict[str, list[tuple[str, Any]]] = {
    "qwen": [("qwen", lambda: byte_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|endoftext|>"))],
    "llama": [
        ("llama2", lambda: byte_tokenizer(("<unk>", "<s>", "</s>"), bos="<s>", eos="</s>")),
        ("llama3", lambda: byte_tokenizer(LLAMA3, bos=LLAMA3[0], eos=LLAMA3[-1])),
        ("chatml", lambda: byte_tokenizer(("<|im_start|>", "<|im_end|>"), bos="<|im_start|>", eos="<|im_end|>")),
    ],
    "baichuan": [
        (
            name,
            lambda roles=roles: byte_tokenizer(("<unk>", "<s>", "</s>"), bos="<s>", eos="</s>", pieces=roles),
        )
        for name, roles in (
            ("baichuan", ("<reserved_102>", "<reserved_103>")),
            ("baichuan2", ("<reserved_106>", "<reserved_107>")),
        )
    ],
}
FAMILY = Family(
    name="mine",
    title="Mine",
    model_types=("mine",),
    template="chatml",
    pad_candidates=("<pad>",),
    stop_candidates=("<|im_end|>",),
    lora_targets=("q_proj",),
)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_family_conforms(name: str) -> None:
    assert check_family(SHIPPED[name]) == []
    assert TOKENIZERS[name], "every shipped family is checked with its formats"


@pytest.mark.parametrize(("name", "template"), [(n, t) for n, rows in TOKENIZERS.items() for t, _ in rows])
def test_shipped_format_conforms(name: str, template: str) -> None:
    tokenizer = dict(TOKENIZERS[name])[template]()
    if SHIPPED[name].template_for is None:
        assert SHIPPED[name].choose_template({}, tokenizer.get_vocab()) == template
    assert check_encoder(ChatEncoder(tokenizer, load_template(template))) == []


@pytest.mark.parametrize("template", template_names())
def test_every_template_conforms_on_a_vocabulary_that_lacks_its_tokens(template: str) -> None:
    encoder = ChatEncoder(byte_tokenizer(("<end>",), eos="<end>"), load_template(template))
    assert check_encoder(encoder) == []


def test_a_sound_family_has_no_faults() -> None:
    assert check_family(FAMILY) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"name": "My Family"},
            "name is 'My Family': it is typed after --family, so small letters, digits, '-', '_', '.' only",
        ),
        ({"title": ""}, "title is empty: it is the family's line in `rlhfkit families`"),
        ({"model_types": ()}, "model_types is empty: no checkpoint would ever be found to be of this family"),
        ({"lora_targets": ()}, "lora_targets is empty: --lora-targets auto would adapt nothing"),
        ({"stop_candidates": ("<a>", "<b>", "<a>")}, "stop_candidates names <a> twice"),
        (
            {"compatible_model_types": ("mine", "x")},
            "compatible_model_types repeats mine, which model_types claims already",
        ),
        ({"requires_conversion": ("old",)}, "requires_conversion names old, which model_types does not claim"),
        (
            {"requires_conversion": ("mine",)},
            "requires_conversion names model types, and there is no legacy_layout to convert them by",
        ),
        (
            {"pad_candidates": ("<|im_end|>", "<pad>")},
            "pad_candidates names '<|im_end|>', which also stops generation, before '<pad>': put it last",
        ),
        ({"template": "vicuna"}, "template 'vicuna' cannot be loaded: no template called 'vicuna'"),
        (
            {"template_for": lambda config, vocabulary: "zephyr"},
            "template 'zephyr' cannot be loaded: no template called 'zephyr'",
        ),
        (
            {"template_for": lambda config, vocabulary: config["x"]},
            "template_for fails on an empty config and vocabulary: KeyError: 'x'",
        ),
        ({"name": "llama"}, "package 'rlhfkit' has a family called 'llama' too"),
        (
            {"model_types": ("mine", "llama")},
            "model_types claims llama, which the family 'llama' holds too: every user would have to name one with "
            "--family; put it into compatible_model_types",
        ),
    ],
)
def test_each_fault_of_a_family_is_told(change: dict[str, Any], fault: str) -> None:
    assert check_family(dataclasses.replace(FAMILY, **change)) == [fault]


@pytest.mark.parametrize("pads", [(), ("<|im_end|>",), ("<pad>", "<|im_end|>")])
def test_a_stop_may_pad_where_nothing_better_is_left(pads: tuple[str, ...]) -> None:
    assert check_family(dataclasses.replace(FAMILY, pad_candidates=pads)) == []


# -- encoders ----------------------------------------------------------------------------------------------------------

TURN = "{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}{{ '<e>' }}"


def encoder(turn: str = TURN, *, front: str = "", ask: str = "<a>") -> ChatEncoder:
    source = f"{front}{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    tokenizer = byte_tokenizer(("<u>", "<a>", "<e>", "<s>"), bos="<s>")
    return ChatEncoder(tokenizer, Template("mine", source, "joined", ("<u>", "<a>", "<e>")))


def test_a_sound_format_has_no_faults() -> None:
    assert check_encoder(encoder(front="{{ bos_token }}")) == []


def test_prompt_that_is_not_the_beginning_is_told() -> None:
    faults = check_encoder(encoder(ask="<a>Sure: "))
    assert "(user) the prompt's ids are not the beginning of the whole conversation's ids" in faults
    assert "(user) encode_pair cuts the conversation elsewhere than encode_prompt" in faults


def test_two_bos_are_told() -> None:
    assert check_encoder(encoder(front="{{ bos_token + bos_token }}")) == [
        f"({shape}) the text begins with two <s>" for shape in ("user", "user, assistant, user", "system, user")
    ]


def test_lost_text_is_told() -> None:
    """The encoder itself refuses a template that drops a message, not a tokenizer that cannot write it."""
    from tokenizers import normalizers

    subject = encoder()
    subject.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    assert "(user) a user's text is lost: 'What does `print(1 + 2)` show?'" in check_encoder(subject)
    assert any("the answer is read back as 'It shows 3.\\n\\nDo you want more" in f for f in check_encoder(subject))


def test_ids_other_than_the_tokenizers_own_are_told() -> None:
    """Texts encoded on their own, where the tokenizer merges the header's end with the text's beginning."""
    subject = encoder(TURN.replace("m.content", "':' + m.content"), ask="<a>:")
    subject.tokenizer.add_tokens([":W", ":Y"])
    assert check_encoder(subject) == []
    apart = ChatEncoder(subject.tokenizer, dataclasses.replace(subject.template, bodies="separate"))
    fault = "the prompt's ids are not those of the tokenizer's apply_chat_template with this template"
    assert check_encoder(apart) == [f"(user) {fault}", f"(system, user) {fault}"]


def test_forged_turns_are_told() -> None:
    subject = encoder()

    def naive(messages: list[Message]) -> list[int]:
        return subject.tokenizer("".join(f"<u>{m.content}<e>" for m in messages) + "<a>")["input_ids"]

    subject.encode_prompt = naive  # type: ignore[method-assign,assignment]
    faults = [f for f in check_encoder(subject) if "forged" in f]
    assert faults == [
        f"a user who types {c} gets the control token: a turn can be forged" for c in ("<u>", "<a>", "<e>", "<s>")
    ]


def test_wrong_mask_is_told() -> None:
    subject = encoder()
    whole = subject.encode

    def no_end(messages: Any) -> Any:
        chat = whole(messages)
        return dataclasses.replace(chat, supervised=[*chat.supervised[:-1], False])

    subject.encode = no_end  # type: ignore[method-assign]
    faults = check_encoder(subject)
    assert "(user) the last token learned is not the turn end <e>" in faults
    assert "(user) not every token of the answer is learned" in faults
