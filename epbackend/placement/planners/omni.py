"""OmniPlacement: as many replicas as a layer needs, up to a cap, and never two of them on one rank.

Source: Huawei's published description of OmniPlacement, written anew. A layer's replicas go one by one to the expert
with the most load a replica, up to the cap. Experts are then packed heaviest replica first, all replicas of an expert
at once, each onto the lightest rank with room. With a budget the layers that need redundant slots most get them and
others get none.

Options: `max_replicas`, the cap; unless given, the ranks. Where the layout in order is better, it is taken instead.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import pairwise

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.budget import first_slots, share_out
from epbackend.placement.placement import Layout
from epbackend.placement.planners.base import Task, all_layers, refuse_unknown
from epbackend.placement.values import whole_number


def plan_layers(task: Task) -> tuple[Layout, ...]:
    """See the module. Several windows are planned as their mixture."""
    refuse_unknown("omni", task, options=("max_replicas",), knows_budget=True)
    most = min(task.ranks, whole_number("max_replicas", task.options.get("max_replicas", task.ranks), 1))
    loaded = task.loads.loaded_layers
    weight_YE = task.loads.mixture_YE()[list(loaded)]
    room_YR = _room(task, weight_YE, most)
    planned = {}
    for done, (layer, weight_E, room_R) in enumerate(zip(loaded, weight_YE, room_YR, strict=True), 1):
        planned[layer] = plan_layer(weight_E, room_R.tolist(), most)
        task.progress(done, len(loaded))
    return all_layers(task, planned)


def _room(task: Task, weight_YE: np.ndarray, most_replicas: int) -> np.ndarray:
    """Slots of every rank in each layer with load, int64 [Y, R]. Raises ConfigError where the cap leaves some empty."""
    layers, experts = weight_YE.shape
    slots, fit = task.slots * layers + (task.budget or 0), most_replicas * experts * layers
    if slots > fit:
        raise ConfigError(
            f"max_replicas: {most_replicas} replicas of {experts} experts in {layers} layers fill {fit} slots, "
            f"not {slots}; allow more replicas, or use fewer slots"
        )
    slots_Y = np.full(layers, task.slots)
    if task.budget is not None:
        slots_Y = share_out(weight_YE, most_replicas, task.slots, task.budget)
    return np.diff(first_slots(slots_Y, task.ranks), axis=1)


def plan_layer(weight_E: np.ndarray, room: list[int], most_replicas: int) -> Layout:
    """One layer, in which rank r has room[r] slots."""
    replicas_E = capped_replicas(weight_E, sum(room), most_replicas)
    packed = pack_apart(weight_E / replicas_E, replicas_E, room)
    return min(packed, _in_order(len(weight_E), room), key=lambda layout: _heaviest(layout, weight_E))


def capped_replicas(weight_E: np.ndarray, slots: int, most: int) -> np.ndarray:
    """Replicas of each expert, int64 [E], that fill the slots: each goes where the load of a replica is greatest."""
    replicas_E = np.ones(len(weight_E), dtype=np.int64)
    for _ in range(slots - len(weight_E)):
        replicas_E[np.where(replicas_E < most, weight_E / replicas_E, -1.0).argmax()] += 1
    return replicas_E


def pack_apart(load_E: np.ndarray, replicas_E: np.ndarray, room: list[int]) -> Layout:
    """Each replica of expert e weighs load_E[e]; rank r gets room[r] replicas, all of different experts.

    Where others have a slot more, a rank starts below zero by the load of such a slot's replica, one of the lightest:
    it has to take heavier ones.
    """
    held: list[list[int]] = [[] for _ in room]
    light = float(np.sort(np.repeat(load_E, replicas_E))[: len(room)].mean())
    start = [(places - max(room)) * light for places in room]
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

    Such a rank is there as long as an expert has no more replicas than there are ranks, and as the room of ranks
    differs by one at most, the full rank holds an expert that the other does not.
    """
    taker = next(rank for rank, experts in enumerate(held) if len(experts) < room[rank])
    giver = next(rank for rank, experts in enumerate(held) if expert not in experts)
    given = next(other for other in reversed(held[giver]) if other not in held[taker])
    held[giver][held[giver].index(given)] = expert
    held[taker].append(given)


def _in_order(experts: int, room: list[int]) -> Layout:
    """Experts in order, and again from the first one while there is room."""
    bounds = np.cumsum([0, *room]).tolist()
    return Layout(tuple(tuple(slot % experts for slot in range(*pair)) for pair in pairwise(bounds)), experts)


def _heaviest(layout: Layout, weight_E: np.ndarray) -> float:
    """Load of the heaviest rank when replicas share evenly."""
    load_P = (weight_E / layout.replicas_E)[layout.slot_to_expert_P]
    return float(np.bincount(layout.rank_of_slot_P, load_P).max())
