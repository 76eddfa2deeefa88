"""OmniPlacement: as many replicas as a layer needs, up to a cap, and never two of them on one rank.

Source: Huawei's published description of OmniPlacement; the code is ours. A layer's replicas go one by one to the
expert with the most load per replica, up to the cap. Experts are then bin packed, heaviest replica first, all replicas
of an expert at once, each onto the lightest rank with room. With a budget the layers that need redundant slots most
get them and others get none. If the layout in order is better, it is taken instead.

Options: `max_replicas`, the cap; unless given, the ranks. (`max_copies`, its old name, still works.)
"""

from __future__ import annotations

import logging
from heapq import heappop, heappush

import numpy as np

from epbackend.errors import ConfigError, whole_number
from epbackend.placement.budget import first_slots, share_out
from epbackend.placement.placement import Layout
from epbackend.placement.planners.base import Task, all_layers, refuse_unknown

log = logging.getLogger(__name__)

OLD_NAME = "max_copies"
"""What `max_replicas` was called at first."""


def plan_layers(task: Task) -> tuple[Layout, ...]:
    """See the module. Several windows are planned as their mixture."""
    known = ("max_replicas", OLD_NAME) if OLD_NAME in task.options else ("max_replicas",)
    refuse_unknown("omni", task, options=known, knows_budget=True)
    cap = _cap(task)
    loaded = task.loads.loaded_layers
    weight_YE = task.loads.mixture_YE()[list(loaded)]
    first_YR = _first_slots(task, weight_YE, cap)
    planned = {}
    for done, (layer, weight_E, first_R) in enumerate(zip(loaded, weight_YE, first_YR, strict=True), 1):
        planned[layer] = plan_layer(weight_E, first_R, cap)
        task.progress(done, len(loaded))
    return all_layers(task, planned)


def plan_layer(weight_E: np.ndarray, first_R: np.ndarray, cap: int) -> Layout:
    """One layer; first_R, int64 [R + 1]: the first slot of each rank, and at the end the number of slots."""
    slots, experts = int(first_R[-1]), len(weight_E)
    replicas_E = capped_replicas(weight_E, slots, cap)
    packed = bin_pack_apart(weight_E / replicas_E, replicas_E, np.diff(first_R).tolist())
    in_order = Layout.cut(np.arange(slots) % experts, first_R, experts)
    return min(packed, in_order, key=lambda layout: _heaviest(layout, weight_E))


def capped_replicas(weight_E: np.ndarray, slots: int, cap: int) -> np.ndarray:
    """Replicas of each expert, int64 [E], `cap` at most, adding up to `slots`.

    One at a time to the expert with the most load per replica; of equal ones, to the first. `layer_search` says why
    this is not `optimal_replicas`.
    """
    replicas_E = np.ones(len(weight_E), dtype=np.int64)
    for _ in range(slots - len(weight_E)):
        replicas_E[np.where(replicas_E < cap, weight_E / replicas_E, -1.0).argmax()] += 1
    return replicas_E


def bin_pack_apart(load_E: np.ndarray, replicas_E: np.ndarray, room: list[int]) -> Layout:
    """Each replica of expert e weighs load_E[e]; rank r gets room[r] replicas, all of different experts.

    If other ranks have a slot more, a rank starts below zero by the load of such a slot's replica, one of the lightest:
    it has to take heavier ones.
    """
    held: list[list[int]] = [[] for _ in room]
    light = float(np.sort(np.repeat(load_E, replicas_E))[: len(room)].mean())
    start = [(slots - max(room)) * light for slots in room]
    open_ranks = _ranks_with_room(held, load_E, room, start)
    for expert in np.argsort(-load_E, kind="stable").tolist():
        replicas = int(replicas_E[expert])
        lightest = [heappop(open_ranks) for _ in range(min(replicas, len(open_ranks)))]
        for load, rank in lightest:
            held[rank].append(expert)
            if len(held[rank]) < room[rank]:
                heappush(open_ranks, (load + float(load_E[expert]), rank))
        for _ in range(replicas - len(lightest)):
            _squeeze_in(expert, held, room)
            open_ranks = _ranks_with_room(held, load_E, room, start)
    return Layout(tuple(map(tuple, held)), len(load_E))


def _cap(task: Task) -> int:
    """The option `max_replicas`, by its new or its old name; the ranks unless given, and at most."""
    if OLD_NAME not in task.options:
        return min(task.ranks, whole_number("max_replicas", task.options.get("max_replicas", task.ranks), 1))
    if "max_replicas" in task.options:
        raise ConfigError(
            f"max_replicas: cannot be given beside {OLD_NAME}, its old name; leave that one out"
        )
    log.warning("option %s of omni is now called max_replicas; the old name still works", OLD_NAME)
    return min(task.ranks, whole_number(OLD_NAME, task.options[OLD_NAME], 1))


def _first_slots(task: Task, weight_YE: np.ndarray, cap: int) -> np.ndarray:
    """`first_slots` of each layer with load. Raises ConfigError where the cap leaves some slots empty."""
    layers, experts = weight_YE.shape
    slots, fit = task.slots * layers + (task.budget or 0), cap * experts * layers
    if slots > fit:
        raise ConfigError(
            f"max_replicas: {cap} replicas of {experts} experts in {layers} layers fill {fit} slots, "
            f"not {slots}; allow more replicas, or use fewer slots"
        )
    slots_Y = np.full(layers, task.slots)
    if task.budget is not None:
        slots_Y = share_out(weight_YE, cap, task.slots, task.budget)
    return first_slots(slots_Y, task.ranks)


def _ranks_with_room(
    held: list[list[int]], load_E: np.ndarray, room: list[int], start: list[float]
) -> list[tuple[float, int]]:
    """(load, rank), lightest first, which makes it a heap."""
    return sorted(
        (start[rank] + float(load_E[experts].sum()), rank)
        for rank, experts in enumerate(held)
        if len(experts) < room[rank]
    )


def _squeeze_in(expert: int, held: list[list[int]], room: list[int]) -> None:
    """All ranks with room hold the expert already: a full rank takes it, and gives one with room another expert.

    There is such a full rank as long as an expert has no more replicas than there are ranks. As the slots of ranks
    differ by one at most, it holds an expert that the other does not.
    """
    taker = next(rank for rank, experts in enumerate(held) if len(experts) < room[rank])
    giver = next(rank for rank, experts in enumerate(held) if expert not in experts)
    given = next(other for other in reversed(held[giver]) if other not in held[taker])
    held[giver][held[giver].index(given)] = expert
    held[taker].append(given)


def _heaviest(layout: Layout, weight_E: np.ndarray) -> float:
    """Load of the heaviest rank when replicas share evenly."""
    load_P = (weight_E / layout.replicas_E)[layout.slot_to_expert_P]
    return float(np.bincount(layout.rank_of_slot_P, load_P).max())
