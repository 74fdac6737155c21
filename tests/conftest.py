"""Tiny models made on the spot: a LLaMA of two layers and a byte-level BPE tokenizer trained on a few sentences."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

# Before anything imports huggingface_hub, which reads it once: a fixture of one test comes too late, and each question
# to an unreachable hub takes 20 s.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RLHFKIT_LANG"] = "en"  # whatever the locale of whoever runs the tests

SENTENCES = [
    "the film was good and the actors were very good",
    "the film was bad and the story was very bad",
    "what do you think of the film?",
    "i think that it was a good film with a good story",
    "count to three: one two three",
    "say one word of praise or one word of blame",
]


def make_tokenizer(**special: str) -> Any:
    """Byte-level BPE with ChatML's tokens; keyword arguments set special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    defaults = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**defaults, **special})


def make_model(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """A random LLaMA with its tokenizer, saved as a model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "initializer_range": 0.2,  # a wide start, so that a tiny random model has opinions
    }
    LlamaForCausalLM(LlamaConfig(**{**defaults, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("RLHFKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A suite in the background of a shell ignores Ctrl-C, and so would all commands that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(1)  # tiny tensors: more threads only get in each other's way


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def sft_file(tmp_path: Path) -> Path:
    words = ["good", "bad", "very good", "very bad", "a good story", "one two three", "the actors"]
    rows = [
        {"prompt": f"what do you think of film {i}?", "response": f"the film was {words[i % 7]}"} for i in range(12)
    ]
    return write_jsonl(tmp_path / "sft.jsonl", rows)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": f"what do you think of film {i}?",
            "chosen": f"it was good {i % 3}",
            "rejected": f"bad, very bad {i}",
        }
        for i in range(12)
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say one word {i}", "n": i} for i in range(8)])


Flags = dict[str, Any]


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Callable[..., Flags]:
    """Flags of a small float32 run; dotted paths given as ``optim__lr=...`` replace them."""

    def make(out: str, **changes: Any) -> Flags:
        flags: Flags = {
            "model.path": str(tiny_model),
            "model.precision": "fp32",
            "data.max_length": 128,
            "optim.batch_size": 4,
            "optim.lr": 1e-3,
            "run.out": str(tmp_path / out),
            "run.trackers": ["none"],
        }
        flags.update({key.replace("__", "."): value for key, value in changes.items()})
        return flags

    return make


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def run_card(folder: Path) -> dict[str, Any]:
    """The names that the code of a model's card leaves behind, run on its folder."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = code.replace('"this-folder"', repr(str(folder))).replace("max_new_tokens=256", "max_new_tokens=4")
    names: dict[str, Any] = {}
    exec(compile(code, str(folder / "README.md"), "exec"), names)
    return names
