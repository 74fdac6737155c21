"""The demo keeps what it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhfkit.stages import demo


@pytest.mark.slow
def test_the_demo_reaches_its_aims(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = demo.run(tmp_path / "demo")
    assert result.sft[1]["eval_loss"] < result.sft[0]["eval_loss"]
    assert result.rm[1]["eval_accuracy"] >= 0.8
    assert result.reward_gain >= 1
    assert result.ppo[1]["eval_kl"] > 0
    assert (tmp_path / "demo" / "report.html").is_file()
    said = capfd.readouterr().out
    assert "before and after, on held-out rows" in said
    # Finished stages are found finished.
    again = demo.run(tmp_path / "demo", resume=True)
    assert again.ppo == result.ppo
