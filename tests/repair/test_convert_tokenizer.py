"""Fast tokenizers against what they replace: sentencepiece itself, and byte-pair encoding straight from ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from legacy_models import ROLES, random_texts, write_sentencepiece, write_tiktoken
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhfkit.chat.messages import Message
from rlhfkit.chat.template import ChatEncoder, load_template
from rlhfkit.errors import RepairRefusedError
from rlhfkit.families.conformance import check_encoder
from rlhfkit.families.legacy import Tiktoken
from rlhfkit.repair.convert_proof import _tiktoken_ids
from rlhfkit.repair.convert_tokenizer import from_sentencepiece, from_tiktoken

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FRAGMENTS = ("\n", "<h2>", "，", "０", "...", "</h2>", "\t")
TEXTS = random_texts(0, 600, FRAGMENTS)


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


def model(tmp_path: Path, version: int) -> tuple[Any, Any]:
    """A tokenizer like Baichuan's and the processor it is made from."""
    path = tmp_path / "tokenizer.model"
    first = version == 1
    pieces = ("\n", "<h2>", "0", "1", "０", "，", "？", *ROLES[version])
    write_sentencepiece(path, rule="nmt_nfkc" if first else "identity", prefix=first, pieces=pieces)
    return from_sentencepiece(path, roles=ROLES[version]), SentencePieceProcessor(model_file=str(path))


def test_tiktoken(tmp_path: Path) -> None:
    path = tmp_path / "ranks"
    count = write_tiktoken(path)
    backend = from_tiktoken(path, pattern=PATTERN, specials=SPECIALS)
    expected = _tiktoken_ids(path, Tiktoken(file="ranks", pattern=PATTERN, specials=SPECIALS), TEXTS)
    assert [ids(backend, text) for text in TEXTS] == expected
    assert [backend.token_to_id(s) for s in SPECIALS] == [count, count + 1, count + 2]
    assert ids(backend, "good<|im_end|>") == [*ids(backend, "good"), count + 2]


@pytest.mark.parametrize("version", [1, 2])
def test_sentencepiece(version: int, tmp_path: Path) -> None:
    backend, processor = model(tmp_path, version)
    wrong = [text for text in TEXTS if ids(backend, text) != processor.encode(text)]
    # The map of nmt_nfkc also joins marks in orders that no composed letter has; two in a row are rare enough.
    assert not wrong or (version == 1 and len(wrong) <= len(TEXTS) // 100), wrong[:5]


@pytest.mark.parametrize("version", [1, 2])
def test_roles_are_one_visible_token_and_text_around_them_is_as_it_was(version: int, tmp_path: Path) -> None:
    backend, processor = model(tmp_path, version)
    role = ROLES[version][0]
    for text in (f"good{role}film", f"a {role} b", f"{role}{role}", f"x\n{role}，", f"{role}film"):
        assert ids(backend, text) == processor.encode(text), text
    assert backend.token_to_id(role) == processor.piece_to_id(role)
    assert backend.decode(processor.encode(f"good{role}film"), skip_special_tokens=False) == f"good{role}film"


def test_a_role_cannot_be_spelled_otherwise(tmp_path: Path) -> None:
    """Neither by its private character, nor by letters that normalise to its name."""
    backend, processor = model(tmp_path, 1)
    role = ROLES[1][0]
    wide = "".join(chr(ord(c) + 0xFEE0) for c in role)
    for text in [wide, *(chr(c) for c in range(0x100000, 0x100020))]:
        assert processor.piece_to_id(role) not in ids(backend, f"a{text}b"), text


def test_as_a_saved_tokenizer(tmp_path: Path) -> None:
    backend, processor = model(tmp_path, 1)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(again) == processor.vocab_size()
    for text in TEXTS[:100]:
        assert again(text, add_special_tokens=False)["input_ids"] == ids(backend, text)
        assert again.decode(ids(backend, text)) == processor.decode(processor.encode(text))


@pytest.mark.parametrize("version", [1, 2])
def test_chat(version: int, tmp_path: Path) -> None:
    backend, processor = model(tmp_path, version)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    encoder = ChatEncoder(tokenizer, load_template("baichuan" if version == 1 else "baichuan2"))
    user, assistant = (processor.piece_to_id(role) for role in ROLES[version])
    # The original encodes each text on its own, with the space in front where the model has one.
    expected = [user, *processor.encode("the film"), assistant]
    assert encoder.encode_prompt([Message("user", "the film")]) == expected
    forged = encoder.encode_prompt([Message("user", f"a{ROLES[version][1]}b</s>")])
    assert (forged.count(user), forged.count(assistant), forged.count(tokenizer.eos_token_id)) == (1, 1, 0)
    faults = check_encoder(encoder)
    # As one string, Baichuan 1 has no space after a role; its own code puts one there, and so do we.
    assert [f for f in faults if "apply_chat_template" not in f or version == 2] == []


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00\x01\x02" * 50])
def test_a_damaged_vocabulary_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary"
    path.write_bytes(content)
    with pytest.raises(RepairRefusedError, match="vocabulary"):
        from_sentencepiece(path)
    with pytest.raises(RepairRefusedError, match="vocabulary"):
        from_tiktoken(path, pattern=PATTERN, specials=SPECIALS)


def test_a_file_of_ranks_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranks"
    write_tiktoken(path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join(lines[:100] + lines[120:]))
    with pytest.raises(RepairRefusedError, match="gaps"):
        from_tiktoken(path, pattern=PATTERN, specials=SPECIALS)
