"""Scores of a reward model: the same text gets the same number in training, in PPO and afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhfkit.chat.messages import Message
from rlhfkit.config.blocks import Quantize
from rlhfkit.data.batch import split_by_tokens
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import LoadedModel, load_model, load_text_side
from rlhfkit.models.wrappers import RewardModel


class ScoreBatch(NamedTuple):
    """Right-padded whole conversations."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]


def pad_rows(rows: Sequence[NDArray[np.int32]], pad_id: int, device: torch.device) -> ScoreBatch:
    """Rows of ids as a batch; ``pad_id`` only fills."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ScoreBatch(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))


class RewardScorer:
    """A reward-model folder, ready to score text.

    Text goes through the reward model's own template and tokenizer, so it may be of another family than the policy.

    Args:
        path: folder or hub id of a reward model, full or LoRA.
        device: where it computes.
        dtype: number format of its weights and computation.
        quantize: storage of its base.
        micro_batch_tokens: most tokens in one pass.

    Raises:
        ModelError: no reward head in there; see also `load_model`.
    """

    def __init__(
        self,
        path: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantize: Quantize = "none",
        micro_batch_tokens: int = 4096,
        trust_remote_code: bool = False,
    ) -> None:
        source = open_model(path)
        self.text = load_text_side(source, trust_remote_code=trust_remote_code)
        self.loaded: LoadedModel = load_model(
            source, self.text, "reward", lora=None, dtype=dtype, quantize=quantize, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        self.module = RewardModel(self.loaded.model).eval()
        if quantize == "none":
            self.module.to(device)
        self.device = device
        self.autocast = None if dtype == torch.float32 else dtype
        self.max_length = int(source.record.get("max_length") or source.config.get("max_position_embeddings") or 4096)
        self.micro_batch_tokens = micro_batch_tokens

    def encode(self, prompt: Sequence[Message], answer: str) -> NDArray[np.int32]:
        """Ids of a conversation, its beginning cut off where it is too long."""
        prompt_ids, answer_ids = self.text.encoder.encode_pair(prompt, answer)
        answer_ids = answer_ids[: self.max_length - 1]
        prompt_ids = prompt_ids[max(0, len(prompt_ids) + len(answer_ids) - self.max_length) :]
        return np.asarray([*prompt_ids, *answer_ids], dtype=np.int32)

    def score(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[float]:
        """One score per answer, in their order; neither order nor batching changes it beyond rounding."""
        return self.score_rows([self.encode(p, a) for p, a in zip(prompts, answers, strict=True)])

    @torch.no_grad()
    def score_rows(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        """Scores of conversations that are ids already."""
        scores = [0.0] * len(rows)
        for group in split_by_tokens([len(row) for row in rows], self.micro_batch_tokens):
            batch = pad_rows([rows[i] for i in group], self.text.tokens.pad_id, self.device)
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                found = self.module(*batch).tolist()
            for i, score in zip(group, found, strict=True):
                scores[i] = score
        return scores
