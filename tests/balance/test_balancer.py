"""The parent's thread: what it asks its planner, and what it leaves to others."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from epbackend.balance.balancer import Balancer, Options, Reading
from epbackend.balance.board import PLACE, Board
from epbackend.balance.decision import Policy
from epbackend.balance.planner import Planner
from epbackend.balance.recording import WindowsFile
from epbackend.placement.formats import read_loads
from epbackend.placement.placement import Placement
from tests.helpers.patience import PATIENCE_S

RANKS, LAYERS, EXPERTS = 2, 3, 4


@pytest.mark.parametrize("phases", ["both", "prefill", "decode"])
def test_a_plan_is_made_for_the_phases_that_were_asked_for_and_they_are_recorded(
    phases, tmp_path, monkeypatch
):
    """Of three windows, the second without any prefill."""
    windows = np.random.default_rng(0).integers(1, 9, (3, 2, RANKS, LAYERS, EXPERTS))
    windows[1, 0] = 0
    counted = iter([np.zeros_like(windows[0]), *windows.cumsum(axis=0), windows.sum(axis=0)])
    steps = iter(range(10))
    asked = []
    monkeypatch.setattr(Planner, "propose", lambda planner, tokens_YE: asked.append(tokens_YE))
    places = np.zeros(RANKS, PLACE)
    places["layers"], places["expert_bytes"] = LAYERS, 100
    options = Options(1000, 1000.0, partial(Policy, 0.1, None, None), 1 << 20, "all", 5.0, phases=phases)
    balancer = Balancer(
        Board(places),
        lambda: Reading(next(steps), next(counted)),
        options,
        Placement.even(LAYERS, EXPERTS, RANKS),
        record=WindowsFile(str(tmp_path / "loads.json"), phases),
    )
    try:
        for _ in range(3):
            assert balancer.rebalance(PATIENCE_S)
    finally:
        balancer.close()
    wanted = {"both": windows.sum(axis=1), "prefill": windows[[0, 2], 0], "decode": windows[:, 1]}[phases]
    assert np.array_equal(asked, wanted.sum(axis=1))
    assert balancer.report().windows == len(wanted)
    assert np.array_equal(read_loads(tmp_path / "loads.json").tokens_WYE, wanted.sum(axis=1))
