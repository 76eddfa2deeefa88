"""OmniPlacement: capped replicas, never two on one rank, and slots where they are needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import Layout, plan
from epbackend.placement.planners.eplb import replicate
from epbackend.placement.planners.omni import bin_pack_apart, capped_replicas
from tests.helpers.placement_strategies import skewed


def omni(loads_YE, ranks, slots=None, **options):
    return plan(loads_YE, ranks=ranks, slots=slots, algorithm="omni", **options)


def test_replicas_are_those_of_eplb_until_the_cap():
    weight_E = skewed(1, 32)[0]
    assert np.array_equal(capped_replicas(weight_E, 48, 48), replicate(weight_E[None], 48).count_BE[0])
    assert capped_replicas(np.array([90.0, 10, 10]), 6, 3).tolist() == [3, 2, 1]
    assert capped_replicas(np.array([90.0, 10, 0]), 9, 3).tolist() == [3, 3, 3]


@pytest.mark.parametrize("most", [2, 3])
def test_the_cap_holds_in_every_layer(most):
    for layer in omni(skewed(4, 16), 8, 32, max_replicas=most).layers:
        assert layer.replicas_E.max() <= most


def test_the_old_name_of_the_cap_works_with_a_note(caplog):
    loads_YE = skewed(4, 16)
    old = omni(loads_YE, 8, 32, max_copies=2)
    assert old.layers == omni(loads_YE, 8, 32, max_replicas=2).layers
    assert old.provenance.options == (("max_copies", 2),)
    (note,) = caplog.messages
    assert "max_copies of omni is now called max_replicas" in note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_copies": 2, "max_replicas": 2},
            "max_replicas: cannot be given beside max_copies, its old name",
        ),
        ({"max_copies": 0}, "max_copies: must be a whole number of 1 or more"),
        ({"max_copy": 2}, "max_copy: is no option of omni"),
    ],
)
def test_caps_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        omni(skewed(1, 16), 8, 32, **options)


@st.composite
def packings(draw):
    """(load_E, replicas_E, room) that just fit, with the room of ranks differing by one at most."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    replicas_E = draw(st.lists(st.integers(1, ranks), min_size=experts, max_size=experts))
    short = -sum(replicas_E) % ranks if sum(replicas_E) < ranks else 0
    replicas_E += [1] * short
    each, longer = divmod(sum(replicas_E), ranks)
    room = draw(st.permutations([each + (rank < longer) for rank in range(ranks)]))
    load_E = draw(st.lists(st.integers(0, 20), min_size=len(replicas_E), max_size=len(replicas_E)))
    return np.array(load_E, dtype=float), np.array(replicas_E), room


@given(packings())
def test_replicas_fill_the_room_and_stay_apart(packing):
    load_E, replicas_E, room = packing
    layout = bin_pack_apart(load_E, replicas_E, room)
    assert layout.slots_R.tolist() == list(room)
    assert layout.replicas_E.tolist() == replicas_E.tolist()
    assert layout.duplicates_on_rank == 0


def test_a_replica_that_finds_no_rank_with_room_is_squeezed_in():
    # Rank 1 is full of experts 0, 4 and 1 when expert 3 comes, whose two replicas rank 0 alone must not take.
    layout = bin_pack_apart(np.array([2.0, 1, 6, 1, 2]), np.array([1, 1, 1, 2, 1]), [3, 3])
    assert layout.experts_of_rank == ((2, 3, 1), (0, 4, 3))


def test_the_heaviest_replica_goes_first_and_to_the_lightest_rank():
    layout = bin_pack_apart(np.array([5.0, 9, 3, 4]), np.array([1, 1, 1, 1]), [2, 2])
    assert layout.experts_of_rank == ((1, 2), (0, 3))


def test_a_rank_with_fewer_slots_takes_heavier_replicas():
    layout = bin_pack_apart(np.array([4.0, 3, 1, 1, 1]), np.ones(5, dtype=int), [3, 2])
    assert layout.experts_of_rank == ((1, 2, 4), (0, 3))


def test_the_layout_in_order_is_taken_where_it_is_better():
    # Packing the heaviest first: 3 + 2 + 2 beside 3 + 2; in order 3 + 3 beside 2 + 2 + 2.
    layer = omni(np.array([[3.0, 3, 0, 2, 2, 2]]), 2).layers[0]
    assert layer == Layout.even(6, 2)


def test_the_cap_must_leave_enough_replicas():
    with pytest.raises(
        ConfigError, match="max_replicas: 1 replicas of 16 experts in 1 layers fill 16 slots, not 24"
    ):
        omni(skewed(1, 16), 8, 24, max_replicas=1)
    with pytest.raises(ConfigError, match="max_replicas: must be a whole number of 1 or more"):
        omni(skewed(1, 16), 8, 24, max_replicas=0)


def test_a_budget_goes_to_the_layers_that_need_it():
    loads_YE = skewed(6, 16)
    loads_YE[2] = 100  # level already
    loads_YE[4] = 0
    placement = omni(loads_YE, 4, budget=14)
    redundant = [layer.slots - 16 for layer in placement.layers]
    assert sum(redundant) == 14
    assert redundant[2] == redundant[4] == 0
    assert placement.duplicates_on_rank == 0
    slots_YR = np.array([layer.slots_R for layer in placement.layers])
    assert (slots_YR.max(axis=1) - slots_YR.min(axis=1)).max() <= 1
    assert np.ptp(slots_YR.sum(axis=0)) <= 1


def test_a_budget_keeps_to_the_cap():
    placement = omni(skewed(3, 8), 4, budget=24, max_replicas=2)
    assert [layer.replicas_E.tolist() for layer in placement.layers] == [[2] * 8] * 3
    with pytest.raises(
        ConfigError, match="max_replicas: 2 replicas of 8 experts in 3 layers fill 48 slots, not 49"
    ):
        omni(skewed(3, 8), 4, budget=25, max_replicas=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "activated:64"}, "objective: omni balances tokens and nothing else, not activated:64"),
        ({"cap": 3}, "cap: is no option of omni; it knows max_replicas"),
    ],
)
def test_options_that_it_cannot_serve_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        omni(skewed(1, 16), 4, **options)
