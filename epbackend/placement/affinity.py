"""`Affinity`: a planned layer is changed so that tokens visit fewer nodes and ranks, within a limit of balance.

It starts from any planner's layer, and keeps how many replicas each expert has:

1. Nodes: slots of different nodes change places where this lets more of a token's experts be on its own node, or
   together on another one. Replicas of an expert go to different nodes by themselves, as each spares its node the link.
2. Ranks: each node's slots are spread over its ranks again; then slots of a node change places where experts that are
   chosen together come to share a rank.

A layer stays as it was planned unless it then has fewer visits by the estimate from the pairs (`visits`), and no more
imbalance than the limit allows, under the split `nearest`, which the visits suppose. Where ranks differ in speed, it is
times that are balanced, and nodes and ranks may have load by their speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.loads import Loads
from epbackend.placement.pairs import Pairs, check_pairs_of
from epbackend.placement.placement import Layout
from epbackend.placement.replica_split import expected_shares
from epbackend.placement.score import imbalances
from epbackend.placement.visits import Visits, chance_of_none, expected_visits

if TYPE_CHECKING:
    from epbackend.placement.search.affinity_search import Gathering

LIMIT = 1.02
NODE_PARTS = (0.5, 0.1)
"""The part of the limit that nodes may use up, tried in turn until their ranks can keep within the limit."""


@dataclass(frozen=True)
class Affinity:
    """Raises ConfigError for a limit that is none."""

    pairs: Pairs
    limit: float = LIMIT
    """The busiest rank over the mean, under `nearest`, that a layer may have for fewer visits; of times with speeds."""

    def __post_init__(self) -> None:
        if (
            isinstance(self.limit, bool)
            or not isinstance(self.limit, (int, float))
            or not 1 <= self.limit < 100
        ):
            raise ConfigError(
                f"affinity: the limit {self.limit!r} must be a number of 1 or more, such as {LIMIT}: the busiest rank "
                "over the mean"
            )

    def check(self, loads: Loads) -> None:
        """Raises ConfigError where the pairs are of another model than the loads."""
        check_pairs_of(self.pairs, loads.layers, loads.experts, "loads", loads.numbering)

    @property
    def provenance(self) -> dict[str, Any]:
        """What a placement says of it: the pairs by name and digest, not their counts."""
        return {"affinity": self.limit, "pairs": f"{self.pairs.name} {self.pairs.digest}"}

    def gather_layers(
        self, layouts: Sequence[Layout], loads: Loads, node_size: int, rank_speed: tuple[float, ...]
    ) -> tuple[Layout, ...]:
        """All layers of a model; those without loads or pairs stay as they are.

        `rank_speed`: as `checked_speeds` gives them; what the limit is of is then time, load over speed.
        """
        from epbackend.placement.search.affinity_search import gather_on_nodes
        from epbackend.placement.search.compiled import announce

        announce(gather_on_nodes)
        return tuple(
            self.gather(layer, layout, tokens_WE, node_size, rank_speed)
            if len(tokens_WE := loads.windows_of(layer))
            else layout
            for layer, layout in enumerate(layouts)
        )

    def gather(
        self,
        layer: int,
        layout: Layout,
        tokens_WE: np.ndarray,
        node_size: int,
        rank_speed: tuple[float, ...] = (),
    ) -> Layout:
        """The layer with fewer visits, or as it is. tokens_WE: the windows of loads that it is planned for."""
        if not self.pairs.loads_YE[layer].any() or layout.ranks == 1:
            return layout
        pair_EE, topk = self.pairs.tokens_YEE[layer], self.pairs.topk
        was = expected_visits(pair_EE, topk, layout, node_size)
        problem = self._problem(layer, layout, tokens_WE, node_size, rank_speed)
        limit = max(self.limit, _imbalance(layout, tokens_WE, node_size, rank_speed))
        for found in _tries(problem, layout, limit):
            now = expected_visits(pair_EE, topk, found, node_size)
            if _is_less(now, was) and _imbalance(found, tokens_WE, node_size, rank_speed) <= limit * (
                1 + 1e-12
            ):
                return found
        return layout

    def _problem(
        self,
        layer: int,
        layout: Layout,
        tokens_WE: np.ndarray,
        node_size: int,
        rank_speed: tuple[float, ...],
    ) -> Gathering:
        from epbackend.placement.search.affinity_search import Gathering

        share_E = (tokens_WE / tokens_WE.sum(axis=1, keepdims=True)).mean(axis=0)
        topk = self.pairs.topk
        both_EE = self.pairs.beyond_noise(layer)
        chance_E = np.diagonal(both_EE).copy()
        np.fill_diagonal(both_EE, 0.0)
        node_R = np.arange(layout.ranks) // (node_size or layout.ranks)
        return Gathering(
            share_E,
            chance_E,
            both_EE,
            layout.rank_of_slot_P.copy(),
            node_R,
            _price(topk, int(node_R[-1]) + 1),
            np.array(rank_speed or (1.0,) * layout.ranks),
        )


def _tries(problem: Gathering, layout: Layout, limit: float) -> Iterator[Layout]:
    """Other layouts, the most gathered first; not all of them keep within the limit."""
    from epbackend.placement.search.affinity_search import gather_on_nodes, gather_on_ranks, pack_ranks

    first_R = layout.first_R
    nodes, speed = int(problem.node_R[-1]) + 1, problem.speed_R.sum()
    if nodes > 1:
        first_M = first_R[:: layout.ranks // nodes].copy()
        # A node's part of all speed, in that of a node if all were alike, which then is exactly 1.
        strength_M = problem.speed_R.reshape(nodes, -1).sum(axis=1) * nodes / speed
        for part in NODE_PARTS:
            expert_P = layout.slot_to_expert_P.copy()
            most_M = (1 + (limit - 1) * part) / nodes * strength_M
            if not gather_on_nodes(problem, expert_P, first_M, most_M):
                break
            if 0 <= pack_ranks(problem, expert_P, first_R) <= limit / speed:
                gather_on_ranks(problem, expert_P, first_R, limit / speed)
                yield Layout.cut(expert_P, first_R, layout.experts)
    expert_P = layout.slot_to_expert_P.copy()
    gather_on_ranks(problem, expert_P, first_R, limit / speed)
    yield Layout.cut(expert_P, first_R, layout.experts)


def _price(topk: int, nodes: int) -> float:
    """What a choice that leaves its node costs, in pairs that leave together: by how the chance of a visit changes with
    either, where choices are independent and all nodes alike."""
    mean, twice, step = topk / nodes, topk * (topk - 1) / nodes**2, 1e-4
    none, by_mean, by_twice = chance_of_none(
        np.array([mean, mean * (1 + step), mean]), np.array([twice, twice, twice * (1 + step)]), topk
    )
    if topk == 1 or nodes == 1 or by_twice <= none:
        return 1.0
    return float((none - by_mean) / (mean * step) / (2 * (by_twice - none) / (twice * step)))


def _imbalance(layout: Layout, tokens_WE: np.ndarray, node_size: int, rank_speed: tuple[float, ...]) -> float:
    """Of the mixture of the windows, under `nearest`."""
    share_1E = (tokens_WE / tokens_WE.sum(axis=1, keepdims=True)).mean(axis=0)[None]
    shares_1P = expected_shares("nearest", share_1E, layout, node_size, rank_speed)
    return float(imbalances(shares_1P, layout, rank_speed=rank_speed)[0])


def _is_less(now: Visits, was: Visits) -> bool:
    """Whether fewer nodes, or else ranks, are visited, and not more of either."""
    nodes, ranks = (now.other_nodes - was.other_nodes, now.ranks - was.ranks)
    return max(nodes, ranks) <= 1e-9 and min(nodes, ranks) < -1e-9
