"""Code and paths that come with a model: nothing runs unasked, and what was trusted is pinned."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_model
from safetensors.torch import load_file

from rlhfkit.errors import ModelError, RepairRefusedError
from rlhfkit.models import trust
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import load_model
from rlhfkit.models.text_side import load_text_side

CODE = """
import os
from transformers import LlamaForCausalLM

open(os.environ["RLHFKIT_TEST_TRIPWIRE"], "a").write("run")


class OwnForCausalLM(LlamaForCausalLM):
    pass
"""


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("RLHFKIT_TEST_TRIPWIRE", str(tmp_path / "trace"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    trust._trusted.cache_clear()
    return tmp_path / "config"


def with_code(folder: Path) -> Path:
    make_model(folder)
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, *, trusted: bool) -> Any:
    trust._trusted.cache_clear()  # a new process
    source = open_model(str(folder))
    text = load_text_side(source, trust_remote_code=trusted)
    return load_model(source, text, "causal", lora=None, dtype=torch.float32, trust_remote_code=trusted).model


def test_code_does_not_run_unless_trusted(tmp_path: Path, config_home: Path) -> None:
    folder = with_code(tmp_path / "m")
    assert type(load(folder, trusted=False)).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "trace").exists()
    assert not config_home.exists()


def test_first_trust_shows_and_pins_every_file(
    tmp_path: Path, config_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_code(tmp_path / "m")
    load(folder, trusted=True)
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    shown = capsys.readouterr().err
    assert f"{digest}  modeling_own.py" in shown
    assert shown.count("pinned in") == 1  # asked about once, for tokenizer and weights
    pins = yaml.safe_load((config_home / "rlhfkit" / "trust.yaml").read_text())
    assert pins[str(folder.resolve())]["files"] == {"modeling_own.py": digest}
    load(folder, trusted=True)
    assert "modeling_own.py" not in capsys.readouterr().err


def test_changed_code_is_refused_where_nobody_can_be_asked(
    tmp_path: Path, config_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_code(tmp_path / "m")
    load(folder, trusted=True)
    before = (config_home / "rlhfkit" / "trust.yaml").read_text()
    (tmp_path / "trace").unlink(missing_ok=True)
    (folder / "modeling_own.py").write_text(CODE + "# more\n")
    (folder / "helper.py").write_text("")
    with pytest.raises(ModelError, match="is not the code that was trusted") as refusal:
        load(folder, trusted=True)
    assert str(config_home) in refusal.value.hint
    shown = capsys.readouterr().err
    assert "CHANGED, was " + hashlib.sha256(CODE.encode()).hexdigest() in shown
    assert "helper.py  NEW" in shown
    assert not (tmp_path / "trace").exists()
    assert (config_home / "rlhfkit" / "trust.yaml").read_text() == before


@pytest.mark.parametrize(("answer", "runs"), [("y\n", True), ("\n", False), ("no\n", False)])
def test_changed_code_is_asked_about_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, runs: bool
) -> None:
    folder = with_code(tmp_path / "m")
    load(folder, trusted=True)
    (folder / "modeling_own.py").write_text(CODE + "# more\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdin, "readline", lambda: answer, raising=False)
    if runs:
        load(folder, trusted=True)
        monkeypatch.setattr(sys.stdin, "readline", lambda: pytest.fail("asked twice"), raising=False)
        load(folder, trusted=True)
    else:
        with pytest.raises(ModelError, match="is not the code that was trusted"):
            load(folder, trusted=True)


def test_code_of_another_repository_is_refused(tmp_path: Path) -> None:
    folder = with_code(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "someone/else--modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"takes its code from someone/else"):
        load(folder, trusted=True)


def test_folder_without_code_needs_no_pin(tmp_path: Path, config_home: Path) -> None:
    load(make_model(tmp_path / "m"), trusted=True)
    assert not config_home.exists()


def test_damaged_pins_are_an_error(tmp_path: Path, config_home: Path) -> None:
    folder = with_code(tmp_path / "m")
    (config_home / "rlhfkit").mkdir(parents=True)
    for text in ("- a list", "{", "m: text"):
        (config_home / "rlhfkit" / "trust.yaml").write_text(text)
        with pytest.raises(ModelError, match=r"trust\.yaml"):
            load(folder, trusted=True)


class _Trap:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "run")


def test_pickled_weights_load_and_code_in_them_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = make_model(tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    load(folder, trusted=False)
    torch.save({**state, "x": _Trap(tmp_path / "trace")}, folder / "pytorch_model.bin", pickle_module=pickle)
    for trusted in (False, True):
        with pytest.raises(ModelError, match="do not load"):
            load(folder, trusted=trusted)
    assert not (tmp_path / "trace").exists()


def test_index_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    names = load_file(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RepairRefusedError, match="no file of its own folder"):
        load(folder, trusted=False)


@pytest.mark.parametrize(
    "named", ["{outside}/mod.OwnForCausalLM", "../outside/mod.OwnForCausalLM", "sub/mod.OwnForCausalLM"]
)
def test_code_that_cannot_be_pinned_does_not_run(named: str, tmp_path: Path, config_home: Path) -> None:
    """By an absolute path, from above the folder, and behind a link out of it."""
    folder, outside = with_code(tmp_path / "m"), tmp_path / "outside"
    outside.mkdir()
    (outside / "mod.py").write_text(CODE)
    (folder / "sub").symlink_to(outside)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": named.format(outside=outside)}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="which is no file of the folder that could be pinned"):
        load(folder, trusted=True)
    assert not (tmp_path / "trace").exists()
    assert not config_home.exists()


def test_a_link_that_code_could_import_through_is_refused(tmp_path: Path) -> None:
    folder, outside = with_code(tmp_path / "m"), tmp_path / "outside"
    outside.mkdir()
    (folder / "sub").symlink_to(outside)
    with pytest.raises(ModelError, match="sub leads out of the model's folder"):
        load(folder, trusted=True)
    assert not (tmp_path / "trace").exists()
