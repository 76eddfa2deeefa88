"""Layers on virtual ranks, and the settings that they are tried with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from epbackend.dispatch.base import DispatchSettings
from tests.helpers.layer_case import Case, Seen, assert_each_choice_computed_once, layer_equals_dense
from tests.helpers.virtual_ranks import run_virtual

OPEN = DispatchSettings(level=2, dispatcher="symmetric")
BOUNDED = DispatchSettings(level=2, dispatcher="symmetric", max_tokens=11)
STATIC = DispatchSettings(level=2, dispatcher="symmetric", static=True, max_tokens=11)


def tight(settings: DispatchSettings, scale: float) -> DispatchSettings:
    """With a receive buffer that does not hold what arrives."""
    return replace(settings, buffer_scale_factors=((0, scale),))


def run(case: Case, place: torch.device, order: Sequence[int] | None = None) -> list[Seen]:
    """Run a case, and check that every choice was computed once."""
    case = replace(case, device="cuda")
    seen = run_virtual(case.size, lambda ranks: layer_equals_dense({1: ranks}, case), place, order)
    assert_each_choice_computed_once(seen)
    assert {rank.dispatcher for rank in seen} == {"symmetric"}
    assert len({(rank.rounds, rank.batches) for rank in seen}) == 1
    return seen
