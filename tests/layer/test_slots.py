"""Maps from slots to experts, and the ids of the slots."""

from __future__ import annotations

import pytest

from epbackend.errors import ConfigError
from epbackend.placement.placement import Layout
from epbackend.replica_split import SlotMap


def test_uniform_keeps_the_experts_order():
    slot_map = SlotMap.uniform(8, 4)
    assert (slot_map.experts, slot_map.ranks, slot_map.slots_per_rank) == (8, 4, 2)
    assert [slot_map.local_experts(rank) for rank in range(4)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert slot_map.slot_ids_EC.tolist() == [[expert] for expert in range(8)]


def test_experts_that_ranks_do_not_divide():
    slot_map = SlotMap.uniform(5, 2)
    assert [slot_map.local_experts(rank) for rank in range(2)] == [(0, 1), (2, 3, 4)]
    assert slot_map.slot_ids_EC.tolist() == [[0], [1], [3], [4], [5]]  # the first rank has no slot 2


def test_ids_leave_room_for_the_rank_that_has_most():
    slot_map = SlotMap(Layout(((0, 1, 0), (2,), (0, 2)), experts=3))
    assert slot_map.slots_per_rank == 3
    assert slot_map.slot_ids_EC.tolist() == [[0, 2, 6], [1, -1, -1], [3, 7, -1]]
    ids = slot_map.slot_ids_EC[slot_map.slot_ids_EC >= 0]
    for rank in range(3):
        mine = sorted(ids[ids // 3 == rank] % 3)
        assert mine == list(range(len(slot_map.local_experts(rank))))


@pytest.mark.parametrize(
    ("slots", "ranks", "message"),
    [
        ((0, 1, 2), 2, "slots: 3 cannot be spread evenly over 2 ranks"),
        ((0, 2), 2, "no slot holds expert 1"),
        ((0, -1), 1, "holds expert -1"),
        ((), 1, "it needs one of both"),
        ((0,), 0, "over 0 ranks"),
    ],
)
def test_maps_that_leave_out_experts_or_ranks_raise(slots, ranks, message):
    with pytest.raises(ConfigError, match=message):
        SlotMap.of(slots, ranks)
