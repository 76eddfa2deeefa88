"""LPLB's `r2o` matrices: redundant slot k of rank i holds a replica of expert k of rank r2o[i, k].

A matrix is for a group of G ranks and repeats itself group by group. Each column is a permutation, so that expert k of
every rank gets one replica, and moves every rank, so that no replica is made where its original is.

DeepSeek's LPLB placement: a fixed graph of replicas, along which a split can level every batch.

Source: the published description of https://github.com/deepseek-ai/LPLB, written anew. EPLB places one replica of every
expert; each rank's experts are ordered by load, heaviest first; then redundant slot k of rank i replicas expert k of
rank r2o[i, k]. Where LPLB solves a linear program a batch, `split="level"` reaches the same optimum.

Options: `topology`, one of spread (default), ring, cube, hypercube, torus; or `r2o`, a matrix of your own (see
topologies.py). Slots must be the experts plus the same number of redundant slots for every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from epbackend.errors import ConfigError, did_you_mean
from epbackend.placement.placement import Layout
from epbackend.placement.planners.base import Task, all_layers, refuse_unknown
from epbackend.placement.planners.eplb import rebalance


def topology_matrix(name: str, ranks: int, node_size: int, columns: int) -> np.ndarray:
    """The named matrix with its first `columns` columns, int64 [G, K].

    Raises ConfigError for an unknown name, and for ranks or columns that the topology does not have.
    """
    if name not in TOPOLOGIES:
        raise ConfigError(
            f"topology: {name!r} is unknown{did_you_mean(str(name), TOPOLOGIES)}; known are {', '.join(TOPOLOGIES)}, "
            "or give a matrix as r2o"
        )
    r2o_GK = TOPOLOGIES[name](ranks, node_size)
    if columns > r2o_GK.shape[1]:
        raise ConfigError(
            f"slots: topology {name!r} has {r2o_GK.shape[1]} redundant slots a rank, not {columns}; "
            "use fewer slots, or a matrix of your own as r2o"
        )
    return checked_matrix(r2o_GK[:, :columns], ranks)


def checked_matrix(r2o: Any, ranks: int) -> np.ndarray:
    """The matrix as int64 [G, K]. Raises ConfigError for one that is no r2o matrix of these ranks."""
    try:
        r2o_GK = np.asarray(r2o)
    except ValueError:
        raise ConfigError("r2o: rows of different length; give a matrix [ranks of a group, K]") from None
    if r2o_GK.ndim != 2 or not len(r2o_GK) or r2o_GK.dtype.kind not in "iu":
        raise ConfigError(
            f"r2o: must be a matrix [ranks of a group, K] of whole numbers, not {r2o_GK.dtype} {r2o_GK.shape}"
        )
    group = len(r2o_GK)
    if ranks % group:
        raise ConfigError(f"r2o: groups of {group} ranks do not divide the {ranks} ranks; use a divisor")
    every_G = np.arange(group)
    for column, source_G in enumerate(r2o_GK.T):
        if not np.array_equal(np.sort(source_G), every_G):
            raise ConfigError(
                f"r2o: column {column} is no permutation of 0 to {group - 1}; every rank must be copied from once"
            )
        if (fixed := np.flatnonzero(source_G == every_G)).size:
            raise ConfigError(
                f"r2o: column {column} replicas rank {fixed[0]} to itself; let another rank hold its replica"
            )
    return r2o_GK.astype(np.int64)


def _spread(ranks: int, node_size: int) -> np.ndarray:
    """All ranks in a circle for each column, each time in another order, so that all are few steps apart."""
    random = np.random.default_rng(ranks)
    r2o_GK = np.empty((ranks, ranks - 1), dtype=np.int64)
    for column in range(ranks - 1):
        circle_G = random.permutation(ranks)
        r2o_GK[circle_G, column] = np.roll(circle_G, 1)
    return r2o_GK


def _ring(ranks: int, node_size: int) -> np.ndarray:
    """All ranks in a circle; column k looks k + 1 ranks back."""
    return (np.arange(ranks)[:, None] - np.arange(1, ranks)) % ranks


def _cube(ranks: int, node_size: int) -> np.ndarray:
    """Eight ranks: two faces of four in a circle; the second column joins the faces along edges and body diagonals."""
    _require_group("cube", 8, ranks)
    face_G, corner_G = np.divmod(np.arange(8), 4)
    within_G = face_G * 4 + (corner_G - 1) % 4
    across_G = (1 - face_G) * 4 + (corner_G + 2 * (1 - face_G)) % 4
    return np.stack([within_G, across_G], axis=1)


def _hypercube(ranks: int, node_size: int) -> np.ndarray:
    """Sixteen ranks, joined where their numbers differ in one bit: in the low two bits, and in the high two."""
    _require_group("hypercube", 16, ranks)
    back_B = np.array([2, 0, 3, 1])  # one step back in the circle 0, 1, 3, 2, whose steps change one bit each
    high_G, low_G = np.divmod(np.arange(16), 4)
    return np.stack([high_G * 4 + back_B[low_G], back_B[high_G] * 4 + low_G], axis=1)


def _torus(ranks: int, node_size: int) -> np.ndarray:
    """A circle through each node, and through the nodes a circle of the ranks at the same position."""
    nodes = ranks // node_size if node_size else 1
    if min(nodes, node_size) < 2:
        raise ConfigError(
            f"topology: a torus needs two nodes or more, of two ranks or more, not node_size {node_size} of {ranks} "
            "ranks; set node_size, or use topology 'spread'"
        )
    node_G, position_G = np.divmod(np.arange(ranks), node_size)
    within_G = node_G * node_size + (position_G - 1) % node_size
    across_G = (node_G - 1) % nodes * node_size + position_G
    return np.stack([within_G, across_G], axis=1)


def _require_group(name: str, group: int, ranks: int) -> None:
    if ranks % group:
        raise ConfigError(
            f"topology: a {name} is for {group} ranks, or groups of {group}, not {ranks}; use topology 'spread'"
        )


TOPOLOGIES: dict[str, Callable[[int, int], np.ndarray]] = {
    "spread": _spread,
    "ring": _ring,
    "cube": _cube,
    "hypercube": _hypercube,
    "torus": _torus,
}
"""By name: (ranks, ranks a node) -> the matrix with all columns it has. The first is the default, and not LPLB's: ranks
that EPLB numbers one after the other have experts alike in load, and a ring makes them neighbours."""


def plan_layers(task: Task) -> tuple[Layout, ...]:
    """See the module. Several windows are planned as their mixture."""
    refuse_unknown("lplb", task, options=("topology", "r2o"))
    experts, ranks = task.loads.experts, task.ranks
    r2o_RK = _over_all_ranks(_matrix(task), ranks)
    loaded = list(task.loads.loaded_layers)
    weight_YE = task.loads.mixture_YE()[loaded]
    expert_YRS = rebalance(weight_YE, experts, ranks).reshape(len(loaded), ranks, experts // ranks)
    load_YRS = np.take_along_axis(weight_YE, expert_YRS.reshape(len(loaded), experts), axis=1).reshape(
        expert_YRS.shape
    )
    own_YRS = np.take_along_axis(expert_YRS, np.argsort(-load_YRS, axis=2, kind="stable"), axis=2)
    replicas_YRK = own_YRS[:, r2o_RK, np.arange(r2o_RK.shape[1])]
    held_YP = np.concatenate([own_YRS, replicas_YRK], axis=2).reshape(len(loaded), task.slots)
    layouts = (Layout.of(held_P, ranks, experts) for held_P in held_YP)
    return all_layers(task, dict(zip(loaded, layouts, strict=True)))


def _matrix(task: Task) -> np.ndarray:
    """The r2o matrix that was asked for, int64 [G, K], with as many columns as a rank has redundant slots."""
    experts, ranks = task.loads.experts, task.ranks
    if experts % ranks:
        raise ConfigError(
            f"ranks: lplb gives every rank the same number of the {experts} experts; {ranks} do not divide them"
        )
    columns = (task.slots - experts) // ranks
    if columns > experts // ranks:
        raise ConfigError(
            f"slots: lplb replicas each expert once at most; {task.slots} are more than twice {experts} experts"
        )
    if "r2o" not in task.options:
        return topology_matrix(task.options.get("topology", "spread"), ranks, task.node_size, columns)
    if "topology" in task.options:
        raise ConfigError("r2o: cannot be given beside topology; leave one out")
    r2o_GK = checked_matrix(task.options["r2o"], ranks)
    if r2o_GK.shape[1] != columns:
        raise ConfigError(
            f"slots: {task.slots} leave {columns} redundant slots a rank, but r2o has {r2o_GK.shape[1]} columns; "
            f"use {experts + ranks * r2o_GK.shape[1]} slots"
        )
    return r2o_GK


def _over_all_ranks(r2o_GK: np.ndarray, ranks: int) -> np.ndarray:
    """The matrix of one group repeated for every group, int64 [R, K]."""
    group = len(r2o_GK)
    first_of_group = np.arange(0, ranks, group)[:, None, None]
    return (first_of_group + r2o_GK).reshape(ranks, r2o_GK.shape[1])
