"""What the slots get when many batches, from all sources together, are split: for judging placements."""

from __future__ import annotations

import numpy as np

from epbackend.errors import ConfigError, did_you_mean
from epbackend.placement.layout import Layout
from epbackend.placement.split.level import level_shares

SPLITS = ("even", "nearest", "level")
WHOLE = 2**32
"""Whole tokens that stand for the load of a layer, so that splitting them is as good as splitting a real number."""


def expected_shares(split: str, tokens_BE: np.ndarray, layout: Layout, node_size: int = 0) -> np.ndarray:
    """shares_BP (float64): tokens of every slot in each of B batches.

    With `even` and `nearest` it is the expectation for sources that have equal parts of every expert's tokens. `level`
    splits batches of whole numbers as it does when serving, in whole tokens, and real numbers without rounding.
    Raises ConfigError for an unknown split.
    """
    if split == "level":
        return np.stack([_level(tokens_E, layout) for tokens_E in tokens_BE])
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise ConfigError(f"split: {split!r} is unknown{did_you_mean(split, SPLITS)}; known are {known}")
    part_P = _even_part(layout) if split == "even" else _nearest_part(layout, node_size or layout.ranks)
    return tokens_BE[:, layout.slot_to_expert_P] * part_P


def _level(tokens_E: np.ndarray, layout: Layout) -> np.ndarray:
    total = tokens_E.sum()
    if tokens_E.dtype.kind in "iu" or not total:
        return level_shares(tokens_E.astype(np.int64), layout).astype(np.float64)
    scale = WHOLE / total
    return level_shares(np.rint(tokens_E * scale).astype(np.int64), layout) / scale


def _even_part(layout: Layout) -> np.ndarray:
    """The part of its expert's tokens that a slot gets."""
    return 1.0 / layout.copies_E[layout.slot_to_expert_P]


def _nearest_part(layout: Layout, node_ranks: int) -> np.ndarray:
    """The same, averaged over the sources: those on the slot's rank, those on its node without a copy of their own, and
    those on nodes without a copy."""
    expert_P, rank_P = layout.slot_to_expert_P, layout.rank_of_slot_P
    nodes = -(-layout.ranks // node_ranks)
    node_P = rank_P // node_ranks
    ranks_N = np.bincount(np.arange(layout.ranks) // node_ranks)
    on_rank_ER = np.zeros((layout.experts, layout.ranks), dtype=np.int64)
    np.add.at(on_rank_ER, (expert_P, rank_P), 1)
    on_node_EN = np.add.reduceat(on_rank_ER, np.arange(nodes) * node_ranks, axis=1)
    held_EN = np.add.reduceat(on_rank_ER > 0, np.arange(nodes) * node_ranks, axis=1, dtype=np.int64)
    without_E = ((on_node_EN == 0) * ranks_N).sum(axis=1)
    sources_P = (
        1 / on_rank_ER[expert_P, rank_P]
        + (ranks_N[node_P] - held_EN[expert_P, node_P]) / on_node_EN[expert_P, node_P]
        + without_E[expert_P] / layout.copies_E[expert_P]
    )
    return sources_P / layout.ranks
