"""What a planner is asked, and what it answers.

A planner is a function `layers = planner(task)`, found by entry point group `epbackend.planners`; `plan` (in
`planners/__init__.py`) checks the question, calls it and wraps the answer in a `Placement`. The planners that come
along have a module of their name here, and in it the function `plan_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from epbackend.placement.layout import Layout
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import Objective
from epbackend.placement.placement import Placement

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


def silent(done: int, total: int) -> None:
    """The progress that nobody watches."""


@dataclass(frozen=True)
class Task:
    """A question that `plan` has already checked as far as it concerns every planner."""

    loads: Loads
    ranks: int
    slots: int
    """P of every layer; with a budget, the slots without redundancy (E)."""
    objective: Objective
    node_size: int = 0
    """Ranks a node; 0: all ranks are one node."""
    budget: int | None = None
    """Redundant slots of all layers together, to be given to layers by need; None: `slots` in every layer."""
    search_ms: float = 0.0
    """Time that a searching planner may spend on each layer beyond its first answer, in milliseconds."""
    seed: int = 0
    current: Placement | None = None
    """The placement in use, for planners that start from it."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What only this planner knows; it refuses others by ConfigError."""
    progress: Progress = silent


class Planner(Protocol):
    """Plans every layer of `task.loads`. Layers without load get `Layout.even`, or stay as in `task.current`."""

    def __call__(self, task: Task) -> tuple[Layout, ...]: ...


def all_layers(task: Task, planned: Mapping[int, Layout]) -> tuple[Layout, ...]:
    """The layers of the model: those planned; and those without load as in the placement in use, or else even."""
    even = Layout.even(task.loads.experts, task.ranks, task.slots)
    in_use = task.current
    idle = in_use.layers if in_use is not None and in_use.slots == task.slots else (even,) * task.loads.layers
    return tuple(planned.get(layer, idle[layer]) for layer in range(task.loads.layers))
