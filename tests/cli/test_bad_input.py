"""What people get wrong: each mistake is answered with its own words and exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import make_model, write_jsonl

GOOD = {"sft": "good.jsonl", "rm": "pairs.jsonl", "ppo": "prompts.jsonl"}
LONG = "what do you think of the film? " * 200


@pytest.fixture(autouse=True)
def inputs(workplace: Path, tiny_model: Path) -> None:
    """Good and bad files and folders, by the names that the table below uses."""
    good = {"prompt": "a film?", "response": "good"}
    write_jsonl(Path("good.jsonl"), [good])
    write_jsonl(Path("pairs.jsonl"), [{"prompt": "a film?", "chosen": "good", "rejected": "bad"}])
    write_jsonl(Path("prompts.jsonl"), [{"prompt": "a film?"}])
    Path("rewards.py").write_text("def zero(prompts, responses):\n    return [0.0] * len(responses)\n")

    Path("empty.jsonl").touch()
    Path("blank.json").write_text("[]")
    Path("cut.json").write_text(json.dumps([good, good])[:-20])
    Path("cut.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good)[:-8] + "\n")
    write_jsonl(Path("nofield.jsonl"), [good, {"prompt": "a film?", "reply": "good"}])
    write_jsonl(Path("wrongtype.jsonl"), [{"prompt": "a film?", "response": 5}])
    write_jsonl(Path("noanswer.jsonl"), [{"prompt": "a film?", "response": "  "}])
    write_jsonl(Path("onlychosen.jsonl"), [{"prompt": "a film?", "chosen": "good"}])
    write_jsonl(Path("same.jsonl"), [{"prompt": "a film?", "chosen": "good", "rejected": "good"}])
    write_jsonl(Path("long.jsonl"), [{"prompt": LONG, "response": "good"}])
    Path("gb.csv").write_bytes("prompt,response\n什么是电影？,好看\n".encode("gb18030"))
    Path("words.txt").write_text("just words\n")

    Path("nothing").mkdir()
    Path("ran/final").mkdir(parents=True)
    shutil.copytree(tiny_model, "judge")
    Path("judge/rlhfkit.json").write_text('{"stage": "rm"}')
    shutil.copytree(tiny_model, "silent", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(tiny_model, "cut")
    weights = Path("cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(tiny_model, "alien")
    config = json.loads(Path("alien/config.json").read_text())
    Path("alien/config.json").write_text(json.dumps({**config, "model_type": "marsian"}))
    Path("a.yaml").write_text("stage: sft\n")
    Path("b.yaml").write_text("stage: rm\noptim: {lr: 5}\n")


MISTAKES = {
    # sampling
    "top-p in PPO": (
        "ppo",
        "--reward rewards.py:zero --top-p 0.9 --set ppo.top_k=50",
        2,
        ["ppo.top_p: PPO samples from the whole distribution", "ppo.top_k: PPO samples from the whole distribution"],
    ),
    # data
    "missing file": ("sft", "--data god.jsonl", 1, ["god.jsonl: no such file or folder", "good.jsonl"]),
    "missing folder": ("sft", "--data x/y.jsonl", 1, ["x/y.jsonl: no such file; its folder x does not exist either"]),
    "empty file": ("sft", "--data empty.jsonl", 1, ["empty.jsonl: the file is empty"]),
    "empty list": ("sft", "--data blank.json", 1, ["blank.json: the file holds no rows"]),
    "empty folder": ("sft", "--data nothing", 1, ["nothing: no data file in this folder"]),
    "truncated array": ("sft", "--data cut.json", 1, ["cut.json:1: the file ends inside the array, at row 2"]),
    "truncated lines": ("sft", "--data cut.jsonl", 1, ["cut.jsonl:2: the last line is cut short"]),
    "no data format": ("sft", "--data words.txt", 1, ["words.txt: unknown format; the file begins with 'just words'"]),
    "missing field": (
        "sft",
        "--data nofield.jsonl",
        1,
        ["nofield.jsonl:2: ", "no sft format; its fields are prompt, reply"],
    ),
    "wrong type": ("sft", "--data wrongtype.jsonl", 1, ['wrongtype.jsonl:1: field "response": the number 5']),
    "empty answer": ("sft", "--data noanswer.jsonl", 1, ['noanswer.jsonl:1: field "response": the answer is empty']),
    "rm without rejected": ("rm", "--data onlychosen.jsonl", 1, ["onlychosen.jsonl:1: the row has no rejected"]),
    "rm with equal answers": ("rm", "--data same.jsonl", 1, ['field "rejected": the answer is equal to "chosen"']),
    "sft data for rm": ("rm", "--data good.jsonl", 1, ["good.jsonl:1: the row fits no rm format"]),
    "rows too long": (
        "sft",
        "--data long.jsonl",
        1,
        ["nothing to learn within --max-length (first: long.jsonl:1)", "raise --max-length"],
    ),
    "prompts too long": ("ppo", "--data long.jsonl", 1, ["prompt longer than 120 tokens (first: long.jsonl:1)"]),
    "GB18030": (
        "sft",
        "--data gb.csv",
        1,
        ["gb.csv:2: not UTF-8", "the file decodes as GB18030", "iconv -f GB18030 -t UTF-8 gb.csv > utf8-gb.csv"],
    ),
    "weight": ("sft", "--data good.jsonl=-1", 2, ['its weight "-1" is not a number above 0']),
    "bad held-out rows": (
        "sft",
        "--data good.jsonl --eval-data nofield.jsonl",
        1,
        ["nofield.jsonl:2: the row fits no sft format"],
    ),
    # models
    "missing model": ("sft", "--model ./tyni", 1, ["no model folder at ./tyni", "tiny"]),
    "not a model folder": ("rm", "--model nothing", 1, ["nothing is no model folder: it has no config.json"]),
    "a run as model": ("sft", "--model ran", 1, ["ran is no model folder", "its model is ran/final"]),
    "a reward model as policy": ("ppo", "--model judge", 1, ["judge is a reward model: it scores answers"]),
    "the same, planned": ("ppo", "--model judge --plan", 1, ["judge is a reward model: it scores answers"]),
    "a file as model": ("sft", "--model ./good.jsonl", 1, ["no model folder at ./good.jsonl"]),
    "no tokenizer": ("ppo", "--model silent", 1, ["silent has no tokenizer", "rlhfkit fix-checkpoint ORIGINAL_FOLDER"]),
    "weights cut short": ("sft", "--model cut", 1, ["the weights of ", "cut do not load"]),
    "unknown architecture": (
        "sft",
        "--model alien",
        1,
        ["alien has model_type 'marsian', and no installed family holds it", "qwen2"],
    ),
    "wrong family": (
        "sft",
        "--family qwen",
        1,
        ["model_type 'llama', which the family 'qwen' does not hold", "--family llama"],
    ),
    "unknown family": ("sft", "--family lama", 1, ["'lama'", "llama"]),
    "unknown template": ("sft", "--template chatlm", 1, ["no template called 'chatlm'", "chatml"]),
    "unknown layers": (
        "sft",
        "--lora-rank 4 --lora-targets c_attn",
        2,
        ["lora.targets: the model has no linear layer called c_attn", "it has: down_proj"],
    ),
    "beyond the context": (
        "sft",
        "--max-length 4096",
        2,
        ["data.max_length: 4096 is more than the 512 positions of ", "--max-length 512"],
    ),
    # rewards
    "missing reward file": ("ppo", "--reward other.py:zero", 1, ["no file other.py for the reward other.py:zero"]),
    "missing function": ("ppo", "--reward rewards.py:one", 1, ["rewards.py has no function 'one'", "it has: zero"]),
    "no reward model": ("ppo", "--reward ./tiny", 1, ["tiny has no reward head", "rlhfkit rm --model"]),
    # configuration
    "unknown flag": ("sft", "--modle tiny", 2, ["No such option: --modle", "--model"]),
    "unknown key": ("sft", "--set optim.lrate=1", 2, ["optim.lrate: unknown key"]),
    "not a number": ("sft", "--lr fast", 2, ["optim.lr: input should be a valid number"]),
    "two recipes": (
        "sft",
        "a.yaml --config b.yaml",
        2,
        ["two recipes are given: a.yaml and --config b.yaml", "give one of them"],
    ),
    "recipe of another stage": (
        "sft",
        "b.yaml",
        2,
        ["b.yaml: this recipe is for stage 'rm', not 'sft'", "rlhfkit rm b.yaml"],
    ),
    "faulty recipe": (
        "rm",
        "b.yaml",
        2,
        [
            "1 fault in the configuration (recipe b.yaml):",
            "optim.lr: input should be less than or equal to 1 (found 5)",
        ],
    ),
    "missing recipe": ("sft", "c.yaml", 2, ["no recipe called 'c.yaml'"]),
    "unknown tracker": (
        "sft",
        "--trackers tensorbord",
        2,
        ["run.trackers: 'tensorbord' is no tracker; there are tensorboard, "],
    ),
    "tracker not installed": (
        "sft",
        "--trackers dvclive",
        2,
        ["run.trackers: 'dvclive' is not installed: pip install dvclive"],
    ),
    "out is a file": ("sft", "--out words.txt", 2, ["run.out: words.txt is a file, not a folder"]),
    "out under a file": ("sft", "--out words.txt/run", 1, ["error: words.txt/run: Not a directory"]),
    "out where nothing can be": ("sft", "--out /proc/none/run", 1, ["error: /proc/none"]),
}


@pytest.mark.parametrize(("stage", "flags", "code", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_and_leaves_nothing(cli: Any, stage: str, flags: str, code: int, words: list[str]) -> None:
    given = flags.split()
    chosen = {
        "--model": "tiny", "--data": GOOD[stage], "--out": "run", "--max-length": "128", "--precision": "fp32",
        "--trackers": "none",
    }  # fmt: skip
    if stage == "ppo":
        chosen |= {"--reward": "rewards.py:zero", "--max-new-tokens": "8", "--rollout-size": "8", "--batch-size": "8"}
    defaults = [word for name, value in chosen.items() if name not in given for word in (name, value)]
    before = sorted(Path().rglob("*"))
    outcome = cli(stage, *given, *defaults)
    assert outcome.code == code, outcome.err
    for part in words:
        assert part in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert sorted(Path().rglob("*")) == before


def test_all_flags_that_are_wrong_are_named_together(cli: Any) -> None:
    """Numbers that are none, numbers out of range, words that are no choice, and what does not go together."""
    flags = "--lr abc --batch-size x --max-steps 2.5 --seed -1 --quantize 3bit --lora-alpha 8 --set optim.epohcs=2"
    outcome = cli("sft", "--model", "tiny", "--data", "good.jsonl", *flags.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines() == [
        "error: 7 faults in the configuration:",
        "  model.quantize: input should be 'none', '8bit' or '4bit' (found '3bit')",
        "  optim.batch_size: input should be a valid integer, unable to parse string as an integer (found 'x')",
        "  optim.max_steps: input should be a valid integer, unable to parse string as an integer (found '2.5')",
        "  optim.lr: input should be a valid number, unable to parse string as a number (found 'abc')",
        "  optim.epohcs: unknown key; did you mean optim.epochs?",
        "  run.seed: input should be greater than or equal to 0 (found -1)",
        "  lora.alpha: has no effect while lora.rank is 0; set --lora-rank",
        "  → all options: rlhfkit sft --help",
    ]


@pytest.mark.parametrize(
    ("flag", "kind"), [("--lr", "<float>"), ("--batch-size", "<int>"), ("--lora-alpha", "<float>")]
)
def test_help_says_what_a_flag_takes(cli: Any, monkeypatch: pytest.MonkeyPatch, flag: str, kind: str) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    (line,) = [line for line in cli("sft", "--help").out.splitlines() if f" {flag} " in line]
    assert line.split()[1:3] == [flag, kind]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (
            "--prompt x --input prompts.jsonl",
            2,
            ["prompt: stands beside input; give one of them", "output: is missing"],
        ),
        ("--input none.jsonl --output o.jsonl", 1, ["none.jsonl: no such file or folder"]),
        ("--input empty.jsonl --output o.jsonl", 1, ["empty.jsonl: the file is empty"]),
        ("--input wrongtype.jsonl --output words.txt/o.jsonl", 1, ["error: words.txt: File exists"]),
        ("--prompt x --top-p 0", 2, ["top_p: input should be greater than 0 (found 0.0)"]),
        ("--prompt x --model silent", 1, ["silent has no tokenizer"]),
    ],
)
def test_mistakes_of_generation(cli: Any, flags: str, code: int, words: list[str]) -> None:
    given = flags.split()
    outcome = cli("generate", *given, *(() if "--model" in given else ("--model", "tiny")))
    assert outcome.code == code, outcome.err
    for part in words:
        assert part in outcome.err
    assert outcome.out == ""
    assert not Path("o.jsonl").exists()


def test_a_base_that_was_moved_is_named(cli: Any) -> None:
    make_model(Path("moved"))
    flags = ("--max-length", "128", "--trackers", "none", "--precision", "fp32", "--lora-rank", "2")
    assert cli("sft", "--model", "moved", "--data", "good.jsonl", "--out", "run", *flags).code == 0
    Path("moved").rename("elsewhere")
    outcome = cli("generate", "--model", "run/final", "--prompt", "x")
    assert outcome.code == 1
    assert "run/final is a LoRA folder whose base '" in outcome.err
    assert "moved' is not there" in outcome.err


def test_a_row_that_cannot_be_used_may_be_skipped(cli: Any) -> None:
    run = ("sft", "--model", "tiny", "--data", "nofield.jsonl", "--max-length", "128", "--trackers", "none")
    outcome = cli(*run, "--precision", "fp32", "--out", "run", "--on-bad-row", "skip")
    assert outcome.code == 0, outcome.err
    assert "read nofield.jsonl: 1 rows, 1 skipped (first: nofield.jsonl:2: the row fits no sft format" in outcome.err


def test_the_hub_is_asked_where_hf_endpoint_says(workplace: Path) -> None:
    """The endpoint is read once, when the hub's library is imported: a fresh process must set it before that."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_")) and "proxy" not in k.lower()
    }
    command = [sys.executable, "-m", "rlhfkit", "generate", "--model", "owner/name", "--prompt", "x"]
    try:
        done = subprocess.run(
            [*command, "--hf-endpoint", endpoint], capture_output=True, text=True, env={**env, "HF_HOME": "hub"}
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 1, done.stderr
    assert f"'owner/name' is no folder here, and {endpoint} did not give it" in done.stderr
    assert "/owner/name/resolve/main/config.json" in asked


def test_rows_that_the_template_refuses_are_skipped_in_training_and_evaluation(cli: Any) -> None:
    rows = [{"prompt": "a film?", "response": "good", "system": "be brief"}, {"prompt": "a film?", "response": "good"}]
    write_jsonl(Path("train.jsonl"), rows)
    write_jsonl(Path("eval.jsonl"), rows[::-1])
    flags = "--model tiny --data train.jsonl --eval-data eval.jsonl --template baichuan --out run --max-length 128"
    refused = cli("sft", *flags.split())
    assert refused.code == 1
    assert "train.jsonl:1: the template 'baichuan' refuses this conversation (system, user, assistant)" in refused.err
    assert "--on-bad-row skip" in refused.err
    done = cli("sft", *flags.split(), "--on-bad-row", "skip", "--max-steps", "1")
    assert done.code == 0, done.err
    assert "read train.jsonl: 1 rows, 1 skipped (first: train.jsonl:1: the template 'baichuan' refuses" in done.err
    assert "read eval.jsonl: 1 rows, 1 skipped (first: eval.jsonl:2: the template 'baichuan' refuses" in done.err
