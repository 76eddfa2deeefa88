"""Search over one layer for the `level` split: slots exchanged and copies replaced while batches get more level.

Letters: E experts, P slots, R ranks, C copies of an expert, B batches. Loads are in mean rank loads of their batch.
All batches are split at once, by what `split/reference.py` does in whole tokens, and here by pairs of copies.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from epbackend.placement.compiled.jit import entry, inner
from epbackend.placement.compiled.random import below

SWEEPS = 2
"""After a change: it goes on from the split before."""
FIRST_SWEEPS = 32

LEAST_GAIN = 1e-7
"""Relative gain below which a change is rounding noise."""
LEVEL_ENOUGH = 1.001
"""Mean cost at which nothing is left to gain."""


class Split(NamedTuple):
    """What the slots hold, and how each batch is split over them."""

    rank_P: np.ndarray
    expert_P: np.ndarray
    copies_E: np.ndarray
    slots_EC: np.ndarray
    """The slots of each expert, in any order; behind its last copy anything."""
    share_PB: np.ndarray
    load_RB: np.ndarray


@entry
def climb(expert_P, first_R, tokens_EB, weight_B, tries, seed):
    """The experts [P] after so many random changes, of which those stay that lower the cost (see `judge`).

    A change takes load from the fullest rank of some batch: it exchanges one of its experts for another, or gives an
    expert of it one copy more in the place of some other copy.
    """
    random_1 = np.full(1, seed, np.uint64)
    split = _even(expert_P, first_R, tokens_EB)
    _sweep(split, FIRST_SWEEPS)
    best = _cost(split, weight_B)
    share_PB, load_RB = split.share_PB.copy(), split.load_RB.copy()
    for _ in range(tries):
        if best < LEVEL_ENOUGH:
            break
        batch = below(random_1, weight_B.size)
        fullest = np.argmax(load_RB[:, batch])
        slot = first_R[fullest] + below(random_1, first_R[fullest + 1] - first_R[fullest])
        other = below(random_1, expert_P.size)
        expert, partner, rank = split.expert_P[slot], split.expert_P[other], split.rank_P[other]
        if _holds(split, rank, expert):
            continue
        replaces = split.copies_E[partner] > 1 and below(random_1, 2) == 0
        if replaces:
            _replace(split, other, expert)
        else:
            moves = share_PB[slot, batch] - share_PB[other, batch]
            fuller = load_RB[rank, batch] + moves >= load_RB[fullest, batch]
            if moves < 0.0 or fuller or _holds(split, fullest, partner):
                continue
            _swap(split, slot, other)
        _sweep(split, SWEEPS)
        cost = _cost(split, weight_B)
        if cost < best * (1.0 - LEAST_GAIN):
            best = cost
            _copy_rows(split, split.share_PB, share_PB)
            load_RB[:] = split.load_RB
        else:
            if replaces:
                _replace(split, other, partner)
            else:
                _swap(split, slot, other)
            _copy_rows(split, share_PB, split.share_PB)
            split.load_RB[:] = load_RB
    return split.expert_P


@entry
def judge(expert_P, first_R, tokens_EB, weight_B):
    """The cost of these experts: the load of the fullest rank once the batch is split, as a weighted mean."""
    split = _even(expert_P, first_R, tokens_EB)
    _sweep(split, FIRST_SWEEPS)
    return _cost(split, weight_B)
