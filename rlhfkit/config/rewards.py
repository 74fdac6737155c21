"""What ``--reward`` takes: a reward-model folder, ``file.py:function`` or a URL, each optionally ``=weight``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from rlhfkit.errors import ConfigError

HOW = "write FOLDER, path/to/file.py:function or http://host:port/path, each optionally =weight"
_URL = re.compile(r"""(https?://)(?:[^\s/@'"]*@)?([^\s?'"]*)(\?[^\s'"]*)?""", re.IGNORECASE)
_HOST = re.compile(r"[\w.-]+:\d+(/|$)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """One reward source as the user named it; its scores are multiplied by ``weight``."""

    kind: Literal["model", "function", "url"]
    name: str
    weight: float = 1.0

    @property
    def label(self) -> str:
        """Its name for messages: what may be secret in a URL is left out."""
        if self.kind != "url":
            return self.name
        parts = urlsplit(self.name)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def parse_reward(spec: str) -> RewardSpec:
    """A reward source from its spec.

    An existing path that holds a ``=`` is taken whole. In a URL's query ``x=1`` is a parameter, and the weight stands
    after one more ``=``: ``http://host/score?x=1=0.5``.

    Raises:
        ConfigError: no name, a weight that is no number or 0, a URL without a host, or a file without a function.
    """
    name, equals, weight = spec.rpartition("=")
    is_url = spec.lower().startswith(("http://", "https://"))
    parameter = is_url and "?" in spec and "=" not in name.rpartition("?")[2].rpartition("&")[2]
    if not equals or parameter or not (_NUMBER.fullmatch(weight) or not is_url) or Path(spec).expanduser().exists():
        name, weight = spec, "1"
    if not is_url and _is_function(spec):
        name, weight = spec, "1"
    if not name:
        raise ConfigError(f"the reward '{spec}' has no name", hint=HOW)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise ConfigError(f"the reward '{spec}': its weight '{weight}' is not a number other than 0", hint=HOW)
    if not is_url and name.endswith(".py"):
        raise ConfigError(
            f"the reward '{spec}' is a Python file without the name of a function", hint=f"write it as {name}:function"
        )
    if not is_url and _HOST.match(name) and not Path(name).expanduser().exists():
        raise ConfigError(f"the reward '{spec}' is no URL: it has no http://", hint=f"write it as http://{name}")
    if not is_url:
        return RewardSpec("function" if _is_function(name) else "model", name, value)
    try:
        parts = urlsplit(name)
        if not parts.hostname or parts.port == 0:
            raise ValueError("it names no host")
    except ValueError as error:
        raise ConfigError(f"the reward '{spec}' is no URL: {error}", hint=HOW) from error
    return RewardSpec("url", name, value)


def _is_function(name: str) -> bool:
    path, _, function = name.rpartition(":")
    return path.endswith(".py") and function.isidentifier()


def without_secrets(text: str) -> str:
    """A text whose URLs have lost user, password and query: for what leaves the run folder or is shown."""
    return _URL.sub(lambda found: found[1] + found[2] + ("?..." if found[3] else ""), text)


def short_names(specs: Sequence[RewardSpec]) -> list[str]:
    """A name of each source for the log: the last part of its path where that tells them apart, else all of it."""
    for names in ([_last_part(spec) for spec in specs], [spec.label for spec in specs]):
        if len(set(names)) == len(names):
            return names
    return [f"{spec.label}#{i}" for i, spec in enumerate(specs, start=1)]  # they differ in what is not shown


def _last_part(spec: RewardSpec) -> str:
    if spec.kind == "url":
        return spec.label.partition("://")[2].rstrip("/")
    return Path(spec.name).name
