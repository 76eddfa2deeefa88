"""From how many tokens a slot takes to which ones."""

from __future__ import annotations

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.layout import Layout

STRIDE = 3762083063
"""A prime, hence i * STRIDE % n takes each of the n values once; of 1200 primes between 2^31 and 2^32 the one that
spreads i = 0, 1, 2, ... most evenly for n up to 512."""


def assign(topk_ids_TK: np.ndarray, quota_P: np.ndarray, layout: Layout) -> np.ndarray:
    """slot_ids_TK (int64) for logical ids in [0, E), of which `quota_P[slot]` go to each slot.

    The n choices of an expert sit down on n seats, its copies' quotas side by side. The i-th one takes seat
    i * STRIDE % n: copies alternate along the batch, and every chunk of it is about as balanced as the whole. With 7
    choices the seats are taken in the order 0 4 1 5 2 6 3.

    Raises ConfigError where the quotas are not those of the ids.
    """
    ids_S = np.asarray(topk_ids_TK).reshape(-1)
    counts_E = np.bincount(ids_S, minlength=layout.experts)
    quota_E = np.bincount(layout.slot_to_expert_P, weights=quota_P, minlength=layout.experts)
    if wrong := np.flatnonzero(counts_E != quota_E).tolist():
        raise ConfigError(
            f"quota_P: gives {quota_E[wrong[0]]:.0f} tokens to the slots of expert {wrong[0]}, which "
            f"{counts_E[wrong[0]]} choices name; compute the quotas from the counts of these ids"
        )
    slots_by_expert_P = np.argsort(layout.slot_to_expert_P, kind="stable")
    seats_S = np.repeat(slots_by_expert_P, np.asarray(quota_P)[slots_by_expert_P])
    order_S = np.argsort(ids_S, kind="stable")
    n_S = np.repeat(counts_E, counts_E)
    first_S = np.repeat(np.cumsum(counts_E) - counts_E, counts_E)
    occurrence_S = np.arange(len(ids_S)) - first_S
    slot_ids_S = np.empty(len(ids_S), dtype=np.int64)
    slot_ids_S[order_S] = seats_S[first_S + occurrence_S * STRIDE % n_S]
    return slot_ids_S.reshape(np.shape(topk_ids_TK))
