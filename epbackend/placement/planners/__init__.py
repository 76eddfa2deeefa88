"""`plan`: one call for every planner. Third-party planners plug in by the entry point group `epbackend.planners`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any

import numpy as np

from epbackend import __version__
from epbackend.errors import ConfigError, real_number, whole_number
from epbackend.names import PLANNERS
from epbackend.placement.affinity import Affinity
from epbackend.placement.loads import NUMBERING, Loads
from epbackend.placement.objectives import TOKENS, Objective, parse_objective
from epbackend.placement.placement import Placement, Provenance
from epbackend.placement.planners.base import (
    Progress,
    Task,
    check_answer,
    check_task,
    checked_rank_slots,
    silent,
)
from epbackend.placement.speeds import RANK_SPEED, checked_speeds

__all__ = ["plan", "planner_names"]


def plan(
    loads: Loads | np.ndarray,
    *,
    ranks: int,
    slots: int | None = None,
    algorithm: str = "refined",
    objective: str | Path | Objective = "tokens",
    node_size: int = 0,
    budget: int | None = None,
    search_ms: float = 0.0,
    seed: int = 0,
    current: Placement | None = None,
    affinity: Affinity | None = None,
    progress: Progress = silent,
    rank_speed: Sequence[float] | None = None,
    rank_slots: Sequence[int] | None = None,
    **options: Any,
) -> Placement:
    """Decides where the experts of every layer live. The same arguments give the same placement, unless it searches.

    Args:
        loads: recorded loads, or one [layers, experts] array of choices (a token counts once for each of its experts).
        ranks: R.
        slots: P, the slots of every layer over all ranks, a multiple of the ranks; unless given, those of `current`, or
            one per expert.
        algorithm: one of `planner_names()`.
        objective: what is balanced, see `objectives.parse_objective`.
        node_size: ranks per node; 0: all ranks are one node.
        budget: redundant slots over all layers, given to layers by need; instead of `slots`.
        search_ms: milliseconds that each layer may be searched beyond the first answer.
        seed: of all random numbers.
        current: the placement in use, from which some planners start.
        affinity: of any planner's layers: fewer nodes and ranks that a token visits, at a limited loss of balance.
        progress: called with (layers done, layers in all).
        rank_speed: how fast each rank is, in any unit; unless given, those of `current`, or all alike.
        rank_slots: slots of each rank in every layer, where their memories differ; instead of `slots` and `budget`.
        options: options of this planner alone; its module lists them.

    Raises:
        ConfigError: the arguments cannot work together, or the planner cannot do what they ask.
        UnavailableError: the package of the planner does not load.
    """
    loads = loads if isinstance(loads, Loads) else Loads.of(loads)
    if slots is not None and budget is not None:
        raise ConfigError(
            "slots: cannot be given beside budget; slots are for every layer, a budget is for all layers"
        )
    whole_number("ranks", ranks, 1)
    if rank_speed is None and current is not None:
        rank_speed = current.rank_speed
    slots_R = checked_rank_slots(rank_slots, ranks, slots, budget)
    if slots_R:
        slots = sum(slots_R)
    task = Task(
        loads=loads,
        ranks=ranks,
        slots=whole_number("slots", slots, 1) if slots is not None else _usual_slots(loads, budget, current),
        objective=parse_objective(objective),
        node_size=whole_number("node_size", node_size),
        budget=whole_number("budget", budget) if budget is not None else None,
        search_ms=real_number("search_ms", search_ms),
        seed=whole_number("seed", seed),
        current=current,
        options=MappingProxyType(options),
        progress=progress,
        rank_speed=checked_speeds(rank_speed, ranks),
        slots_R=slots_R,
    )
    check_task(task)
    if affinity is not None:
        affinity.check(loads)
        if task.objective != TOKENS:
            raise ConfigError(
                f"affinity: its limit is of tokens, not {task.objective.name}; use objective tokens"
            )
    layers = check_answer(algorithm, PLANNERS.load(algorithm)(task), task)
    asked = _asked(task)
    if affinity is not None:
        layers = affinity.gather_layers(layers, loads, task.node_size, task.rank_speed)
        asked |= affinity.provenance
    progress(loads.layers, loads.layers)
    provenance = Provenance(algorithm, loads.names, __version__, tuple(sorted(asked.items())))
    return Placement(layers, task.node_size, provenance)


def planner_names() -> tuple[str, ...]:
    """Every algorithm that `plan` knows: the default first, those of third parties last."""
    return PLANNERS.names()


def _usual_slots(loads: Loads, budget: int | None, current: Placement | None) -> int:
    """P where no slots are given."""
    in_use = current.slots if current is not None and budget is None else None
    return in_use or loads.experts


def _asked(task: Task) -> dict[str, Any]:
    """The arguments beyond loads, ranks and slots that are not the usual ones, as plain values, for the provenance;
    and by whose numbers the loads count experts, where they say it."""
    usual = Task(task.loads, task.ranks, task.slots, TOKENS)
    asked = {name: getattr(task, name) for name in ("budget", "search_ms", "seed")}
    changed = {name: value for name, value in asked.items() if value != getattr(usual, name)}
    if task.objective != TOKENS:
        changed["objective"] = task.objective.name
    if task.rank_speed:
        changed[RANK_SPEED] = list(task.rank_speed)
    if task.loads.numbering is not None:
        changed[NUMBERING] = task.loads.numbering
    return changed | {name: _plain(value) for name, value in task.options.items()}


def _plain(value: Any) -> Any:
    """A value that JSON can hold and returns unchanged."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, NoneType)) else str(value)
