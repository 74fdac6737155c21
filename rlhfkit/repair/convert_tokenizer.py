"""Fast tokenizers made from the vocabulary files of old releases: tiktoken ranks and sentencepiece models.

Each function returns a `tokenizers.Tokenizer` that gives the ids of the original. It is used and saved as a
``PreTrainedTokenizerFast``: under the name of a model's own class, transformers 5 builds a pipeline of its own from the
vocabulary and drops the file's.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rlhfkit.errors import RepairRefusedError

# GPT-2's table from bytes to printable characters, in which a byte-level vocabulary is written.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
_BYTE_TO_CHAR = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # kinds of a sentencepiece piece
_BPE = 2  # trainer_spec.model_type
_SPACE = "▁"
_APART = "\x02"


# -- tiktoken ----------------------------------------------------------------------------------------------------------


def from_tiktoken(path: Path, *, pattern: str, specials: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer from a file of ranks.

    Args:
        path: lines of a token in base64 and its rank.
        pattern: the regular expression that cuts text before any merge.
        specials: tokens whose ids follow the ranks.

    Raises:
        RepairRefusedError: the file is damaged.
    """
    ranks = _read_ranks(path)
    text_of = {token: "".join(_BYTE_TO_CHAR[b] for b in token) for token in ranks}
    vocabulary = {text_of[token]: rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = _last_merge(token, ranks, path)
            merges.append((text_of[left], text_of[right]))
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return backend


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise RepairRefusedError(
            f"{path} is no file of tiktoken ranks: {error}", hint="download it again; it may be a Git LFS pointer"
        ) from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise RepairRefusedError(f"{path} has gaps in its ranks, so it is cut short", hint="download it again")
    return ranks


def _last_merge(token: bytes, ranks: dict[bytes, int], path: Path) -> tuple[bytes, bytes]:
    """The two parts a token is merged from: BPE is replayed inside it with all merges of a lower rank."""
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = limit, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], limit)
            if rank < best:
                best, at = rank, i
        if at < 0:
            raise RepairRefusedError(f"{path}: no lower ranks make up the token {token!r}", hint="download it again")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


# -- sentencepiece -----------------------------------------------------------------------------------------------------


def from_sentencepiece(path: Path, *, roles: Sequence[str] = (), bos: bool = False) -> Tokenizer:
    """A BPE tokenizer from a sentencepiece model; normaliser, prefix and pieces are those that the model names.

    Args:
        path: ``tokenizer.model``.
        roles: user-defined pieces that open a turn; they stay visible in the vocabulary under their own names.
        bos: put the bos in front of every text, as the tokenizer's own flag says.

    Raises:
        RepairRefusedError: the file is damaged, or no BPE model.
    """
    proto = _read_model(path)
    pieces = list(proto.pieces)
    vocabulary = {p.piece: i for i, p in enumerate(pieces)}
    user_defined = [p.piece for p in pieces if p.type == _USER_DEFINED]
    unknown, *controls = (p.piece for p in pieces if p.type in (_UNKNOWN, _CONTROL))
    hidden = _hidden_pieces(proto, user_defined)
    names = {piece: hidden[piece] for piece in hidden if piece not in roles}
    written = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    backend = Tokenizer(
        models.BPE(written, list(_merges(pieces)), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(_normaliser(proto.normalizer_spec, hidden, roles))
    backend.decoder = decoders.Sequence(
        [
            *(decoders.Replace(char, piece) for piece, char in hidden.items()),
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []),
        ]
    )
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in (unknown, *controls)])
    # One that is hidden on its way is found in the normalised text, where it is a character of its own.
    visible = [p for p in user_defined if p in roles] if hidden else user_defined
    backend.add_tokens([AddedToken(p, special=False, normalized=p in hidden) for p in visible])
    if bos:
        first = controls[0]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, vocabulary[first])]
        )
    return backend


def _hidden_pieces(proto: Any, user_defined: Sequence[str]) -> dict[str, str]:
    """User-defined pieces that are one private character each between the first step of normalising and the ids.

    sentencepiece finds such a piece before it normalises, and goes on as if the text were whole. Where there is
    nothing to normalise, cutting it out as an added token comes to the same; elsewhere it must pass through unchanged.
    """
    spec = proto.normalizer_spec
    if not spec.precompiled_charsmap and not spec.add_dummy_prefix:
        return {}
    changed = _charsmap(spec)
    # A single character that no rule touches is found by its name: it may also come out of normalising (`①` is `1`).
    found = [piece for piece in user_defined if len(piece) > 1 or changed.normalize_str(piece) != piece]
    taken = set("".join(p.piece for p in proto.pieces))
    free = (chr(c) for c in range(0x100000, 0x10FFFE) if chr(c) not in taken)
    return dict(zip(found, free, strict=False))


def _charsmap(spec: Any) -> Any:
    if not spec.precompiled_charsmap:
        return normalizers.Sequence([])
    return normalizers.Precompiled(spec.precompiled_charsmap)


def _normaliser(spec: Any, hidden: dict[str, str], roles: Sequence[str]) -> list[Any]:
    steps: list[Any] = []
    if hidden:
        # Nobody may spell a piece by typing its private character.
        steps.append(normalizers.Replace(Regex(f"[{min(hidden.values())}-{max(hidden.values())}]"), "\ufffd"))
    steps += [normalizers.Replace(p, hidden[p]) for p in sorted(hidden, key=len, reverse=True)]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
        # Not before a role alone: so is an added token itself normalised before it is looked for.
        alone = [hidden[role] for role in roles if role in hidden]
        steps += [normalizers.Replace(Regex(rf"\A{_SPACE}{char}\z"), char) for char in alone]
    if spec.precompiled_charsmap:
        # The map is applied to whole graphemes here, which loses marks that no rule joins to their letter. So marks
        # are joined first where they can be, and a control character, which the map drops, sets the others apart.
        steps += [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"(?=[\p{M}\x{0E33}\x{0EB3}])"), _APART),
            _charsmap(spec),
        ]
    return [*steps, normalizers.Replace(" ", _SPACE)]


def _read_model(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise RepairRefusedError(
            f"{path} is no sentencepiece model: {error}", hint="download it again; it may be a Git LFS pointer"
        ) from error
    if proto.trainer_spec.model_type != _BPE or not proto.trainer_spec.byte_fallback:
        raise RepairRefusedError(f"{path} is no sentencepiece BPE model with bytes to fall back to")
    return proto


def _merges(pieces: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """All ways to put a piece together from two others; the piece with the best score first."""
    normal = {p.piece: i for i, p in enumerate(pieces) if p.type == _NORMAL}
    for piece in sorted(normal, key=lambda piece: (-pieces[normal[piece]].score, normal[piece])):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        fitting = [(left, right) for left, right in cuts if left in normal and right in normal]
        yield from sorted(fitting, key=lambda cut: (normal[cut[0]], normal[cut[1]]))
