"""Rewards over HTTP, the side that asks. `rlhfkit.stages.serve_reward` is a server; docs/rewards.md has the schema."""

from __future__ import annotations

import base64
import http.client
import json
import math
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from rlhfkit import __version__
from rlhfkit.chat.messages import last_user_text
from rlhfkit.config.rewards import RewardSpec
from rlhfkit.data.records import PromptRecord
from rlhfkit.errors import RewardError

ANSWERS_PER_REQUEST = 64
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before another try; doubled each time
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that another try may end
_AS_THEY_ARE = "/%:@!$&'()*+,;=~?-._"  # in a URL's path and query
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class HttpReward:
    """Scores from a server: a JSON object of prompts and answers is posted, one of scores comes back.

    Args:
        spec: the URL; a user and password in it are sent as basic authentication.
        timeout: seconds a server may be silent.
        retries: further tries after a failure that may pass.
        columns: the names of the rows' other fields that are always posted; those of the rows in a request are, too.
        say: shows a line when something is tried again.
        pause: waits that many seconds.
    """

    def __init__(
        self,
        spec: RewardSpec,
        *,
        timeout: float,
        retries: int,
        columns: Collection[str] = (),
        say: Callable[[str], None] = lambda words: None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.label, self._columns, self._say = spec.label, columns, say
        self.timeout, self.retries, self._pause = timeout, retries, pause
        parts = urlsplit(spec.name)
        path, query = (quote(part, safe=_AS_THEY_ARE) for part in (parts.path, parts.query))
        self._url = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, query, ""))
        self._headers = {"Content-Type": "application/json", "User-Agent": f"rlhfkit/{__version__}"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        # A proxy of the environment is for the world outside, not for a server on this machine.
        handlers = [urllib.request.ProxyHandler({})] if parts.hostname in LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirects, *handlers)

    def score(self, records: Sequence[PromptRecord], answers: Sequence[str]) -> list[Any]:
        """What the server says of each answer, unchecked.

        Raises:
            RewardError: no answer after all tries, a status that is no success, or a body that is not of the schema.
        """
        scores: list[Any] = []
        for start in range(0, len(answers), ANSWERS_PER_REQUEST):
            part = slice(start, start + ANSWERS_PER_REQUEST)
            found = self._ask(request_body(records[part], answers[part], self._columns))
            count = len(answers[part])
            if len(found) != count:
                raise RewardError(f"the reward {self.label} returned {len(found)} scores for {count} answers")
            scores += found
        return scores

    def _ask(self, body: bytes) -> list[Any]:
        for attempt in range(self.retries + 1):
            try:
                return self._scores(self._post(body))
            except _PassingError as error:
                failure = error
            if attempt < self.retries:
                seconds = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
                self._say(f"the reward {self.label} {failure}; retry {attempt + 1} of {self.retries} in {seconds:g} s")
                self._pause(seconds)
        tries = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise RewardError(
            f"the reward {self.label} {failure} (tried {tries})",
            hint="see whether the server runs and its log; more patience: --reward-timeout SECONDS, --reward-retries N",
        ) from failure

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self._url, data=body, headers=self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                found: bytes = response.read()
                return found
        except urllib.error.HTTPError as error:
            with error:
                said = _start_of(_beginning(error))
            words = f"answered with status {error.code} {error.reason}" + (f": {said}" if said else "")
            if error.code in PASSING:
                raise _PassingError(words) from error
            raise RewardError(
                f"the reward {self.label} {words}", hint="the path and the schema are in docs/rewards.md"
            ) from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise _PassingError(failure_words(error, self.timeout)) from error

    def _scores(self, body: bytes) -> list[Any]:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self._not_of_the_schema(f"not JSON: {_start_of(body) or 'an empty body'}") from error
        if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
            raise self._not_of_the_schema(f"JSON without a list of scores: {_start_of(body)}")
        scores: list[Any] = answer["scores"]
        return scores

    def _not_of_the_schema(self, found: str) -> RewardError:
        return RewardError(
            f"the reward {self.label} answered with {found}", hint='it has to answer {"scores": [0.5, ...]}'
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without the answers, and take the password to another server."""

    def redirect_request(self, *given: Any) -> None:
        return None


def _beginning(error: urllib.error.HTTPError) -> bytes:
    """Of what a server says about its failure; it may fall silent over that, too."""
    try:
        return bytes(error.read(2000))
    except (OSError, http.client.HTTPException):
        return b""


class _PassingError(Exception):
    """A failure that another try may end."""


def check_reachable(spec: RewardSpec, timeout: float) -> None:
    """Find out before any model is loaded that somebody listens there. Nothing is sent.

    Raises:
        RewardError: nobody does.
    """
    parts = urlsplit(spec.name)
    host = parts.hostname or ""
    if host not in LOOPBACK and parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return  # the proxy will know the way; from here there may be none
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=timeout).close()
    except OSError as error:
        raise RewardError(
            f"the reward {spec.label} {failure_words(error, timeout)}",
            hint="start the server first; for a reward model of ours: rlhfkit serve-reward FOLDER",
        ) from error


def request_body(records: Sequence[PromptRecord], answers: Sequence[str], columns: Collection[str]) -> bytes:
    """The JSON that is posted."""
    names = sorted({*columns, *(name for record in records for name in record.columns)})
    body = {
        "messages": [[m.with_input() for m in record.prompt] for record in records],
        "prompts": [last_user_text(record.prompt) for record in records],
        "responses": list(answers),
        "columns": {name: [_plain(record.columns.get(name)) for record in records] for name in names},
    }
    return json.dumps(body, default=str).encode()


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity, and tables that were read from files may hold them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def failure_words(error: BaseException, timeout: float) -> str:
    """What went wrong on the way, for a sentence that begins with the server's name."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"did not answer within {timeout:g} s"
    if isinstance(cause, ConnectionRefusedError):
        return "refused the connection: nothing listens there"
    if isinstance(cause, socket.gaierror):
        return f"is at no host that is known here: {cause.strerror}"
    if isinstance(cause, (http.client.IncompleteRead, http.client.RemoteDisconnected, ConnectionResetError)):
        return "broke off before its answer was whole"
    return f"could not be asked: {type(cause).__name__}: {cause}"


def _start_of(body: bytes) -> str:
    text = " ".join(body.decode("utf-8", errors="replace").split())
    return text if len(text) <= 200 else text[:200] + "..."
