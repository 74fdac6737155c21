"""A reward model behind HTTP: the reference for what ``--reward http://...`` asks. docs/rewards.md has the schema."""

from __future__ import annotations

import json
import math
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_args

from rlhfkit import __version__
from rlhfkit.chat.messages import Message, Role, message_with_input
from rlhfkit.config.stages import ScoreConfig
from rlhfkit.errors import ConfigError, RlhfkitError
from rlhfkit.models.precision import DTYPES, current_device
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.runtime.screen import Screen, quiet_libraries

PATHS = ("/", "/score")
ROLES = get_args(Role)
LARGEST_BODY = 256 * 2**20
IDLE_SECONDS = 60  # of a connection that says nothing


def run(config: ScoreConfig, *, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM; a batch that is being scored is finished first.

    Raises:
        ModelError: no reward model there.
        ConfigError: an address that cannot be had.
    """
    quiet_libraries()
    screen = Screen()
    # As in `score`: in float32, scores hardly depend on what they are computed beside.
    precision = "fp32" if config.precision == "auto" else config.precision
    _refuse_address(host, port)
    scorer = RewardScorer(
        config.model,
        device=current_device(),
        dtype=DTYPES[precision],
        quantize=config.quantize,
        max_length=config.max_length,
        micro_batch_tokens=config.micro_batch_tokens,
        trust_remote_code=config.trust_remote_code,
    )
    for note in [*scorer.text.notes, *scorer.loaded.notes]:
        screen.line(f"  {note}")
    with RewardServer((host, port), scorer, screen, {"model": config.model, "precision": precision}) as server:
        screen.line(f"serving {config.model} ({scorer.device.type}, {precision}) at {server.url}; Ctrl-C ends it")
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job is started with the first ignored
            signal.signal(number, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            with server.scoring:  # the batch in work
                screen.line(f"ended after {server.answers:,} answers")


def _refuse_address(host: str, port: int) -> None:
    """Find out before the model is loaded whether a server can listen there.

    Raises:
        ConfigError: it cannot.
    """
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise _cannot_listen(host, port, error) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _cannot_listen(host: str, port: int, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot listen at {host}, port {port}: {error}",
        hint="give another --port (0 takes a free one), or a --host of this machine",
    )


class RewardServer(ThreadingHTTPServer):
    """Threads take requests; one at a time scores.

    Args:
        address: host and port, 0 for any free one.
        scorer: the reward model.
        screen: gets a line for each request.
        facts: what ``/health`` says beside its own.

    Raises:
        ConfigError: the address cannot be had.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], scorer: RewardScorer, screen: Screen, facts: dict[str, Any]) -> None:
        self.scorer, self.screen = scorer, screen
        self.facts = {"status": "ok", "rlhfkit": __version__, **facts, "max_length": scorer.max_length}
        self.scoring = threading.Lock()
        self.answers = 0
        self.address_family = _family(address[0])
        try:
            super().__init__(address, Handler)
        except (OSError, OverflowError) as error:
            raise _cannot_listen(*address, error) from error

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name service for this machine's name and may wait long for it.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}/score"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no fault here."""

    def score(self, conversations: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[float]:
        """Scores; empty for nothing.

        Raises:
            RlhfkitError: a text that the model's template refuses.
            FloatingPointError: a score that is no number.
        """
        started = time.perf_counter()
        with self.scoring:
            scores = self.scorer.score(conversations, answers) if answers else []
            self.answers += len(answers)
        if bad := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
            raise FloatingPointError(f"the score of response {bad[0]} is {scores[bad[0]]}")
        self.screen.line(f"{len(answers):,} answers in {time.perf_counter() - started:.2f} s")
        return scores


class Handler(BaseHTTPRequestHandler):
    """POST /score, GET /health."""

    server: RewardServer
    server_version = f"rlhfkit/{__version__}"
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        if self.path == "/health":
            self._say(200, self.server.facts)
        else:
            self._fault(404, f"no {self.path} here: POST /score, GET /health")

    def do_POST(self) -> None:
        body = self._body()
        if body is None:
            return
        if self.path.partition("?")[0] not in PATHS:
            self._fault(404, f"no {self.path} here: POST /score, GET /health")
            return
        try:
            conversations, answers = read_request(body)
            self._say(200, {"scores": self.server.score(conversations, answers)})
        except (ValueError, RlhfkitError) as error:
            self._fault(400, str(error))
        except Exception as error:
            self._fault(500, f"{type(error).__name__}: {error}")

    def _body(self) -> bytes | None:
        """The body; None where there is none to be had, which has been said then."""
        try:
            size = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            size = -1
        if not 0 <= size <= LARGEST_BODY:
            self.close_connection = True  # whatever comes now is no new request
            status = 411 if size < 0 else 413
            self._fault(status, f"a body needs a Content-Length of at most {LARGEST_BODY}")
            return None
        return self.rfile.read(size)

    def _fault(self, status: int, message: str) -> None:
        self.server.screen.line(f"status {status} to {self.client_address[0]}: {message}")
        self._say(status, {"error": message})

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """What is worth a line has one already."""


def read_request(body: bytes) -> tuple[list[list[Message]], list[str]]:
    """Conversations and answers of a posted body.

    Raises:
        ValueError: it is not of the schema; says where.
    """
    try:
        asked = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the body is no JSON: {error}") from error
    if not isinstance(asked, dict):
        raise ValueError(f"the body is a {type(asked).__name__}, not an object")
    answers = asked.get("responses")
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise ValueError("'responses' is to be a list of strings")
    name = "messages" if "messages" in asked else "prompts"
    prompts = asked.get(name)
    if not isinstance(prompts, list) or len(prompts) != len(answers):
        raise ValueError(f"'{name}' is to be a list with one item for each of the {len(answers)} responses")
    return [_conversation(prompt, f"{name}[{i}]") for i, prompt in enumerate(prompts)], answers


def _conversation(prompt: Any, where: str) -> list[Message]:
    if where.startswith("prompts"):
        if not isinstance(prompt, str):
            raise ValueError(f"{where} is no string")
        return [Message("user", prompt)]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{where} is no list of messages")
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}[{i}] has no text under 'content'")
        if message.get("role") not in get_args(Role):
            raise ValueError(
                f"{where}[{i}] has the role {message.get('role')!r}; there are {', '.join(get_args(Role))}"
            )
    return [message_with_input(message["role"], message["content"], message.get("input")) for message in prompt]
