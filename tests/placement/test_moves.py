"""Moves between placements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import Layout, Placement, count_moves
from tests.helpers.placement_strategies import layouts, placements


def test_experts_that_a_rank_did_not_hold():
    before = Placement((Layout(((0, 1), (2, 3)), 4), Layout(((0, 1), (2, 3)), 4)))
    after = Placement((Layout(((1, 0), (3, 2)), 4), Layout(((1, 2), (3, 0, 1)), 4)))
    moves = count_moves(before, after)
    assert moves.received_YR.tolist() == [[0, 0], [1, 2]]
    assert (moves.total, moves.slots, moves.share) == (3, 9, 3 / 9)


def test_only_the_given_layers_are_compared():
    before, after = Placement.even(3, 4, 2), Placement((Layout(((3, 2), (1, 0)), 4),) * 3)
    assert count_moves(before, after, layers=[1]).received_YR.tolist() == [[2, 2]]
    nothing = count_moves(before, after, layers=[])
    assert (nothing.total, nothing.slots, nothing.share) == (0, 0, 0.0)


def test_a_second_replica_on_the_same_rank_is_not_received_again():
    before, after = Layout(((0, 1), (2,)), 3), Layout(((0, 1), (2, 0, 0)), 3)
    assert count_moves(Placement((before,)), Placement((after,))).received_YR.tolist() == [[0, 1]]


@given(placements())
def test_staying_costs_nothing(placement):
    assert count_moves(placement, placement).total == 0


@given(st.data())
def test_as_counted_by_hand(data):
    before, after = data.draw(layouts(5, 3)), data.draw(layouts(5, 3))
    pairs = zip(before.experts_of_rank, after.experts_of_rank, strict=True)
    by_hand = [len(set(new) - set(old)) for old, new in pairs]
    assert count_moves(Placement((before,)), Placement((after,))).received_YR.tolist() == [by_hand]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Placement.even(2, 4, 2), "layers: one placement has 1, the other 2"),
        (Placement.even(1, 4, 4), "ranks: one placement has 2, the other 4"),
        (Placement.even(1, 6, 2), "experts: one placement has 4, the other 6"),
    ],
)
def test_placements_of_other_models_or_ranks_are_refused(other, message):
    with pytest.raises(ConfigError, match=message):
        count_moves(Placement.even(1, 4, 2), other)
