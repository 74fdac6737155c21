"""`config.resolved.yaml`: what the run took where it was left a choice, and a resume where that is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Flags, make_model
from safetensors.torch import load_file

from rlhfkit.config.load import dump_config, load_config
from rlhfkit.config.stages import PpoConfig, SftConfig
from rlhfkit.errors import CheckpointError, ConfigError, Interrupted
from rlhfkit.stages import ppo, sft


def train(flags: Flags, **more: Any) -> Path:
    return sft.run(load_config(SftConfig, flags=flags, **more)).out


def resolved(out: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((Path(out) / "config.resolved.yaml").read_text())
    return found


@pytest.fixture
def open_flags(settings: Callable[..., Flags], sft_file: Path) -> Flags:
    """Nothing said that the run can find out."""
    flags = settings("run", data__train=[str(sft_file)], lora__rank=2)
    del flags["model.precision"]
    return flags


@pytest.fixture
def stopped(open_flags: Flags) -> Flags:
    """A run that was stopped after its second step of three."""

    def stop(self: Any, record: dict[str, Any]) -> None:
        self.interrupted = record["step"] == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhfkit.runtime.run.Run._refuse_non_finite", stop)
        with pytest.raises(Interrupted):
            train(open_flags)
    return open_flags


def test_nothing_is_left_open_and_the_recipe_repeats_the_run(open_flags: Flags, tmp_path: Path) -> None:
    first = train(open_flags)
    found = resolved(first)
    assert found["model"]["family"] == "llama"
    assert found["model"]["template"] == "chatml"
    assert found["model"]["precision"] in ("bf16", "fp32")
    assert found["lora"] == {
        "rank": 2,
        "alpha": 4.0,
        "targets": "down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj",
    }
    assert (found["optim"]["kernels"], found["optim"]["optimizer"]) == ("fused", "adamw")
    assert found["run"]["out"] == str(first)
    blocks = [(name, values) for name, values in found.items() if isinstance(values, dict)]
    assert [f"{name}.{key}" for name, values in blocks for key in values if values[key] == "auto"] == ["run.view"]

    again = train({"run.out": str(tmp_path / "again")}, recipe=str(first / "config.resolved.yaml"))
    a, b = (load_file(out / "final" / "adapter_model.safetensors") for out in (first, again))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_template_of_the_model_stays_its_own(open_flags: Flags, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = make_model(tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(model)
    assert resolved(train({**open_flags, "model.path": str(model)}))["model"]["template"] == "auto"


@pytest.mark.parametrize("how", ["as it was started", "by its own recipe", "with what an older version wrote"])
def test_a_run_goes_on_by_either_form(stopped: Flags, how: str) -> None:
    recipe = Path(stopped["run.out"]) / "config.resolved.yaml"
    if how == "with what an older version wrote":
        recipe.write_text(dump_config(load_config(SftConfig, flags=stopped)))
        assert resolved(recipe.parent)["optim"]["kernels"] == "auto"
    given = {"flags": stopped} if how == "as it was started" else {"recipe": str(recipe), "flags": {}}
    given["flags"] = {**given["flags"], "run.resume": True}
    sft.run(load_config(SftConfig, **given))
    assert resolved(recipe.parent)["optim"]["kernels"] == "fused"


def test_an_auto_that_is_something_else_now_is_refused(stopped: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resolved(stopped["run.out"])
    monkeypatch.setattr("rlhfkit.stages.common.chosen_kernels", lambda *_: "plain")
    with pytest.raises(CheckpointError) as error:
        train({**stopped, "run.resume": True})
    checkpoint = Path(stopped["run.out"]) / "checkpoints" / "step-2"
    assert error.value.message == (
        f"{checkpoint} was made with other settings than auto gives here: optim.kernels: 'fused' -> 'plain'"
    )
    assert resolved(stopped["run.out"]) == before


def test_another_value_than_the_chosen_one_is_refused(stopped: Flags) -> None:
    with pytest.raises(ConfigError, match=r"lora\.alpha: 4\.0 -> 16\.0"):
        train({**stopped, "run.resume": True, "lora.alpha": 16.0})
    with pytest.raises(ConfigError, match=r"optim\.kernels: 'fused' -> 'plain'"):
        train({**stopped, "run.resume": True, "optim.kernels": "plain"})


@pytest.mark.parametrize(
    ("changes", "estimator"),
    [({}, "k1"), ({"ppo.advantage": "grpo", "ppo.samples_per_prompt": 2}, "k3"), ({"ppo.kl_coef": 0.0}, "auto")],
)
def test_the_kl_estimator_of_ppo(
    settings: Callable[..., Flags], prompts_file: Path, tmp_path: Path, changes: Flags, estimator: str
) -> None:
    """It is said, but where it would be without effect: the recipe has to load."""
    (tmp_path / "r.py").write_text("def f(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    flags = settings(
        "run", data__train=[str(prompts_file)], ppo__reward=[f"{tmp_path / 'r.py'}:f"], ppo__rollout_size=4,
        ppo__max_new_tokens=4, ppo__episodes=4,
    )  # fmt: skip
    out = ppo.run(load_config(PpoConfig, flags=flags | changes)).out
    assert resolved(out)["ppo"]["kl_estimator"] == estimator
    load_config(PpoConfig, recipe=str(out / "config.resolved.yaml"))
