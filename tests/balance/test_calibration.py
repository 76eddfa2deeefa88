"""What calibration makes of the times of all ranks, and who reads it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from epbackend import EPConfig
from epbackend.balance.calibration import Calibration, active_experts
from epbackend.errors import ConfigError
from epbackend.placement.objectives import parse_objective
from epbackend.placement.speeds import parse_speeds

ROWS = (1, 16, 256)
EXPERTS = active_experts(12)


def measured(speed_R, noise=0.0, seed=0) -> Calibration:
    """Ranks of these speeds whose experts take 5 us a call, 20 an active expert and 1 a row."""
    rows_XA = np.maximum.outer(ROWS, EXPERTS)
    exact_XA = 5.0 + 20.0 * np.array(EXPERTS) + rows_XA
    times_RXA = exact_XA / np.array(speed_R)[:, None, None]
    spread = np.random.default_rng(seed).lognormal(0, noise, times_RXA.shape)
    return Calibration(ROWS, EXPERTS, times_RXA * spread, layer=1)


@pytest.mark.parametrize("seed", range(5))
def test_speeds_are_told_from_noise(seed):
    assert measured([1, 1, 1, 1], 0.02, seed).rank_speed == (1.0, 1.0, 1.0, 1.0)
    slow = measured([1, 1, 0.5, 1], 0.05, seed).rank_speed
    assert slow[2] == pytest.approx(0.5, rel=0.06)
    assert min(slow[0], slow[1], slow[3]) > 0.9


def test_times_are_those_of_a_rank_of_speed_one_and_do_not_fall_with_more_work():
    exact = measured([1, 0.5, 1])
    np.testing.assert_allclose(exact.microseconds_XA[:, 0], [26, 41, 281])
    table_XA = measured([1, 0.5, 1], 0.3).microseconds_XA
    assert (np.diff(table_XA, axis=0) >= 0).all()
    assert (np.diff(table_XA, axis=1) >= 0).all()


def test_planning_and_a_config_read_the_file(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(measured([1, 0.5, 1, 1]).to_dict(batch=512)))
    assert parse_speeds(str(path)) == (1.0, 0.5, 1.0, 1.0)
    objective = parse_objective(path)
    assert (objective.batch, objective.tokens_X, objective.experts_A) == (512, ROWS, EXPERTS)
    assert objective.cost(256, 2) == pytest.approx(301)
    placed = {"loads": "loads.json", "rank_speed": str(path)}
    assert EPConfig.load({"ep_size": 4, "placement": placed}).placement.rank_speed == (1.0, 0.5, 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"placement\.rank_speed.*4 speeds are given for 2 ranks"):
        EPConfig.load({"ep_size": 2, "placement": placed})
    with pytest.raises(ConfigError, match=r"placement\.rank_speed.*cannot be read"):
        EPConfig.load({"ep_size": 2, "placement": placed | {"rank_speed": "nowhere.json"}})
