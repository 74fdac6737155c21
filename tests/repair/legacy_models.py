"""Whole tiny checkpoints in the layouts of Qwen 1, Baichuan 1 and 2 and a bare LLaMA 2, with vocabularies of their own.

Folders hold code files that leave a trace when they are run: nothing may ever run one.
"""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from legacy_folders import edit_json, save_weights, write_json
from torch import Tensor

HIDDEN, HEADS, LAYERS, WIDE = 32, 4, 2, 48
ROLES = {1: ("<reserved_102>", "<reserved_103>"), 2: ("<reserved_106>", "<reserved_107>")}
TRAP = 'import os\nopen(os.environ["RLHFKIT_TEST_TRIPWIRE"], "a").write("ran")\n'
WORDS = [
    "the film was good",
    "the actors were very bad",
    "what do you think of it?",
    "def f(x): return 12",
    "好电影很好",
]


class Weights:
    """Random numbers of a kind that no two tensors could be mistaken for each other."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def __call__(self, *shape: int, scale: float = 0.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self._random) * (scale or shape[-1] ** -0.5) + mean
        return values.to(self._dtype)


def write_tiktoken(path: Path) -> int:
    """A file of ranks; returns how many."""
    tokens = [bytes([b]) for b in range(256)]
    for word in dict.fromkeys(" ".join(WORDS).split()):
        raw = word.encode()
        tokens += [t for t in (raw[:i] for i in range(2, len(raw) + 1)) if t not in tokens]
        tokens += [t for t in [b" " + raw] if t not in tokens]
    path.write_bytes(b"".join(base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(tokens)))
    return len(tokens)


def write_sentencepiece(path: Path, *, rule: str, prefix: bool, pieces: tuple[str, ...]) -> int:
    """A trained BPE model with bytes to fall back to; returns how many pieces it has."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name=rule,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=list(pieces),
        minloglevel=2,
        num_threads=1,
    )
    path.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()


def make_qwen1(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Like Qwen-7B-Chat: two safetensors shards and an index."""
    folder.mkdir(parents=True)
    ranks = write_tiktoken(folder / "qwen.tiktoken")
    rows = -(-(ranks + 208) // 64) * 64
    settings = {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
        "bf16": dtype == torch.bfloat16,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * WIDE,
        "kv_channels": HIDDEN // HEADS,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 32768,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "rotary_emb_base": 1000000,
        "rotary_pct": 1.0,
        "seq_length": 256,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "vocab_size": rows,
        **config,
    }
    rows = settings["vocab_size"]
    w = Weights(seed, dtype)
    state = {"transformer.wte.weight": w(rows, HIDDEN, scale=1.0)}
    for i in range(LAYERS):
        p = f"transformer.h.{i}."
        state |= {
            p + "ln_1.weight": w(HIDDEN, scale=0.1, mean=1.0),
            p + "attn.c_attn.weight": w(3 * HIDDEN, HIDDEN),
            p + "attn.c_attn.bias": w(3 * HIDDEN, scale=0.5),
            p + "attn.c_proj.weight": w(HIDDEN, HIDDEN),
            p + "ln_2.weight": w(HIDDEN, scale=0.1, mean=1.0),
            p + "mlp.w1.weight": w(WIDE, HIDDEN),
            p + "mlp.w2.weight": w(WIDE, HIDDEN),
            p + "mlp.c_proj.weight": w(HIDDEN, WIDE),
        }
    state |= {"transformer.ln_f.weight": w(HIDDEN, scale=0.1, mean=1.0), "lm_head.weight": w(rows, HIDDEN)}
    generation = {
        "chat_format": "chatml",
        "eos_token_id": ranks,
        "pad_token_id": ranks,
        "top_p": 0.8,
        "do_sample": True,
    }
    _write(folder, settings, generation, state, "safetensors")
    tokenizer = {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_qwen.Q", None]}}
    write_json(folder / "tokenizer_config.json", tokenizer)
    return folder


def make_baichuan(
    folder: Path, version: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, rows: int = 0, **config: Any
) -> Path:
    """Like Baichuan-7B or Baichuan2-7B-Chat: two .bin shards and an index."""
    folder.mkdir(parents=True)
    first = version == 1
    pieces = ("\n", "<h2>", "0", "1", "，", *ROLES[version]) if first else ("\n", "<h2>", "，", *ROLES[version])
    rule = "nmt_nfkc" if first else "identity"
    count = write_sentencepiece(folder / "tokenizer.model", rule=rule, prefix=first, pieces=pieces)
    rows = rows or count
    settings = {
        "architectures": ["BaiChuanForCausalLM" if first else "BaichuanForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_baichuan.C"},
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "max_position_embeddings": 256,
        "model_type": "baichuan",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "vocab_size": rows,
        **config,
    }
    w = Weights(seed, dtype)
    state = {"model.embed_tokens.weight": w(rows, HIDDEN, scale=1.0)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        state |= {p + "self_attn.W_pack.weight": w(3 * HIDDEN, HIDDEN), **_shared_layer(p, w)}
        if first:
            state[p + "self_attn.rotary_emb.inv_freq"] = w(HIDDEN // HEADS // 2)
    uneven = 0.25 + 3 * torch.arange(rows)[:, None] / rows
    state |= {
        "model.norm.weight": w(HIDDEN, scale=0.1, mean=1.0),
        "lm_head.weight": (w(rows, HIDDEN).float() * uneven).to(dtype),
    }
    generation = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "user_token_id": 195, "top_k": 5}
    _write(folder, settings, generation, state, "bin")
    write_json(folder / "tokenizer_config.json", {"add_bos_token": False, "pad_token": {"content": "<unk>"}})
    return folder


def make_baichuan_13b(folder: Path, version: int, *, rows: int = 0, seed: int = 0) -> Path:
    """Like Baichuan-13B or Baichuan2-13B-Chat: the same names, and no number of positions."""
    make_baichuan(folder, version, rows=rows, seed=seed, model_max_length=512)
    names = {"AutoConfig": "configuration_qwen.C", "AutoModelForCausalLM": "modeling.M"}
    edit_json(folder / "config.json", "max_position_embeddings", auto_map=names, architectures=["BaichuanForCausalLM"])
    return folder


def make_bare_llama(folder: Path, *, seed: int = 0) -> Path:
    """Like a LLaMA 2 folder of old: native weights, a tokenizer.model and nothing made from it."""
    folder.mkdir(parents=True)
    rows = write_sentencepiece(folder / "tokenizer.model", rule="identity", prefix=True, pieces=())
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "max_position_embeddings": 256,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": rows,
    }
    w = Weights(seed)
    state = {"model.embed_tokens.weight": w(rows, HIDDEN, scale=1.0)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        state |= {p + f"self_attn.{x}_proj.weight": w(HIDDEN, HIDDEN) for x in ("q", "k", "v")}
        state |= {**_shared_layer(p, w), p + "self_attn.rotary_emb.inv_freq": w(HIDDEN // HEADS // 2)}
    state |= {"model.norm.weight": w(HIDDEN, scale=0.1, mean=1.0), "lm_head.weight": w(rows, HIDDEN)}
    _write(folder, settings, {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2}, state, "bin")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    return folder


def _shared_layer(prefix: str, w: Weights) -> dict[str, Tensor]:
    return {
        prefix + "self_attn.o_proj.weight": w(HIDDEN, HIDDEN),
        prefix + "mlp.gate_proj.weight": w(WIDE, HIDDEN),
        prefix + "mlp.down_proj.weight": w(HIDDEN, WIDE),
        prefix + "mlp.up_proj.weight": w(WIDE, HIDDEN),
        prefix + "input_layernorm.weight": w(HIDDEN, scale=0.1, mean=1.0),
        prefix + "post_attention_layernorm.weight": w(HIDDEN, scale=0.1, mean=1.0),
    }


def _write(folder: Path, config: Any, generation: Any, state: dict[str, Tensor], kind: str) -> None:
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    save_weights(folder, state, kind=kind, shards=2)
    for name in ("configuration_qwen.py", "modeling.py", "tokenization_qwen.py"):
        (folder / name).write_text(TRAP)
    (folder / "LICENSE").write_text("terms\n")


def random_texts(seed: int, count: int, fragments: tuple[str, ...]) -> list[str]:
    """Short strings of letters, words, white space, scripts, marks, control characters and the given fragments."""
    rng = random.Random(seed)
    pools = [range(32, 127), range(0x4E00, 0x4F00), range(0x20), range(0xA0, 0x180), range(0xFF00, 0xFF60)]
    parts = [*fragments, *" ".join(WORDS).split(), " ", "  ", "e\u0301", "①", "ﬁ", "🙂"]

    def piece() -> str:
        return rng.choice(parts) if rng.random() < 0.6 else chr(rng.choice(rng.choice(pools)))

    return ["".join(piece() for _ in range(rng.randint(0, 10))) for _ in range(count)]
