"""The slots of one layer, and everything derived from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import Layout
from tests.helpers.placement_strategies import layouts


def test_derived_maps():
    layout = Layout(((0, 2), (1, 0, 2), (2,)), 3)
    assert (layout.ranks, layout.slots, layout.duplicates_on_rank) == (3, 6, 0)
    assert layout.slots_R.tolist() == [2, 3, 1]
    assert layout.slot_to_expert_P.tolist() == [0, 2, 1, 0, 2, 2]
    assert layout.rank_of_slot_P.tolist() == [0, 0, 1, 1, 1, 2]
    assert layout.replicas_E.tolist() == [2, 1, 3]
    assert layout.slots_EC.tolist() == [[0, 3, -1], [2, -1, -1], [1, 4, 5]]


@given(layouts())
def test_derived_maps_agree_with_each_other(layout):
    assert layout.replicas_E.sum() == layout.slots_R.sum() == layout.slots
    for expert, slots_C in enumerate(layout.slots_EC.tolist()):
        slots = [slot for slot in slots_C if slot >= 0]
        assert slots == sorted(slots) == np.flatnonzero(layout.slot_to_expert_P == expert).tolist()
        assert len(slots) == layout.replicas_E[expert]
    for rank, held in enumerate(layout.experts_of_rank):
        assert tuple(layout.slot_to_expert_P[layout.rank_of_slot_P == rank]) == held


def test_derived_maps_cannot_be_written_to():
    layout = Layout.even(4, 2)
    for array in (
        layout.slots_R,
        layout.slot_to_expert_P,
        layout.rank_of_slot_P,
        layout.replicas_E,
        layout.slots_EC,
    ):
        with pytest.raises(ValueError, match="read-only"):
            array.flat[0] = 1


def test_duplicates_on_a_rank_are_counted():
    assert Layout(((0, 0, 0), (1, 2, 1)), 3).duplicates_on_rank == 3


def test_slots_in_order_are_cut_evenly():
    assert Layout.of([3, 1, 0, 2], 2, 4).experts_of_rank == ((3, 1), (0, 2))
    assert Layout.of(np.array([3, 1, 0, 2]), 2, 4) == Layout.of([3, 1, 0, 2], 2, 4)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 20))
def test_the_even_layout_spreads_experts_and_replicas(experts, ranks, more):
    slots = min(max(experts, ranks) + more, experts * ranks)
    layout = Layout.even(experts, ranks, slots)
    assert layout.slots == slots
    assert layout.replicas_E.max() - layout.replicas_E.min() <= 1
    assert layout.slots_R.max() - layout.slots_R.min() <= 1


@pytest.mark.parametrize(
    ("held", "experts", "message"),
    [
        ((), 1, "0 ranks"),
        (((0,),), 0, "0 experts"),
        (((0,), ()), 1, "rank 1 has no slot"),
        (((0, 2),), 2, "holds expert 2, but experts are numbered 0 to 1"),
        (((0, -1),), 1, "holds expert -1"),
        (((0, 3),), 5, r"no slot holds expert 1 \(3 experts have none\)"),
    ],
)
def test_layouts_that_leave_an_expert_or_a_rank_out_are_refused(held, experts, message):
    with pytest.raises(ConfigError, match=message):
        Layout(held, experts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout.of([0, 1, 2], 2, 3), "slots: 3 cannot be spread evenly over 2 ranks"),
        (lambda: Layout.of([0], 0, 1), "over 0 ranks"),
        (lambda: Layout.even(4, 2, 3), "slots: 3 are fewer than the 4 experts"),
        (lambda: Layout.even(2, 3), "slots: 2 are fewer than the 3 ranks"),
    ],
)
def test_slots_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
