"""A sequence of loads served four ways, and what each costs by the model of `cost`: what `epbackend simulate` shows.

| name | placement | experts move |
|---|---|---|
| `none` | experts in order | never |
| `once` | EPLB on the first window | never |
| `anew` | EPLB on the window before, as vLLM and SGLang do | between two steps, which wait |
| `ours` | `refined` on the first window, then what the `Rebalancer` proposes | beside the steps |

The first window is known beforehand; the others are served, each with the placement that was made before it came.
What moves beside the steps delays their exchange where both need the link.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from epbackend.balance.cost import CostModel, moved_experts
from epbackend.balance.decision import Policy, Rebalancer
from epbackend.errors import ConfigError, whole_number
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Placement
from epbackend.placement.planners import plan
from epbackend.placement.planners.base import Progress, silent

LABELS = {"none": "experts in order", "once": "EPLB once", "anew": "EPLB anew", "ours": "epbackend"}
"""The ways to serve, for people."""
STEPS = 3000
"""Of a cycle: vLLM's `step_interval`."""
THRESHOLD = 0.01


@dataclass(frozen=True)
class Cycle:
    """One window served, and the moves before it."""

    step_s: float
    """All layers with experts, without moving."""
    exchange_s: float
    """The exchange's part of that."""
    imbalance: float
    """Busiest rank over the mean, mean over the layers."""
    moved: int = 0
    """Experts that ranks fetched."""
    within_bytes: int = 0
    """From the own node."""
    across_bytes: int = 0
    """From other nodes."""
    moving_s: float = 0.0
    """While the last rank of each layer fetches, one layer after the other."""
    staged: int = 0
    """Experts that a rank fetched for one layer, at most."""


@dataclass(frozen=True)
class Outcome:
    """One way to serve the sequence."""

    cycles: tuple[Cycle, ...]
    steps: int
    """Of a cycle."""
    waits: bool
    """Whether the steps wait while experts move."""

    def delay_s(self, cycle: Cycle) -> float:
        """By how much moving made a cycle longer. Beside the steps, only an exchange waits that needs the link too."""
        share = 1.0 if self.waits else cycle.exchange_s / cycle.step_s
        return cycle.moving_s * share

    @property
    def step_ms_W(self) -> np.ndarray:
        """A step of each cycle in milliseconds, its part of moving included. W: windows served, a cycle each."""
        return np.array([1e3 * (cycle.step_s + self.delay_s(cycle) / self.steps) for cycle in self.cycles])

    @property
    def stall_ms_W(self) -> np.ndarray:
        """How long serving stood still in each cycle, in milliseconds. W: windows served, a cycle each."""
        return np.array([1e3 * cycle.moving_s * self.waits for cycle in self.cycles])

    def total(self, name: str) -> int:
        """Of a field of the cycles."""
        return sum(getattr(cycle, name) for cycle in self.cycles)


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found."""

    cost: CostModel
    slots: int
    layers: int
    """Those with experts."""
    steps: int
    names: tuple[str, ...]
    """Of the windows served."""
    outcomes: dict[str, Outcome]
    """By the names of `LABELS`."""
    planning_ms: tuple[float, ...] = field(repr=False)
    """Of each cycle of `ours`, for one layer: seeing the window and proposing."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Times: milliseconds of the layers with experts alone, means over the cycles."""
        moving = {name: self.outcomes[name] for name in ("anew", "ours")}
        all_slots = self.slots * self.layers * len(self.names)
        expert_bytes = self.cost.model.expert_bytes
        rank_slots = self.slots // self.cost.ranks
        return {
            "ranks": self.cost.ranks,
            "slots": self.slots,
            "model": self.cost.model.name,
            "experts": self.cost.model.experts,
            "layers": self.layers,
            "node_size": self.cost.node_size,
            "tokens_per_rank": self.cost.tokens,
            "split": self.cost.split,
            "rank_speed": list(self.cost.rank_speed),
            "cycles": len(self.names),
            "steps_per_cycle": self.steps,
            "planning_ms_per_layer": round(float(np.mean(self.planning_ms)), 4),
            "planning_ms_per_layer_worst": round(max(self.planning_ms), 4),
            "step_time": {name: round(float(o.step_ms_W.mean()), 4) for name, o in self.outcomes.items()},
            "imbalance": {
                name: round(float(np.mean([cycle.imbalance for cycle in o.cycles])), 4)
                for name, o in self.outcomes.items()
            },
            "stall_ms": {name: round(float(o.stall_ms_W.mean()), 3) for name, o in moving.items()},
            "stall_ms_worst": {name: round(float(o.stall_ms_W.max()), 3) for name, o in moving.items()},
            "delay_ms": {
                name: round(float(np.mean([1e3 * o.delay_s(cycle) for cycle in o.cycles])), 3)
                for name, o in moving.items()
            },
            "slots_moved": {name: o.total("moved") for name, o in moving.items()},
            "slots_moved_share": {name: round(o.total("moved") / all_slots, 4) for name, o in moving.items()},
            "bytes_moved": {
                name: o.total("within_bytes") + o.total("across_bytes") for name, o in moving.items()
            },
            "bytes_by_link": {
                name: {"node": o.total("within_bytes"), "network": o.total("across_bytes")}
                for name, o in moving.items()
            },
            "memory_bytes_per_rank": {
                "experts": rank_slots * self.layers * expert_bytes,
                "staging": {
                    "anew": rank_slots * expert_bytes,
                    "ours": max(cycle.staged for cycle in self.outcomes["ours"].cycles) * expert_bytes,
                },
            },
        }


def sequence(loads: Loads, cycles: int) -> Loads:
    """The recorded windows, and between each and the next `cycles - 1` in which the load goes over evenly.

    A single window stays as it is for so many cycles. Raises ConfigError for less than one cycle.
    """
    whole_number("cycles", cycles, 1)
    windows, names = [loads.tokens_WYE[0]], [loads.names[0]]
    recorded = loads if loads.windows > 1 else Loads(np.repeat(loads.tokens_WYE, 2, axis=0), loads.names * 2)
    for (before_YE, after_YE), name in zip(pairwise(recorded.tokens_WYE), recorded.names[1:], strict=True):
        for step in range(1, cycles + 1):
            windows.append(before_YE * (1 - step / cycles) + after_YE * (step / cycles))
            names.append(name if step == cycles else f"{name} {step}/{cycles}")
    return Loads(np.array(windows), tuple(names))


def simulate(
    loads: Loads,
    cost: CostModel,
    *,
    slots: int,
    steps: int = STEPS,
    threshold: float = THRESHOLD,
    max_slots: int | None = None,
    max_bytes: int | None = None,
    progress: Progress = silent,
) -> Simulation:
    """Serves the windows after the first one, each for so many steps, in all of the ways.

    Args:
        loads: two windows or more, in their order.
        cost: what layers and moves cost; its model has the experts of the loads.
        slots: P, of each layer.
        steps: of a window.
        threshold, max_slots, max_bytes: of the `Rebalancer`, see `Policy`.
        progress: called with (windows done, windows in all), summed over the ways.

    Raises:
        ConfigError: the loads, ranks and slots do not go together, or a window has no token.
    """
    whole_number("steps", steps, 1)
    for name, tokens_YE in zip(loads.names, loads.tokens_WYE, strict=True):
        if not tokens_YE.any():
            raise ConfigError(f"loads: {name} has no token, so there is nothing to serve; leave it out")
    planning_ms: list[float] = []
    settings = (threshold, max_slots, max_bytes)
    placements = {
        "none": _same(loads, Placement.even(loads.layers, loads.experts, cost.ranks, slots)),
        "once": _same(loads, _eplb(loads, 0, cost.ranks, slots)),
        "anew": (_eplb(loads, window, cost.ranks, slots) for window in range(loads.windows - 1)),
        "ours": _rebalanced(loads, cost, slots, steps, settings, planning_ms),
    }
    outcomes = {}
    for index, (name, each) in enumerate(placements.items()):
        cycles: list[Cycle] = []
        before = None
        for tokens_YE, placement in zip(loads.tokens_WYE[1:], each, strict=True):
            cycles.append(_cycle(tokens_YE, before, placement, cost))
            before = placement
            progress(index * (loads.windows - 1) + len(cycles), len(LABELS) * (loads.windows - 1))
        outcomes[name] = Outcome(tuple(cycles), steps, waits=name == "anew")
    layers = len(loads.loaded_layers)
    return Simulation(cost, slots, layers, steps, loads.names[1:], outcomes, tuple(planning_ms))


# The placement of every window that is served


def _same(loads: Loads, placement: Placement) -> Iterator[Placement]:
    return (placement for _ in range(loads.windows - 1))


def _eplb(loads: Loads, window: int, ranks: int, slots: int) -> Placement:
    return plan(loads.tokens_WYE[window], ranks=ranks, slots=slots, algorithm="eplb")


def _rebalanced(
    loads: Loads,
    cost: CostModel,
    slots: int,
    steps: int,
    settings: tuple[float, int | None, int | None],
    planning_ms: list[float],
) -> Iterator[Placement]:
    """Adds the milliseconds that each cycle took for a layer, of this thread alone."""
    planned = plan(loads.tokens_WYE[0], ranks=cost.ranks, slots=slots, rank_speed=cost.rank_speed)
    first = Placement(planned.layers, cost.node_size, planned.provenance)
    policy = Policy(
        *settings,
        expert_bytes=cost.model.expert_bytes,
        split=cost.split,
        link_bytes_s=cost.machine.network_bytes_s,
        horizon_s=steps * _cycle(loads.tokens_WYE[0], None, first, cost).step_s,
    )
    rebalancer = Rebalancer(first, policy)
    for tokens_YE in loads.tokens_WYE[:-1]:
        began = time.thread_time()
        rebalancer.observe(tokens_YE)
        proposal = rebalancer.propose()
        planning_ms.append(1e3 * (time.thread_time() - began) / len(loads.loaded_layers))
        if proposal is not None:
            rebalancer.accept(proposal.placement)
        yield rebalancer.placement


def _cycle(tokens_YE: np.ndarray, before: Placement | None, placement: Placement, cost: CostModel) -> Cycle:
    """Serves one window, after the moves from the placement before."""
    loaded = np.flatnonzero(tokens_YE.any(axis=1)).tolist()
    times = [cost.layer(placement.layers[layer], tokens_YE[layer]) for layer in loaded]
    computing, exchange = (sum(getattr(each, name) for each in times) for name in ("compute", "exchange"))
    imbalance = float(np.mean([each.imbalance for each in times]))
    pairs = zip(before.layers, placement.layers, strict=True) if before is not None else ()
    moves = [moved_experts(old, new, cost.node_size) for old, new in pairs if old != new]
    within, across = (
        (int(sum(each.sum() for each in part)) for part in zip(*moves, strict=True)) if moves else (0, 0)
    )
    return Cycle(
        step_s=computing + exchange,
        exchange_s=exchange,
        imbalance=imbalance,
        moved=within + across,
        within_bytes=within * cost.model.expert_bytes,
        across_bytes=across * cost.model.expert_bytes,
        moving_s=sum(cost.moving_s(*each) for each in moves),
        staged=max((int((each.within_R + each.across_R).max()) for each in moves), default=0),
    )
