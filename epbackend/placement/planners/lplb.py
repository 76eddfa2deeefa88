"""DeepSeek's LPLB placement: a fixed graph of copies, along which a split can level every batch.

Source: the published description of https://github.com/deepseek-ai/LPLB, written anew. EPLB places one copy of every
expert; each rank's experts are ordered by load, heaviest first; then redundant slot k of rank i copies expert k of
rank r2o[i, k]. Where LPLB solves a linear program a batch, `split="level"` reaches the same optimum.

Options: `topology`, one of spread (default), ring, cube, hypercube, torus; or `r2o`, a matrix of your own (see
topologies.py). Slots must be the experts plus the same number of redundant slots for every rank.
"""

from __future__ import annotations

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.layout import Layout
from epbackend.placement.planners.base import Task, all_layers
from epbackend.placement.planners.checks import refuse_unknown
from epbackend.placement.planners.eplb import rebalance
from epbackend.placement.planners.topologies import checked_matrix, topology_matrix


def plan_layers(task: Task) -> tuple[Layout, ...]:
    """See the module. Several windows are planned as their mixture."""
    refuse_unknown("lplb", task, options=("topology", "r2o"))
    experts, ranks = task.loads.experts, task.ranks
    r2o_RK = _over_all_ranks(_matrix(task), ranks)
    loaded = list(task.loads.loaded_layers)
    weight_LE = task.loads.mixture_LE()[loaded]
    expert_LRS = rebalance(weight_LE, experts, ranks).reshape(len(loaded), ranks, experts // ranks)
    load_LRS = np.take_along_axis(weight_LE, expert_LRS.reshape(len(loaded), experts), axis=1).reshape(
        expert_LRS.shape
    )
    own_LRS = np.take_along_axis(expert_LRS, np.argsort(-load_LRS, axis=2, kind="stable"), axis=2)
    copies_LRK = own_LRS[:, r2o_RK, np.arange(r2o_RK.shape[1])]
    held_LP = np.concatenate([own_LRS, copies_LRK], axis=2).reshape(len(loaded), task.slots)
    layouts = (Layout.of(held_P, ranks, experts) for held_P in held_LP)
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
            f"slots: lplb copies each expert once at most; {task.slots} are more than twice {experts} experts"
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
