"""DeepSeek's Expert Parallelism Load Balancer, slot for slot: the reference that other planners are measured against.

Source: the published description and example of https://github.com/deepseek-ai/EPLB; the code is ours, and plans all
layers at once. Three greedy steps: groups of experts to nodes, replicas within a node to the expert with the most load
per replica, and replicas to ranks, heaviest first. Loads are added and divided in float32 as there, and equal ones are
sorted as torch does.

Options: `groups`, the expert groups of the router. If the nodes divide them, groups stay whole on a node (hierarchical;
costs balance), else any replica may go to any rank (global). Two replicas of an expert may be on one rank.

Letters beyond the package's: B problems solved at once, I items to pack (groups or replicas), J bins (nodes or ranks).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from epbackend.errors import ConfigError, whole_number
from epbackend.placement.placement import Layout
from epbackend.placement.planners.base import Task, all_layers, check_even, refuse_unknown


def plan_layers(task: Task) -> tuple[Layout, ...]:
    """See the module. Several windows are planned as their mixture."""
    refuse_unknown("eplb", task, options=("groups",))
    check_even(task)
    groups = whole_number("groups", task.options.get("groups", 1), 1)
    if task.loads.experts % groups:
        raise ConfigError(
            f"groups: {groups} do not divide the {task.loads.experts} experts; use the router's number (n_group)"
        )
    nodes = task.ranks // task.node_size if task.node_size else 1
    loaded = task.loads.loaded_layers
    weight_YE = task.loads.mixture_YE()[list(loaded)]
    expert_YP = rebalance(weight_YE, task.slots, task.ranks, groups, nodes)
    layouts = (Layout.of(held_P, task.ranks, task.loads.experts) for held_P in expert_YP)
    return all_layers(task, dict(zip(loaded, layouts, strict=True)))


def rebalance(weight_YE: np.ndarray, slots: int, ranks: int, groups: int = 1, nodes: int = 1) -> np.ndarray:
    """The expert of every slot, int64 [Y, P].

    Args:
        weight_YE: load of each expert, in any unit.
        slots: P, a multiple of the ranks.
        ranks: R.
        groups: of experts, which they divide.
        nodes: they divide the ranks.
    """
    if groups % nodes:
        groups = nodes = 1
    layers, experts = weight_YE.shape
    weight_YE = weight_YE.astype(np.float32)
    by_node_YE = _experts_by_node(weight_YE, groups, nodes)
    weight_BE = np.take_along_axis(weight_YE, by_node_YE, axis=1).reshape(layers * nodes, experts // nodes)
    replicas = replicate(weight_BE, slots // nodes)
    load_BE = weight_BE / replicas.count_BE.astype(np.float32)
    load_BP = np.take_along_axis(load_BE, replicas.expert_BP, axis=1)
    replica_BP = bin_pack(load_BP, ranks // nodes)
    expert_BP = np.take_along_axis(replicas.expert_BP, replica_BP, axis=1)
    first_M1 = np.arange(nodes)[:, None] * (experts // nodes)
    local_YP = (expert_BP.reshape(layers, nodes, slots // nodes) + first_M1).reshape(layers, slots)
    return np.take_along_axis(by_node_YE, local_YP, axis=1)


def _experts_by_node(weight_YE: np.ndarray, groups: int, nodes: int) -> np.ndarray:
    """The experts in the order of nodes, int64 [Y, E]: groups stay whole, and nodes get equally many."""
    layers, experts = weight_YE.shape
    size = experts // groups
    weight_YI = weight_YE.reshape(layers, groups, size).sum(axis=2)
    group_YI = bin_pack(weight_YI, nodes)
    return (group_YI[:, :, None] * size + np.arange(size)).reshape(layers, experts)


class Replicas(NamedTuple):
    """The replicas of B independent problems (a layer on a node) with E experts and P replicas each."""

    expert_BP: np.ndarray
    """The expert of each replica: first one of every expert, then the further ones in the order they were given."""
    count_BE: np.ndarray
    """Replicas of each expert."""


def replicate(weight_BE: np.ndarray, slots: int) -> Replicas:
    """One replica of each expert, then further ones of the expert with the most load per replica, `slots` in all.

    `layer_search.optimal_replicas` says why the same rule is written several times.
    """
    problems, experts = weight_BE.shape
    every_B = np.arange(problems)
    expert_BP = np.tile(np.arange(slots), (problems, 1))
    count_BE = np.ones((problems, experts), dtype=np.int64)
    load_BE = weight_BE.copy()
    for slot in range(experts, slots):
        heaviest_B = load_BE.argmax(axis=1)
        expert_BP[:, slot] = heaviest_B
        count_BE[every_B, heaviest_B] += 1
        replicas_B = count_BE[every_B, heaviest_B].astype(np.float32)
        load_BE[every_B, heaviest_B] = weight_BE[every_B, heaviest_B] / replicas_B
    return Replicas(expert_BP, count_BE)


def bin_pack(load_BI: np.ndarray, bins: int) -> np.ndarray:
    """Items into bins of equal number, heaviest item first, each into the lightest bin with room.

    Returns the items in the order of bins, int64 [B, I]: bin j holds entries j * I / bins to (j + 1) * I / bins - 1.
    """
    problems, items = load_BI.shape
    room = items // bins
    if room == 1:  # as published: items stay where they are, not sorted
        return np.tile(np.arange(items), (problems, 1))
    every_B = np.arange(problems)
    order_BI = descending_order(load_BI)
    packed_BI = np.empty((problems, items), dtype=np.int64)
    held_BJ = np.zeros((problems, bins), dtype=np.int64)
    weight_BJ = np.zeros((problems, bins), dtype=np.float32)  # infinite for a full bin
    for item_B in order_BI.T:
        bin_B = weight_BJ.argmin(axis=1)
        position_B = held_BJ[every_B, bin_B]
        packed_BI[every_B, bin_B * room + position_B] = item_B
        held_BJ[every_B, bin_B] += 1
        grown_B = weight_BJ[every_B, bin_B] + load_BI[every_B, item_B]
        weight_BJ[every_B, bin_B] = np.where(position_B + 1 < room, grown_B, np.inf)
    return packed_BI


# The order of equal values
#
# EPLB's answers depend on the order in which `torch.sort(descending=True)` leaves equal values on a CPU. That is the
# C++ library's `std::sort` (libstdc++): introsort, which is not stable. It partitions by quicksort down to short runs,
# with the median of three as pivot, and then sorts by insertion. Insertion is stable, so a stable sort of the
# partitioned values gives the same order, and values without ties need no partitioning at all.
#
# The heap sort to which introsort turns when quicksort goes badly is left out: such an input gets its ties in another
# order.

SHORT = 16
"""Runs of at most this many values are left to insertion."""


def descending_order(values_BI: np.ndarray) -> np.ndarray:
    """The indices that sort each row, largest first, int64 [B, I]; ties in the order of torch."""
    order_BI = np.argsort(-values_BI, axis=1, kind="stable")
    sorted_BI = np.take_along_axis(values_BI, order_BI, axis=1)
    for row in np.flatnonzero((sorted_BI[:, 1:] == sorted_BI[:, :-1]).any(axis=1)):
        partitioned_I = _partitioned(values_BI[row].tolist())
        order_BI[row] = partitioned_I[np.argsort(-values_BI[row, partitioned_I], kind="stable")]
    return order_BI


def _partitioned(values: list[float]) -> np.ndarray:
    """Where quicksort leaves each value's index when it stops at short runs, int64 [I]."""
    order = list(range(len(values)))
    levels = 2 * (len(values).bit_length() - 1)
    runs = [(0, len(values), levels)]
    while runs:
        first, last, levels = runs.pop()
        if last - first > SHORT and levels:
            cut = _partition(values, order, first, last)
            runs += [(first, cut, levels - 1), (cut, last, levels - 1)]
    return np.array(order, dtype=np.int64)


def _partition(values: list[float], order: list[int], first: int, last: int) -> int:
    """Cuts the run [first, last) of both lists in two, larger values first, and returns where."""
    _median_to_front(values, order, first, last)
    pivot = values[first]
    low, high = first + 1, last
    while True:
        while values[low] > pivot:
            low += 1
        high -= 1
        while pivot > values[high]:
            high -= 1
        if low >= high:
            return low
        _swap(values, order, low, high)
        low += 1


def _median_to_front(values: list[float], order: list[int], first: int, last: int) -> None:
    a, b, c = first + 1, first + (last - first) // 2, last - 1
    if values[a] > values[b]:
        median = b if values[b] > values[c] else c if values[a] > values[c] else a
    else:
        median = a if values[a] > values[c] else c if values[b] > values[c] else b
    _swap(values, order, first, median)


def _swap(values: list[float], order: list[int], a: int, b: int) -> None:
    values[a], values[b] = values[b], values[a]
    order[a], order[b] = order[b], order[a]
