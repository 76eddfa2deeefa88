"""Ranks that differ in speed and in memory: what counts is time, load over speed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import Placement, plan
from epbackend.placement.placement import with_speeds
from epbackend.placement.score import rank_costs, score
from epbackend.placement.speeds import checked_speeds, parse_speeds


def random_speeds(ranks: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).uniform(0.25, 1, ranks).tolist()


def loads(experts: int = 256, layers: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 0.8, (layers, experts))


@given(
    st.integers(0, 2**32), st.sampled_from([1, 2, 3, 4]), st.integers(0, 2), st.sampled_from([0.25, 1, 7.3])
)
@settings(max_examples=15, deadline=None)
def test_equal_speeds_give_the_plans_without_speeds(seed, ranks, redundant, speed):
    tokens_YE = loads(12, 2, seed)
    asked = {"ranks": ranks, "slots": 12 + ranks * (redundant if ranks > 1 else 0)}
    for options in ({}, {"split": "level"}, {"objective": "activated:64"}, {"algorithm": "eplb"}):
        plain = plan(tokens_YE, **asked, **options)
        assert plan(tokens_YE, **asked, **options, rank_speed=[speed] * ranks) == plain
    later_YE = loads(12, 2, seed + 1)
    moved = plan(later_YE, ranks=ranks, algorithm="incremental", current=plain)
    equal = [speed] * ranks
    assert plan(later_YE, ranks=ranks, algorithm="incremental", current=plain, rank_speed=equal) == moved


@pytest.mark.parametrize(("ranks", "slots"), [(4, 264), (16, 272), (32, 320), (64, 512)])
def test_times_are_within_a_thousandth_of_the_bound(ranks, slots):
    placement = plan(loads(layers=1), ranks=ranks, slots=slots, rank_speed=random_speeds(ranks), kicks=200)
    found = score(placement, loads(layers=1))
    assert found.duplicates_on_rank == 0
    assert found.imbalance_worst <= 1.001 * found.lower_bound_mean


def test_a_rank_of_half_the_speed_and_memory_gets_what_it_can_carry():
    placement = plan(loads(64), ranks=4, rank_slots=[20, 20, 20, 10], rank_speed=[1, 1, 1, 0.5])
    found = score(placement, loads(64))
    assert [layer.slots_R.tolist() for layer in placement.layers] == [[20, 20, 20, 10]] * 2
    assert found.imbalance_worst <= 1.001
    assert found.duplicates_on_rank == 0
    assert Placement.from_json(placement.to_json()) == placement


def test_the_hottest_experts_live_on_strong_ranks():
    tokens_YE = np.array([[100.0, 90, 80, 10, 9, 8, 7, 6]])
    layer = plan(tokens_YE, ranks=2, rank_speed=[0.25, 1]).layers[0]
    assert {0, 1, 2} <= set(layer.experts_of_rank[1])


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_any_slots_of_ranks_hold_every_expert_and_none_twice_on_a_rank(seed):
    random = np.random.default_rng(seed)
    experts, ranks = int(random.integers(2, 9)), int(random.integers(1, 5))
    slots_R = random.integers(1, experts + 1, ranks)
    slots_R[0] = experts  # so that they are enough
    for options in ({}, {"split": "level"}):
        placement = plan(loads(experts, 2, seed), ranks=ranks, rank_slots=slots_R.tolist(), **options)
        assert [layer.slots_R.tolist() for layer in placement.layers] == [slots_R.tolist()] * 2
        assert placement.duplicates_on_rank == 0


def test_incremental_relieves_a_rank_that_became_slow_and_keeps_the_speeds_of_a_placement():
    tokens_YE = loads(64)
    before = plan(tokens_YE, ranks=4, slots=72)
    slow = [1.0, 1.0, 0.5, 1.0]
    was = score(before, tokens_YE, rank_speed=slow).imbalance_worst
    after = plan(tokens_YE, ranks=4, algorithm="incremental", current=before, rank_speed=slow)
    assert was > 1.7
    assert score(after, tokens_YE).imbalance_worst <= 1.02 * (1 + 1e-9)
    again = plan(tokens_YE, ranks=4, algorithm="incremental", current=after)
    assert again.rank_speed == after.rank_speed == tuple(slow)
    assert again.layers == after.layers


@pytest.mark.parametrize("split", ["even", "level"])
def test_a_plan_with_speeds_takes_less_time_than_one_without(split):
    tokens_YE, speeds = loads(64), random_speeds(8)
    without, planned = (plan(tokens_YE, ranks=8, slots=80, rank_speed=given) for given in (None, speeds))
    slower, faster = (
        score(placement, tokens_YE, split=split, rank_speed=speeds) for placement in (without, planned)
    )
    assert faster.imbalance_mean < slower.imbalance_mean


def test_a_table_of_times_is_over_the_speed():
    placement = plan(loads(8, 1), ranks=2, objective="activated:16", rank_speed=[1, 0.5])
    shares_BP = np.ones((1, 8))
    from epbackend.placement.objectives import activated

    plain, slowed = (rank_costs(shares_BP, placement.layers[0], activated(16), s) for s in ((), (1.0, 0.5)))
    assert slowed[0].tolist() == [plain[0, 0], plain[0, 1] * 2]


def test_speeds_are_parts_of_the_fastest():
    assert checked_speeds([2, 1, 4], 3) == (0.5, 0.25, 1.0)
    assert checked_speeds([3, 3], 2) == checked_speeds(None, 2) == ()
    placement = with_speeds(Placement.even(1, 4, 2), [3, 1])
    assert Placement.from_json(placement.to_json()).rank_speed == placement.rank_speed == (1.0, 1 / 3)
    assert with_speeds(placement, [1, 1]) == Placement.even(1, 4, 2)


def test_a_file_of_speeds(tmp_path):
    path = tmp_path / "speeds.json"
    for text in ("[1, 0.5]", '{"rank_speed": [1, 0.5]}'):
        path.write_text(text)
        assert parse_speeds(str(path)) == (1, 0.5)
    path.write_text(json.dumps({"speeds": [1]}))
    with pytest.raises(ConfigError, match="an object with one"):
        parse_speeds(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_speeds(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="a number for each rank"):
        parse_speeds("1,fast")


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"rank_speed": [1, 1, 1]}, "rank_speed: 3 speeds are given for 2 ranks; give one for each"),
        ({"rank_speed": [1, 0]}, "rank_speed: that of rank 1 is 0, and must be a number above 0"),
        ({"rank_speed": [-1, 1]}, "rank_speed: that of rank 0 is -1"),
        ({"rank_speed": [1, float("nan")]}, "rank_speed: that of rank 1 is nan"),
        ({"rank_speed": [1, 1e-5]}, "rank_speed: rank 1 has less than 1/4096"),
        ({"rank_speed": [1, 0.5], "algorithm": "eplb"}, "rank_speed: eplb takes all ranks to be alike"),
        (
            {"rank_slots": [4, 0]},
            "rank_slots: rank 1 has 0, .* leave out a rank whose memory holds no expert",
        ),
        ({"rank_slots": [1, 2]}, "slots: 3 are fewer than the 4 experts"),
        ({"rank_slots": [4, 4, 4]}, "rank_slots: 3 are given for 2 ranks"),
        ({"rank_slots": [4, 2], "slots": 8}, "rank_slots: they are 6 in every layer"),
        ({"rank_slots": [5, 2]}, "rank_slots: rank 0 has 5, and needs 1 to 4"),
    ],
)
def test_speeds_and_slots_that_cannot_be_are_refused(asked, problem):
    with pytest.raises(ConfigError, match=problem):
        plan(np.ones((1, 4)), ranks=2, **asked)
