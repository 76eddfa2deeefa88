"""How many ranks and nodes a token visits, and what that sends over the links: estimated from pairs.

Tokens go to the nearest replica of each of their experts (the split `nearest`), and come from all ranks alike. A rank
is visited once, however many of a token's experts it holds; so is a node by a dispatcher that sends each node one row.

Letters: M nodes, as sources and as destinations; L slots of a rank or a node; others as in `epbackend.placement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.pairs import Pairs, check_pairs_of
from epbackend.placement.placement import Layout, Placement


@dataclass(frozen=True, eq=False)
class Visits:
    """Of a mean token of one layer, or of the mean layer."""

    ranks: float
    """Ranks that it visits, its own among them where that holds one of its experts."""
    nodes: float
    nodes_MM: np.ndarray
    """Visits of a token from one node (row) to another: 1 where each token goes there."""
    ranks_MM: np.ndarray
    """Likewise the ranks that it visits there."""

    @property
    def other_nodes(self) -> float:
        """Nodes that it visits besides its own: as often a row crosses to another node, if nodes get one row each."""
        return _off_diagonal(self.nodes_MM)

    @property
    def ranks_on_other_nodes(self) -> float:
        """As often a row crosses where each rank gets one, as with the dispatchers of epbackend."""
        return _off_diagonal(self.ranks_MM)

    def bytes_across(self, row_bytes: int) -> float:
        """That a token sends to other nodes and gets back, in rows of so many bytes for each rank."""
        return self.ranks_on_other_nodes * row_bytes

    def bytes_within(self, row_bytes: int) -> float:
        """The same to ranks of its own node; the part that stays on its own rank, one in R, counts too."""
        return (self.ranks - self.ranks_on_other_nodes) * row_bytes


def mean_visits(each: Sequence[Visits]) -> Visits:
    """Of several layers."""
    return Visits(
        float(np.mean([v.ranks for v in each])),
        float(np.mean([v.nodes for v in each])),
        np.mean([v.nodes_MM for v in each], axis=0),
        np.mean([v.ranks_MM for v in each], axis=0),
    )


def _off_diagonal(visits_MM: np.ndarray) -> float:
    return float((visits_MM.sum() - np.trace(visits_MM)) / len(visits_MM))


def expected_visits(pair_EE: np.ndarray, topk: int, layout: Layout, node_size: int = 0) -> Visits:
    """An estimate from pairs alone, which say how many of a token's experts a rank holds on average, and the variance.

    The chance that it is none is that of the Pólya distribution with these two moments: of K draws, where each raises
    or lowers the chance of the next. Choices that are independent, or never come together, are special cases.

    Args:
        pair_EE: tokens that chose both experts; on the diagonal, that chose the expert (see `Pairs`).
        topk: K.
        layout: of the layer.
        node_size: ranks per node; 0: all ranks are one node.
    """
    from epbackend.placement.search.affinity_search import visit_moments

    ranks, size = layout.ranks, node_size or layout.ranks
    node_R = np.arange(ranks) // size
    nodes = ranks // size
    expert_P = layout.slot_to_expert_P.copy()  # numba would compile once more for a read-only array
    rank_P = layout.rank_of_slot_P.copy()
    held_ER = np.zeros((layout.experts, ranks), dtype=np.int64)
    np.add.at(held_ER, (expert_P, rank_P), 1)
    held_EM = held_ER.reshape(-1, nodes, size).sum(axis=2)
    first_R = layout.first_R
    tokens = max(np.trace(pair_EE) / topk, 1e-300)
    moments = (
        visit_moments(expert_P, first_X, rank_P, node_R, held_ER, held_EM, pair_EE)
        for first_X in (first_R, first_R[::size].copy())
    )
    mean_RX, twice_RX = (np.hstack(each) / tokens for each in zip(*moments, strict=True))
    visited_RX = 1.0 - chance_of_none(mean_RX, twice_RX, topk)
    visited_MX = visited_RX.reshape(nodes, size, -1).mean(axis=1)
    ranks_MR, nodes_MM = visited_MX[:, :ranks], visited_MX[:, ranks:]
    ranks_MM = ranks_MR.reshape(nodes, nodes, size).sum(axis=2)
    return Visits(float(ranks_MR.sum(axis=1).mean()), float(nodes_MM.sum(axis=1).mean()), nodes_MM, ranks_MM)


def chance_of_none(mean: np.ndarray, twice: np.ndarray, topk: int) -> np.ndarray:
    """The chance of 0 of K draws, by their mean number and the mean number of ordered pairs of them.

    >>> chance_of_none(np.array([1.0, 1.0]), np.array([0.5, 0.0]), 2).tolist()  # independent; never both of two
    [0.25, 0.0]
    """
    hit = np.clip(np.asarray(mean) / topk, 1e-12, 1 - 1e-12)
    if topk == 1:
        return 1 - hit
    # The chance that the second draw hits after a first hit, and from it how much one hit adds to the next chance.
    again = np.clip(np.asarray(twice) / (topk * (topk - 1) * hit), 0.0, 1 - 1e-9)
    adds = (again - hit) / (1 - again)
    none = np.ones_like(hit)
    for drawn in range(topk):
        none *= np.maximum(1 - hit + drawn * adds, 0.0) / np.maximum(1 + drawn * adds, 1e-12)
    return np.clip(none, 0.0, 1.0)


def placement_visits(placement: Placement, pairs: Pairs) -> Visits:
    """The estimate for the mean layer that has pairs.

    Raises:
        ConfigError: the pairs are of another model, or all zero.
    """
    check_pairs_of(pairs, len(placement.layers), placement.experts, "placement", placement.numbering)
    counted = np.flatnonzero(pairs.loads_YE.any(axis=1))
    if not counted.size:
        raise ConfigError(f"pairs: {pairs.name} counts no token; record a real run")
    return mean_visits(
        [
            expected_visits(pairs.tokens_YEE[layer], pairs.topk, placement.layers[layer], placement.node_size)
            for layer in counted
        ]
    )
