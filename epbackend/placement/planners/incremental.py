"""From the placement in use to one that is balanced for new loads, with few moves.

The worst rank is relieved by the swap or the replaced replica that brings most for each expert that a rank has to
fetch, until no rank costs more than `target` times the mean, or than the heaviest replica costs at least with so many
slots. Where such steps do not get there, the layer is refined as `refined` does, whatever that moves. Slots that keep
their expert keep their place, layers that are balanced stay as they are, and no layer gets worse. Two replicas of an
expert on one rank are separated, unless the layer would then cost more.

A slot counts as changed if its rank did not hold its expert before: what has to be fetched.

Options: `target`, the worst rank over the mean, 1.02 unless given; `windows` as for `refined`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from epbackend.errors import ConfigError, real_number
from epbackend.placement.placement import Layout, Placement
from epbackend.placement.planners.base import Task, refuse_options, refuse_search
from epbackend.placement.planners.search_inputs import SearchInputs

OPTIONS = ("target", "windows")

TARGET = 1.02

LAST_KICKS = 256
"""Kicks of the search for a layer that few moves do not balance."""


def plan_layers(task: Task) -> tuple[Layout, ...]:
    """See the module.

    Raises:
        ConfigError: there is no placement to start from, or it has other slots; or an option cannot be.
    """
    from epbackend.placement.search.compiled import announce
    from epbackend.placement.search.layer_search import improve

    refuse_search("incremental", task)
    refuse_options("incremental", task, OPTIONS)
    current = _checked_current(task)
    target = real_number("target", task.options.get("target", TARGET))
    if target < 1:
        raise ConfigError(
            f"target: {target} is below 1, and the worst rank cannot be below the mean; use 1 or more"
        )
    inputs = SearchInputs.of(task)
    layers = list(current.layers)
    announce(improve)
    for done, layer in enumerate(task.loads.loaded_layers, start=1):
        layers[layer] = _replan(inputs, layer, layers[layer], target, task.seed % 2**32)
        task.progress(done, len(task.loads.loaded_layers))
    return tuple(layers)


def _checked_current(task: Task) -> Placement:
    """The placement in use. Raises ConfigError where there is none, or it cannot be kept."""
    current = task.current
    if current is None:
        raise ConfigError(
            "current: is missing, and incremental starts from it; give the placement in use, or use 'refined'"
        )
    if task.budget is not None:
        raise ConfigError(
            "budget: incremental keeps the slots of every layer; leave it out, or use 'refined'"
        )
    has_R = current.layers[0].slots_R.tolist()
    if task.slots_R and any(layer.slots_R.tolist() != list(task.slots_R) for layer in current.layers):
        raise ConfigError(
            f"rank_slots: the ranks of the placement in use have {has_R}, and incremental keeps them; leave it out, or "
            "use algorithm 'refined'"
        )
    if current.slots not in (None, task.slots):
        raise ConfigError(
            f"slots: the placement in use has {current.slots}, and incremental keeps them; ask for {current.slots}, "
            "or use algorithm 'refined'"
        )
    return current


def _replan(inputs: SearchInputs, layer: int, before: Layout, target: float, seed: int) -> Layout:
    """One layer: as it is if nothing better is found."""
    from epbackend.placement.search.layer_search import improve, relieve, slots_cost

    problem = inputs.problem(layer, before.first_R)
    before_P = before.slot_to_expert_P.copy()  # numba would compile once more for a read-only array
    least = inputs.least_cost(layer, before.slots)
    expert_P, _, reached = relieve(problem, before_P, target, least, 0.0, before_P.size)
    if not reached:
        expert_P, _ = improve(problem, expert_P, expert_P, LAST_KICKS, seed)
    if slots_cost(problem, expert_P) > slots_cost(problem, before_P):
        return before
    return with_experts(before, expert_P)


def with_experts(before: Layout, expert_P: np.ndarray) -> Layout:
    """The layout with these experts in its slots. On each rank those that were there before keep their places."""
    held = list(before.experts_of_rank)
    changed_P = before.slot_to_expert_P != expert_P
    for rank in np.unique(before.rank_of_slot_P[changed_P]).tolist():
        after_L = expert_P[before.rank_of_slot_P == rank]
        held[rank] = _keep_places(held[rank], after_L.tolist())
    return Layout(tuple(held), before.experts)


def _keep_places(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """The experts of `after`, with those that were there before in their old places."""
    fetched = list(after)
    held: list[int | None] = []
    for expert in before:
        stays = expert in fetched
        held.append(expert if stays else None)
        if stays:
            fetched.remove(expert)
    return tuple(fetched.pop(0) if expert is None else expert for expert in held)
