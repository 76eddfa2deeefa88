"""Random numbers for searches: the same on every machine."""

from __future__ import annotations

import numpy as np

from epbackend.placement.compiled.jit import inner


@inner
def below(random_1, limit):
    """The next random number in [0, limit), by SplitMix64 (Steele, Lea, Flood 2014)."""
    random_1[0] += np.uint64(0x9E3779B97F4A7C15)
    mixed = random_1[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((mixed ^ (mixed >> np.uint64(31))) % np.uint64(limit))
