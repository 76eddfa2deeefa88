"""Layouts on the way from one to another: every expert has a slot in each, and no rank takes too many at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from epbackend.balance.moves import SAMPLED_ONE_OF, Migration, Move, changes, parts, route
from epbackend.errors import EPError
from epbackend.placement.placement import Layout
from tests.helpers.placement_strategies import layouts

pytestmark = pytest.mark.cpu


@st.composite
def pairs(draw):
    """Two layouts of the same experts in the same slots."""
    before = draw(layouts())
    kept = draw(st.permutations(range(before.experts)))
    rest = draw(
        st.lists(
            st.integers(0, before.experts - 1),
            min_size=before.slots - before.experts,
            max_size=before.slots - before.experts,
        )
    )
    order = draw(st.permutations([*kept, *rest]))
    firsts = np.concatenate(([0], np.cumsum(before.slots_R)))
    return before, Layout.cut(np.array(order), firsts, before.experts)


@given(pairs(), st.integers(1, 4))
def test_parts_lead_to_the_end_and_lose_no_expert(pair, most):
    before, after = pair
    try:
        found = parts(before, after, most)
    except EPError:
        assume(most >= max(before.slots_R))  # a ring through a rank that has too little room for it
        raise
    assert (found or [before])[-1] == after
    for one, following in zip([before, *found], found, strict=False):
        taken = [rank for rank, _, _ in changes(one, following)]
        assert 0 < max(map(taken.count, taken)) <= most
    # A Layout with an expert without slot cannot be made, so that these had none.


@given(pairs())
def test_all_fits_into_one_part_with_room_for_every_slot(pair):
    before, after = pair
    assert parts(before, after, int(before.slots_R.max())) == ([after] if changes(before, after) else [])


@given(pairs(), st.integers(0, 2**32 - 1))
def test_moves_take_every_expert_from_a_slot_that_holds_it_to_where_it_shall_be(pair, seed):
    before, after = pair
    held = [list(experts) for experts in before.experts_of_rank]
    moves = route(before, after, np.random.default_rng(seed).random(before.ranks), node_size=1)
    for move in moves:
        assert before.experts_of_rank[move.source][move.source_place] == move.expert
        if move.expert in before.experts_of_rank[move.target]:
            assert move.source == move.target
        held[move.target][move.target_place] = move.expert
    assert tuple(map(tuple, held)) == after.experts_of_rank
    order = Migration(3, 1, before, after, moves)
    assert Migration.from_json(order.to_json()) == order


def test_experts_come_from_the_same_node_and_from_whom_has_least_to_do():
    before = Layout(((0, 1), (0, 2), (0, 3), (1, 2)), 4)
    after = Layout(((0, 1), (0, 2), (0, 3), (1, 0)), 4)
    assert [move.source for move in route(before, after, tokens_R=[5, 4, 3, 2])] == [2]
    assert [move.source for move in route(before, after, tokens_R=[3, 4, 5, 2])] == [0]
    assert [move.source for move in route(before, after, tokens_R=[3, 4, 5, 2], node_size=2)] == [2]


def test_other_slots_are_refused():
    with pytest.raises(EPError, match="slots"):
        changes(Layout(((0, 1), (2,)), 3), Layout(((0,), (1, 2)), 3))


def test_sampled_checksums_come_to_every_expert_by_turns():
    layout = Layout.even(4, 2)
    for expert in range(2 * SAMPLED_ONE_OF):
        move = Move(expert, 0, 0, 1, 0)
        many = [
            Migration(number, 0, layout, layout, (move,), checksums="sampled") for number in range(16, 32)
        ]
        assert sum(each.checks(move) for each in many) == 16 / SAMPLED_ONE_OF
