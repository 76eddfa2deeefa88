"""Pictures have the size they should have, and show something where there is something to show."""

import numpy as np
import pytest

from epbackend.cli import pictures
from epbackend.engines.lmdeploy import LoadReport
from epbackend.errors import ConfigError
from epbackend.placement.compare import score_table
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Placement
from epbackend.placement.score import Terms
from epbackend.placement.synthetic import synthetic_loads
from tests.helpers.pictures import drawn_share, size

LOADS = synthetic_loads(8, 16, tokens=10_000, dense_layers=1, seed=3)
EVEN = Placement.even(8, 16, 4)


def report(tokens_RYE, step_imbalance=2.5) -> LoadReport:
    """A load report of as many layers as the tokens have."""
    tokens = np.array(tokens_RYE)
    layers = tuple(range(tokens.shape[1]))
    tokens_2RYE = np.stack([tokens, 0 * tokens])
    return LoadReport(layers, tokens_2RYE, 1, 1, 1, {}, np.full(len(layers), step_imbalance), top_k=2)


TWO_RANKS = report([[[1, 2], [0, 0]], [[0, 0], [3, 9]]])


def test_plan_heat_map_draws_both_halves(tmp_path):
    path = pictures.save_before_after(EVEN, EVEN, LOADS, tmp_path / "new" / "plan.png", Terms())
    assert size(path) == (1995, 960)
    assert drawn_share(path, left=0.10, right=0.40, top=0.2, bottom=0.8) > 0.8
    assert drawn_share(path, left=0.55, right=0.85, top=0.2, bottom=0.8) > 0.8


def test_plan_heat_map_of_equal_loads_is_not_blank(tmp_path):
    equal = Loads.of(np.full((8, 16), 100))
    path = pictures.save_before_after(EVEN, EVEN, equal, tmp_path / "plan.png", Terms())
    assert drawn_share(path, left=0.10, right=0.40, top=0.2, bottom=0.8) > 0.8
    assert drawn_share(path, left=0.55, right=0.85, top=0.2, bottom=0.8) > 0.8


def test_heat_map_of_a_run_draws_experts_and_ranks(tmp_path):
    path = pictures.save_load(TWO_RANKS, tmp_path / "new" / "load.png", title="two ranks")
    assert size(path) == (1080, 312)
    assert drawn_share(path, left=0.15, right=0.5, top=0.3, bottom=0.7) > 0.9
    assert drawn_share(path, left=0.7, right=0.8, top=0.3, bottom=0.7) > 0.8


@pytest.mark.parametrize("after", [1.0, 2.5])
def test_bars_of_two_runs_are_as_high_as_their_imbalance(tmp_path, after):
    runs = {"before": TWO_RANKS, "after": report(TWO_RANKS.tokens_RYE, after)}
    path = pictures.save_imbalance(runs, tmp_path / "both.png", title="two runs")
    assert size(path) == (960, 540)
    bars = drawn_share(path, left=0.15, right=0.95, top=0.4, bottom=0.8)
    assert bars > 0.7 if after > 1 else 0.2 < bars < 0.6


def test_score_table_draws_every_view(tmp_path):
    two_windows = synthetic_loads(8, 16, tokens=10_000, dense_layers=1, windows=2, seed=3)
    for loads, panels in ((LOADS, 2), (two_windows, 3)):
        table = score_table(loads, ranks=4, slots=20, algorithms=("eplb",), batches=2)
        path = pictures.save_score_table(table, tmp_path / f"{panels}.png")
        assert size(path)[0] == 1995
        for panel in range(panels):
            left, right = (0.08 + 0.91 * edge / panels for edge in (panel, panel + 1))
            assert drawn_share(path, left=left, right=right, top=0.3, bottom=0.7) > 0.001


def test_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"plot: .*picture\.mp3 cannot be written: .*; name a \.png"):
        pictures.save_before_after(EVEN, EVEN, LOADS, tmp_path / "picture.mp3", Terms())
