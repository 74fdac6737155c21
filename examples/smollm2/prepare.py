"""Cut the example's data into training and held-out rows.

    python examples/smollm2/prepare.py --alpaca-en alpaca_en.json --alpaca-zh alpaca_zh.json --pairs pairs.json

Any files in a format that `rlhfkit` reads will do; the figures in docs/results.md were made with

- English and Chinese rows of Stanford Alpaca (tatsu-lab/stanford_alpaca and a translation of it), and
- the politeness pairs of rasbt/LLMs-from-scratch (ch07, ``instruction-data-with-preference.json``): one instruction,
  a polite and a rude answer that say the same.

Writes ``data/smollm2/{sft,sft_heldout,pairs,pairs_heldout,prompts,prompts_heldout}.jsonl``. A row is held out by a hash
of its instruction, so the same instruction never stands on both sides, whatever the order of the files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhfkit.data.read import read_rows

SFT_ROWS, SFT_HELD_OUT = 320, 48  # of each language
PAIRS_HELD_OUT = 120
PROMPTS, PROMPTS_HELD_OUT = 256, 32
LONGEST = 600  # characters of a row: the example is to end within an hour on two cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("alpaca-en", "alpaca-zh", "pairs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("data/smollm2"))
    given = parser.parse_args()

    english = list(_short(given.alpaca_en))
    chinese = list(_short(given.alpaca_zh))
    pairs = [row for row in _short(given.pairs) if row["chosen"] != row["rejected"]]
    pairs.sort(key=_place)
    files = {
        "sft": _take(english, SFT_ROWS, "train") + _take(chinese, SFT_ROWS, "train"),
        "sft_heldout": _take(english, SFT_HELD_OUT, "held out") + _take(chinese, SFT_HELD_OUT, "held out"),
        "pairs": [_pair(row) for row in pairs[PAIRS_HELD_OUT:]],
        "pairs_heldout": [_pair(row) for row in pairs[:PAIRS_HELD_OUT]],
        # Prompts that neither SFT nor the reward model saw.
        "prompts": [_prompt(row) for row in _take(english, PROMPTS, "prompts")],
        "prompts_heldout": [_prompt(row) for row in _take(english, PROMPTS_HELD_OUT, "held-out prompts")],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = given.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


def _short(path: Path) -> Iterator[dict[str, Any]]:
    for row in read_rows(path):
        texts = [str(value) for value in row.fields.values()]
        if all(row.fields.get(name) for name in ("instruction", "output")) and sum(map(len, texts)) <= LONGEST:
            yield row.fields


def _place(row: dict[str, Any]) -> str:
    return hashlib.sha256(str(row["instruction"]).encode()).hexdigest()


def _take(rows: Iterable[dict[str, Any]], count: int, use: str) -> list[dict[str, Any]]:
    """The first rows of one use, by hash. A sixteenth of all instructions is held out, a quarter is for prompts."""
    uses = {"held out": "0", "held-out prompts": "1", "prompts": "2345", "train": "6789abcdef"}[use]
    chosen = sorted((row for row in rows if _place(row)[-1] in uses), key=_place)
    return chosen[:count]


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name, "") for name in ("instruction", "input", "chosen", "rejected")}


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name, "") for name in ("instruction", "input")}


if __name__ == "__main__":
    main()
