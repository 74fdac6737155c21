"""Models and data sets from a mirror of the hub, played by a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import make_model, write_jsonl
from hub import COMMIT, Hub, playing
from legacy_folders import edit_json
from legacy_models import make_baichuan_13b, make_qwen1

ROWS = [{"prompt": f"what about film {i}?", "response": "it was good"} for i in range(4)]


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path) -> Iterator[Hub]:
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "train.jsonl", ROWS)
    with playing({"models/owner/tiny": tiny_model, "datasets/owner/rows": data}) as server:
        yield server


def rlhfkit(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process whose environment has no hub in it, and an empty cache."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_")) and "proxy" not in k.lower()
    }
    return subprocess.run(
        [sys.executable, "-m", "rlhfkit", *words], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**clean, "HF_HOME": str(folder / "cache"), **env}, check=False,
    )  # fmt: skip


TRAIN = ("sft", "--model", "owner/tiny", "--data", "owner/rows", "--out", "run", "--precision", "fp32",
         "--max-length", "64", "--max-steps", "1", "--trackers", "none")  # fmt: skip
ASK = ("--prompt", "x", "--max-new-tokens", "2")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flag", "recipe", "environment"])
def test_everything_comes_from_the_mirror(hub: Hub, tmp_path: Path, how: str) -> None:
    words: list[str] = []
    env: dict[str, str] = {}
    if how == "flag":
        words = ["--hf-endpoint", hub.url]
    elif how == "recipe":
        (tmp_path / "recipe.yaml").write_text(f"model: {{hf_endpoint: '{hub.url}'}}\n")
        words = ["--config", "recipe.yaml"]
    else:
        env = {"HF_ENDPOINT": hub.url}
    done = rlhfkit(tmp_path, *TRAIN, *words, **env)
    assert done.returncode == 0, done.stderr
    assert "read owner/rows: 4 rows" in done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert any(path.startswith("/owner/tiny/resolve/") and path.endswith(name) for path in hub.asked)
    assert any(p.startswith("/datasets/owner/rows/resolve/") for p in hub.asked)
    assert "/xet-read-token" not in hub.asked  # the hub's other storage, which a mirror does not stand for
    if how == "flag":  # once fetched, it is there without the mirror
        again = rlhfkit(tmp_path, "generate", "--model", "owner/tiny", *ASK, HF_HUB_OFFLINE="1")
        assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_xet_is_left_alone_when_asked_for(hub: Hub, tmp_path: Path) -> None:
    rlhfkit(tmp_path, *TRAIN, "--hf-endpoint", hub.url, HF_HUB_DISABLE_XET="0")
    assert "/xet-read-token" in hub.asked


@pytest.mark.slow
def test_a_failure_names_the_mirror(hub: Hub, tmp_path: Path) -> None:
    done = rlhfkit(tmp_path, "generate", "--model", "owner/other", "--prompt", "x", "--hf-endpoint", hub.url)
    assert done.returncode == 1
    assert f"'owner/other' is no folder here, and {hub.url} did not give it" in done.stderr
    assert "try a mirror with --hf-endpoint" in done.stderr
    done = rlhfkit(tmp_path, *TRAIN[:4], "owner/nothing", *TRAIN[5:], "--hf-endpoint", hub.url)
    assert done.returncode == 1
    assert f"loading it from {hub.url} failed" in done.stderr


def test_offline_is_said(tmp_path: Path) -> None:
    done = rlhfkit(tmp_path, "generate", "--model", "owner/tiny", "--prompt", "x", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "'owner/tiny' is no folder here and not in the cache, and HF_HUB_OFFLINE forbids downloads" in done.stderr


def test_a_modelscope_folder_is_a_model(tiny_model: Path, tmp_path: Path) -> None:
    """Its cache writes a dot as three underscores and leaves files of its own beside the model's."""
    folder = tmp_path / "hub" / "Qwen" / "Qwen2___5-tiny"
    shutil.copytree(tiny_model, folder)
    (folder / "configuration.json").write_text(json.dumps({"framework": "pytorch", "task": "text-generation"}))
    (folder / ".msc").write_bytes(b"\x80\x04]\x94.")
    (folder / ".mv").write_text("Revision:master,CreatedAt:1727000000")
    done = rlhfkit(tmp_path, "generate", "--model", str(folder), *ASK, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr


# -- hub ids where a folder is usual -----------------------------------------------------------------------------------


def answered(hub: Hub, folder: Path, model: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return rlhfkit(folder, "generate", "--model", model, *ASK, "--hf-endpoint", hub.url, *words, **env)


@pytest.mark.slow
def test_an_adapter_is_merged_into_a_base_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    done = rlhfkit(tmp_path, *TRAIN, "--lora-rank", "2", "--hf-endpoint", hub.url)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "cache")  # as on another machine
    hub.asked.clear()
    done = rlhfkit(tmp_path, "merge", "run", "merged", "--hf-endpoint", hub.url)
    assert done.returncode == 0, done.stderr
    assert any(path.endswith("model.safetensors") for path in hub.asked)
    assert not any(path.endswith(".bin") for path in hub.asked)
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["base"] == "owner/tiny"
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_code_of_a_hub_id_is_pinned_with_its_revision(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = make_model(tmp_path / "with code")
    write_code(code, "first")
    hub.repositories["models/owner/coded"] = code
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "RLHFKIT_TEST_TRIPWIRE": str(tmp_path / "trace")}
    done = answered(hub, tmp_path, "owner/coded", "--trust-remote-code", **env)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256((code / "modeling_own.py").read_bytes()).hexdigest()
    assert f"{digest}  modeling_own.py" in done.stderr
    assert (tmp_path / "trace").read_text() == "first"
    pins = yaml.safe_load((tmp_path / "config" / "rlhfkit" / "trust.yaml").read_text())
    assert pins["owner/coded"]["files"] == {"modeling_own.py": digest}

    write_code(code, "second")
    monkeypatch.setattr("hub.COMMIT", COMMIT[::-1])
    done = answered(hub, tmp_path, "owner/coded", "--trust-remote-code", **env)
    assert done.returncode == 1
    assert f"CHANGED, was {digest}" in done.stderr
    assert "the code of owner/coded is not the code that was trusted" in done.stderr
    assert (tmp_path / "trace").read_text() == "first"


def write_code(folder: Path, word: str) -> None:
    (folder / "modeling_own.py").write_text(
        "import os\nfrom transformers import LlamaForCausalLM\n\n"
        f"open(os.environ['RLHFKIT_TEST_TRIPWIRE'], 'a').write({word!r})\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_qwen1, lambda folder: make_baichuan_13b(folder, 1)], ids=["qwen1", "13b"])
def test_a_legacy_checkpoint_on_the_hub(make: Callable[[Path], Path], hub: Hub, tmp_path: Path) -> None:
    """Converted, or in its own layout; its code comes along and is not run."""
    hub.repositories["models/owner/old"] = make(tmp_path / "old")
    env = {"RLHFKIT_CACHE": str(tmp_path / "rlhfkit"), "RLHFKIT_TEST_TRIPWIRE": str(tmp_path / "trace")}
    done = answered(hub, tmp_path, "owner/old", **env)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "trace").exists()
