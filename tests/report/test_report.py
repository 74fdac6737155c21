"""What a report says of runs whose contents are known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run
from PIL import Image

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import SftConfig
from rlhfkit.errors import ConfigError
from rlhfkit.report.curves import PANELS, panels_of, svg_figures
from rlhfkit.report.findings import findings
from rlhfkit.report.runs import read_runs
from rlhfkit.report.tables import headline, sample_table
from rlhfkit.stages import report, sft


def test_figures_before_and_after(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "rm", "rm")])
    assert [(f.before, f.after) for f in headline(run)] == [("50.0%", "85.0%"), ("0.700", "0.367"), ("0.000", "1.000")]


def test_without_held_out_data_the_steps_speak(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "sft", "sft", loss=lambda step: 3.0 - step / 100)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith("eval_")} for row in rows if row.get("event") != "start"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (run,) = read_runs([folder])
    assert [(f.before, f.after) for f in headline(run)] == [("2.990", "2.600")]


def test_answers_stand_side_by_side(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "ppo", "ppo")])
    table = sample_table([run])
    assert table is not None
    assert table.headings == ["before training", "step 10", "step 30", "step 40"]
    assert table.left_out == 1
    prompt, answers = table.rows[0]
    assert prompt == "What about film 0?"
    assert [a.changed for a in answers if a] == [True, True, True, False]
    assert [a.note for a in answers if a] == ["reward -0.50, cut off", "reward 0.50", "reward 2.50", "reward 3.50"]


def test_every_metric_is_drawn_from_its_own_values(tmp_path: Path) -> None:
    """Each panel has a line per metric whose data are those of the file."""
    from rlhfkit.report.curves import _draw, _styled

    (run,) = read_runs([make_run(tmp_path / "ppo", "ppo", steps=20)])
    by_title = {panel.title: panel for panel in panels_of([run])}
    with _styled() as pyplot:
        for title, key in (("KL to the reference", "kl"), ("Entropy", "entropy"), ("Answer length", "response_tokens")):
            _, axes = pyplot.subplots()
            assert _draw(axes, by_title[title], [run])
            line = axes.get_lines()[0]
            assert list(line.get_xdata()) == [row["step"] for row in run.steps]
            assert list(line.get_ydata()) == [row[key] for row in run.steps]
        _, axes = pyplot.subplots()
        assert _draw(axes, by_title["Explained variance of the value function"], [run])
        assert len(axes.get_lines()[0].get_ydata()) == 19  # one step had none
        _, axes = pyplot.subplots()
        assert _draw(axes, by_title["Reward against KL"], [run])
        assert list(axes.get_lines()[0].get_xdata()) == [row["kl"] for row in run.steps]
        pyplot.close("all")


def test_runs_lie_over_one_another(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / name, "sft") for name in ("a", "b")])
    figures = dict(svg_figures(runs))
    assert "a, training" in figures["Loss"]
    assert "b, held out" in figures["Loss"]
    assert svg_figures(runs) == svg_figures(runs)  # the same figures give the same file


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_all_panels_have_data(tmp_path: Path, stage: str) -> None:
    (run,) = read_runs([make_run(tmp_path / stage, stage)])
    assert [title for title, _ in svg_figures([run])] == [panel.title for panel in PANELS[stage]]


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("sft", {"grad_norm": 7.0}, "clipped to 1 at 100% of the steps"),
        ("sft", {"grad_norm": lambda step: 900.0 if step == 33 else 0.5}, "jumped to 900 at step 33"),
        ("rm", {"accuracy": 1.2}, None),
        ("ppo", {"kl": -0.3}, "KL is -0.30 nats"),
        ("ppo", {"eos_rate": 0.04}, "only 4% of the answers ended"),
        ("ppo", {"reward_std": 0.0}, "the same reward"),
        ("ppo", {"clip_fraction": 0.5}, "50% of the tokens were clipped"),
        ("ppo", {"value_explained_variance": -0.4}, "explains nothing"),
        ("ppo", {"response_tokens": lambda step: 40.0 if step < 20 else 3.0}, "shrank from 40 to 3 tokens"),
    ],
)
def test_what_stands_out_is_said(tmp_path: Path, stage: str, changes: dict[str, Any], words: str | None) -> None:
    (plain,) = read_runs([make_run(tmp_path / "plain", stage)])
    assert findings(plain) == []
    (run,) = read_runs([make_run(tmp_path / "run", stage, **changes)])
    said = findings(run)
    if words is None:
        assert len(said) == 1
        assert "learned by heart" in said[0]
    else:
        assert len(said) == 1
        assert words in said[0]


def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "sft", "sft", finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # being written, or killed
    (run,) = read_runs([folder])
    assert f"rlhfkit sft --config {folder}/config.resolved.yaml --resume" in findings(run)[0]


def test_what_was_wrong_with_the_rows_is_said(settings: Any, tmp_path: Path) -> None:
    rows = [
        '{"prompt": "a film?", "response": "good"}',
        '{"prompt": 3}',
        json.dumps({"prompt": "b", "response": "x " * 99}),
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n")
    flags = settings("run", data__train=[str(data)], data__on_bad_row="skip", data__max_length=32, optim__max_steps=1)
    sft.run(load_config(SftConfig, flags=flags))
    (run,) = read_runs([tmp_path / "run"])
    skipped, cut = findings(run)[-2:]
    assert skipped.startswith(f"{data}: 1 rows were skipped (first: {data}:2: ")
    assert cut == "1 of 2 rows were longer than --max-length and were cut"
    report.run([tmp_path / "run"], out=tmp_path / "r.md", form=None)
    assert cut in (tmp_path / "r.md").read_text()


def test_a_report_among_the_runs_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "sft", "sft")
    page = tmp_path / "runs" / "report.html"
    page.write_text("an earlier one")
    assert [run.stage for run in read_runs([page, tmp_path / "runs" / "sft"])] == ["sft"]
    with pytest.raises(ConfigError, match="none of these is a run folder"):
        read_runs([page, page])


def test_forms(tmp_path: Path) -> None:
    for stage in ("sft", "ppo"):
        make_run(tmp_path / "runs" / stage, stage)
    written = report.run([tmp_path / "runs"], out=tmp_path / "new" / "r.png", form=None)
    assert [p.name for p in written] == ["r-sft.png", "r-ppo.png"]
    for path in written:
        with Image.open(path) as picture:
            assert picture.width > 1000
            assert len(picture.convert("L").getcolors(2**24)) > 50  # not blank
    page, *pictures = report.run([tmp_path / "runs" / "ppo"], out=None, form="md")
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "runs" / "ppo" / "report.md"
    assert f"]({pictures[0].name})" in text
    assert "| mean reward | -1.000 | 1.000 |" in text


def test_what_it_refuses(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft", "sft")
    (tmp_path / "empty").mkdir()
    for folders, out, form, words in (
        ([tmp_path / "none"], None, None, "there is no such folder"),
        ([tmp_path / "empty"], None, None, "there is no metrics.jsonl in it"),
        ([run], tmp_path / "x.html", "png", "contradict"),
        ([run], tmp_path / "x.pdf", None, "not 'pdf'"),
    ):
        with pytest.raises(ConfigError, match=words):
            report.run(folders, out=out, form=form)
    assert read_runs([run / "final"])[0].folder == run  # the model in a run stands for it


def test_it_needs_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft", "sft")
    script = (
        "import sys; from pathlib import Path; from rlhfkit.stages import report;"
        f"report.run([Path({str(run)!r})], out=None, form=None); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
