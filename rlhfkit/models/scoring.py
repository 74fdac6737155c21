"""Scores of a reward model: the same text gets the same number in training, in PPO and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlhfkit.chat.messages import Message
from rlhfkit.config.blocks import Kernels, Quantize
from rlhfkit.data.packing import Packed, Tree, group_by_tokens, join, pack, part_ends
from rlhfkit.data.tokenize import fit_answers
from rlhfkit.errors import ConfigError, ModelError
from rlhfkit.models.adapters import REWARD, add_frozen_adapter, fits_on
from rlhfkit.models.folder import RECORD, ModelSource, open_model
from rlhfkit.models.heads import no_head, stored_head
from rlhfkit.models.load import LoadedModel, load_model
from rlhfkit.models.text_side import load_text_side
from rlhfkit.models.wrappers import AdapterRewardModel, RewardModel

POOLING = "last_token"  # where a score is read; written into the record of a reward model


class ScoreBatch(NamedTuple):
    """Whole conversations and where each ends in the line."""

    tokens: Packed
    last: Tensor  # [A]


def collate_conversations(trees: Sequence[Tree], device: torch.device) -> ScoreBatch:
    """One score for each branch, or for the trunk where there is none."""
    last = [end - 1 for trunk_end, ends in part_ends(trees) for end in ends or [trunk_end]]
    return ScoreBatch(pack(trees).to(device), torch.tensor(last, device=device))


class RewardScorer:
    """A reward-model folder, ready to score text.

    Text goes through the reward model's own template and tokenizer, so it may be of another family than the policy.

    Args:
        path: folder or hub id of a reward model, full or LoRA.
        device: where it computes.
        dtype: number format of its weights and computation.
        quantize: storage of its base; ``auto`` is as it was trained: an adapter fits the base it was trained on.
        max_length: longest row in tokens; 0 is what it was trained with.
        micro_batch_tokens: most tokens in one pass.
        packing, kernels: as in `load_model`; on a policy's base they are the policy's.
        policy: a LoRA policy, whose base the reward model uses if it is an adapter on the same one, stored alike.

    Raises:
        ModelError: no reward head in there, or a score that is read elsewhere than we do; see also `load_model`.
    """

    def __init__(
        self,
        path: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantize: Quantize | Literal["auto"] = "auto",
        max_length: int = 0,
        micro_batch_tokens: int = 4096,
        trust_remote_code: bool = False,
        packing: bool = True,
        kernels: Kernels = "auto",
        policy: LoadedModel | None = None,
    ) -> None:
        source = open_model(path)
        if (pooling := source.record.get("pooling", POOLING)) != POOLING:
            raise ModelError(
                f"{path}/{RECORD} says that its score is pooled by '{pooling}'; this version knows '{POOLING}' alone",
                hint="score it with the version that trained it: " + str(source.record.get("rlhfkit", "unknown")),
            )
        self.quantize: Quantize = source.record.get("quantize", "none") if quantize == "auto" else quantize
        self.source = source
        self.text = load_text_side(source, trust_remote_code=trust_remote_code)
        # An adapter makes up for the rounding of the base it was trained on: on another storage it scores otherwise.
        same_base = policy is not None and fits_on(policy, source)
        self.shared = policy is not None and same_base and policy.quantize == self.quantize
        self.other_storage = same_base and not self.shared
        if policy is not None and self.shared:
            self.loaded = policy
            self.module: nn.Module = _on_base_of(policy, source, device)
        else:
            self.loaded = load_model(
                source, self.text, "reward", lora=None, dtype=dtype, quantize=self.quantize, device=device,
                trust_remote_code=trust_remote_code, packing=packing, kernels=kernels,
            )  # fmt: skip
            self.module = RewardModel(self.loaded.model).eval()
            if self.quantize == "none":
                self.module.to(device)
        self.device = device
        self.autocast = None if dtype == torch.float32 else dtype
        positions = source.positions
        if positions and max_length > positions:
            raise ConfigError(
                f"max_length: {max_length} is more than the {positions} positions of {path}",
                hint=f"give --max-length {positions} or less",
            )
        self.max_length = max_length or int(source.record.get("max_length") or positions or 4096)
        self.micro_batch_tokens = micro_batch_tokens
        self.cut: list[bool] = []  # of each answer scored last: whether its conversation was too long to be read whole

    def encode(self, prompt: Sequence[Message], answer: str) -> NDArray[np.int32]:
        """Ids of a conversation, cut as `fit_answers` says for an answer that is compared with no other."""
        return self._fitted(*self.text.encoder.encode_pair(prompt, answer))

    def _fitted(self, prompt: Sequence[int], answer: Sequence[int]) -> NDArray[np.int32]:
        prompt_kept, (answer_kept,) = fit_answers(prompt, [answer], self.max_length)
        return np.asarray([*prompt_kept, *answer_kept], dtype=np.int32)

    def score(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[float]:
        """One score per answer, in their order; notes in ``cut`` whose conversation was cut."""
        pairs = [self.text.encoder.encode_pair(p, a) for p, a in zip(prompts, answers, strict=True)]
        self.cut = [len(prompt) + len(answer) > self.max_length for prompt, answer in pairs]
        return self.score_rows([self._fitted(*pair) for pair in pairs])

    @torch.no_grad()
    def score_rows(self, rows: Sequence[NDArray[np.int32]], tick: Callable[[], None] = lambda: None) -> list[float]:
        """Scores of conversations that are ids already.

        Neither the order of the rows nor their repetition changes a bit of a score; which other rows there are, and
        ``micro_batch_tokens``, change its rounding.

        Args:
            rows: token ids.
            tick: called once for each row when it has its score.
        """
        # Equal rows are computed once, and what shares a pass depends on the rows alone, not on their order.
        places: dict[bytes, list[int]] = {}
        for i, row in enumerate(rows):
            places.setdefault(row.tobytes(), []).append(i)
        same = [places[key] for key in sorted(places)]
        scores = [0.0] * len(rows)
        for group in group_by_tokens([(len(rows[i[0]]), 1, len(rows[i[0]])) for i in same], self.micro_batch_tokens):
            batch = collate_conversations([join([rows[same[g][0]] for g in group])], self.device)
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                found = self.module(*batch).tolist()
            for g, score in zip(group, found, strict=True):
                for i in same[g]:
                    scores[i] = score
                    tick()
        return scores


def _on_base_of(policy: LoadedModel, source: ModelSource, device: torch.device) -> AdapterRewardModel:
    """A reward model's adapter beside the policy's."""
    weight = stored_head(source.adapter) if source.adapter is not None else None
    if source.adapter is None or weight is None:
        raise no_head(source)
    name = next(name for i in range(99) if (name := f"{REWARD}_{i}" if i else REWARD) not in policy.model.peft_config)
    add_frozen_adapter(policy.model, source.adapter, name)
    head = nn.Linear(weight.shape[1], 1, bias=False, device=device)
    with torch.no_grad():
        head.weight.copy_(weight)
    return AdapterRewardModel(policy.model, name, head.requires_grad_(False))
