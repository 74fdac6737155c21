"""Make what `rlhfkit demo` needs: a tiny LLaMA-architecture base model, SFT rows, preference pairs and prompts.

    OMP_NUM_THREADS=2 python tools/make_demo_assets.py --sentences sentiment_en.jsonl.gz --out rlhfkit/assets/demo

``--sentences`` is a JSON-lines file (plain or gzipped) with ``text`` and ``rating`` (-4 to 4) in each row: the
movie-review sentences of vaderSentiment, MIT. Some ten minutes on two idle CPU cores, 2.5 GiB of memory. On the same
machine, with the same packages and the same number of threads, a second run writes the same bytes; elsewhere the
row files are the same and the weights differ a little.

What happens, in order:

1. Sentences are cleaned, and divided by a hash of their text: held-out sentences enter nothing but the
   ``*_heldout.jsonl`` files, not even the tokenizer; validation sentences only choose the checkpoint here.
2. A byte-level BPE tokenizer is trained on the training sentences and on the words of the prompts.
3. The base model learns the training sentences as plain text, never in a chat format. Beside the next token, a small
   head on the same hidden states learns how good or bad the words so far are (see ``word_ratings``). The head is
   thrown away; what stays is a model whose features know good from bad, as those of a large pretrained model do, so
   that a reward model can be trained in a minute. ``--rating-weight 0`` leaves it out.
4. SFT rows, pairs and prompts are drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import json
import math
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEXT = f"{START}user\n{{prompt}}{END}\n{START}assistant\n"

WORDINGS = (
    "Write one sentence about {film}.",
    "Describe {film} in one sentence.",
    "Review {film} in a few words.",
    "What did you think of {film}?",
    "How was {film}?",
    "Say something about {film}.",
    "Give your verdict on {film}.",
    "Write a line about {film}.",
)
FILMS = (
    "the film",
    "the movie",
    "a new film",
    "a new movie",
    "the film you saw",
    "the last movie you saw",
    "this picture",
)
# Words that a demo should not teach a model to say; about one sentence in forty has one.
UNWANTED = re.compile(
    r"\b(fuck|shit|sex|porn|nazi|holocaust|rape|rapist|whore|bitch|gay|lesbian|homo|jew|crap|ass\b|asses|penis|turd"
    r"|incest|masturbat|genital|vomit|cannibal|suicid|terroris|muslim|islam)|\*\*",
    re.IGNORECASE,
)
# How clear a sentence's rating must be to stand in a pair: raters disagree about the middle.
LEAST_RATING, LEAST_RATING_HELDOUT = 1.2, 1.8
# What a model can say within the demo's 24 new tokens, with the end of its turn.
ANSWER_TOKENS = 23
PAIR_TOKENS = 36
PAIRS_PER_SENTENCE, PAIRS_PER_SENTENCE_HELDOUT = 2, 4
# Names and rare words are many tokens each; a model this small would put their pieces together at random.
MOST_TOKENS_PER_WORD = 1.6
GOOD_SHARE = 0.3

Rows = dict[str, list[dict[str, str]]]


@dataclass(frozen=True, slots=True)
class Sentence:
    """One review sentence and the mean of its human ratings, -4 (bad) to 4 (good)."""

    text: str
    rating: float


@dataclass(frozen=True, slots=True)
class Sentences:
    """The sentences by what they may be used for; no text stands in two of them."""

    train: list[Sentence]
    validation: list[Sentence]
    heldout: list[Sentence]


def clean(text: str) -> str:
    """Undo what the source's own clean-up left behind, and nothing else."""
    text = text.replace("''", '"').replace("`", "'").replace("–", " ")
    text = re.sub(r"(?<=[\w\)'\"])\s{2,}(?=\w)", ", ", text)  # a dash that became spaces
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"^[.\s]+", "", text)  # an opening ellipsis
    text = re.sub(r"\s*\.\.\.+\s*$", ".", text)
    return re.sub(r"\s+([.,;:!?])", r"\1", text)


def usable(text: str) -> bool:
    """Whether a cleaned text is one self-contained sentence (or two) that a demo can show."""
    return 3 <= len(text.split()) <= 45 and text[0].isalnum() and not UNWANTED.search(text)


def read_sentences(path: Path) -> list[Sentence]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    by_text: dict[str, Sentence] = {}
    for row in rows:
        text = clean(row["text"])
        if text and usable(text):
            text = text[0].upper() + text[1:]
            text = text if text[-1] in ".!?\"')" else text + "."
            by_text.setdefault(text, Sentence(text, float(row["rating"])))
    return list(by_text.values())


def divide(sentences: Iterable[Sentence]) -> Sentences:
    """Divide by a hash of the text, so that a sentence's place does not depend on the others."""
    parts = Sentences([], [], [])
    for sentence in sentences:
        place = int(hashlib.sha256(sentence.text.encode()).hexdigest(), 16) % 100
        part = parts.heldout if place < 14 else parts.validation if place < 19 else parts.train
        part.append(sentence)
    return parts


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The prompts' words are few; repeated, they become short in tokens without a model ever having read them.
    tokenizer.train_from_iterator([*texts, *prompt_texts() * 2], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def prompt_texts() -> list[str]:
    prompts_train, prompts_heldout = divide_prompts()
    return [CHAT_TEXT.format(prompt=prompt) for prompt in prompts_train + prompts_heldout]


def divide_prompts() -> tuple[list[str], list[str]]:
    """Prompts to train on and prompts held out: other pairings of the same wordings and films."""
    train: list[str] = []
    heldout: list[str] = []
    for row, wording in enumerate(WORDINGS):
        for column, film in enumerate(FILMS):
            part = heldout if (row + 2 * column) % 5 == 0 else train
            part.append(wording.format(film=film))
    return train, heldout


# --- the base model ---------------------------------------------------------------------------------------------


WORD = re.compile(r"[a-z']+", re.IGNORECASE)


def word_ratings(sentences: list[Sentence], shrink: float = 4.0) -> dict[str, float]:
    """The mean rating of the sentences that hold a word, less the mean of all, drawn to 0 for rare words.

    Three thousand ratings are too few for a model that begins from nothing: it learns them by heart and guesses no
    better than chance. Their mean over words is a lesson it can learn, and says as much about unseen sentences.
    """
    middle = sum(sentence.rating for sentence in sentences) / len(sentences)
    totals: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for sentence in sentences:
        for word in {word.lower() for word in WORD.findall(sentence.text)}:
            totals[word] += sentence.rating - middle
            counts[word] += 1
    return {word: totals[word] / (counts[word] + shrink) for word in counts}


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized sentence and, after each token, how good the words so far are; NaN inside a word."""

    ids: list[int]
    goodness: list[float]


def make_example(text: str, tokenizer: PreTrainedTokenizerFast, ratings: dict[str, float]) -> Example:
    """Goodness is the sum of the words' ratings over the root of their number: about -1.5 to 1.5."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    after: dict[int, float] = {}
    total = 0.0
    for number, match in enumerate(WORD.finditer(text), start=1):
        total += ratings.get(match.group().lower(), 0.0)
        after[match.end()] = total / math.sqrt(number)
    goodness = [after.get(end, math.nan) for _, end in encoded["offset_mapping"]]
    return Example(encoded["input_ids"], goodness)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sentences as ``<|endoftext|> text <|endoftext|>``, padded on the right with ``<|endoftext|>``."""

    input_ids: Tensor  # (rows, length)
    predicted: Tensor  # (rows, length) bool: the token at this place is text or the text's end
    goodness: Tensor  # (rows, length), NaN where nothing is asked


def make_batch(rows: list[Example], pad_id: int) -> Batch:
    length = max(len(row.ids) for row in rows) + 2
    input_ids = torch.full((len(rows), length), pad_id)
    predicted = torch.zeros((len(rows), length), dtype=torch.bool)
    goodness = torch.full((len(rows), length), math.nan)
    for place, row in enumerate(rows):
        end = len(row.ids) + 1
        input_ids[place, 1:end] = torch.tensor(row.ids)
        predicted[place, 1 : end + 1] = True
        goodness[place, 1:end] = torch.tensor(row.goodness)
    return Batch(input_ids, predicted, goodness)


def batches(rows: list[Example], size: int, pad_id: int, order: random.Random) -> Iterator[Batch]:
    """One epoch. Rows of a like length share a batch, so that little padding is computed."""
    keyed = sorted(((len(row.ids) + order.random() * 4, place) for place, row in enumerate(rows)))
    groups = [keyed[start : start + size] for start in range(0, len(keyed), size)]
    order.shuffle(groups)
    for group in groups:
        yield make_batch([rows[place] for _, place in group], pad_id)


class Learner(nn.Module):
    """The model, and what surrounds it only while it learns: dropout and the rating head."""

    def __init__(self, model: LlamaForCausalLM, dropout: float) -> None:
        super().__init__()
        self.model = model
        self.rating_head = nn.Linear(model.config.hidden_size, 1)
        self.drop = nn.Dropout(dropout)
        # LLaMA has no residual dropout of its own; hooks add it and leave nothing behind in the saved model.
        self.hooks = [model.model.embed_tokens.register_forward_hook(self._dropped)]
        for layer in model.model.layers:
            self.hooks.append(layer.mlp.register_forward_hook(self._dropped))
            self.hooks.append(layer.self_attn.o_proj.register_forward_hook(self._dropped))

    def _dropped(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.drop(output)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean next-token loss, and the squared error of the goodness guessed after each word."""
        hidden = self.model.model(input_ids=batch.input_ids[:, :-1]).last_hidden_state
        wanted = batch.predicted[:, 1:]
        logits = self.model.lm_head(hidden[wanted])
        text_loss = nn.functional.cross_entropy(logits.float(), batch.input_ids[:, 1:][wanted])
        goodness = batch.goodness[:, :-1]
        asked = ~goodness.isnan()
        guesses = self.rating_head(hidden[asked]).squeeze(-1).float()
        return text_loss, nn.functional.mse_loss(guesses, goodness[asked])


def autocast(bf16: bool) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()


@torch.no_grad()
def evaluate(learner: Learner, rows: list[Example], pad_id: int, bf16: bool) -> tuple[float, float]:
    """Text loss per token and rating error over all rows."""
    learner.eval()
    totals, tokens = torch.zeros(2), 0
    for batch in batches(rows, 64, pad_id, random.Random(0)):
        with autocast(bf16):
            losses = torch.stack(learner(batch))
        count = int(batch.predicted.sum())
        totals, tokens = totals + losses * count, tokens + count
    text_loss, rating_loss = (totals / tokens).tolist()
    return text_loss, rating_loss


def pretrain(tokenizer: PreTrainedTokenizerFast, parts: Sentences, options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(options.seed)
    order = random.Random(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    learner = Learner(LlamaForCausalLM(config), options.dropout)
    pad_id = tokenizer.pad_token_id
    ratings = word_ratings(parts.train)
    train = [make_example(sentence.text, tokenizer, ratings) for sentence in parts.train]
    validation = [make_example(sentence.text, tokenizer, ratings) for sentence in parts.validation]
    matrices = [p for p in learner.parameters() if p.ndim > 1]
    vectors = [p for p in learner.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    steps = options.epochs * math.ceil(len(train) / options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    best, best_state = math.inf, copy.deepcopy(learner.model.state_dict())
    began = time.monotonic()
    for epoch in range(options.epochs):
        learner.train()
        seen = torch.zeros(2)
        for batch in batches(train, options.batch_size, pad_id, order):
            with autocast(options.bf16):
                text_loss, rating_loss = learner(batch)
            (text_loss + options.rating_weight * rating_loss).backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            seen += torch.stack((text_loss, rating_loss)).detach() * len(batch.input_ids) / len(train)
        text_loss, rating_loss = evaluate(learner, validation, pad_id, options.bf16)
        if text_loss + options.rating_weight * rating_loss < best:
            best = text_loss + options.rating_weight * rating_loss
            best_state = copy.deepcopy(learner.model.state_dict())
        print(
            f"epoch {epoch + 1:2d}  train {seen[0]:.3f} / {seen[1]:.3f}  validation {text_loss:.3f} / {rating_loss:.3f}"
            f"  {time.monotonic() - began:.0f} s",
            flush=True,
        )
    learner.model.load_state_dict(best_state)
    for hook in learner.hooks:
        hook.remove()
    return learner.model.eval()


# --- the rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowMaker:
    """Draws rows from sentences; one seeded stream per file, so that a change to one file leaves the others alone."""

    tokenizer: PreTrainedTokenizerFast
    seed: int

    def draws(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def sft(self, name: str, sentences: list[Sentence], prompts: list[str]) -> list[dict[str, str]]:
        """Short sentences of common words; of the good ones only a part, so that there is something left to reward."""
        draws = self.draws(name)
        rows = []
        for sentence in sentences:
            tokens = self.tokens(sentence.text)
            common = tokens <= MOST_TOKENS_PER_WORD * len(sentence.text.split())
            kept = sentence.rating < 0.5 or draws.random() < GOOD_SHARE
            if tokens <= ANSWER_TOKENS and common and kept:
                rows.append({"prompt": draws.choice(prompts), "response": sentence.text})
        draws.shuffle(rows)
        return rows

    def pairs(
        self, name: str, sentences: list[Sentence], prompts: list[str], least: float, uses: int
    ) -> list[dict[str, str]]:
        """Good against bad; each sentence meets at most ``uses`` others."""
        draws = self.draws(name)
        fitting = [sentence for sentence in sentences if self.tokens(sentence.text) <= PAIR_TOKENS]
        good = [sentence.text for sentence in fitting if sentence.rating >= least]
        bad = [sentence.text for sentence in fitting if sentence.rating <= -least]
        rows = []
        for _ in range(uses):
            draws.shuffle(good)
            draws.shuffle(bad)
            for chosen, rejected in zip(good, bad, strict=False):
                rows.append({"prompt": draws.choice(prompts), "chosen": chosen, "rejected": rejected})
        draws.shuffle(rows)
        return rows


def make_rows(parts: Sentences, tokenizer: PreTrainedTokenizerFast, seed: int) -> Rows:
    learned = parts.train + parts.validation
    maker = RowMaker(tokenizer, seed)
    train, heldout = divide_prompts()
    return {
        "sft": maker.sft("sft", learned, train),
        "sft_heldout": maker.sft("sft_heldout", parts.heldout, heldout),
        "pairs": maker.pairs("pairs", learned, train, LEAST_RATING, PAIRS_PER_SENTENCE),
        "pairs_heldout": maker.pairs(
            "pairs_heldout", parts.heldout, heldout, LEAST_RATING_HELDOUT, PAIRS_PER_SENTENCE_HELDOUT
        ),
        "prompts": [{"prompt": prompt} for prompt in train],
        "prompts_heldout": [{"prompt": prompt} for prompt in heldout],
    }


# --- writing ----------------------------------------------------------------------------------------------------

README = """# What `rlhfkit demo` runs on

Written by `tools/make_demo_assets.py`; how to make it again is said at the top of that script. Do not edit by hand.

| file | rows | what |
|---|---|---|
{table}
| `model/` | | LLaMA architecture, {parameters:,} parameters in bfloat16, vocabulary {vocabulary} (byte-level BPE) |

- **Where it comes from.** The sentences are movie-review sentences with a mean human rating from -4 to 4, from the
  data of vaderSentiment (Hutto & Gilbert, ICWSM 2014; `movieReviewSnippets_GroundTruth.txt`), MIT licence, below. They
  are reviewers' opinions, not ours. Whitespace and stray punctuation were mended, sentences with crude words, names of
  peoples or faiths left out. Prompts, pairing and the model are ours and under rlhfkit's licence.
- **What the model knows.** It was trained from nothing on {train} of these sentences as plain text, and has never seen
  a chat. While it learned, a small head read from the same features how good or bad the words so far are; the head is
  not in the checkpoint, but the features are, which is why a reward model learns so fast here. It writes film-review
  English and nothing else; it is for the demo only.
- **SFT rows** are short sentences of common words, the good ones thinned out, so that a reward has something to raise.
- **Held out.** A sentence in a `*_heldout` file is in no other file, and neither the tokenizer nor the model was
  trained on it. No prompt stands in both prompt files.
- **Pairs.** Chosen is a sentence rated {least_train} or more, rejected one rated -{least_train} or less (held out:
  {least_heldout} and -{least_heldout}).

## Licence of the sentences

{licence}
"""
LICENCE = """The MIT License (MIT)

Copyright (c) 2016 C.J. Hutto

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE."""


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=0.6
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(rows: Rows, folder: Path) -> None:
    for name, part in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_readme(rows: Rows, parts: Sentences, model: LlamaForCausalLM, folder: Path) -> None:
    fields = {name: " ".join(f"`{field}`" for field in part[0]) for name, part in rows.items()}
    table = "\n".join(f"| `{name}.jsonl` | {len(part)} | {fields[name]} |" for name, part in rows.items())
    text = README.format(
        table=table,
        parameters=model.num_parameters(),
        vocabulary=model.config.vocab_size,
        train=len(parts.train),
        least_train=LEAST_RATING,
        least_heldout=LEAST_RATING_HELDOUT,
        licence=LICENCE,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def check_apart(rows: Rows) -> None:
    """Stop when a text stands both in a training file and in a held-out one."""

    def texts(heldout: bool, fields: tuple[str, ...]) -> set[str]:
        parts = [part for name, part in rows.items() if name.endswith("_heldout") is heldout]
        return {row[field] for part in parts for row in part for field in fields if field in row}

    shared = texts(False, ("response", "chosen", "rejected")) & texts(True, ("response", "chosen", "rejected"))
    shared |= {row["prompt"] for row in rows["prompts"]} & {row["prompt"] for row in rows["prompts_heldout"]}
    if shared:
        raise SystemExit(f"{len(shared)} texts are both in training and held out, for example: {min(shared)}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True, help="sentiment_en.jsonl.gz: rows of text and rating")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, rlhfkit/assets/demo")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rating-weight", type=float, default=1.0)
    parser.add_argument("--rows-only", action="store_true", help="keep the model that is there, write the row files")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    parts = divide(read_sentences(options.sentences))
    tokenizer = train_tokenizer((sentence.text for sentence in parts.train), options.vocabulary)
    rows = make_rows(parts, tokenizer, options.seed)
    check_apart(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.out / "model"
    if options.rows_only:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        model = pretrain(tokenizer, parts, options)
        save_model(model, tokenizer, folder)
    write_rows(rows, options.out)
    write_readme(rows, parts, model, options.out)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 1e6:.1f} MB, " + ", ".join(f"{len(part)} {name}" for name, part in rows.items()))


if __name__ == "__main__":
    main()
