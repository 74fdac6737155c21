"""The page in a browser: opens from disk, nothing missing, nothing asked of the network, readable on a phone."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run

from rlhfkit.stages import report

# Written into the page before it is opened: what only a browser knows goes into the DOM, which it then prints.
PROBE = """<script>addEventListener("load", () => {
  const facts = {
    images: [...document.images].map(i => [i.alt, i.complete, i.naturalWidth, i.clientWidth]),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    requests: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    small: [...document.querySelectorAll("td,dd,li,p,th,dt,figcaption")].filter(
      e => e.offsetParent && parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.textContent),
  };
  const note = document.createElement("pre");
  note.id = "facts"; note.textContent = JSON.stringify(facts);
  (window.top.document || document).body.appendChild(note);
});</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("sft", "rm", "ppo"):
        make_run(folder / stage, stage)
    make_run(folder / "ppo-没完成", "ppo", finished=False, kl=lambda step: -0.2)
    (path,) = report.run([folder], out=None, form=None)
    return path


def opened(browser: str, path: Path, profile: Path) -> tuple[dict[str, Any], str]:
    """What the probe found, and what Chromium logged."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
        "--allow-file-access-from-files", f"--user-data-dir={profile}", "--virtual-time-budget=10000",
        "--window-size=1200,900", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (facts,) = re.findall(r'<pre id="facts">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    found: dict[str, Any] = json.loads(html.unescape(facts))
    return found, done.stderr


@pytest.mark.parametrize("width", [1200, 360])
def test_it_opens(browser: str, page: Path, tmp_path: Path, width: int) -> None:
    probed = page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>")
    path = tmp_path / "probed.html"
    if width >= 500:
        path.write_text(probed, encoding="utf-8")
    else:  # a window cannot be made that narrow, a frame can
        frame = f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(probed)}"></iframe>'
        path.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frame}</body>", encoding="utf-8")
    facts, log = opened(browser, path, tmp_path / "profile")
    assert "CONSOLE" not in log
    assert facts["requests"] == []
    assert len(facts["images"]) > 25
    assert all(complete and natural > 100 and shown > 250 for _, complete, natural, shown in facts["images"])
    assert facts["overflow"] <= 0
    assert facts["small"] == []


def test_the_probe_sees_what_is_wrong(browser: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        '<!DOCTYPE html><body><img src="data:image/svg+xml;base64,AAAA" alt="x">'
        f'<p style="width:5000px;font-size:5px">x</p><script>console.error("oh")</script>{PROBE}</body>',
        encoding="utf-8",
    )
    facts, log = opened(browser, path, tmp_path / "profile")
    assert "CONSOLE" in log
    assert facts["images"][0][2] == 0
    assert facts["overflow"] > 0
    assert facts["small"] == ["x"]


def test_it_carries_everything(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)
    assert "&lt;b&gt;The best&lt;/b&gt; film &amp; story." in text
    assert "<b>" not in text
    for words in ("held-out loss (nats per token)", "85.0%", "ppo-没完成", "cut off", "as before", "  lr: "):
        assert words in text
