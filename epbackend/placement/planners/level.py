"""`refined` for the `level` split: one layer whose replicas connect the ranks, so that any batch can be levelled.

Under `even` a replica halves what a rank gets of an expert. Under `level` it is a road between ranks: what matters is
that no group of ranks is cut off from the others, and that the roads are wide, which replicas of heavy experts are.

1. Several answers: the one for the `even` split, and layers that connect ranks (`level_search.connect`), some with
   more roads and some with lighter replicas.
2. The best of them is searched on (`level_search.climb`): random changes stay by which the mean load, or batches drawn
   around it, are levelled better. Drawn batches are over-dispersed (`noise.py`), and the windows take turns.
3. A search fits the batches that it has seen, so whether its layer is taken is decided by others.

With `search_ms` the search goes on, each time with new batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from epbackend.placement.synthetic import CONCENTRATION

FORMS = ((1.0, False), (1.0, True), (1.25, True), (1.5, False), (1.5, True))
"""Steepness of the replicas, and whether their ranks form a chain: see `search.level_search.connect`."""

BATCHES = 24
MEAN_WEIGHT = 2.0
"""Of the mean load, against all drawn batches together."""
MEAN_TRIES = 1000
TRIES = 200
"""Changes of the first searches, on the mean load and on drawn batches."""


def plan_layer(
    tokens_WE: np.ndarray, first_R: np.ndarray, even_P: np.ndarray, search_ms: float, seed: int
) -> np.ndarray:
    """The expert of every slot [P], never two of an expert on a rank unless `even_P`, the layer for `even`, has them.

    tokens_WE: windows that all have tokens. first_R: the first slot of each rank, and behind the last rank all slots.
    """
    from epbackend.placement.search.level_search import climb, judge

    chance_WE = tokens_WE / tokens_WE.sum(axis=1, keepdims=True)
    random, ranks = np.random.default_rng(seed), first_R.size - 1
    mean = _batches(chance_WE, ranks, 0, random)
    unseen = _batches(chance_WE, ranks, BATCHES, random)

    def worth(expert_P: np.ndarray) -> float:
        return judge(expert_P, first_R, *unseen)

    best_P = min((even_P, *_connected(chance_WE.max(axis=0), first_R)), key=worth)
    for batches, tries in ((mean, MEAN_TRIES), (_batches(chance_WE, ranks, BATCHES, random), TRIES)):
        best_P = min(best_P, climb(best_P, first_R, *batches, tries, seed), key=worth)
    began = time.perf_counter()
    while time.perf_counter() - began < search_ms / 1e3:
        unseen, batches = (_batches(chance_WE, ranks, 2 * BATCHES, random) for _ in range(2))
        seed += 1
        best_P = min(best_P, climb(best_P, first_R, *batches, TRIES, seed), key=worth)
    return best_P


def _connected(weight_E: np.ndarray, first_R: np.ndarray) -> Iterator[np.ndarray]:
    from epbackend.placement.search.level_search import connect, steep_replicas

    for steepness, chain in FORMS:
        replicas_E = steep_replicas(weight_E, first_R[-1], first_R.size - 1, steepness)
        order_E = np.argsort(-weight_E / replicas_E, kind="stable")
        expert_P = connect(weight_E, replicas_E, order_E, first_R, chain)
        if expert_P.min() >= 0:
            yield expert_P


def _batches(
    chance_WE: np.ndarray, ranks: int, batches: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """tokens_EB, in mean rank loads, and weight_B: the windows as they are, and batches drawn around them."""
    drawn_BE = random.gamma(np.resize(chance_WE, (batches, chance_WE.shape[1])) * CONCENTRATION)
    drawn_BE = np.concatenate([chance_WE, drawn_BE])
    weights = np.repeat([MEAN_WEIGHT / len(chance_WE), 1 / max(batches, 1)], [len(chance_WE), batches])
    weights /= weights.sum()
    return np.ascontiguousarray(drawn_BE.T / drawn_BE.sum(axis=1) * ranks), weights
