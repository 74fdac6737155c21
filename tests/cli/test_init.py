"""Recipes written by ``rlhfkit init``: they load, as they are and with every key switched on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhfkit.config.load import iterate_fields, load_config
from rlhfkit.config.stages import STAGES
from rlhfkit.config.starter import FORMS, billions_in_name, choose_form
from rlhfkit.errors import ConfigError, FamilyError
from rlhfkit.stages import init


def written(tmp_path: Path, stage: str, **changes: Any) -> Path:
    given = {"model": "", "family": "qwen", "memory_gib": 24.0, "out": tmp_path / f"{stage}.yaml", "force": True}
    recipe, schema = init.run(stage, **{**given, **changes})
    assert schema.parent == recipe.parent
    return recipe


@pytest.mark.parametrize("stage", init.STAGES)
@pytest.mark.parametrize("memory", [6.0, 24.0, 400.0])
@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_a_recipe_loads(tmp_path: Path, stage: str, memory: float, family: str) -> None:
    recipe = written(tmp_path, stage, memory_gib=memory, family=family)
    config = load_config(STAGES[stage], recipe=str(recipe))
    assert config.lora.rank == (0 if "all weights" in recipe.read_text().splitlines()[1] else 16)
    assert config.optim.lr <= 2e-4


@pytest.mark.parametrize("stage", init.STAGES)
def test_every_key_is_there_with_its_default(tmp_path: Path, stage: str) -> None:
    recipe = written(tmp_path, stage)
    as_it_is = load_config(STAGES[stage], recipe=str(recipe))
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(re.sub(r"^(\s*)# ([a-z_]+:)", r"\1\2", text.partition("\n\n")[2], flags=re.MULTILINE))
    assert load_config(STAGES[stage], recipe=str(recipe)) == as_it_is
    raw = yaml.safe_load(recipe.read_text())
    keys = {f"{block}.{key}" for block, values in raw.items() if isinstance(values, dict) for key in values}
    assert keys == {f.path for f in iterate_fields(STAGES[stage])} - {"stage", "run.resume", "run.plan"}
    properties = json.loads((tmp_path / f"{stage}.schema.json").read_text())
    for block in raw.keys() - {"stage"}:
        reference = properties["properties"][block]["$ref"].rpartition("/")[2]
        assert raw[block].keys() <= properties["$defs"][reference]["properties"].keys()


def test_the_form_goes_by_memory(tmp_path: Path) -> None:
    assert [choose_form("sft", 7.0, gib) for gib in (8, 24, 200)] == [FORMS[2], FORMS[1], FORMS[0]]
    with pytest.raises(ConfigError, match="needs about 7 GiB"):
        choose_form("sft", 7.0, 5)
    assert "Qwen2.5-32B" in written(tmp_path, "sft", memory_gib=40.0).read_text()
    assert "SmolLM2-135M" in written(tmp_path, "ppo", memory_gib=2.3, family="llama").read_text()


def test_lengths_stay_within_a_folders_positions(tiny_model: Path, tmp_path: Path) -> None:
    positions = json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    assert positions < 1024
    for stage in init.STAGES:
        recipe = written(tmp_path, stage, model=str(tiny_model))
        config = load_config(STAGES[stage], recipe=str(recipe))
        assert config.data.max_length == positions
        assert config.row_limit >= positions // 2


@pytest.mark.parametrize("stage", init.STAGES)
def test_only_what_can_be_planned_is_planned(tmp_path: Path, stage: str) -> None:
    assert ("--plan" in written(tmp_path, stage).read_text()) == (stage in ("sft", "rm", "ppo"))


def test_a_folder_is_weighed(tiny_model: Path, tmp_path: Path) -> None:
    assert "all weights" in written(tmp_path, "rm", model=str(tiny_model), memory_gib=2.5).read_text()


def test_a_lora_folder_is_as_heavy_as_its_base(tiny_model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model)}))
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    assert init._billions(str(adapter)) == init._billions(str(tiny_model)) > 1e-5


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7.0),
        ("SmolLM2-135M", 0.135),
        ("Qwen2.5-0.5B", 0.5),
        ("gpt2", None),
        ("a-1Bit", None),
    ],
)
def test_sizes_in_names(name: str, billions: float | None) -> None:
    assert billions_in_name(name) == billions


def test_what_it_refuses(tmp_path: Path) -> None:
    recipe = written(tmp_path, "sft")
    before = recipe.read_text()
    with pytest.raises(ConfigError, match="is there already"):
        written(tmp_path, "sft", force=False)
    assert recipe.read_text() == before
    with pytest.raises(ConfigError, match="cannot be told from its name"):
        written(tmp_path, "sft", model="some/model")
    with pytest.raises(ConfigError, match="there is no recipe for 'generate'"):
        written(tmp_path, "generate")
    with pytest.raises(FamilyError, match="no family called 'gpt'"):
        written(tmp_path, "sft", family="gpt")


def test_a_family_beside_a_model_is_refused(cli: Any) -> None:
    outcome = cli("init", "sft", "--model", "Qwen/Qwen2.5-0.5B", "--family", "qwen")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: --family has no effect with --model")
