"""`refined` with the option split="level": layers in which any batch can be levelled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import Loads, plan
from epbackend.placement.replica_split import expected_shares
from epbackend.placement.score import imbalances
from epbackend.placement.synthetic import draw_batches, synthetic_loads


def levelled(placement, loads, concentration=2000.0, batches=6):
    """Mean imbalance of batches that no planner has seen."""
    counts_YBE = draw_batches(
        loads, loads.loaded_layers, batches=batches, concentration=concentration, seed=99
    )
    return np.mean(
        [
            imbalances(expected_shares("level", counts_BE, layer), layer).mean()
            for counts_BE, layer in zip(counts_YBE, placement.layers, strict=True)
        ]
    )


@pytest.mark.parametrize("concentration", [2000.0, 8000.0])
@pytest.mark.parametrize(("ranks", "slots"), [(32, 288), (32, 320), (64, 320)])
def test_unseen_batches_are_more_level_than_on_any_other_plan(ranks, slots, concentration):
    loads = synthetic_loads(layers=6, seed=5)
    asked = {"ranks": ranks, "slots": slots}
    mine = levelled(plan(loads, **asked, split="level"), loads, concentration)
    others = plan(loads, **asked), plan(loads, **asked, algorithm="lplb")
    assert mine < min(levelled(other, loads, concentration) for other in others) + 1e-3


def test_the_mean_is_level_too():
    loads = synthetic_loads(layers=4, seed=6)
    for ranks, slots, most in ((32, 288, 1.002), (64, 320, 1.01), (72, 288, 1.03)):
        placement = plan(loads, ranks=ranks, slots=slots, split="level")
        for tokens_E, layer in zip(loads.tokens_WYE[0], placement.layers, strict=True):
            assert imbalances(expected_shares("level", tokens_E[None], layer), layer)[0] <= most


@st.composite
def questions(draw):
    experts, ranks = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    windows = draw(st.integers(1, 3))
    rows = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    tokens_WYE = np.array(
        draw(
            st.lists(st.lists(rows, min_size=2, max_size=2), min_size=windows, max_size=windows).filter(
                np.any
            )
        )
    )
    if draw(st.booleans()) and ranks <= experts:
        loaded = int(tokens_WYE.any(axis=(0, 2)).sum())
        return (
            Loads.of(list(tokens_WYE)),
            ranks,
            {"budget": draw(st.integers(0, loaded * experts * (ranks - 1)))},
        )
    least = -(-max(experts, ranks) // ranks)
    return Loads.of(list(tokens_WYE)), ranks, {"slots": ranks * draw(st.integers(least, experts))}


@given(questions())
@settings(max_examples=100, deadline=None)
def test_layers_are_valid(question):
    loads, ranks, room = question
    placement = plan(loads, ranks=ranks, **room, split="level")
    for layer in placement.layers:
        assert layer.duplicates_on_rank == 0
        assert np.ptp(layer.slots_R) <= 1
        if "slots" in room:
            assert layer.slots == room["slots"]
    if "budget" in room and loads.loaded_layers:
        assert sum(layer.slots - loads.experts for layer in placement.layers) == room["budget"]


def test_the_same_task_gives_the_same_answer_and_search_improves():
    loads = synthetic_loads(layers=2, seed=7)
    first, again = (plan(loads, ranks=64, slots=320, split="level", seed=3) for _ in range(2))
    assert first == again
    searched = plan(loads, ranks=64, slots=320, split="level", seed=3, search_ms=200)
    assert levelled(searched, loads, batches=40) < levelled(first, loads, batches=40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "nearest"}, "split: must be even or level"),
        ({"split": "level", "objective": "activated"}, "objective: the level split levels tokens"),
        ({"split": "level", "kicks": 3}, "kicks: plays no part"),
        ({"split": "level", "windows": "worst"}, "windows: plays no part"),
    ],
)
def test_options_that_level_cannot_go_with_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(np.ones((1, 4)), ranks=2, **options)
