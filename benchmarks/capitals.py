"""A rule as a reward, with a known optimum: the share of an answer's words that begin with a capital letter, at most 1.

rlhfkit ppo --reward benchmarks/capitals.py:reward
"""

from __future__ import annotations


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    words = [response.split() for response in responses]
    return [sum(word[0].isupper() for word in found) / max(1, len(found)) for found in words]
