from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from legacy_folders import TRIPWIRE


@pytest.fixture(autouse=True)
def no_remote_code(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test here fails when any code file of a model folder was run."""
    trace = tmp_path_factory.mktemp("tripwire") / "trace"
    monkeypatch.setenv(TRIPWIRE, str(trace))
    yield trace
    assert not trace.exists(), f"code of a model folder was run: {trace.read_text()}"
