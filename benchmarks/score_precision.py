"""How far a reward model's scores move with the number format of their computation.

    python benchmarks/score_precision.py --model RM_FOLDER --data PAIRS [--rows 24]

Against float32: float32 weights computed in bf16, as a training in bf16 computes them, and weights held in bf16.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from rlhfkit.data.sources import load_records
from rlhfkit.models.precision import current_device
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.runtime.screen import Screen, quiet_libraries
from rlhfkit.stages.score import score_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=24)
    args = parser.parse_args()
    quiet_libraries()
    (records,), _ = load_records([args.data], "score", on_bad_row="skip")
    pairs = [record for record in records if len(record.answers) == 2][: args.rows]

    def scores(weights: torch.dtype, computed: torch.dtype) -> np.ndarray:
        scorer = RewardScorer(args.model, device=current_device(), dtype=weights)
        scorer.autocast = None if computed == torch.float32 else computed
        return np.array(score_records(scorer, pairs, Screen())[0])

    exact = scores(torch.float32, torch.float32)
    margins = exact[:, 0] - exact[:, 1]
    print(f"{len(pairs)} pairs, scores spread by {exact.std():.3f}\n")
    print("| computed | scores differ by, mean / most | margins by, mean / most | pairs ranked otherwise |")
    print("|---|---|---|---|")
    for name, weights in (("float32 weights in bf16", torch.float32), ("bf16 weights", torch.bfloat16)):
        found = scores(weights, torch.bfloat16)
        off, moved = np.abs(found - exact), np.abs(found[:, 0] - found[:, 1] - margins)
        turned = int(((found[:, 0] > found[:, 1]) != (margins > 0)).sum())
        print(
            f"| {name} | {off.mean():.3f} / {off.max():.3f} | {moved.mean():.3f} / {moved.max():.3f} "
            f"| {turned} of {len(pairs)} |"
        )


if __name__ == "__main__":
    main()
