"""What a token split knows of a layer's copies, as one source of tokens sees them.

A source is a group of ranks that hold the same tokens. E experts, C copies of the one that has most, G sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from epbackend.placement.layout import Layout

Split = Callable[[Tensor], Tensor]
"""topk_ids_TK (logical) -> slot_ids_TK (int64)."""


@dataclass(frozen=True, eq=False)
class EvenCopies:
    """Copies that share their expert's tokens equally, or in numbers that differ by one: `placement.split.even`."""

    slot_ids_EC: np.ndarray
    """int64: the slots of each expert, -1 past the last one."""
    takes_EC: np.ndarray
    """bool: the copies that take tokens of this source, one for each expert at least."""
    turn: int = 0
    """Who gets one more in the first call. It moves on with every call: a step of decoding has few choices of an
    expert, often one, which would always go to the same copy."""

    @property
    def takers_E(self) -> np.ndarray:
        """int64: how many copies take tokens."""
        return self.takes_EC.sum(axis=1)

    @property
    def place_EC(self) -> np.ndarray:
        """int64: the place of each copy in the queue for one more; -1 where it takes none."""
        start_E = self.turn + np.cumsum(self.takers_E > 1)
        place_EC = (self.takes_EC.cumsum(axis=1) - 1 - start_E[:, None]) % self.takers_E[:, None]
        return np.where(self.takes_EC, place_EC, -1)


@dataclass(frozen=True, eq=False)
class LevelCopies:
    """Copies that take what levels the ranks' loads: `placement.split.level`."""

    slot_ids_EC: np.ndarray
    """int64: the slots of each expert, -1 past the last one."""
    layout: Layout
    """The same slots with their ranks."""
    by_source: Layout
    """The same slots, each source's ranks taken together."""
    source: int
    node_sources: int
    """Sources of a node, which share tokens among themselves first; 0: all are one node."""
    gather: Callable[[Tensor], Tensor] | None
    """counts_E of this source -> counts_GE of all; None: there is no other. All sources call it together."""
