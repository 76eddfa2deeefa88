"""A task as plain arrays, layer by layer: what the compiled search reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epbackend.errors import ConfigError, real_number
from epbackend.placement.planners.base import Task

if TYPE_CHECKING:
    from epbackend.placement.search.layer_search import LayerProblem


WINDOWS = ("mixture", "worst")


@dataclass(frozen=True)
class SearchInputs:
    """The loads of all layers of a task, and what its layers have in common.

    `search.layer_search.LayerProblem` describes the fields: each layer becomes one such problem.
    """

    share_YEQ: np.ndarray
    weight_YE: np.ndarray
    """Largest share of each expert in any window: what its replicas are to divide among them."""
    weights_Q2: np.ndarray
    batch: float
    table: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    node_R: np.ndarray
    locality_price: float
    slow_R: np.ndarray

    @classmethod
    def of(cls, task: Task) -> SearchInputs:
        """Reads the options `windows` and `node_penalty`. Raises ConfigError for values that they cannot have."""
        tokens_WYE = _windows(task)
        totals_WY1 = tokens_WYE.sum(axis=2, keepdims=True)
        share_WYE = tokens_WYE / np.where(totals_WY1 > 0, totals_WY1, 1.0)
        objective, windows = task.objective, len(share_WYE)
        if objective.plane is None:
            weights, table = [(objective.batch, 0.0), (0.0, 1.0)], objective.table
        elif objective.batch:
            weights, table = [(objective.plane[0] * objective.batch, objective.plane[1])], None
        else:
            # So that the mean rank costs 1, or all do if they end together.
            weights, table = [(sum(task.rank_speed) or task.ranks, 0.0)], None
        node_R = np.arange(task.ranks) // (task.node_size or task.ranks)
        return cls(
            np.ascontiguousarray(np.repeat(share_WYE, len(weights), axis=0).transpose(1, 2, 0)),
            share_WYE.max(axis=0),
            np.array(weights * windows, dtype=np.float64),
            float(objective.batch),
            table,
            node_R,
            _node_penalty(task, node_R) * _mean_cost(task, share_WYE),
            1.0 / np.array(task.rank_speed or np.ones(task.ranks)),
        )

    def problem(self, layer: int, first_R: np.ndarray) -> LayerProblem:
        """One layer; first_R, int64 [R + 1]: the first slot of each rank, and at the end the number of slots."""
        from epbackend.placement.search.layer_search import LayerProblem

        rank_P = np.repeat(np.arange(first_R.size - 1), np.diff(first_R))
        share_EQ = self.share_YEQ[layer]
        return LayerProblem(
            share_EQ,
            self.weights_Q2,
            self.batch,
            self.table,
            first_R,
            rank_P,
            self.node_R,
            self.locality_price,
            self.slow_R,
        )

    def least_cost(self, layer: int, slots: int) -> float:
        """What the worst rank costs at least with so many slots: the heaviest replica. 0 unless tokens alone count."""
        from epbackend.placement.search.layer_search import optimal_replicas

        if self.table is not None or len(self.weights_Q2) > 1 or self.batch:
            return 0.0
        weight_E = self.weight_YE[layer]
        replicas_E = optimal_replicas(weight_E, np.argsort(-weight_E, kind="stable"), slots, self.node_R.size)
        return float((weight_E / replicas_E).max() * self.weights_Q2[0, 0])


def _windows(task: Task) -> np.ndarray:
    """The windows to balance, float64 [W, Y, E]: the mixture as one window, or all of them."""
    windows: Any = task.options.get("windows", WINDOWS[0])
    if windows not in WINDOWS:
        raise ConfigError(f"windows: must be {' or '.join(WINDOWS)}, not {windows!r}")
    return task.loads.tokens_WYE if windows == "worst" else task.loads.mixture_YE()[None]


def _node_penalty(task: Task, node_R: np.ndarray) -> float:
    """Of a crowded replica, in mean rank costs."""
    penalty = real_number("node_penalty", task.options.get("node_penalty", 0.0))
    if penalty and not node_R[-1]:
        raise ConfigError("node_penalty: there is one node only; give node_size, the ranks a node")
    return penalty


def _mean_cost(task: Task, share_WYE: np.ndarray) -> float:
    """What a rank with the mean tokens and activated experts costs: the unit of the node penalty."""
    objective = task.objective
    if not objective.batch:
        return 1.0
    _, active_WYE = objective.features(share_WYE, 1.0)
    tokens, active = objective.batch / task.ranks, active_WYE.sum(axis=2).max() / task.ranks
    return float(objective.cost(tokens, active))
