"""`simulate` and `epbackend simulate`: what is counted, on loads that shift and on loads that do not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from epbackend.balance.cost import H100, MODELS, CostModel
from epbackend.balance.simulation import LABELS, sequence, simulate
from epbackend.cli import app
from epbackend.errors import ConfigError
from epbackend.placement import Loads, synthetic_loads
from epbackend.placement.formats import write
from tests.helpers.pictures import drawn_share, size

pytestmark = pytest.mark.cpu
SHIFTING = synthetic_loads(3, 64, dense_layers=1, drift=0.2, windows=3, seed=1)


def served(loads, ranks=8, slots=72, rank_speed=(), **given):
    cost = CostModel(MODELS["deepseek-v3"], H100, ranks, node_size=4, tokens=128, rank_speed=rank_speed)
    return simulate(loads, cost, slots=slots, **given)


@pytest.fixture(scope="module")
def shifting():
    return served(sequence(SHIFTING, 4))


def test_the_sequence_goes_over_evenly_from_one_recorded_window_to_the_next():
    loads = sequence(SHIFTING, 4)
    assert loads.windows == 9
    assert loads.tokens_WYE[::4] == pytest.approx(SHIFTING.tokens_WYE)
    assert loads.tokens_WYE[2] == pytest.approx(SHIFTING.tokens_WYE[:2].mean(axis=0))
    steady = sequence(Loads.of(SHIFTING.tokens_WYE[0]), 2)
    assert (steady.tokens_WYE == SHIFTING.tokens_WYE[0]).all()
    assert steady.windows == 3


def test_on_a_shifting_load_ours_is_about_as_fast_as_eplb_anew_and_moves_far_less(shifting):
    found = shifting.to_dict()
    step_time, moved = found["step_time"], found["bytes_moved"]
    assert step_time["ours"] < step_time["once"] < step_time["none"]
    assert step_time["ours"] < 1.02 * step_time["anew"]
    assert 0 < moved["ours"] < 0.3 * moved["anew"]
    assert found["stall_ms"]["ours"] == 0 < found["stall_ms"]["anew"]
    assert 0 < found["delay_ms"]["ours"] < found["delay_ms"]["anew"]


def test_on_ranks_of_unequal_speed_times_are_balanced_which_eplb_does_not_know_of():
    found = served(SHIFTING, rank_speed=(1.0,) * 7 + (0.5,)).to_dict()
    assert found["rank_speed"] == [1.0] * 7 + [0.5]
    assert found["imbalance"]["ours"] < 0.8 * found["imbalance"]["anew"]
    assert found["step_time"]["ours"] < found["step_time"]["anew"]


def test_what_is_counted_adds_up(shifting):
    found = shifting.to_dict()
    assert found["cycles"] == 8 == len(shifting.planning_ms)
    assert found["layers"] == 2
    assert found["memory_bytes_per_rank"]["experts"] == 2 * 9 * MODELS["deepseek-v3"].expert_bytes
    for name in ("anew", "ours"):
        links = found["bytes_by_link"][name]
        assert links["node"] + links["network"] == found["bytes_moved"][name]
        assert found["bytes_moved"][name] == found["slots_moved"][name] * MODELS["deepseek-v3"].expert_bytes
        assert found["slots_moved_share"][name] == pytest.approx(
            found["slots_moved"][name] / (72 * 2 * 8), abs=1e-4
        )
        outcome = shifting.outcomes[name]
        assert outcome.cycles[0].moved == 0  # the first placement was there beforehand
        delays = np.array([outcome.delay_s(cycle) for cycle in outcome.cycles])
        plain = np.array([cycle.step_s for cycle in outcome.cycles])
        assert outcome.step_ms_W == pytest.approx(1e3 * (plain + delays / shifting.steps))


def test_a_steady_load_needs_no_moves():
    found = served(sequence(Loads.of(SHIFTING.tokens_WYE[0]), 3)).to_dict()
    assert found["bytes_moved"] == {"anew": 0, "ours": 0}
    assert found["step_time"]["once"] == found["step_time"]["anew"]


def test_a_budget_bounds_every_cycle():
    outcome = served(sequence(SHIFTING, 2), max_slots=5).outcomes["ours"]
    assert 0 < max(cycle.moved for cycle in outcome.cycles) <= 5


def test_a_window_without_a_token_is_refused():
    with pytest.raises(ConfigError, match="loads: quiet has no token"):
        served(Loads.of([SHIFTING.tokens_WYE[0], np.zeros((3, 64))], ["day", "quiet"]))


@pytest.fixture
def run(tmp_path):
    files = []
    for window in range(3):
        files.append(tmp_path / f"{window}.json")
        write(Loads.of(SHIFTING.tokens_WYE[window]), files[-1], "sglang")
    plot = tmp_path / "new" / "simulate.png"

    def invoke(*arguments, windows=3):
        words = ["simulate", *files[:windows], "--plot", plot, *arguments]
        return CliRunner().invoke(app, [str(word) for word in words]), plot

    return invoke


def test_the_command_prints_one_object_and_draws_a_picture(run):
    result, plot = run("--ranks", 16, "--slots", 80, "--cycles", 2, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["ranks"], said["slots"], said["experts"], said["node_size"]) == (16, 80, 64, 8)
    assert set(said["step_time"]) == set(LABELS)
    assert set(said["bytes_moved"]) == {"anew", "ours"}
    assert 0 < said["planning_ms_per_layer"] <= said["planning_ms_per_layer_worst"]
    assert said["plot"] == str(plot)
    assert size(plot) == (1995, 840)
    assert drawn_share(plot, left=0.1, right=0.7, top=0.2, bottom=0.85) > 0.01
    assert drawn_share(plot, left=0.75, right=0.98, top=0.2, bottom=0.85) > 0.1


def test_the_command_prints_a_table_for_people(run):
    result, _ = run("--ranks", 8, "--slots", 72, "--split", "level", "--max-slots", 10)
    assert result.exit_code == 0, result.output
    for words in (*LABELS.values(), "2 layers", "planning:", "memory of a rank"):
        assert words in result.stdout
    result, _ = run("--ranks", 16, "--node-size", 0, "--json", windows=1)
    assert "one window of loads never changes" in result.stderr
    assert json.loads(result.stdout)["node_size"] == 16  # 0 is one node, here as in plan and compare


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", 8, "--slots", 60), "slots: 60 are fewer than the 64 experts"),
        (("--ranks", 8, "--slots", 68), "slots: 68 cannot be spread evenly"),
        (("--ranks", 1), "one rank holds all experts"),
        (("--ranks", 0), "ranks: must be a whole number"),
        (("--ranks", 8, "--model", "kimi-k2"), "model: kimi-k2 has 384 experts, but the loads have 64"),
        (("--ranks", 8, "--model", "kimi"), "did you mean 'kimi-k2'"),
        (("--ranks", 8, "--node-size", 3), "node_size: 3 ranks a node do not divide"),
        (("--ranks", 8, "--cycles", 0), "cycles: must be a whole number of 1 or more"),
        (("--ranks", 8, "--steps", 0), "steps: must be a whole number of 1 or more"),
        (("--ranks", 8, "--max-bytes", 5), "max_bytes: 5 are less than the 44050944 of one expert"),
        (("--ranks", 8, "--split", "evn"), "split: 'evn' is unknown"),
    ],
)
def test_bad_arguments_are_refused_without_a_traceback(run, arguments, message):
    result, _ = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""
