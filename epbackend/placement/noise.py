"""Batches as they come: drawn from recorded loads, of which every single batch differs.

A batch is counted in choices: tokens times experts a token. Two models of how it differs from the mean:

* multinomial: every choice on its own. What is left when nothing else varies: the least noise there can be.
* over-dispersed: each batch has chances of its own, drawn from a Dirichlet distribution around the recorded ones
  (together: Dirichlet-multinomial), as requests about one subject choose the same experts. The smaller the
  concentration, the more batches differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from epbackend.placement.loads import Loads

BATCH_CHOICES = 4096 * 8
"""4096 tokens that choose 8 experts each."""
CONCENTRATION = 2000.0
"""Of the over-dispersed batches."""


def draw_batches(
    loads: Loads,
    layers: Sequence[int],
    *,
    choices: int = BATCH_CHOICES,
    batches: int = 8,
    concentration: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """counts_LBE (int64): batches for each of the layers, each of which needs a token; the windows take turns.

    Multinomial, or over-dispersed with a concentration. The same arguments give the same batches.
    """
    random = np.random.default_rng(seed)
    counts_LBE = np.empty((len(layers), batches, loads.experts), dtype=np.int64)
    for index, layer in enumerate(layers):
        tokens_WE = loads.tokens_WLE[:, layer]
        tokens_BE = np.resize(tokens_WE[tokens_WE.any(axis=1)], (batches, loads.experts))
        chance_BE = tokens_BE / tokens_BE.sum(axis=1, keepdims=True)
        if concentration is not None:
            chance_BE = random.gamma(chance_BE * concentration)
            chance_BE /= chance_BE.sum(axis=1, keepdims=True)
        counts_LBE[index] = random.multinomial(choices, chance_BE)
    return counts_LBE
