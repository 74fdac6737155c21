"""Keys and values of a batch of answers in memory that is laid out once.

transformers' own cache makes a new copy of everything for each token. Here a token is written into its place, and the
place of an answer that has ended is taken by the batch's last one.

Shapes: B answers, L tokens of the longest prompt, H key-value heads, D their size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


def every_layer_sees_everything(config: Any) -> bool:
    """Whether all layers are plain attention: no window that moves, no state that is not keys and values."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


class AnswerCache(Cache):
    """A transformers cache for a batch of answers.

    Args:
        layers: how many.
        places: [B, L] where in a line of prompts the tokens of each answer's prompt stand, at the right end of its row.
        room: most tokens that follow the prompts.
    """

    def __init__(self, layers: int, places: Tensor, room: int) -> None:
        super().__init__(layers=[_Layer(places, room) for _ in range(layers)])

    def move(self, moves: list[tuple[int, int]], count: int) -> None:
        """Put row ``a`` in the place of row ``b`` for each (a, b); then the first ``count`` rows are left."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                for a, b in moves:
                    states[b, :, : layer.filled] = states[a, :, : layer.filled]
            layer.rows = count


class _Layer(DynamicLayer):
    def __init__(self, places: Tensor, room: int) -> None:
        super().__init__()
        self.places = places
        self.room = room
        self.rows = len(places)
        self.filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The first call brings the prompts as a line, whose attention needs nothing else; later ones one token each.

        Args:
            key_states, value_states: [1, H, N, D] of a line of N tokens, then [B, H, 1, D].

        Returns:
            The line as it is, then all there is of each answer, [B, H, tokens so far, D].
        """
        if self.filled == 0:
            self.keys, self.values = (self._spread(states) for states in (key_states, value_states))
            self.filled = self.places.shape[1]
            self.is_initialized = True
            return key_states, value_states
        self.keys[: self.rows, :, self.filled] = key_states[:, :, 0]
        self.values[: self.rows, :, self.filled] = value_states[:, :, 0]
        self.filled += 1
        return self.keys[: self.rows, :, : self.filled], self.values[: self.rows, :, : self.filled]

    def _spread(self, line: Tensor) -> Tensor:
        height, width = self.places.shape
        _, heads, _, depth = line.shape
        cells = line.new_empty(height, heads, width + self.room, depth)
        rows = line[0].index_select(1, self.places.flatten()).view(heads, height, width, depth)
        cells[:, :, :width] = rows.transpose(0, 1)
        return cells

    def get_seq_length(self) -> int:
        return self.filled
