"""Every damaged folder of the references ends in the state that is written down for it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from references import LEGACY, TOKENIZERS, generator

from rlhfkit.errors import RepairRefusedError
from rlhfkit.stages.fix_checkpoint import RepairResult, run

CASES = json.loads((LEGACY / "cases.json").read_text(encoding="utf-8"))["cases"]
WEIGHTS = (".safetensors", ".bin")


def small_spec() -> Any:
    """The references' own set, a quarter as wide: what is damaged here is names and settings, not numbers."""
    spec = json.loads((LEGACY / "dev.json").read_text(encoding="utf-8"))
    for entry in spec["checkpoints"].values():
        del entry["weights_sha256"]
        heads = entry["config"]["num_attention_heads"]
        entry["config"] |= {"hidden_size": 4 * heads, "num_hidden_layers": 1}
        if "kv_channels" in entry["config"]:
            entry["config"]["kv_channels"] = 4
    return spec


@pytest.fixture(params=CASES, ids=[case["name"] for case in CASES])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[dict[str, Any], Path, Path]]:
    generator().make_damage(tmp_path, request.param, small_spec(), TOKENIZERS)
    yield request.param, tmp_path / "src", tmp_path / "dst"
    for name in ("src", "dst"):
        shutil.rmtree(tmp_path / name)


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and ".rlhfkit-backup" not in p.parts]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def parsed(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def fix(src: Path, dst: Path) -> RepairResult:
    return run(src, dst, dry_run=False, yes=True, confirm=lambda question: False)


def test_case(case: tuple[dict[str, Any], Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, src, dst = case
    expect = facts["expect"]
    monkeypatch.setenv("LEGACY_TRIPWIRE", str(tmp_path / "somebody-ran-code"))
    original, before = digests(src), digests(dst)
    kept = {name: parsed(dst / name) for name in expect.get("json_kept", {})}

    if expect["result"] == "refused":
        with pytest.raises(RepairRefusedError) as refusal:
            fix(src, dst)
        assert digests(dst) == before
        if facts["name"] == "lora-adapter":
            assert "LoRA" in refusal.value.message
            assert "merge" in f"{refusal.value.message} {refusal.value.hint}"
    else:
        assert fix(src, dst).status == expect["result"]
        if expect["result"] == "unchanged":
            assert digests(dst) == before
        after = digests(dst)
        assert {k: v for k, v in after.items() if k.endswith(WEIGHTS)} == {
            k: v for k, v in before.items() if k.endswith(WEIGHTS)
        }
        assert_state(expect, src, dst, kept)
        assert fix(src, dst).status == "unchanged"
        assert digests(dst) == after
    assert digests(src) == original
    assert not (tmp_path / "somebody-ran-code").exists()


def assert_state(expect: dict[str, Any], src: Path, dst: Path, kept: dict[str, Any]) -> None:
    for name in expect.get("from_src", []):
        same = parsed(dst / name) == parsed(src / name) if name.endswith(".json") else (
            (dst / name).read_bytes() == (src / name).read_bytes()
        )  # fmt: skip
        assert same, name
    for name, keys in expect.get("json_from_src", {}).items():
        assert {k: parsed(dst / name).get(k) for k in keys} == {k: parsed(src / name).get(k) for k in keys}
    for name, values in expect.get("json_equal", {}).items():
        assert {k: parsed(dst / name)[k] for k in values} == values
    for name, keys in expect.get("json_kept", {}).items():
        assert {k: parsed(dst / name)[k] for k in keys} == {k: kept[name][k] for k in keys}
    for name in expect.get("absent", []):
        assert not (dst / name).exists()
    for name in expect.get("index", []):
        assert_right_index(dst, parsed(dst / name))


def assert_right_index(dst: Path, index: Any) -> None:
    from safetensors import safe_open

    where, size = {}, 0
    for path in sorted(dst.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- the file's own list, not a mapping
                where[name] = path.name
                size += file.get_tensor(name).nbytes
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == size


def test_there_are_fifteen() -> None:
    assert len(CASES) == 15
