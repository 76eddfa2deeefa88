"""Splits that each source makes from its own counts, without a word to the others: `even` and `nearest`."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from epbackend.placement.layout import Layout
from epbackend.placement.split.checks import checked_counts


def even_shares(tokens_E: np.ndarray, layout: Layout, turn: int = 0) -> np.ndarray:
    """shares_P (int64): an expert's copies get equal shares, or shares that differ by one.

    The copies that get one more follow each other from a starting copy, which moves on by one from each replicated
    expert to the next and with `turn`: give each source its rank as `turn`, and neither the experts nor the sources
    pile their remainders up on the same ranks. Sums over an expert's slots are its tokens exactly.
    """
    return _shares(checked_counts(tokens_E, layout), layout, *_all_in_turn(layout, turn))


def nearest_quota(counts_E: np.ndarray, layout: Layout, source_rank: int, node_size: int = 0) -> np.ndarray:
    """quota_P (int64) of `source_rank`: all to the nearest copies, evenly where several are equally near.

    Near is the source's own rank, then its node (`node_size` ranks; 0: all ranks are one node), then anywhere.
    """
    return _shares(
        checked_counts(counts_E, layout), layout, *_nearest_in_turn(layout, source_rank, node_size)
    )


def _shares(tokens_E: np.ndarray, layout: Layout, takers_E: np.ndarray, turn_P: np.ndarray) -> np.ndarray:
    """Even shares among the slots that have a turn; those with the first turns get the remainder."""
    each_E, remainder_E = np.divmod(tokens_E, takers_E)
    expert_P = layout.slot_to_expert_P
    return np.where(turn_P >= 0, each_E[expert_P] + (turn_P < remainder_E[expert_P]), 0)


@lru_cache(maxsize=1024)
def _all_in_turn(layout: Layout, turn: int) -> tuple[np.ndarray, np.ndarray]:
    return _in_turn(layout, layout.slots_EC >= 0, turn)


@lru_cache(maxsize=1024)
def _nearest_in_turn(layout: Layout, source_rank: int, node_size: int) -> tuple[np.ndarray, np.ndarray]:
    rank_EC = layout.rank_of_slot_P[layout.slots_EC]
    node_ranks = node_size or layout.ranks
    elsewhere_EC = (rank_EC != source_rank).astype(np.int64)
    distance_EC = elsewhere_EC + (rank_EC // node_ranks != source_rank // node_ranks)
    distance_EC[layout.slots_EC < 0] = 3
    return _in_turn(layout, distance_EC == distance_EC.min(axis=1, keepdims=True), source_rank)


def _in_turn(layout: Layout, takes_EC: np.ndarray, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """takers_E: how many copies take a share of each expert. turn_P: the turn of each slot among them, or -1."""
    takers_E = takes_EC.sum(axis=1)
    start_E = turn + np.cumsum(takers_E > 1)
    turn_EC = (np.cumsum(takes_EC, axis=1) - 1 - start_E[:, None]) % takers_E[:, None]
    turn_P = np.full(layout.slots, -1)
    turn_P[layout.slots_EC[takes_EC]] = turn_EC[takes_EC]
    return takers_E, turn_P
