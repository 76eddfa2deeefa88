"""A planner that moves all experts each time, by one slot; without numba, which a GPU machine may lack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from epbackend.balance.decision import Proposal
from epbackend.placement.placement import Layout, Placement


class RotatingPlanner:
    """As `epbackend.balance.planner.Planner`, in the parent's own process."""

    pid, restarts, age_s = None, 0, 0.0

    def __init__(self, placement: Placement, *_: Any) -> None:
        self._placement = placement

    def propose(self, tokens_YE: np.ndarray) -> Proposal:
        with_experts = np.flatnonzero(tokens_YE.any(axis=1)).tolist()
        layers = list(self._placement.layers)
        for layer in with_experts:
            layers[layer] = _rotated(layers[layer])
        slots = sum(layers[layer].slots for layer in with_experts)
        placement = replace(self._placement, layers=tuple(layers))
        return Proposal(placement, tuple(with_experts), slots, 1.0, 1.0, "a test")

    def accept(self, placement: Placement) -> None:
        self._placement = placement

    def close(self) -> None:
        pass


def _rotated(layout: Layout) -> Layout:
    return Layout.of(np.roll(layout.slot_to_expert_P, 1).tolist(), layout.ranks, layout.experts)
