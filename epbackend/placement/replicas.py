"""How many copies of each expert."""

from __future__ import annotations

import numpy as np

from epbackend.errors import ConfigError


def optimal_copies(weight_E: np.ndarray, slots: int, max_copies: int | None = None) -> np.ndarray:
    """Copies of each expert, int64 [E], adding up to `slots`, that minimise the largest weight of a copy.

    One at a time to the expert whose copies weigh most, which is optimal; of equal ones, to the first. No expert gets
    more than `max_copies`: the ranks, where no rank is to hold two. Raises ConfigError where the slots do not fit.
    """
    from epbackend.placement.compiled.packing import optimal_copies as compiled

    weight_E = np.asarray(weight_E, dtype=np.float64)
    most = slots if max_copies is None else max_copies
    if not weight_E.size <= slots <= weight_E.size * most:
        raise ConfigError(
            f"slots: {slots} do not fit {weight_E.size} experts of 1 to {most} copies; "
            f"use {weight_E.size} to {weight_E.size * most}"
        )
    return compiled(weight_E, np.argsort(-weight_E, kind="stable"), slots, most)
