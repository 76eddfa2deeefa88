"""What `benchmarks.live_balance` makes of the steps that ranks wrote down: known times give the known figures."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.live_balance import KINDS, STEP, Round, Topic, beside_undisturbed, possible
from epbackend.names import PHASES

pytestmark = pytest.mark.cpu


def steps(count, seconds=0.01):
    """Decode steps that follow one another."""
    rows = np.zeros(count, STEP)
    rows["phase"], rows["thread_s"] = PHASES.index("decode"), seconds
    rows["began_s"] = np.arange(count)
    rows["ended_s"] = rows["began_s"] + seconds
    return rows


def test_a_flip_that_doubles_a_step_is_seen_beside_the_steps_around_it():
    """While all steps become slower, as on a machine that others use too."""
    rows = steps(100)
    rows["thread_s"] *= np.linspace(1, 5, 100)
    rows["flips"][[30, 60]], rows["moving"][[29, 30, 59, 60]] = 1, True
    rows["thread_s"][60] *= 2.5
    found = {kind: beside_undisturbed(rows)["processor", kind] for kind in KINDS}
    assert [len(found[kind]) for kind in KINDS] == [95, 2, 2]  # the first step has the start in it
    assert found["it flips"] == pytest.approx([1.0, 2.5], rel=0.05)
    assert np.abs(found["undisturbed"] - 1).max() < 0.5


def round_of(seconds, began_s=0.0, others=0.0):
    return Round([[1]], began_s, began_s + seconds, seconds, others, 1.0, 0)


def test_the_most_that_balance_could_bring_is_that_ranks_take_as_long_as_their_mean():
    """Of ten seconds the busiest ranks' experts take eight: six of one layer, and two of the other."""
    ranks = [steps(3), steps(3)]
    ranks[0]["experts_s"][0, :2], ranks[1]["experts_s"][0, :2] = (6, 1), (2, 2)
    ranks[0]["experts_s"][2, 0] = 100  # after the round
    ranks[0]["ended_s"][2] = ranks[1]["ended_s"][2] = 11
    share, most = possible(round_of(10.0), ranks)
    assert share == pytest.approx(0.8)
    assert most == pytest.approx(10 / (10 - (8 - 5.5)))


def test_rounds_are_judged_in_which_others_left_the_machine_alone():
    pairs = [(round_of(1.0), round_of(1.2))] * 5 + [(round_of(3.0, others=0.4), round_of(1.0))] * 7
    row = Topic(pairs).row(1, [steps(2), steps(2)])
    assert row["pairs"] == "12, quiet 5"
    assert row["times the tokens/s (quartiles)"] == "1.200 (1.200, 1.200)"
