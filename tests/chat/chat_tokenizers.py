"""Tokenizers small enough to read their merges, big enough that a wrong cut between two texts shows in the ids."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhfkit.chat.messages import Message

WORDS = ("user", "assistant", "system", "Hello", "Hi", "INST", "SYS", "Response", "Below", "fine", "me", "you")
# How the tokenizers of Qwen and LLaMA 3 cut text before merging: line breaks stick to punctuation in front of them.
PRETOKENS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def _merges(words: tuple[str, ...], space: str) -> list[tuple[str, str]]:
    """Every word grows from left to right and then takes the space in front of it."""
    grown = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    return list(dict.fromkeys([*grown, *((space, word) for word in WORDS)]))


def _vocabulary(alphabet: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *(a + b for a, b in merges)]))}


def byte_level(
    specials: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *LLAMA3),
    *,
    bos: str | None = None,
    eos: str = "<|endoftext|>",
) -> Any:
    """As in Qwen and LLaMA 3: bytes, line breaks that merge with each other and with punctuation, no space in front."""
    merges = _merges((*WORDS, "ĊĊ", "]Ċ", ":Ċ", ":]", "_e"), "Ġ")
    backend = Tokenizer(models.BPE(_vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()), merges), merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def sentencepiece(pieces: tuple[str, ...] = (), *, space: str = "always", adds_bos: bool = False) -> Any:
    """As in LLaMA 2 and Baichuan: a space in front of text (``never``, ``first``: only at the very beginning), bytes as
    a fallback, ``pieces`` as single tokens that are not special."""
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    alphabet += [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'#[]/<>_|", *"你好吗"]
    merges = _merges((*WORDS, "▁[", ":]", "▁▁", "你好", "/s"), "▁")
    backend = Tokenizer(
        models.BPE(_vocabulary(alphabet, merges), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    to_space = normalizers.Replace(" ", "▁")
    if space == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        front = [normalizers.Prepend("▁")] if space == "always" else []
        backend.normalizer = normalizers.Sequence([*front, to_space])
    strip = [] if space == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ("<unk>", "<s>", "</s>")])
    backend.add_tokens([AddedToken(p, special=False, normalized=False) for p in pieces])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


BAICHUAN1 = ("<reserved_102>", "<reserved_103>")
BAICHUAN2 = ("<reserved_106>", "<reserved_107>")

# Every shipped template with a tokenizer of the kind that it was made for.
HOMES: dict[str, Callable[[], Any]] = {
    "alpaca": sentencepiece,
    "baichuan": lambda: sentencepiece(BAICHUAN1),
    "baichuan2": lambda: sentencepiece(BAICHUAN2, space="never"),
    "chatml": byte_level,
    "llama2": sentencepiece,
    "llama3": lambda: byte_level(bos="<|begin_of_text|>", eos="<|end_of_text|>"),
    "qwen": byte_level,
}
NO_SYSTEM = ("baichuan",)


def random_conversations(
    seed: int, count: int, *, system: bool = True, fragments: tuple[str, ...] = (), blanks: bool = True
) -> list[tuple[Message, ...]]:
    """Prompts of one to four turns, the user's last; ``blanks`` allows white space at both ends of a text."""
    rng = random.Random(seed)
    words = [*WORDS, "你好", "吗", "é", "🙂", "3", "14", "a, b", "x\ny", "p\n\nq", "  z", *fragments]

    def text() -> str:
        joined = " ".join(rng.choice(words) for _ in range(rng.randint(1, 6))).strip()
        return rng.choice(["", " ", "\n", " \t"]) + joined + rng.choice(["", " ", "\n\n"]) if blanks else joined

    found = []
    for _ in range(count):
        turns = [Message(r, text()) for _ in range(rng.randint(0, 3)) for r in ("user", "assistant")]
        front = [Message("system", text())] if system and rng.random() < 0.5 else []
        found.append((*front, *turns, Message("user", text())))
    return found
