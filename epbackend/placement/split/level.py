"""The `level` split: an expert's tokens go where its copies find room, so that the fullest rank is as empty as can be.

The compiled forms; `reference.py` says what they compute.
"""

from __future__ import annotations

import numpy as np

from epbackend.placement.layout import Layout
from epbackend.placement.split.checks import checked_counts, read_only


def level_shares(tokens_E: np.ndarray, layout: Layout) -> np.ndarray:
    """shares_P (int64) that minimise the largest rank load; sums over an expert's slots are its tokens exactly.

    At most one part in 1024 above the optimum of the linear program that LPLB solves, rounded up to a whole token. Of
    two slots of an expert on the same rank the first takes all.
    """
    from epbackend.placement.compiled.split import level_shares as compiled

    counts_E = checked_counts(tokens_E, layout)
    return compiled(counts_E, layout.slots_EC, layout.rank_of_slot_P, layout.ranks)


def own_quota(
    counts_RE: np.ndarray, shares_P: np.ndarray, layout: Layout, source_rank: int, node_size: int = 0
) -> np.ndarray:
    """quota_P (int64): how many of `source_rank`'s tokens go to each slot, near ones first.

    `counts_RE` are the choices of every source and `shares_P` their split over the slots, both summing to the same
    number for each expert. A source first fills what its own rank takes, then sources and slots of a node meet, then
    those left of all ranks. Over all sources a slot's quotas sum to its share, and a source's sum to its counts.
    """
    from epbackend.placement.compiled.split import own_quota as compiled

    counts_RE = checked_counts(counts_RE, layout)
    slots_EC, rank_of_slot_P = layout.slots_EC, layout.rank_of_slot_P
    return compiled(
        counts_RE, read_only(shares_P), slots_EC, rank_of_slot_P, source_rank, node_size or layout.ranks
    )
