"""Rewards over HTTP: our own server gives the scorer's numbers, and servers that fail are told from each other."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import read_metrics

from rlhfkit.chat.messages import Message
from rlhfkit.config.load import load_config
from rlhfkit.config.rewards import parse_reward
from rlhfkit.config.stages import PpoConfig, RmConfig, ScoreConfig
from rlhfkit.data.records import PromptRecord
from rlhfkit.errors import ConfigError, RewardError
from rlhfkit.models import reward_http
from rlhfkit.models.reward_http import ANSWERS_PER_REQUEST, HttpReward
from rlhfkit.models.reward_sources import check_rewards
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.runtime.screen import Screen
from rlhfkit.stages import plan, ppo, report, reward, serve_reward
from rlhfkit.stages.serve_reward import RewardServer

CPU = torch.device("cpu")
RECORDS = [
    PromptRecord("p.jsonl:1", (Message("system", "be brief"), Message("user", "a film?")), {"n": 1, "x": float("nan")}),
    PromptRecord("p.jsonl:2", (Message("user", "哪部电影？"),), {"n": 2}),
]
ANSWERS = ["good", "一部好电影"]


@contextmanager
def running(server: HTTPServer) -> Iterator[str]:
    """A server on a thread of its own; gives its address."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
    finally:
        server.shutdown()
        server.server_close()


# -- our server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    rows = [{"prompt": f"film {i}?", "chosen": f"it was good {i % 3}", "rejected": f"bad {i}"} for i in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model.path": str(tiny_model), "model.precision": "fp32", "data.max_length": 128, "optim.lr": 1e-2,
        "data.train": [str(folder / "pairs.jsonl")], "run.out": str(folder / "run"), "run.trackers": ["none"],
    }  # fmt: skip
    return reward.run(load_config(RmConfig, flags=flags)).final


@pytest.fixture(scope="module")
def scorer(judge: Path) -> RewardScorer:
    return RewardScorer(str(judge), device=CPU, dtype=torch.float32)


@pytest.fixture
def served(scorer: RewardScorer) -> Iterator[str]:
    with running(RewardServer(("127.0.0.1", 0), scorer, Screen(speaks=False), {"model": "m"})) as url:
        yield url


def post(url: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, method="POST"), timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_server_gives_the_scorer_s_numbers(scorer: RewardScorer, served: str) -> None:
    records, answers = RECORDS * 40, [f"{a} {i}" for i, a in enumerate(ANSWERS * 40)]
    asked = HttpReward(parse_reward(served), timeout=20, retries=0).score(records, answers)
    parts = [slice(i, i + ANSWERS_PER_REQUEST) for i in range(0, 80, ANSWERS_PER_REQUEST)]
    assert len(parts) == 2
    own = [s for part in parts for s in scorer.score([r.prompt for r in records[part]], answers[part])]
    assert asked == own
    assert len(set(own)) > 70


def test_plain_prompts_are_user_turns(scorer: RewardScorer, served: str) -> None:
    status, answer = post(served, {"prompts": ["a film?"], "responses": ["good"]})
    assert (status, answer) == (200, {"scores": scorer.score([[Message("user", "a film?")]], ["good"])})
    assert post(served, {"prompts": [], "responses": []}) == (200, {"scores": []})


def test_health(served: str, scorer: RewardScorer) -> None:
    with urllib.request.urlopen(served.replace("/score", "/health"), timeout=20) as answer:
        facts = json.loads(answer.read())
    assert (facts["status"], facts["model"], facts["max_length"]) == ("ok", "m", scorer.max_length)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the body is no JSON"),
        ([1], "the body is a list, not an object"),
        ({"prompts": ["a"]}, "'responses' is to be a list of strings"),
        ({"prompts": ["a"], "responses": [1]}, "'responses' is to be a list of strings"),
        ({"responses": ["a"]}, "'prompts' is to be a list with one item for each of the 1 responses"),
        ({"prompts": ["a", "b"], "responses": ["a"]}, "'prompts' is to be a list with one item"),
        ({"prompts": [1], "responses": ["a"]}, r"prompts[0] is no string"),
        ({"messages": ["a"], "responses": ["a"]}, "messages[0] is no list of messages"),
        ({"messages": [[{"role": "user"}]], "responses": ["a"]}, "messages[0][0] has no text under 'content'"),
        ({"messages": [[{"role": "me", "content": ""}]], "responses": ["a"]}, "messages[0][0] has the role 'me'"),
    ],
)
def test_bad_requests_are_answered_with_what_is_wrong(served: str, body: Any, words: str) -> None:
    status, answer = post(served, body)
    assert status == 400
    assert words in answer["error"]


def test_other_paths_and_bodies_without_a_length(served: str) -> None:
    assert post(served.replace("score", "other"), {})[0] == 404
    host, port = served.removeprefix("http://").removesuffix("/score").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        plain.sendall(b"POST /score HTTP/1.1\r\nHost: h\r\n\r\n")
        assert plain.recv(100).startswith(b"HTTP/1.1 411 ")


def test_a_taken_port_is_named_before_the_model_is_loaded(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(served.split(":")[2].split("/")[0])
    monkeypatch.setattr(serve_reward, "RewardScorer", None)
    with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1, port {port}"):
        serve_reward.run(ScoreConfig(model="any"), host="127.0.0.1", port=port)


def test_a_taken_port_is_named(served: str, scorer: RewardScorer) -> None:
    port = int(served.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1, port {port}"):
        RewardServer(("127.0.0.1", port), scorer, Screen(speaks=False), {})


@pytest.mark.parametrize("end", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_command_serves_and_ends_cleanly(judge: Path, scorer: RewardScorer, end: signal.Signals) -> None:
    command = [sys.executable, "-m", "rlhfkit", "serve-reward", str(judge), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("serving "))
        assert f"serving {judge} (cpu, fp32) at http://127.0.0.1:" in line
        url = line.split(" at ")[1].split(";")[0]
        status, answer = post(url, {"prompts": ["a film?"], "responses": ["good"]})
        assert (status, len(answer["scores"])) == (200, 1)
        process.send_signal(end)
        _, rest = process.communicate(timeout=300)
        assert process.returncode == 0
        assert rest.endswith("ended after 1 answers\n")
    finally:
        process.kill()


# -- servers of others -------------------------------------------------------------------------------------------------


@contextmanager
def answering(*answers: tuple[int, bytes] | float, to: str = "") -> Iterator[tuple[str, list[Any]]]:
    """A server that gives one of these after another, the last for ever; a number is seconds of silence, ``to`` an
    address that it points to.
    """
    requests: list[Any] = []

    class Scripted(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            given = answers[min(len(requests), len(answers) - 1)]
            requests.append((dict(self.headers), self.path, json.loads(body)))
            if isinstance(given, float):
                time.sleep(given)
                given = (200, b'{"scores": [1, 2]}')
            self.send_response(given[0])
            self.send_header("Content-Length", str(len(given[1])))
            if to:
                self.send_header("Location", to)
            self.end_headers()
            self.wfile.write(given[1])

        def log_message(self, *args: Any) -> None: ...

    with running(HTTPServer(("127.0.0.1", 0), Scripted)) as url:
        yield url, requests


GOOD = (200, b'{"scores": [0.5, -1]}')


def ask(
    url: str,
    *,
    timeout: float = 20,
    retries: int = 0,
    pause: Callable[[float], None] = lambda _: None,
    **more: Any,
) -> Any:
    return HttpReward(parse_reward(url), timeout=timeout, retries=retries, pause=pause, **more).score(RECORDS, ANSWERS)


def test_retries_are_told() -> None:
    said: list[str] = []
    with answering((503, b""), (503, b""), GOOD) as (url, _):
        ask(url, retries=2, say=said.append)
    start = f"the reward {url} answered with status 503 Service Unavailable; retry "
    assert said == [start + "1 of 2 in 1 s", start + "2 of 2 in 2 s"]


def test_columns_that_no_row_of_a_request_has_are_null() -> None:
    with answering(GOOD) as (url, requests):
        ask(url, columns={"rare"})
    assert requests[0][2]["columns"]["rare"] == [None, None]


def test_what_is_sent() -> None:
    with answering(GOOD) as (url, requests):
        assert ask(url.replace("http://", "http://me:a%40b@") + "?x=1=0.5") == [0.5, -1]
    ((headers, path, body),) = requests
    assert path == "/score?x=1"
    assert headers["Content-Type"] == "application/json"
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"me:a@b"
    assert body == {
        "messages": [
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a film?"}],
            [{"role": "user", "content": "哪部电影？"}],
        ],
        "prompts": ["a film?", "哪部电影？"],
        "responses": ANSWERS,
        "columns": {"n": [1, 2], "x": [None, None]},
    }


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, b'{"scores": [1]}'), "returned 1 scores for 2 answers"),
        ((200, b"<html>hello</html>"), "answered with not JSON: <html>hello</html>"),
        ((200, b""), "answered with not JSON: an empty body"),
        ((200, b"[1, 2]"), "answered with JSON without a list of scores: "),
        ((200, b'{"rewards": [1, 2]}'), r'answered with JSON without a list of scores: {"rewards": \[1, 2\]}'),
        ((500, b"out of luck"), r"answered with status 500 Internal Server Error: out of luck \(tried 2 times\)"),
        ((404, b""), "answered with status 404 Not Found\n"),
    ],
)
def test_what_is_no_answer_is_named(answer: tuple[int, bytes], words: str) -> None:
    with answering(answer) as (url, _), pytest.raises(RewardError, match=f"the reward {url} {words}"):
        ask(url, retries=1)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirection_is_followed(status: int) -> None:
    """It would take the password to another server, and most would lose the answers on the way."""
    with answering(GOOD) as (other, asked), answering((status, b""), to=other) as (url, _):
        with pytest.raises(RewardError, match=f"answered with status {status}"):
            ask(url.replace("http://", "http://me:secret@"))
        assert asked == []


def test_a_path_may_be_chinese() -> None:
    with answering(GOOD) as (url, requests):
        ask(url.replace("/score", "/打分"))
    assert requests[0][1] == "/%E6%89%93%E5%88%86"


def test_failures_that_may_pass_are_tried_again_with_growing_pauses() -> None:
    pauses: list[float] = []
    with answering((503, b""), (502, b"no"), GOOD) as (url, requests):
        assert ask(url, retries=3, pause=pauses.append) == [0.5, -1]
        assert (len(requests), pauses) == (3, [1.0, 2.0])
    with answering((400, b"bad")) as (url, requests):
        with pytest.raises(RewardError, match="status 400 Bad Request: bad"):
            ask(url, retries=3)
        assert len(requests) == 1


def test_a_slow_server_is_given_up() -> None:
    with (
        answering(1.0) as (url, _),
        pytest.raises(RewardError, match=r"did not answer within 0.2 s \(tried once\)\n.*--reward-timeout"),
    ):
        ask(url, timeout=0.2)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_nobody_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}/score"
    with pytest.raises(RewardError, match=r"refused the connection: nothing listens there.*tried 3 times"):
        ask(url, retries=2)
    with pytest.raises(RewardError, match=r"refused the connection.*\n.*rlhfkit serve-reward"):
        check_rewards([url], 5)


def test_a_server_that_breaks_off() -> None:
    def cut(server: socket.socket) -> None:
        with server.accept()[0] as caller:
            caller.recv(10_000)
            caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=cut, args=(server,), daemon=True).start()
        with pytest.raises(RewardError, match="broke off before its answer was whole"):
            ask(f"http://127.0.0.1:{server.getsockname()[1]}/")


def test_a_server_here_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with answering(GOOD) as (url, _):
        assert ask(url) == [0.5, -1]


# -- in PPO ------------------------------------------------------------------------------------------------------------


def flags_of(settings: Any, prompts: Path, out: str, *rewards: str, **more: Any) -> Any:
    given = {
        "data__train": [str(prompts)], "ppo__reward": list(rewards), "ppo__max_new_tokens": 8,
        "ppo__rollout_size": 8, "ppo__ppo_epochs": 1, "optim__max_steps": 2, "optim__epochs": 2, **more,
    }  # fmt: skip
    return load_config(PpoConfig, flags=settings(out, **given))


def test_ppo_with_a_served_reward_is_ppo_with_its_folder(
    settings: Any, prompts_file: Path, judge: Path, served: str
) -> None:
    """Running statistics and KL included, and through a stop and a resume."""
    more = {"ppo__reward_normalize": True, "ppo__kl_target": 1.0, "run__save_every": 1}
    whole = ppo.run(flags_of(settings, prompts_file, "folder", f"{judge}=0.5", **more))
    asked = ppo.run(flags_of(settings, prompts_file, "http", f"{served}=0.5", **more))
    shutil.rmtree(asked.final)
    shutil.rmtree(asked.out / "checkpoints" / "step-2")
    asked = ppo.run(flags_of(settings, prompts_file, "http", f"{served}=0.5", run__resume=True, **more))
    own, other = read_metrics(whole.out), read_metrics(asked.out)
    host = served.removeprefix("http://")
    for one, two in zip(own[:-1], other[:-1], strict=True):
        assert one["reward/final"] == two[f"reward/{host}"]
        assert [one[k] for k in ("loss", "kl", "kl_coef", "reward_mean")] == [
            two[k] for k in ("loss", "kl", "kl_coef", "reward_mean")
        ]
    assert other[-1]["resumed_from"] == 1


def test_a_number_that_is_none_is_named_with_its_row(settings: Any, prompts_file: Path) -> None:
    scores = json.dumps({"scores": [1.0] * 7 + [float("nan")]}).encode()
    words = r"step 1 of 2: the reward http://\S+ returned nan for answer 8 of 8, to the prompt of \S+prompts.jsonl:\d"
    with answering((200, scores)) as (url, _), pytest.raises(RewardError, match=words):
        ppo.run(flags_of(settings, prompts_file, "run", url))


def test_the_settings_of_a_run_are_those_of_its_server(
    settings: Any, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--reward-retries and --reward-timeout, with neither at its default."""
    monkeypatch.setattr(reward_http, "FIRST_PAUSE", 0.0)
    eight = (200, json.dumps({"scores": [1.0] * 8}).encode())
    with answering((503, b""), (503, b""), eight) as (url, requests):
        ppo.run(flags_of(settings, prompts_file, "two", url, ppo__reward_retries=2, optim__max_steps=1))
        assert len(requests) == 3
    with answering((503, b"")) as (url, requests):
        with pytest.raises(RewardError, match="tried 6 times"):
            ppo.run(flags_of(settings, prompts_file, "five", url, ppo__reward_retries=5))
        assert len(requests) == 6
    more = {"ppo__reward_timeout": 0.25, "ppo__reward_retries": 0}
    with answering(1.0) as (url, _), pytest.raises(RewardError, match=r"did not answer within 0.25 s \(tried once\)"):
        ppo.run(flags_of(settings, prompts_file, "slow", url, **more))


def test_no_secret_of_a_url_leaves_the_configuration(settings: Any, prompts_file: Path) -> None:
    with answering((200, json.dumps({"scores": [1.0] * 8}).encode())) as (url, _):
        secret = url.replace("http://", "http://me:hunter2@") + "?key=k3y"
        run = ppo.run(flags_of(settings, prompts_file, "run", secret, run__trackers=["tensorboard"]))
        report.run([run.out], out=None, form="html")
    told = [path for path in run.out.rglob("*") if path.is_file() and path.name != "config.resolved.yaml"]
    assert len(told) > 5
    for path in told:
        text = path.read_bytes()
        assert b"hunter2" not in text, path
        assert b"k3y" not in text, path


def test_an_absent_server_is_found_before_anything_is_loaded(
    settings: Any, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo, "load_for_training", None)
    config = flags_of(settings, prompts_file, "run", f"http://127.0.0.1:{free_port()}")
    for stage in (plan, ppo):
        with pytest.raises(RewardError, match="nothing listens there"):
            stage.run(config)
