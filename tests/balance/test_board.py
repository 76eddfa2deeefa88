"""All ranks flip at one step, or none does, in whatever order the parent, the stagers and the steps come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epbackend.balance.board import MAX_TEXT, PLACE, Board, Seat, Verdict
from epbackend.balance.moves import Migration
from epbackend.errors import EPError
from epbackend.placement.placement import Layout

pytestmark = pytest.mark.cpu
RANKS = 3


def order(number: int) -> Migration:
    layout = Layout(((0, 1), (2, 3), (4, 5)), 6)
    return Migration(number, 0, layout, layout, ())


class Cluster:
    """Ranks whose steps interleave as collectives allow: none begins step k + lead before all have begun step k."""

    def __init__(self, lead: int = 1) -> None:
        places = np.zeros(RANKS, PLACE)
        self.lead = lead
        self.board, self.seats = Board(places), [Seat(places, rank, lead) for rank in range(RANKS)]
        self.steps, self.pending, self.seen = [0] * RANKS, [0] * RANKS, [0] * RANKS
        self.verdicts: list[dict[int, tuple[Verdict, int]]] = [{} for _ in range(RANKS)]

    def begin_step(self, rank: int) -> None:
        if self.steps[rank] + 1 - self.lead > min(self.steps):
            return
        self.steps[rank] += 1
        verdict = self.seats[rank].begin_step(self.pending[rank])
        if verdict is not Verdict.WAIT:
            number, self.pending[rank] = self.pending[rank], 0
            self.verdicts[rank][number] = verdict, self.steps[rank]
            self.seats[rank].end(number)

    def stage(self, rank: int, fails: bool) -> None:
        found = self.seats[rank].order(self.seen[rank])
        if found is None:
            return
        self.seen[rank] = found.number
        if fails:
            self.seats[rank].answer_failed(found.number, "no memory")
        else:
            self.pending[rank] = found.number
            self.seats[rank].answer_staged(found.number)


events = st.one_of(
    st.tuples(st.just("step"), st.integers(0, RANKS - 1)),
    st.tuples(st.just("stage"), st.integers(0, RANKS - 1)),
    st.tuples(st.just("fail"), st.integers(0, RANKS - 1)),
    st.tuples(st.just("cancel"), st.just(0)),
)


@settings(max_examples=150)
@given(st.lists(events, max_size=60), st.booleans(), st.sampled_from([1, 4]))
def test_all_flip_at_one_step_or_none_does(happenings, failures, lead):
    """Also where hosts run ahead of their devices (`lead` above 1)."""
    cluster, number = Cluster(lead), 1
    cluster.board.publish(order(1))
    for what, rank in happenings:
        if what == "step":
            cluster.begin_step(rank)
        elif what == "stage" or (what == "fail" and not failures):
            cluster.stage(rank, fails=False)
        elif what == "fail":
            cluster.stage(rank, fails=True)
        else:
            cluster.board.cancel(number)
        if cluster.board.ended(number):
            number += 1
            cluster.board.publish(order(number))
    # What is open comes to an end as soon as all have staged and made some steps more.
    for rank in range(RANKS):
        cluster.stage(rank, fails=False)
    for rank in [*range(RANKS)] * (3 * lead + 3):
        cluster.begin_step(rank)
    assert cluster.board.ended(number)
    for each in range(1, number + 1):
        found = [verdicts.get(each) for verdicts in cluster.verdicts]
        if any(verdict and verdict[0] is Verdict.FLIP for verdict in found):
            assert len(set(found)) == 1
    assert cluster.board.flipped(number) == all(
        verdicts.get(number, (None,))[0] is Verdict.FLIP for verdicts in cluster.verdicts
    )


def test_nothing_flips_while_a_rank_has_not_staged():
    cluster = Cluster()
    cluster.board.publish(order(1))
    for rank in (0, 2):
        cluster.stage(rank, fails=False)
    for rank in [*range(RANKS)] * 5:
        cluster.begin_step(rank)
    assert not cluster.board.staged(1)
    assert cluster.board.silent(1) == [1]
    assert cluster.verdicts == [{}, {}, {}]


def test_a_failure_is_reported_with_its_rank():
    cluster = Cluster()
    cluster.board.publish(order(1))
    for rank in range(RANKS):
        cluster.stage(rank, fails=rank == 1)
    for rank in [*range(RANKS)] * 2:
        cluster.begin_step(rank)
    assert cluster.board.ended(1)
    assert not cluster.board.flipped(1)
    assert cluster.board.errors() == ["rank 1: no memory"]


def test_ranks_that_count_different_steps_do_not_flip():
    cluster = Cluster()
    for _ in range(3):
        cluster.seats[0].begin_step(0)
    cluster.board.publish(order(1))
    for rank in range(RANKS):
        cluster.stage(rank, fails=False)
    assert [seat.begin_step(1) for seat in cluster.seats] == [Verdict.DROP] * RANKS
    assert "different steps" in cluster.board.errors()[0]


def test_a_missed_flip_is_an_error_and_not_a_wrong_token():
    cluster = Cluster()
    cluster.board.publish(order(1))
    for rank in range(RANKS):
        cluster.stage(rank, fails=False)
    cluster.seats[0].begin_step(1)
    cluster.seats[1].begin_step(0)
    cluster.seats[1].begin_step(0)
    with pytest.raises(EPError, match="had to flip at step 2"):
        cluster.seats[1].begin_step(1)


def test_of_two_plans_that_race_the_second_is_refused():
    """Also by another parent of the same board; the first flips on all ranks, and then there is room for the next."""
    cluster = Cluster()
    cluster.board.publish(order(1))
    for parent in (cluster.board, Board(cluster.board._places)):
        with pytest.raises(EPError, match="still under way"):
            parent.publish(order(2))
    for rank in range(RANKS):
        cluster.stage(rank, fails=False)
    for rank in [*range(RANKS)] * 2:
        cluster.begin_step(rank)
    assert cluster.board.flipped(1)
    cluster.board.publish(order(2))


def test_an_order_that_is_half_written_is_not_read():
    places = np.zeros(1, PLACE)
    Board(places).publish(order(1))
    seat = Seat(places, 0)
    places[0]["text"][5] ^= 1
    assert seat.order(0) is None
    places[0]["text"][5] ^= 1
    assert seat.order(0) == order(1)
    assert seat.order(1) is None


def test_an_order_that_is_too_long_is_refused():
    held = tuple(range(MAX_TEXT // 4))
    long = Layout((held,), len(held))
    with pytest.raises(EPError, match="board"):
        Board(np.zeros(1, PLACE)).publish(Migration(1, 0, long, long, ()))
