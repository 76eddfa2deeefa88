"""Experts that move between calls of a layer, on real ranks: the very bytes, the same results, or nothing at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import psutil
import pytest

from epbackend.balance.board import PLACE, Seat
from epbackend.balance.transfer import Connections
from tests.helpers.migrating import (
    BROKEN,
    DAMAGED,
    LATE,
    OTHER_LAYOUT,
    WAY,
    assert_all_counted,
    migrate,
    plans,
)

pytestmark = pytest.mark.cpu


@pytest.fixture
def board_file(tmp_path):
    file = tmp_path / "board"

    def make(size):
        np.zeros(size, PLACE).tofile(file)
        return str(file)

    return make


@pytest.mark.parametrize(
    ("form", "level", "split"),
    [
        ("float32", 2, "level"),
        ("bfloat16", 1, "even"),
        ("int8", 2, "nearest"),
        pytest.param("fp8", 2, "even", marks=pytest.mark.slow),
        pytest.param("float32", 1, "level", marks=pytest.mark.slow),
    ],
)
def test_slots_get_the_bytes_of_their_experts_and_results_stay(ranks, board_file, form, level, split):
    """A round of four migrations, the whole of it twice: biases, packed matrices, scales, map, split and counters."""
    way = [*WAY, *WAY[1:]]
    seen = ranks.run(2, migrate, board_file(2), WAY[0], plans(way), form, level, split)
    for each in seen:
        assert each.errors == ()
        assert each.flipped == tuple(range(1, 9))
        assert each.steps == seen[0].steps
        assert each.held == WAY[-1].experts_of_rank
        assert each.right_bytes
        assert each.worst < (0.02 if form == "bfloat16" else 1e-5)
    assert_all_counted(seen)


@pytest.mark.slow
def test_after_a_hundred_migrations_in_a_row_every_slot_is_right(ranks, board_file):
    way = [WAY[0], *WAY[1:] * 25]
    seen = ranks.run(2, migrate, board_file(2), WAY[0], plans(way), "bfloat16", 2, "level")
    for each in seen:
        assert each.errors == ()
        assert each.flipped == tuple(range(1, 101))
        assert each.steps == seen[0].steps
        assert each.right_bytes


@pytest.mark.parametrize(
    ("fault", "said", "checksums"),
    [
        (DAMAGED, "came damaged from rank 1", "all"),
        pytest.param(DAMAGED, "came damaged from rank 1", "sampled", marks=pytest.mark.slow),
        (OTHER_LAYOUT, "rank 1 stores the experts of layer 0 otherwise", "none"),
        pytest.param(BROKEN, "no memory", "all", marks=pytest.mark.slow),
        pytest.param(LATE, "rank 0", "all", marks=pytest.mark.slow),
    ],
)
def test_a_failure_before_the_flip_leaves_weights_and_map_and_the_next_one_works(
    ranks, board_file, fault, said, checksums
):
    """A damaged expert, a sender that fails, and one that comes after the timeout."""
    first = replace(plans(WAY)[0], timeout_s=2.0, checksums=checksums)
    again = replace(first, number=2, connection=1, timeout_s=60.0)
    seen = ranks.run(2, migrate, board_file(2), WAY[0], [first, again], "float32", 2, "even", fault)
    for each in seen:
        assert each.flipped == (2,)
        assert each.right_bytes
        assert each.held == WAY[1].experts_of_rank
        assert each.worst < 1e-4
    assert said in " ".join(seen[0].errors)


def test_the_ranks_meet_where_no_other_machine_can_come():
    places = np.zeros(1, PLACE)
    connections = Connections(Seat(places, 0), rank=0, ranks=1)
    connections.group(plans(WAY)[0])
    found = [each.laddr for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"]
    assert [at.ip for at in found if at.port == places[0]["port"]] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"before": WAY[2], "after": WAY[3]}, "other experts than the plan starts from"),
        ({"layer": 7}, "no MoE layer 7"),
    ],
)
def test_a_plan_for_other_weights_is_refused(ranks, board_file, change, said):
    right = plans(WAY)[:1]
    wrong = replace(right[0], **change)
    second = replace(right[0], number=2)
    seen = ranks.run(2, migrate, board_file(2), WAY[0], [replace(wrong, number=1), second])[0]
    assert seen.flipped == (2,)
    assert said in seen.errors[0]
