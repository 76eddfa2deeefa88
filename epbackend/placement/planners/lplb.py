"""DeepSeek's LPLB placement: a fixed graph of replicas, along which a split can level every batch.

Source: the published description of https://github.com/deepseek-ai/LPLB; the code is ours. EPLB places one replica of
every expert; each rank's experts are ordered by load, heaviest first; then redundant slot j of rank i gets a replica of
expert j of rank r2o[i, j]. Where LPLB solves a linear program for each batch, `split="level"` reaches the same optimum.

Options: `topology`, one of spread (default), ring, cube, hypercube, torus; or `r2o`, a matrix of your own. Slots must
be the experts plus the same number of redundant slots for every rank.

Letters beyond the package's: Z ranks of a group, J redundant slots of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from epbackend.errors import ConfigError, did_you_mean
from epbackend.placement.placement import Layout
from epbackend.placement.planners.base import Task, all_layers, check_even, refuse_unknown
from epbackend.placement.planners.eplb import rebalance


def plan_layers(task: Task) -> tuple[Layout, ...]:
    """See the module. Several windows are planned as their mixture."""
    refuse_unknown("lplb", task, options=("topology", "r2o"))
    check_even(task)
    experts, ranks = task.loads.experts, task.ranks
    r2o_RJ = _over_all_ranks(_matrix(task), ranks)
    loaded = list(task.loads.loaded_layers)
    weight_YE = task.loads.mixture_YE()[loaded]
    expert_YRL = rebalance(weight_YE, experts, ranks).reshape(len(loaded), ranks, experts // ranks)
    load_YRL = np.take_along_axis(weight_YE, expert_YRL.reshape(len(loaded), experts), axis=1).reshape(
        expert_YRL.shape
    )
    own_YRL = np.take_along_axis(expert_YRL, np.argsort(-load_YRL, axis=2, kind="stable"), axis=2)
    replicas_YRJ = own_YRL[:, r2o_RJ, np.arange(r2o_RJ.shape[1])]
    held_YP = np.concatenate([own_YRL, replicas_YRJ], axis=2).reshape(len(loaded), task.slots)
    layouts = (Layout.of(held_P, ranks, experts) for held_P in held_YP)
    return all_layers(task, dict(zip(loaded, layouts, strict=True)))


def _matrix(task: Task) -> np.ndarray:
    """The r2o matrix that is asked for, int64 [Z, J], with a column for each redundant slot of a rank."""
    experts, ranks = task.loads.experts, task.ranks
    if experts % ranks:
        raise ConfigError(
            f"ranks: lplb gives every rank the same number of the {experts} experts; {ranks} do not divide them"
        )
    columns = (task.slots - experts) // ranks
    if columns > experts // ranks:
        raise ConfigError(
            f"slots: lplb copies each expert once at most; {task.slots} are more than twice {experts} experts"
        )
    if "r2o" not in task.options:
        return topology_matrix(task.options.get("topology", "spread"), ranks, task.node_size, columns)
    if "topology" in task.options:
        raise ConfigError("r2o: cannot be given beside topology; leave one out")
    r2o_ZJ = checked_matrix(task.options["r2o"], ranks)
    if r2o_ZJ.shape[1] != columns:
        raise ConfigError(
            f"slots: {task.slots} leave {columns} redundant slots a rank, but r2o has {r2o_ZJ.shape[1]} columns; "
            f"use {experts + ranks * r2o_ZJ.shape[1]} slots"
        )
    return r2o_ZJ


def _over_all_ranks(r2o_ZJ: np.ndarray, ranks: int) -> np.ndarray:
    """The matrix of one group repeated for every group, int64 [R, J]."""
    group = len(r2o_ZJ)
    first_of_group = np.arange(0, ranks, group)[:, None, None]
    return (first_of_group + r2o_ZJ).reshape(ranks, r2o_ZJ.shape[1])


# The r2o matrices
#
# A matrix is for a group of Z ranks and is repeated for every group. Each column is a permutation, so that expert j of
# every rank gets one replica, and no rank is its own image, so that no replica is made where its original is.


def topology_matrix(name: str, ranks: int, node_size: int, columns: int) -> np.ndarray:
    """The named matrix with its first `columns` columns, int64 [Z, J].

    Raises:
        ConfigError: an unknown name, or ranks or columns that the topology does not have.
    """
    if name not in TOPOLOGIES:
        raise ConfigError(
            f"topology: {name!r} is unknown{did_you_mean(str(name), TOPOLOGIES)}; known are {', '.join(TOPOLOGIES)}, "
            "or give a matrix as r2o"
        )
    r2o_ZJ = TOPOLOGIES[name](ranks, node_size)
    if columns > r2o_ZJ.shape[1]:
        raise ConfigError(
            f"slots: topology {name!r} has {r2o_ZJ.shape[1]} redundant slots a rank, not {columns}; "
            "use fewer slots, or a matrix of your own as r2o"
        )
    return checked_matrix(r2o_ZJ[:, :columns], ranks)


def checked_matrix(r2o: Any, ranks: int) -> np.ndarray:
    """The matrix as int64 [Z, J]. Raises ConfigError for one that is no r2o matrix of these ranks."""
    try:
        r2o_ZJ = np.asarray(r2o)
    except ValueError:
        raise ConfigError("r2o: rows of different length; give a matrix [ranks of a group, K]") from None
    if r2o_ZJ.ndim != 2 or not len(r2o_ZJ) or r2o_ZJ.dtype.kind not in "iu":
        raise ConfigError(
            f"r2o: must be a matrix [ranks of a group, K] of whole numbers, not {r2o_ZJ.dtype} {r2o_ZJ.shape}"
        )
    group = len(r2o_ZJ)
    if ranks % group:
        raise ConfigError(f"r2o: groups of {group} ranks do not divide the {ranks} ranks; use a divisor")
    every_Z = np.arange(group)
    for column, source_Z in enumerate(r2o_ZJ.T):
        if not np.array_equal(np.sort(source_Z), every_Z):
            raise ConfigError(
                f"r2o: column {column} is no permutation of 0 to {group - 1}; every rank must be copied from once"
            )
        if (fixed := np.flatnonzero(source_Z == every_Z)).size:
            raise ConfigError(
                f"r2o: column {column} copies rank {fixed[0]} to itself; let another rank hold its replica"
            )
    return r2o_ZJ.astype(np.int64)


def _spread(ranks: int, node_size: int) -> np.ndarray:
    """All ranks in a circle for each column, in a different order each time, so that all are few steps apart."""
    random = np.random.default_rng(ranks)
    r2o_ZJ = np.empty((ranks, ranks - 1), dtype=np.int64)
    for column in range(ranks - 1):
        circle_Z = random.permutation(ranks)
        r2o_ZJ[circle_Z, column] = np.roll(circle_Z, 1)
    return r2o_ZJ


def _ring(ranks: int, node_size: int) -> np.ndarray:
    """All ranks in a circle; column k looks k + 1 ranks back."""
    return (np.arange(ranks)[:, None] - np.arange(1, ranks)) % ranks


def _cube(ranks: int, node_size: int) -> np.ndarray:
    """Eight ranks: two faces of four in a circle; the second column joins the faces along edges and body diagonals."""
    _require_group("cube", 8, ranks)
    face_Z, corner_Z = np.divmod(np.arange(8), 4)
    within_Z = face_Z * 4 + (corner_Z - 1) % 4
    across_Z = (1 - face_Z) * 4 + (corner_Z + 2 * (1 - face_Z)) % 4
    return np.stack([within_Z, across_Z], axis=1)


def _hypercube(ranks: int, node_size: int) -> np.ndarray:
    """Sixteen ranks, joined where their numbers differ in one bit: in the low two bits, and in the high two."""
    _require_group("hypercube", 16, ranks)
    back_4 = np.array([2, 0, 3, 1])  # one step back in the circle 0, 1, 3, 2, whose steps change one bit each
    high_Z, low_Z = np.divmod(np.arange(16), 4)
    return np.stack([high_Z * 4 + back_4[low_Z], back_4[high_Z] * 4 + low_Z], axis=1)


def _torus(ranks: int, node_size: int) -> np.ndarray:
    """A circle through each node, and through the nodes a circle of the ranks at the same position."""
    nodes = ranks // node_size if node_size else 1
    if min(nodes, node_size) < 2:
        raise ConfigError(
            f"topology: a torus needs two nodes or more, of two ranks or more, not node_size {node_size} of {ranks} "
            "ranks; set node_size, or use topology 'spread'"
        )
    node_Z, position_Z = np.divmod(np.arange(ranks), node_size)
    within_Z = node_Z * node_size + (position_Z - 1) % node_size
    across_Z = (node_Z - 1) % nodes * node_size + position_Z
    return np.stack([within_Z, across_Z], axis=1)


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
"""By name: (ranks, ranks per node) -> the matrix with all its columns. The first is the default, and not LPLB's own:
ranks with neighbouring numbers get experts of similar load from EPLB, and a ring would connect them."""
