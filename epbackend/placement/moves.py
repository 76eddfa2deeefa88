"""What it takes to get from one placement to another: the experts that each rank does not hold yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.layout import Layout
from epbackend.placement.placement import Placement


@dataclass(frozen=True, eq=False)
class Moves:
    """Experts that ranks must receive. What a rank already holds, in whichever slot, costs nothing."""

    received_LR: np.ndarray
    """Experts that each rank receives in each of the layers that were compared, int64."""
    slots: int
    """Slots of those layers in the new placement."""

    @property
    def total(self) -> int:
        """Over all layers and ranks."""
        return int(self.received_LR.sum())

    @property
    def share(self) -> float:
        """Part of the slots that change, 0 to 1."""
        return self.total / self.slots if self.slots else 0.0

    def bytes_R(self, expert_bytes: int) -> np.ndarray:
        """Bytes that each rank receives, int64, where an expert's weights take `expert_bytes` in each layer."""
        return self.received_LR.sum(axis=0) * expert_bytes


def count_moves(before: Placement, after: Placement, layers: Sequence[int] | None = None) -> Moves:
    """Compares the given layers, e.g. `loads.loaded_layers`; all of them unless given.

    Raises ConfigError for placements of different models or ranks.
    """
    for name, old, new in (
        ("layers", len(before.layers), len(after.layers)),
        ("ranks", before.ranks, after.ranks),
        ("experts", before.experts, after.experts),
    ):
        if old != new:
            raise ConfigError(
                f"{name}: one placement has {old}, the other {new}; compare placements of one model and ranks"
            )
    chosen = range(len(after.layers)) if layers is None else layers
    received = [
        (_held_RE(after.layers[layer]) & ~_held_RE(before.layers[layer])).sum(axis=1) for layer in chosen
    ]
    received_LR = np.array(received, dtype=np.int64).reshape(len(chosen), after.ranks)
    return Moves(received_LR, sum(after.layers[layer].slots for layer in chosen))


def _held_RE(layout: Layout) -> np.ndarray:
    """Which rank holds which expert, bool [R, E]."""
    held_RE = np.zeros((layout.ranks, layout.experts), dtype=bool)
    held_RE[layout.rank_of_slot_P, layout.slot_to_expert_P] = True
    return held_RE
