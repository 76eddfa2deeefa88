"""When a new placement pays, and which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epbackend.placement.placement import Layout, Placement
from epbackend.placement.planners import plan


@dataclass(frozen=True)
class Policy:
    """What a new placement must bring, and may cost."""

    threshold: float
    """Least share of a layer's time that a change must save, at least 0 and below 1."""
    max_slots: int | None
    max_bytes: int | None
    expert_bytes: int
    objective: str = "tokens"
    split: str = "even"


@dataclass(frozen=True)
class Proposal:
    """A placement that pays."""

    placement: Placement
    layers: tuple[int, ...]
    moved_slots: int
    imbalance_before: float
    imbalance_after: float
    reason: str


class Rebalancer:
    """Takes windows of loads, proposes placements."""

    def __init__(self, placement: Placement, policy: Policy) -> None:
        self._placement, self._policy = placement, policy
        self._tokens_YE: np.ndarray | None = None

    def observe(self, tokens_YE: np.ndarray) -> None:
        """The loads of one more window."""
        self._tokens_YE = tokens_YE

    def propose(self) -> Proposal | None:
        """A placement that pays by the last window; None: stay."""
        tokens_YE, policy, current = self._tokens_YE, self._policy, self._placement
        if tokens_YE is None or not tokens_YE.any():
            return None
        found = plan(
            tokens_YE,
            ranks=current.ranks,
            slots=current.slots,
            algorithm="incremental",
            current=current,
            node_size=current.node_size,
            objective=policy.objective,
        )
        budget = current.ranks * len(current.layers) * 1024 if policy.max_slots is None else policy.max_slots
        if policy.max_bytes is not None:
            budget = min(budget, policy.max_bytes // policy.expert_bytes)
        layers, moved = list(current.layers), 0
        chosen = []
        for layer in range(len(layers)):
            slots = int((layers[layer].slot_to_expert_P != found.layers[layer].slot_to_expert_P).sum())
            if (
                slots
                and moved + slots <= budget
                and _gain(layers[layer], found.layers[layer], tokens_YE[layer]) > policy.threshold
            ):
                layers[layer], moved = found.layers[layer], moved + slots
                chosen.append(layer)
        if not chosen:
            return None
        before = max(_imbalance(current.layers[layer], tokens_YE[layer]) for layer in chosen)
        after = max(_imbalance(layers[layer], tokens_YE[layer]) for layer in chosen)
        placement = Placement(tuple(layers), current.node_size, found.provenance)
        return Proposal(placement, tuple(chosen), moved, before, after, "the last window")

    def accept(self, placement: Placement) -> None:
        """The placement in use from now on."""
        self._placement = placement


def _gain(before: Layout, after: Layout, tokens_E: np.ndarray) -> float:
    return 1 - _imbalance(after, tokens_E) / _imbalance(before, tokens_E)


def _imbalance(layout: Layout, tokens_E: np.ndarray) -> float:
    share_E = tokens_E / layout.replicas_E
    tokens_R = np.bincount(layout.rank_of_slot_P, share_E[layout.slot_to_expert_P], layout.ranks)
    return float(tokens_R.max() / max(tokens_R.mean(), 1e-9))
