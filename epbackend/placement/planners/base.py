"""What a planner is: its `Task`, its answer, and the checks of both.

A planner is a function `layers = planner(task)`, found by the entry point group `epbackend.planners`. `plan` (in
`planners/__init__.py`) checks the task, calls the planner, checks the answer and wraps it in a `Placement`. The
built-in planners have a module of their name here, and in it the function `plan_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from epbackend.errors import ConfigError, did_you_mean, whole_number
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import TOKENS, Objective
from epbackend.placement.placement import Layout, Placement, check_ranks, check_slots

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


def silent(done: int, total: int) -> None:
    """For callers that show no progress."""


@dataclass(frozen=True)
class Task:
    """What `plan` asks of a planner, already checked as far as it concerns every planner."""

    loads: Loads
    ranks: int
    """R."""
    slots: int
    """P, slots of every layer over all ranks; with a budget, the slots without redundancy (E)."""
    objective: Objective
    """What is balanced."""
    node_size: int = 0
    """Ranks per node; 0: all ranks are one node."""
    budget: int | None = None
    """Redundant slots of all layers together, given to layers by need; None: `slots` in every layer."""
    search_ms: float = 0.0
    """Milliseconds that a searching planner may spend on each layer beyond its first answer."""
    seed: int = 0
    current: Placement | None = None
    """The placement in use, for planners that start from it."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Options of this planner alone; it refuses unknown ones with a ConfigError."""
    progress: Progress = silent
    rank_speed: tuple[float, ...] = ()
    """Speeds of the ranks, as `speeds.checked_speeds` gives them; empty: all are equally fast."""
    slots_R: tuple[int, ...] = ()
    """Slots of each rank, in every layer; empty: equally many on each, or as in `current`."""

    def first_R(self) -> np.ndarray:
        """The first slot of each rank, and at the end the number of slots, int64 [R + 1], where `slots_R` is given."""
        return np.concatenate(([0], np.cumsum(self.slots_R)))


class Planner(Protocol):
    """Plans every layer of `task.loads`. Layers without load get `Layout.even`, or stay as in `task.current`."""

    def __call__(self, task: Task) -> tuple[Layout, ...]: ...


def all_layers(task: Task, planned: Mapping[int, Layout]) -> tuple[Layout, ...]:
    """All layers of the model: the planned ones, and those without load as in the placement in use, or else even."""
    experts, slots_R = task.loads.experts, task.slots_R
    even = Layout.in_order(experts, slots_R) if slots_R else Layout.even(experts, task.ranks, task.slots)
    in_use = task.current
    idle = in_use.layers if in_use is not None and in_use.slots == task.slots else (even,) * task.loads.layers
    return tuple(planned.get(layer, idle[layer]) for layer in range(task.loads.layers))


def checked_rank_slots(
    rank_slots: Sequence[int] | None, ranks: int, slots: int | None, budget: int | None
) -> tuple[int, ...]:
    """Slots of each rank; empty where they are equal, as in plans that do not name them one by one.

    Raises:
        ConfigError: another number than the ranks, one that is no number of slots, or others beside them.
    """
    if not rank_slots:
        return ()
    if len(rank_slots) != ranks:
        raise ConfigError(
            f"rank_slots: {len(rank_slots)} are given for {ranks} ranks; give one for each rank"
        )
    each = tuple(whole_number("rank_slots", count) for count in rank_slots)
    if (slots is not None and slots != sum(each)) or budget is not None:
        raise ConfigError(
            f"rank_slots: they are {sum(each)} in every layer, and cannot be given beside other slots or a budget; "
            "leave these out"
        )
    return each


def check_task(task: Task) -> None:
    """Raises ConfigError, with the field and the remedy, for loads without a token, and for ranks, slots and nodes that
    do not go together."""
    experts, ranks, slots = task.loads.experts, task.ranks, task.slots
    if not task.loads.loaded_layers:
        raise ConfigError("loads: no expert has had a token: there is nothing to plan on; record a real run")
    check_ranks(ranks)
    if task.current is not None:
        _check_current(task.current, task.loads, ranks)
    for rank, has in enumerate(task.slots_R):
        if not 1 <= has <= experts:
            raise ConfigError(
                f"rank_slots: rank {rank} has {has}, and needs 1 to {experts}, a replica of each expert; "
                "leave out a rank whose memory holds no expert"
            )
    check_slots(slots, experts, ranks)
    if task.budget is None and task.current is None and not task.slots_R:
        check_even(task)
    if task.budget is not None and task.budget > (
        most := len(task.loads.loaded_layers) * experts * (ranks - 1)
    ):
        raise ConfigError(
            f"budget: {task.budget} is more than {most}, a replica of every expert on every rank; use less"
        )
    if task.node_size and ranks % task.node_size:
        raise ConfigError(
            f"node_size: {task.node_size} ranks a node do not divide the {ranks} ranks; use a divisor, or 0"
        )


def check_even(task: Task) -> None:
    """Raises ConfigError for slots that the ranks do not divide, as those of a placement in use may be."""
    slots, ranks = task.slots, task.ranks
    if slots % ranks:
        above = -(-slots // ranks) * ranks
        raise ConfigError(
            f"slots: {slots} cannot be spread evenly over {ranks} ranks; use a multiple of the ranks "
            f"such as {above}, or a budget"
        )


def _check_current(current: Placement, loads: Loads, ranks: int) -> None:
    """Raises ConfigError for a placement of another model or number of ranks."""
    has = {"ranks": current.ranks, "layers": len(current.layers), "experts": current.experts}
    asked = {"ranks": ranks, "layers": loads.layers, "experts": loads.experts}
    for name in has:
        if has[name] != asked[name]:
            raise ConfigError(
                f"current: the placement in use has {has[name]} {name}, but {asked[name]} are asked for; "
                "start from a placement of the same model and ranks"
            )


def check_answer(algorithm: str, layers: Any, task: Task) -> tuple[Layout, ...]:
    """The planner's answer. Raises ConfigError, with the planner's name, for one that does not fit the task."""
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
        if task.slots_R and layer.slots_R.tolist() != list(task.slots_R):
            raise ConfigError(
                f"rank_slots: {algorithm!r} gave ranks other slots in layer {index}; use algorithm 'refined'"
            )
        has = (layer.ranks, layer.experts, layer.slots if fixed else task.slots)
        if has != (task.ranks, task.loads.experts, task.slots):
            raise ConfigError(
                f"algorithm: {algorithm!r} answered with {layer.ranks} ranks, {layer.experts} experts and "
                f"{layer.slots} slots in layer {index}, where {task.ranks}, {task.loads.experts} and {task.slots} "
                "were asked for; report it to its authors"
            )
    return tuple(layers)


def refuse_unknown(algorithm: str, task: Task, *, options: Iterable[str], knows_budget: bool = False) -> None:
    """For planners that balance tokens only, over ranks that are alike, and do not search.

    Raises:
        ConfigError: another objective, speeds or slots of ranks, time to search, a budget unless the planner knows it,
            or an option that it does not know.
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
    for name, value in (("rank_speed", task.rank_speed), ("rank_slots", task.slots_R)):
        if value:
            raise ConfigError(f"{name}: {algorithm} takes all ranks to be alike; use algorithm 'refined'")
    refuse_search(algorithm, task)
    refuse_options(algorithm, task, options)


def refuse_search(algorithm: str, task: Task) -> None:
    """Raises ConfigError for time to search, where the planner does not."""
    if task.search_ms:
        raise ConfigError(f"search_ms: {algorithm} does not search; leave it out, or use algorithm 'refined'")


def refuse_options(algorithm: str, task: Task, known: Iterable[str]) -> None:
    """Raises ConfigError for an option that the planner does not know."""
    known = tuple(known)
    for name in task.options:
        if name not in known:
            listed = f"it knows {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{name}: is no option of {algorithm}{did_you_mean(name, known)}; {listed}")
