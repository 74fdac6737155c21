"""How much memory and time `rlhfkit sft --plan` takes to make token rows of a big file, and to find them again.

    python benchmarks/data.py --model MODEL --rows 20000 2000000

Rows are alpaca-like, about 520 bytes each, and all different. The first run makes the token rows, the second finds them
in the cache. Peak memory is the largest process's, workers included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = re.findall(
    r"\w+",
    """the a of to and in that it is was for on with as be at by from this have are not but what all were when we there
    can said which their time will about if up out them then some her would make like him into has look two more write
    go see number no way could people my than first water been call who oil its now find long down day did get come""",
)


def write_rows(path: Path, rows: int) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            question, answer = (" ".join(draw.choices(WORDS, k=k)) for k in (25, 70))
            row = {"instruction": f"Question {number}: {question}?", "input": "", "output": f"{answer.capitalize()}."}
            file.write(json.dumps(row) + "\n")


def run(model: str, data: Path, folder: Path) -> tuple[float, float]:
    """Seconds and peak GiB of one command, in a process of its own that knows no other's peak."""
    command = ["rlhfkit", "sft", "--model", model, "--data", str(data), "--out", str(folder / "run"), "--plan"]
    code = f"import resource, subprocess; subprocess.run({command!r}, check=True, capture_output=True)\n"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    environment = {**os.environ, "RLHFKIT_CACHE": str(folder / "cache")}
    started = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return time.monotonic() - started, int(found.stdout) * (1 if sys.platform == "darwin" else 1024) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 2_000_000])
    wanted = parser.parse_args()
    print("| rows | file MiB | cache MiB | first run s | first run GiB | second run s | second run GiB |")
    print("|---|---|---|---|---|---|---|")
    for rows in wanted.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = folder / "rows.jsonl"
            write_rows(data, rows)
            first, second = (run(wanted.model, data, folder) for _ in range(2))
            kept = sum(path.stat().st_size for path in (folder / "cache").rglob("*.arrow"))
            sizes = f"{data.stat().st_size / 2**20:,.0f} | {kept / 2**20:,.0f}"
            figures = " | ".join(f"{seconds:.1f} | {gib:.2f}" for seconds, gib in (first, second))
            print(f"| {rows:,} | {sizes} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
