"""The three kinds of reward that `--reward` takes, and their weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhfkit.config.load import load_config
from rlhfkit.config.rewards import RewardSpec, parse_reward, short_names
from rlhfkit.config.stages import PpoConfig
from rlhfkit.errors import ConfigError


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("runs/rm/final", ("model", "runs/rm/final", 1)),
        ("owner/name=0.5", ("model", "owner/name", 0.5)),
        ("r.py:f", ("function", "r.py:f", 1)),
        ("r.py:f=2", ("function", "r.py:f", 2)),
        ("a=b/r.py:f", ("function", "a=b/r.py:f", 1)),
        ("a=b/r.py:f=-1e-1", ("function", "a=b/r.py:f", -0.1)),
        ("http://host", ("url", "http://host", 1)),
        ("http://host=.5", ("url", "http://host", 0.5)),
        ("http://host:8000/score=0.5", ("url", "http://host:8000/score", 0.5)),
        ("http://host:8000/score?x=1", ("url", "http://host:8000/score?x=1", 1)),
        ("http://host:8000/score?x=1=0.5", ("url", "http://host:8000/score?x=1", 0.5)),
        ("https://host/s?a=1&b=2", ("url", "https://host/s?a=1&b=2", 1)),
        ("https://host/s?a=1&b=2=3", ("url", "https://host/s?a=1&b=2", 3)),
        ("https://host/s?key=QUJD==", ("url", "https://host/s?key=QUJD==", 1)),
        ("http://host/a=b", ("url", "http://host/a=b", 1)),
        ("http://host/a=b=2", ("url", "http://host/a=b", 2)),
    ],
)
def test_specs(spec: str, found: tuple[str, str, float]) -> None:
    assert parse_reward(spec) == RewardSpec(*found)


def test_a_folder_whose_name_holds_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "lr=0.5").mkdir()
    assert parse_reward(f"{tmp_path}/lr=0.5") == RewardSpec("model", f"{tmp_path}/lr=0.5", 1)
    assert parse_reward(f"{tmp_path}/lr=0.5=2") == RewardSpec("model", f"{tmp_path}/lr=0.5", 2)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rm=much", "its weight 'much' is not a number other than 0"),
        ("rm=", "its weight '' is not a number"),
        ("rm=0", "its weight '0' is not"),
        ("http://host/score=nan", "its weight 'nan' is not"),
        ("=2", "has no name"),
        ("", "has no name"),
        ("http://:80/x", "is no URL: it names no host"),
        ("http://host:port/x", "is no URL: Port could not be cast"),
        ("127.0.0.1:8000/score", r"is no URL: it has no http://\n.*write it as http://127.0.0.1:8000/score"),
        ("host:8000=2", r"is no URL: it has no http://\n.*write it as http://host:8000"),
        ("a/rewards.py", r"Python file without the name of a function\n.*write it as a/rewards.py:function"),
    ],
)
def test_bad_specs(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_reward(spec)


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        (["runs/rm/final", "rewards.py:f"], ["final", "rewards.py:f"]),
        (["runs/a/final", "runs/b/final"], ["runs/a/final", "runs/b/final"]),
        (["a/r.py:f", "b/r.py:f"], ["a/r.py:f", "b/r.py:f"]),
        (["http://me:secret@host:80/score?key=secret"], ["host:80/score"]),
        (["http://host/s?m=a", "http://host/s?m=b"], ["http://host/s#1", "http://host/s#2"]),
    ],
)
def test_names_for_the_log_differ_and_hold_no_secret(specs: list[str], names: list[str]) -> None:
    assert short_names([parse_reward(spec) for spec in specs]) == names


@pytest.mark.parametrize(
    ("rewards", "more", "words"),
    [
        (["rm=x", "=3"], {}, r"ppo.reward: the reward 'rm=x'(.|\n)*ppo.reward: the reward '=3' has no name"),
        (["rm=1", "rm=2"], {}, "ppo.reward: rm is given twice"),
        (["rm"], {"ppo.reward_timeout": 5}, "ppo.reward_timeout: has no effect without a reward that is a URL"),
        (["r.py:f"], {"ppo.reward_retries": 1}, "ppo.reward_retries: has no effect without"),
    ],
)
def test_faults_stand_with_the_others(rewards: list[str], more: dict[str, object], words: str) -> None:
    flags = {"model.path": "m", "data.train": ["d"], "ppo.reward": rewards, **more}
    with pytest.raises(ConfigError, match=words):
        load_config(PpoConfig, flags=flags)
