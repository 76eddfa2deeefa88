"""Whether it pays to move experts, and which: a `Rebalancer` sees the loads window by window, and proposes a placement.

A layer is planned again, by the steps of the planner `incremental`, where the experts' time that a step is expected to
save is worth more than what moving them takes. The loads to plan for are predicted (`forecast`); the gain is judged on
the recent windows where these vary by chance. Layers that bring most for each moved slot come first, until the budget
of a cycle is spent; the last of them is changed as far as the budget goes.

Nothing is started and nothing is moved here: whoever moves the experts says by `accept` what is in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from epbackend.balance.cost import H100
from epbackend.balance.forecast import WAYS, Forecast
from epbackend.errors import ConfigError, real_number, unknown_name, whole_number
from epbackend.names import SPLITS
from epbackend.placement.loads import Loads
from epbackend.placement.objectives import Objective, parse_objective
from epbackend.placement.placement import Layout, Placement, Provenance, with_speeds
from epbackend.placement.planners.base import Task
from epbackend.placement.planners.incremental import with_experts
from epbackend.placement.planners.search_inputs import SearchInputs
from epbackend.placement.replica_split import expected_shares
from epbackend.placement.score import count_moves, imbalances, rank_costs

TARGETS = {"even": 1.005, "nearest": 1.005, "level": 1.10, "level_by_node": 1.10}
"""What a layer is brought to once it is changed: the worst rank over the mean, where replicas share evenly. The splits
that level share out what is left: from 1.10 it comes below 1.05."""


@dataclass(frozen=True)
class Policy:
    """When to move experts, and how many. All from the configuration.

    Raises:
        ConfigError: a value is out of its range, or a budget moves no expert at all.
    """

    threshold: float
    """Least expected gain of a layer, as a share of its time, net of the cost of moving; 0 or more, below 1."""
    max_slots: int | None
    """Slots that may change in a cycle, over all layers; None: any number."""
    max_bytes: int | None
    """Bytes that may move in a cycle; None: any number."""
    expert_bytes: int
    """Of one expert of one layer, its scales included."""
    objective: str | Path | Objective = "tokens"
    """What is balanced, see `placement.objectives.parse_objective`."""
    split: str = "even"
    """How the replicas of an expert share its tokens while serving, one of `names.SPLITS`."""
    link_bytes_s: float = H100.network_bytes_s
    """Bytes a second that a rank can receive."""
    horizon_s: float = 60.0
    """Seconds of serving for which a plan is expected to hold: usually those of a cycle."""

    def __post_init__(self) -> None:
        real_number("threshold", self.threshold, below=1)
        whole_number("expert_bytes", self.expert_bytes, 1)
        if self.max_slots is not None:
            whole_number("max_slots", self.max_slots, 1)
        if self.max_bytes is not None and whole_number("max_bytes", self.max_bytes) < self.expert_bytes:
            raise ConfigError(
                f"max_bytes: {self.max_bytes} are less than the {self.expert_bytes} of one expert, so that nothing "
                f"could ever move; give {self.expert_bytes} or more"
            )
        if self.split not in SPLITS:
            raise unknown_name("split:", self.split, SPLITS)
        for name in ("link_bytes_s", "horizon_s"):
            if not real_number(name, getattr(self, name)):
                raise ConfigError(f"{name}: must be above 0")
        object.__setattr__(self, "objective", parse_objective(self.objective))

    @property
    def budget(self) -> int | None:
        """Slots that may change in a cycle, by both limits."""
        by_bytes = None if self.max_bytes is None else self.max_bytes // self.expert_bytes
        limits = [limit for limit in (self.max_slots, by_bytes) if limit is not None]
        return min(limits, default=None)

    def price(self, layers: int) -> float:
        """What it costs to move one slot, as a share of the time that its layer takes until the horizon.

        The exchange of tokens waits for as long as the link is busy with the expert, at worst. Experts are taken to
        move one after the other.
        """
        return self.expert_bytes / self.link_bytes_s * layers / self.horizon_s


@dataclass(frozen=True)
class Proposal:
    """A placement that should take less time than the one in place, with the same slots on each rank."""

    placement: Placement
    layers: tuple[int, ...]
    """Those that change; those with the largest gain for each moved slot first."""
    moved_slots: int
    """Experts that ranks have to fetch."""
    imbalance_before: float
    """Busiest rank over the mean, expected; mean over the layers that have loads."""
    imbalance_after: float
    reason: str
    """In words, for the log."""


@dataclass(frozen=True)
class _Change:
    """Another layout of a layer."""

    layer: int
    layout: Layout
    moved: int
    gain: float
    """Share of the layer's time, net of moving."""
    imbalance: float

    @property
    def worth(self) -> float:
        return self.gain / self.moved


class Rebalancer:
    """Keeps the placement in use and what the loads were, and says what to change. One thread at a time.

    Raises:
        ConfigError: there is a single rank, among which nothing can be balanced.
    """

    def __init__(self, placement: Placement, policy: Policy) -> None:
        if placement.ranks < 2:
            raise ConfigError(
                "balance: one rank holds all experts, so nothing can move; use more ranks, or leave it off"
            )
        self.placement = placement
        self.policy = policy
        self._forecast = Forecast(len(placement.layers), placement.experts)

    def observe(self, tokens_YE: np.ndarray) -> None:
        """One window: choices of each expert of each layer. All zero is a window without tokens.

        Raises:
            ConfigError: the shape is not that of the placement, or values are no counts.
        """
        window_YE = Loads.of(np.asarray(tokens_YE)[None], ("the window",)).tokens_WYE[0]
        expected = (len(self.placement.layers), self.placement.experts)
        if window_YE.shape != expected:
            raise ConfigError(
                f"loads: the window has {window_YE.shape} layers and experts, but the placement has {expected}; use "
                "loads of the same model"
            )
        self._forecast.observe(window_YE)

    def accept(self, placement: Placement) -> None:
        """What is in place from now on: a proposal, or as much of it as was moved.

        Raises:
            ConfigError: its ranks have other slots than before, or it is of another model.
        """
        for index, (before, after) in enumerate(zip(self.placement.layers, placement.layers, strict=False)):
            if after.slots_R.tolist() != before.slots_R.tolist():
                raise ConfigError(
                    f"placement: ranks have other slots than before in layer {index}; the slots of a rank stay while "
                    "it serves"
                )
        count_moves(self.placement, placement, layers=())  # refuses other layers, ranks and experts
        self.placement = placement

    def propose(self) -> Proposal | None:
        """The changes that pay, within the budget of one cycle; None where there are none."""
        if not self._forecast.shares_YE.any():
            return None
        layers = _Layers(self.placement, self.policy, self._forecast)
        wanted = [change for layer in layers.loaded if (change := layers.change(layer)) is not None]
        wanted.sort(key=lambda change: -change.worth)
        taken: list[_Change] = []
        left = self.policy.budget
        for change in wanted:
            cut = change if left is None or change.moved <= left else layers.cut(change, left)
            if cut is not None:
                taken.append(cut)
                left = None if left is None else left - cut.moved
        if not taken:
            return None
        return self._proposal(layers, taken, len(wanted))

    def _proposal(self, layers: _Layers, taken: list[_Change], wanted: int) -> Proposal:
        taken = sorted(taken, key=lambda change: -change.worth)
        changed = {change.layer: change for change in taken}
        layouts = tuple(
            changed[index].layout if index in changed else layout
            for index, layout in enumerate(self.placement.layers)
        )
        before_Y = {layer: layers.now(layer)[1] for layer in layers.loaded}
        after_Y = before_Y | {layer: change.imbalance for layer, change in changed.items()}
        before, after = (float(np.mean(list(each.values()))) for each in (before_Y, after_Y))
        moved = sum(change.moved for change in taken)
        ways = np.bincount(self._forecast.way_Y[list(layers.loaded)], minlength=len(WAYS))
        reason = (
            f"{len(taken)} of {len(layers.loaded)} layers change, {moved} slots move: busiest rank {before:.3f} to "
            f"{after:.3f} times the mean, expected; predicted by {WAYS[int(ways.argmax())]} in most layers"
        )
        if left_out := wanted - len(taken):
            reason += f"; {left_out} more layers wait for the next cycle's budget"
        provenance = Provenance("rebalanced", options=(("from", self.placement.provenance.algorithm),))
        placement = Placement(layouts, self.placement.node_size, provenance)
        placement = placement.with_options(numbering=self.placement.numbering)
        placement = with_speeds(placement, self.placement.rank_speed)
        return Proposal(placement, tuple(changed), moved, before, after, reason)


class _Layers:
    """One cycle: the layers as they are, what is expected of them, and how they can be changed."""

    def __init__(self, placement: Placement, policy: Policy, forecast: Forecast) -> None:
        loads = Loads.of(forecast.shares_YE)
        self.loaded = loads.loaded_layers
        self._placement, self._policy, self._forecast = placement, policy, forecast
        self._objective = parse_objective(policy.objective)
        self._price = policy.price(len(placement.layers))
        slots, speeds = placement.layers[0].slots, placement.rank_speed
        task = Task(loads, placement.ranks, slots, self._objective, rank_speed=speeds)
        self._inputs = SearchInputs.of(task)
        self._now: dict[int, tuple[float, float]] = {}

    def now(self, layer: int) -> tuple[float, float]:
        """What is expected of the layer as it is."""
        if layer not in self._now:
            self._now[layer] = self.expected(layer, self._placement.layers[layer])
        return self._now[layer]

    def expected(self, layer: int, layout: Layout) -> tuple[float, float]:
        """The busiest rank's cost in the unit of the objective, and over the mean, on the windows to judge by."""
        shares_BE, weight_B = self._forecast.judges(layer)
        speeds = self._placement.rank_speed
        shares_BP = expected_shares(self._policy.split, shares_BE, layout, self._placement.node_size, speeds)
        busiest_B = rank_costs(shares_BP, layout, self._objective, speeds).max(axis=1)
        imbalance_B = imbalances(shares_BP, layout, self._objective, speeds)
        return float(weight_B @ busiest_B), float(weight_B @ imbalance_B)

    def change(self, layer: int) -> _Change | None:
        """The change that brings most, if it brings as much as it has to."""
        least = self._policy.threshold
        if 1 - 1 / self.now(layer)[1] <= least:  # even perfect balance would not
            return None
        change = self._relieved(layer, None)
        return change if change is not None and change.gain > 0 and change.gain >= least else None

    def cut(self, change: _Change, most: int) -> _Change | None:
        """The part of a change that moves no more than so many slots; None where that gains nothing by itself."""
        part = self._relieved(change.layer, most) if most else None
        return part if part is not None and part.gain > 0 else None

    def _relieved(self, layer: int, most: int | None) -> _Change | None:
        """The layer with its worst ranks relieved, by so many fetched experts at most; None where nothing changes."""
        from epbackend.placement.search.layer_search import relieve

        before = self._placement.layers[layer]
        problem = self._inputs.problem(layer, before.first_R)
        expert_P = before.slot_to_expert_P.copy()  # numba would compile once more for a read-only array
        least = self._inputs.least_cost(layer, before.slots)
        cost, imbalance = self.now(layer)
        target = TARGETS[self._policy.split]
        price = self._price * imbalance
        expert_P, moved, _ = relieve(
            problem, expert_P, target, least, price, before.slots if most is None else most
        )
        if not moved:
            return None
        after = with_experts(before, expert_P)
        cost_after, imbalance = self.expected(layer, after)
        return _Change(layer, after, moved, 1 - cost_after / cost - self._price * moved, imbalance)
