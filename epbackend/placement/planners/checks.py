"""What every planner may rely on: the question checked before it is asked, and its answer checked afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from epbackend.errors import ConfigError, did_you_mean
from epbackend.placement.layout import Layout
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import TOKENS
from epbackend.placement.placement import Placement
from epbackend.placement.planners.base import Task


def check_task(task: Task) -> None:
    """Raises ConfigError for ranks, slots and nodes that do not go together, naming the field and the remedy."""
    experts, ranks, slots = task.loads.experts, task.ranks, task.slots
    if task.current is not None:
        _check_current(task.current, task.loads, ranks)
    if slots < experts:
        raise ConfigError(f"slots: {slots} are fewer than the {experts} experts; every expert needs one")
    if slots < ranks:
        raise ConfigError(f"slots: {slots} are fewer than the {ranks} ranks; every rank needs one")
    if slots > experts * ranks:
        raise ConfigError(
            f"slots: {slots} are more than {experts * ranks}, a copy of each of {experts} experts on each of "
            f"{ranks} ranks; use fewer"
        )
    if slots % ranks and task.budget is None and task.current is None:
        above = -(-slots // ranks) * ranks
        raise ConfigError(
            f"slots: {slots} cannot be spread evenly over {ranks} ranks; use a multiple of the ranks "
            f"such as {above}, or a budget"
        )
    if task.budget is not None and task.budget > (
        most := len(task.loads.loaded_layers) * experts * (ranks - 1)
    ):
        raise ConfigError(
            f"budget: {task.budget} is more than {most}, a copy of every expert on every rank; use less"
        )
    if task.node_size and ranks % task.node_size:
        raise ConfigError(
            f"node_size: {task.node_size} ranks a node do not divide the {ranks} ranks; use a divisor, or 0"
        )


def _check_current(current: Placement, loads: Loads, ranks: int) -> None:
    has = {"ranks": current.ranks, "layers": len(current.layers), "experts": current.experts}
    asked = {"ranks": ranks, "layers": loads.layers, "experts": loads.experts}
    for name in has:
        if has[name] != asked[name]:
            raise ConfigError(
                f"current: the placement in use has {has[name]} {name}, but {asked[name]} are asked for; "
                "start from a placement of the same model and ranks"
            )


def check_answer(algorithm: str, layers: Any, task: Task) -> tuple[Layout, ...]:
    """The planner's answer. Raises ConfigError, naming the planner, for one that is not what was asked for."""
    if not isinstance(layers, (tuple, list)) or not all(isinstance(layer, Layout) for layer in layers):
        raise ConfigError(
            f"algorithm: {algorithm!r} answered with {layers!r:.80}, not layouts; report it to its authors"
        )
    if len(layers) != task.loads.layers:
        raise ConfigError(
            f"algorithm: {algorithm!r} planned {len(layers)} of {task.loads.layers} layers; report it to its authors"
        )
    fixed = task.budget is None and (task.current is None or task.current.slots is not None)
    for index, layer in enumerate(layers):
        has = (layer.ranks, layer.experts, layer.slots if fixed else task.slots)
        if has != (task.ranks, task.loads.experts, task.slots):
            raise ConfigError(
                f"algorithm: {algorithm!r} answered with {layer.ranks} ranks, {layer.experts} experts and "
                f"{layer.slots} slots in layer {index}, where {task.ranks}, {task.loads.experts} and {task.slots} "
                "were asked for; report it to its authors"
            )
    return tuple(layers)


def refuse_unknown(
    algorithm: str, task: Task, *, options: Iterable[str] = (), knows_budget: bool = False
) -> None:
    """For planners that balance tokens and nothing else.

    Raises ConfigError for another objective, for a budget unless the planner knows it, and for other options.
    """
    if task.objective != TOKENS:
        raise ConfigError(
            f"objective: {algorithm} balances tokens and nothing else, not {task.objective.name}; "
            "use algorithm 'refined'"
        )
    if task.budget is not None and not knows_budget:
        raise ConfigError(
            f"budget: {algorithm} cannot share slots out over layers; use algorithm 'refined' or 'omni'"
        )
    refuse_options(algorithm, task, options)


def refuse_options(algorithm: str, task: Task, known: Iterable[str] = ()) -> None:
    """Raises ConfigError for an option that the planner does not know."""
    known = tuple(known)
    for name in task.options:
        if name not in known:
            listed = f"it knows {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{name}: is no option of {algorithm}{did_you_mean(name, known)}; {listed}")
