"""`refined` for the `level` split: one layer whose replicas connect the ranks, so that any batch can be balanced.

Under `even` a replica halves what a rank gets of an expert. Under `level` it is an edge between two ranks, along which
the split can move tokens: what matters is that no group of ranks is cut off from the others, and that the edges have
capacity, which replicas of heavy experts give.

1. Several answers: the one for the `even` split, and layers that connect ranks (`level_search.connect`), some with
   more edges and some with lighter replicas.
2. The best of them is improved by `level_search.hill_climb`: it keeps random changes by which the mean load, or batches
   drawn around it, are balanced better. Drawn batches are over-dispersed (`synthetic.draw_batches` explains that), and
   the windows alternate.
3. A search fits the batches that it has seen, so other batches decide whether its layer is taken.

With `search_ms` the search goes on, with new batches in every round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from epbackend.placement.synthetic import CONCENTRATION

STARTS = ((1.0, False), (1.0, True), (1.25, True), (1.5, False), (1.5, True))
"""The exponent of the replicas (`level_search.power_law_replicas`), and whether they form a chain (`connect`)."""

BATCHES = 24
MEAN_WEIGHT = 2.0
"""Weight of the mean load; all drawn batches together have weight 1."""
MEAN_TRIES = 1000
TRIES = 200
"""Changes that the first searches try, on the mean load and on drawn batches."""


def plan_layer(
    tokens_WE: np.ndarray,
    first_R: np.ndarray,
    even_P: np.ndarray,
    slow_R: np.ndarray,
    search_ms: float,
    seed: int,
) -> np.ndarray:
    """The expert of every slot, int64 [P]; never two replicas of an expert on a rank unless `even_P` has them.

    Args:
        tokens_WE: windows, each with a token.
        first_R: the first slot of each rank, and at the end the number of slots: R + 1 entries.
        even_P: the expert of every slot in the layer that is planned for the `even` split.
        slow_R: one over the speed of each rank.
        search_ms: milliseconds to search on beyond the first answer.
        seed: of the drawn batches and the random changes.
    """
    from epbackend.placement.search.level_search import hill_climb, split_cost

    chance_WE = tokens_WE / tokens_WE.sum(axis=1, keepdims=True)
    random, ranks = np.random.default_rng(seed), first_R.size - 1
    mean = _batches(chance_WE, ranks, 0, random)
    unseen = _batches(chance_WE, ranks, BATCHES, random)

    def cost(expert_P: np.ndarray) -> float:
        return split_cost(expert_P, first_R, slow_R, *unseen)

    best_P = min((even_P, *_connected(chance_WE.max(axis=0), first_R)), key=cost)
    for batches, tries in ((mean, MEAN_TRIES), (_batches(chance_WE, ranks, BATCHES, random), TRIES)):
        best_P = min(best_P, hill_climb(best_P, first_R, slow_R, *batches, tries, seed), key=cost)
    began = time.perf_counter()
    while time.perf_counter() - began < search_ms / 1e3:
        unseen, batches = (_batches(chance_WE, ranks, 2 * BATCHES, random) for _ in range(2))
        seed += 1
        best_P = min(best_P, hill_climb(best_P, first_R, slow_R, *batches, TRIES, seed), key=cost)
    return best_P


def _connected(weight_E: np.ndarray, first_R: np.ndarray) -> Iterator[np.ndarray]:
    """Layers [P] that connect ranks, in which every replica found a slot."""
    from epbackend.placement.search.level_search import connect, power_law_replicas

    for exponent, chain in STARTS:
        replicas_E = power_law_replicas(weight_E, first_R[-1], first_R.size - 1, exponent)
        order_E = np.argsort(-weight_E / replicas_E, kind="stable")
        expert_P = connect(weight_E, replicas_E, order_E, first_R, chain)
        if expert_P.min() >= 0:
            yield expert_P


def _batches(
    chance_WE: np.ndarray, ranks: int, batches: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """tokens_EB, in mean rank loads, and weight_B: the windows as they are, and `batches` more drawn around them."""
    drawn_BE = random.gamma(np.resize(chance_WE, (batches, chance_WE.shape[1])) * CONCENTRATION)
    drawn_BE = np.concatenate([chance_WE, drawn_BE])
    weights = np.repeat([MEAN_WEIGHT / len(chance_WE), 1 / max(batches, 1)], [len(chance_WE), batches])
    weights /= weights.sum()
    return np.ascontiguousarray(drawn_BE.T / drawn_BE.sum(axis=1) * ranks), weights
