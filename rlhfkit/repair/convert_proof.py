"""Proof that a conversion is right: logits and token ids, each computed in two ways that share no code.

On the one side the equations of the original (`LegacyLayout.layer`) run on the original's files, on the other the class
of transformers on the converted ones. Both go through the model a layer at a time, so that the proof of a model needs
the memory of one layer, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhfkit.errors import CheckpointError
from rlhfkit.families.legacy import LegacyLayout, Sentencepiece, Shape, Tiktoken, rms_norm
from rlhfkit.repair.stream import TensorReader

TOLERANCE = 1e-4  # a wrong mapping is off by 1 and more
TOKENS = 32
HEAD_ROWS = 8192  # rows of the head whose logits are computed at once

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 3.14159, isn't it? We'll see: 1,234,567.89 or 1e-9!",
    "    indented\n\tby a tab\r\n\n\nand  several   spaces   ",
    " leading space", "\nleading line break", "", " ", "\n", "a", "。",
    "你好，请介绍一下你自己。今天天气很好，我们一起去公园散步吧！",
    "第12章　全角空格，１２３，ｆｕｌｌ　ｗｉｄｔｈ；“引号”《书名》……——",
    "def f(x):\n    return x**2  # square\n\nfor i in range(10):\n\tprintf(\"%d\\n\", i);",
    "<html><body class=\"a-b\">x &amp; y</body></html> http://example.com/a?b=c&d=e#f",
    "{\"key\": [1, 2.5e-10, null, true], \"u\": \"\\u4f60\"}",
    "Привет, как дела? مرحبا كيف حالك शुभ प्रभात สวัสดีชาวโลก 안녕하세요 こんにちは",
    "Zażółć gęślą jaźń, Ünïcödé, naïve café, İstanbul, ﬁ ½ ① Ⅷ ™ ㍿",
    "😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇨🇳 ❤️ 𠮷 龘靐齉龖",
    "e\u0301 a\u0300 n\u0303 \u1112\u1161\u11ab \u00a0\u200b\ufeff\u2028",
    "SELECT * FROM t WHERE a>=1 AND b<>'x'; -- comment ```code```",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared and how close it came.

    Args:
        logits: largest difference of a logit over all tokens of the vocabulary; None where weights were only copied.
        largest: largest logit, to compare it with.
        positions: how many positions were compared.
        ids_equal, ids_compared: strings whose ids are those of the original vocabulary file, and all.
    """

    logits: float | None
    largest: float
    positions: int
    ids_equal: int
    ids_compared: int

    def sentences(self) -> list[str]:
        """For the screen."""
        ids = f"token ids: {self.ids_equal} of {self.ids_compared} probe texts equal"
        if self.logits is None:
            return ["weights: copied, not one number changed", ids]
        return [
            f"logits: largest difference {self.logits:.1e} in float32 over {self.positions} positions and the whole "
            f"vocabulary (largest logit {self.largest:.1f})",
            *([ids] if self.ids_compared else []),
        ]


# -- logits ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_logits(
    layout: LegacyLayout, config: Mapping[str, Any], original: TensorReader, native: TensorReader, tokens: int
) -> tuple[float, float, int]:
    """Largest difference of a logit, largest logit, and number of positions.

    Args:
        layout: the original's equations and names.
        config: the native config.json.
        original: tensors under their original names.
        native: tensors under their native names.
        tokens: ids below this are tried.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS, int(config["max_position_embeddings"]))
    ids = torch.randint(tokens, (length,), generator=generator)
    names = {rule.native[0]: rule for rule in layout.tensors}
    shape = Shape(int(config["num_attention_heads"]), float(config["rms_norm_eps"]), float(config["rope_theta"]))

    ours = _embedded(native, "model.embed_tokens.weight", ids)
    theirs = _embedded(original, names["model.embed_tokens.weight"].original, ids)
    layers = int(config["num_hidden_layers"])
    one_layer = _OneLayer(config)
    for i in range(layers):
        theirs = layout.layer(_layer_weights(layout, original, i), theirs, shape)
        ours = one_layer(native, i, ours)
    ours = one_layer.norm(native.whole("model.norm.weight").float(), ours)
    theirs = rms_norm(theirs, original.whole(names["model.norm.weight"].original).float(), shape.eps)

    head = names["lm_head.weight"]
    rows = native.shape("lm_head.weight")[0]
    difference = largest = 0.0
    for start in range(0, rows, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, rows)
        theirs_head, ours_head = original.rows(head.original, start, stop), native.rows("lm_head.weight", start, stop)
        if head.unit_rows and ours_head.dtype != torch.float32:
            # In 16 bits the original rounds the rows that it scales, as storing them does: round what it computes with.
            used = layout.logits(torch.eye(theirs.shape[-1])[None], theirs_head.float())[0].T
            expected = theirs @ used.to(ours_head.dtype).float().T
        else:
            expected = layout.logits(theirs, theirs_head.float())
        found = torch.nn.functional.linear(ours, ours_head.float())
        difference = max(difference, float((found - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return difference, largest, length


def _embedded(reader: TensorReader, name: str, ids: Tensor) -> Tensor:
    return torch.cat([reader.rows(name, int(i), int(i) + 1) for i in ids]).float()[None]


def _layer_weights(layout: LegacyLayout, reader: TensorReader, layer: int) -> dict[str, Tensor]:
    """Tensors of one layer, named by what follows the layer's number."""
    rules = [rule.original for rule in layout.tensors if "{i}" in rule.original]
    return {name.split("{i}.", 1)[1]: reader.whole(name.format(i=layer)).float() for name in rules}


class _OneLayer:
    """The class of transformers with a single layer, which holds the weights of each in turn."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import AutoConfig, AutoModel

        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        settings = AutoConfig.for_model(**{**config, **tokens, "num_hidden_layers": 1, "vocab_size": 1})
        self._model = AutoModel.from_config(settings, dtype=torch.float32, attn_implementation="sdpa").eval()
        self._norm = self._model.norm
        self._model.norm = torch.nn.Identity()

    def __call__(self, reader: TensorReader, layer: int, hidden: Tensor) -> Tensor:
        inner = self._model.layers[0]
        weights = {key: reader.whole(f"model.layers.{layer}.{key}").float() for key in inner.state_dict()}
        inner.load_state_dict(weights, assign=True)
        found: Tensor = self._model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return found

    def norm(self, weight: Tensor, hidden: Tensor) -> Tensor:
        self._norm.load_state_dict({"weight": weight})
        found: Tensor = self._norm(hidden)
        return found


# -- token ids ---------------------------------------------------------------------------------------------------------


def compare_ids(tokenizer: Any, facts: Tiktoken | Sentencepiece, path: Path) -> tuple[int, int]:
    """How many probe texts have the ids that the original vocabulary file gives, and how many there are."""
    expected = _tiktoken_ids(path, facts, PROBES) if isinstance(facts, Tiktoken) else _sentencepiece_ids(path, PROBES)
    found = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in PROBES]
    return sum(one == other for one, other in zip(found, expected, strict=True)), len(PROBES)


def _sentencepiece_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    return [list(processor.encode(text)) for text in texts]


def _tiktoken_ids(path: Path, facts: Tiktoken, texts: Sequence[str]) -> list[list[int]]:
    """Byte-pair encoding straight from the ranks, with no table of merges."""
    import base64
    import itertools
    import unicodedata

    import regex

    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    pattern = regex.compile(facts.pattern)

    def encoded(text: str) -> list[int]:
        ids = []
        for word in pattern.findall(unicodedata.normalize("NFC", text)):
            parts = [bytes([b]) for b in word.encode()]
            while len(parts) > 1:
                joined = [ranks.get(left + right) for left, right in itertools.pairwise(parts)]
                best = min((rank for rank in joined if rank is not None), default=None)
                if best is None:
                    break
                i = joined.index(best)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            ids += [ranks[part] for part in parts]
        return ids

    return [encoded(text) for text in texts]


def require(proof: Proof, what: str) -> None:
    """Refuse a conversion that is not proved.

    Raises:
        CheckpointError: a logit or an id differs.
    """
    if proof.logits is not None and not proof.logits <= TOLERANCE:  # a NaN is not either
        raise CheckpointError(
            f"{what}: the logits differ by up to {proof.logits:.2e} from the original's, more than {TOLERANCE:.0e}",
            hint="nothing was put in place; the files are of another release than the adapter knows: please report it",
        )
    if proof.ids_equal < proof.ids_compared:
        raise CheckpointError(
            f"{what}: {proof.ids_compared - proof.ids_equal} of {proof.ids_compared} probe texts get other token ids "
            "than from the original vocabulary file",
            hint="nothing was put in place; the vocabulary is of another release than the adapter knows: please report",
        )
