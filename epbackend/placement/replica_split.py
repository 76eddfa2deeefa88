"""Which replica of its expert a token takes: batch by batch, and the same answer on every rank.

The steps, from the counts of a batch to a slot for every choice. R sources (ranks) hold tokens, E experts are chosen, P
slots hold replicas:

    counts_RE    how often each source chose each expert (all-gathered; `even` and `nearest` need the own row only)
    tokens_E     their sum over the sources
    shares_P     how many of its expert's choices each slot takes, from all sources
    quota_P      how many of them come from one source
    slot_ids_TK  the slot of every (token, k) at that source

| split     | quota_P of source r                                                          | communication        |
|-----------|------------------------------------------------------------------------------|----------------------|
| `even`    | `even_shares(counts_E, layout, offset=r)`: replicas get equal shares         | none                 |
| `nearest` | `nearest_quota(counts_E, layout, r, node_size)`: own rank, own node, rest    | none                 |
| `level`   | `own_quota(counts_RE, level_shares(tokens_E, layout), layout, r, node_size)` | all-gather of counts |
| `level_by_node` | the same with `level_by_node_shares(counts_RE, layout, node_size)`     | all-gather of counts |

then `slot_ids_TK = assign(topk_ids_TK, quota_P, layout)`. For every source the quotas of an expert's slots sum to the
source's count of it; with the last two the sources' quotas of a slot sum to its share. All of it is integer
arithmetic: no result depends on the order of a sum, the machine or the number of threads.

Slots are counted densely here, P of them; `epbackend.replica_split` turns them into the padded slot ids of the data
path. What these two compute is written plainly in `replica_split_reference`, and compiled in `search.level_split`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from epbackend.errors import ConfigError, unknown_name
from epbackend.names import LEVEL_BY_NODE, LEVELLING, SPLITS
from epbackend.placement.placement import Layout
from epbackend.placement.speeds import rank_weights

__all__ = [
    "SPLITS",
    "assign",
    "even_shares",
    "expected_shares",
    "level_by_node_shares",
    "level_shares",
    "nearest_quota",
    "own_quota",
]

MOST_TOKENS = 2**40
"""Limit of the choices in a batch, over all experts: more than any has, and too few for a sum to overflow 64 bits."""


# `even` and `nearest`: each source decides from its own counts


def even_shares(tokens_E: np.ndarray, layout: Layout, offset: int = 0) -> np.ndarray:
    """shares_P (int64): an expert's replicas get equal shares, or shares that differ by one.

    Round robin decides which replicas get one more: they follow each other from a first one, which moves on by one from
    each replicated expert to the next, and with `offset`. If each source gives its rank as the offset, neither the
    experts nor the sources put all their remainders on the same ranks. Sums over an expert's slots are its tokens
    exactly.
    """
    return _shares(checked_counts(tokens_E, layout), layout, *_all_round_robin(layout, offset))


def nearest_quota(counts_E: np.ndarray, layout: Layout, source_rank: int, node_size: int = 0) -> np.ndarray:
    """quota_P (int64) of `source_rank`: everything to the nearest replicas, evenly if several are equally near.

    The nearest is on the source's own rank, then on its node (`node_size` ranks; 0: all are one node), then anywhere.
    """
    return _shares(
        checked_counts(counts_E, layout), layout, *_nearest_round_robin(layout, source_rank, node_size)
    )


@lru_cache(maxsize=1024)
def _all_round_robin(layout: Layout, offset: int) -> tuple[np.ndarray, np.ndarray]:
    return _round_robin(layout, layout.slots_EC >= 0, offset)


@lru_cache(maxsize=1024)
def _nearest_round_robin(layout: Layout, source_rank: int, node_size: int) -> tuple[np.ndarray, np.ndarray]:
    return _round_robin(layout, nearest_replicas(layout, source_rank, node_size), source_rank)


def nearest_replicas(layout: Layout, source_rank: int, node_size: int = 0) -> np.ndarray:
    """takes_EC (bool): the replicas of each expert that `nearest_quota` gives tokens of `source_rank`."""
    rank_EC = layout.rank_of_slot_P[layout.slots_EC]
    node_ranks = node_size or layout.ranks
    elsewhere_EC = (rank_EC != source_rank).astype(np.int64)
    distance_EC = elsewhere_EC + (rank_EC // node_ranks != source_rank // node_ranks)
    distance_EC[layout.slots_EC < 0] = 3
    return distance_EC == distance_EC.min(axis=1, keepdims=True)


def round_robin(takes_EC: np.ndarray, offset: int) -> np.ndarray:
    """place_EC (int64): of each replica that takes tokens in the queue for one more; -1 for the others."""
    takers_E1 = takes_EC.sum(axis=1, keepdims=True)
    start_E1 = offset + np.cumsum(takers_E1 > 1, axis=0)
    return np.where(takes_EC, (takes_EC.cumsum(axis=1) - 1 - start_E1) % takers_E1, -1)


def _round_robin(layout: Layout, takes_EC: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """takers_E: how many replicas take a share of each expert. position_P: of each slot among them, or -1."""
    position_P = np.full(layout.slots, -1)
    position_P[layout.slots_EC[takes_EC]] = round_robin(takes_EC, offset)[takes_EC]
    return takes_EC.sum(axis=1), position_P


def _shares(tokens_E: np.ndarray, layout: Layout, takers_E: np.ndarray, position_P: np.ndarray) -> np.ndarray:
    """Even shares among the slots that have a position; the first positions get the remainder."""
    each_E, remainder_E = np.divmod(tokens_E, takers_E)
    expert_P = layout.slot_to_expert_P
    return np.where(position_P >= 0, each_E[expert_P] + (position_P < remainder_E[expert_P]), 0)


# `level`: the fullest rank of the batch gets as little as possible


def level_shares(tokens_E: np.ndarray, layout: Layout, rank_speed: tuple[float, ...] = ()) -> np.ndarray:
    """shares_P (int64) that minimise the largest rank load; sums over an expert's slots are its tokens exactly.

    The largest load is above the optimum of the linear program that LPLB solves, rounded up to a whole token, by one
    part in 1024 at most. Of two slots of an expert on one rank the first takes everything. With speeds, as
    `speeds.checked_speeds` gives them, the same holds for times, of speeds as `speeds.rank_weights` rounds them.
    """
    from epbackend.placement.search.level_split import level_shares as compiled

    counts_E = checked_counts(tokens_E, layout)
    return compiled(counts_E, layout.slots_EC, layout.rank_of_slot_P, rank_weights(rank_speed, layout.ranks))


def level_by_node_shares(
    counts_GE: np.ndarray, layout: Layout, node_size: int, rank_speed: tuple[float, ...] = ()
) -> np.ndarray:
    """shares_P (int64) that leave tokens on their node, and send over links what balance needs.

    No rank takes longer than the slowest one does with `level_shares` and 1/64 of that, and no fewer tokens can stay on
    their node than with these (`own_quota` then leaves them there). Among such shares they are near the best, not
    proven to be it. With one node they are those of `level_shares`.

    Args:
        counts_GE: choices of every source; G divides the ranks, of which each source has equally many.
        layout: of the layer.
        node_size: ranks per node, which is to divide the ranks; 0: all ranks are one node.
        rank_speed: as for `level_shares`.
    """
    from epbackend.placement.search.level_split import level_by_node_shares as compiled

    counts_GE = checked_counts(counts_GE, layout)
    sources_a_node = (node_size or layout.ranks) * len(counts_GE) // layout.ranks
    counts_ME = np.add.reduceat(counts_GE, np.arange(0, len(counts_GE), sources_a_node), axis=0)
    if len(counts_ME) == 1:
        return level_shares(counts_ME[0], layout, rank_speed)
    weight_R = rank_weights(rank_speed, layout.ranks)
    return compiled(read_only(counts_ME), layout.slots_EC, layout.rank_of_slot_P, weight_R, node_size)


def own_quota(
    counts_RE: np.ndarray, shares_P: np.ndarray, layout: Layout, source_rank: int, node_size: int = 0
) -> np.ndarray:
    """quota_P (int64): how many of `source_rank`'s tokens go to each slot, near ones first.

    Sources and slots of the same rank are matched first, then what is left within each node, then what is left over all
    ranks. Over all sources a slot's quotas sum to its share, and a source's quotas sum to its counts.

    Args:
        counts_RE: choices of every source.
        shares_P: how they are split over the slots; the same sum for each expert.
        layout: of the layer.
        source_rank: whose quota is returned.
        node_size: ranks per node; 0: all ranks are one node.
    """
    from epbackend.placement.search.level_split import own_quota as compiled

    counts_RE = checked_counts(counts_RE, layout)
    slots_EC, rank_of_slot_P = layout.slots_EC, layout.rank_of_slot_P
    return compiled(
        counts_RE, read_only(shares_P), slots_EC, rank_of_slot_P, source_rank, node_size or layout.ranks
    )


def checked_counts(counts_E: np.ndarray, layout: Layout) -> np.ndarray:
    """Counts as int64 [E] (or [R, E]), read-only and contiguous: one array type, for which numba compiles once.

    Raises:
        ConfigError: another length than the experts, or counts that are negative, fractional or too many.
    """
    counts_E = np.asarray(counts_E)
    if counts_E.shape[-1:] != (layout.experts,):
        raise ConfigError(
            f"counts: the shape is {counts_E.shape}, but the layout has {layout.experts} experts; give a count for each"
        )
    if counts_E.dtype.kind not in "iu":
        raise ConfigError(f"counts: must be whole numbers, not {counts_E.dtype}; round them first")
    # The largest is checked first: only then the sum cannot overflow.
    if counts_E.min(initial=0) < 0 or counts_E.max(initial=0) > MOST_TOKENS or counts_E.sum() > MOST_TOKENS:
        raise ConfigError(f"counts: must be 0 or more, and {MOST_TOKENS} in all at most")
    return read_only(counts_E)


def read_only(counts: np.ndarray) -> np.ndarray:
    """A read-only, contiguous int64 view, or a copy where there is none."""
    view = np.ascontiguousarray(counts, dtype=np.int64).view()
    view.flags.writeable = False
    return view


# From how many choices a slot takes to which ones

STRIDE = 3762083063
"""A prime, hence i * STRIDE % n takes each of the n values once. Of 1200 primes between 2^31 and 2^32 it spreads
i = 0, 1, 2, ... most evenly for n up to 512."""


def assign(topk_ids_TK: np.ndarray, quota_P: np.ndarray, layout: Layout) -> np.ndarray:
    """slot_ids_TK (int64) for logical ids from 0 to E - 1, of which `quota_P[slot]` go to each slot.

    An expert with n choices has n positions, the quotas of its slots side by side. Its choice i, in the order of the
    batch, takes position i * STRIDE % n: replicas alternate along the batch, and every chunk of it is about as balanced
    as the whole. With 7 choices the positions are 0 4 1 5 2 6 3.

    Raises:
        ConfigError: the quotas are not those of the ids.
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
    slot_of_position_S = np.repeat(slots_by_expert_P, np.asarray(quota_P)[slots_by_expert_P])
    order_S = np.argsort(ids_S, kind="stable")
    n_S = np.repeat(counts_E, counts_E)
    first_S = np.repeat(np.cumsum(counts_E) - counts_E, counts_E)
    occurrence_S = np.arange(len(ids_S)) - first_S
    slot_ids_S = np.empty(len(ids_S), dtype=np.int64)
    slot_ids_S[order_S] = slot_of_position_S[first_S + occurrence_S * STRIDE % n_S]
    return slot_ids_S.reshape(np.shape(topk_ids_TK))


# Many batches at once, from all sources together: for scoring placements

WHOLE = 2**32
"""Whole tokens that the load of a layer is scaled to: as good as splitting a real number."""


def expected_shares(
    split: str,
    tokens_BE: np.ndarray,
    layout: Layout,
    node_size: int = 0,
    rank_speed: tuple[float, ...] = (),
) -> np.ndarray:
    """shares_BP (float64): tokens of every slot in each of B batches, in the unit of `tokens_BE`.

    All but `level` take it that all sources have equal parts of every expert's tokens. `level` and `level_by_node`
    split integer batches as they do when serving, in whole tokens, and real numbers without rounding; they alone heed
    speeds.

    Raises:
        ConfigError: the split is unknown.
    """
    if split in LEVELLING:
        nodes = layout.ranks // node_size if split == LEVEL_BY_NODE and node_size else 1
        return np.stack([_level(tokens_E, layout, nodes, rank_speed) for tokens_E in tokens_BE])
    if split not in SPLITS:
        raise unknown_name("split:", split, SPLITS)
    part_P = _even_part(layout) if split == "even" else _nearest_part(layout, node_size or layout.ranks)
    return tokens_BE[:, layout.slot_to_expert_P] * part_P


def _level(tokens_E: np.ndarray, layout: Layout, nodes: int, rank_speed: tuple[float, ...]) -> np.ndarray:
    """`level_by_node_shares` of one batch, of which each node has an equal part, as float64."""
    total = tokens_E.sum()
    whole = tokens_E.dtype.kind in "iu" or not total
    scale = 1.0 if whole else WHOLE / total
    counts_ME = (np.rint(tokens_E * scale).astype(np.int64) + np.arange(nodes)[:, None]) // nodes
    return level_by_node_shares(counts_ME, layout, layout.ranks // nodes, rank_speed) / scale


def _even_part(layout: Layout) -> np.ndarray:
    """The part of its expert's tokens that a slot gets."""
    return 1.0 / layout.replicas_E[layout.slot_to_expert_P]


def _nearest_part(layout: Layout, node_ranks: int) -> np.ndarray:
    """The same, averaged over the sources.

    Its terms: the source on the slot's rank, sources on its node without a replica of their own, and sources on nodes
    without a replica.
    """
    expert_P, rank_P = layout.slot_to_expert_P, layout.rank_of_slot_P
    nodes = -(-layout.ranks // node_ranks)
    node_P = rank_P // node_ranks
    ranks_M = np.bincount(np.arange(layout.ranks) // node_ranks)
    on_rank_ER = np.zeros((layout.experts, layout.ranks), dtype=np.int64)
    np.add.at(on_rank_ER, (expert_P, rank_P), 1)
    on_node_EM = np.add.reduceat(on_rank_ER, np.arange(nodes) * node_ranks, axis=1)
    held_EM = np.add.reduceat(on_rank_ER > 0, np.arange(nodes) * node_ranks, axis=1, dtype=np.int64)
    without_E = ((on_node_EM == 0) * ranks_M).sum(axis=1)
    sources_P = (
        1 / on_rank_ER[expert_P, rank_P]
        + (ranks_M[node_P] - held_EM[expert_P, node_P]) / on_node_EM[expert_P, node_P]
        + without_E[expert_P] / layout.replicas_E[expert_P]
    )
    return sources_P / layout.ranks
