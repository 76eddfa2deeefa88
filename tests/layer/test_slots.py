"""Maps from slots to experts, and which copy a choice goes to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.slots import SlotMap


def test_uniform_keeps_the_experts_order():
    slot_map = SlotMap.uniform(8, 4)
    assert (slot_map.experts, slot_map.slots_per_rank) == (8, 2)
    assert [slot_map.local_experts(rank) for rank in range(4)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    ids = torch.tensor([[7, 0], [3, 3]])
    assert torch.equal(slot_map.assign(ids), ids)


@pytest.mark.parametrize(
    ("slots", "ranks", "message"),
    [
        ((0, 1, 2), 2, "3 slots cannot be spread evenly over 2 ranks"),
        ((0, 2), 2, "no slot holds expert 1"),
        ((0, -1), 1, "slot 1 names expert -1"),
        ((), 1, "0 slots"),
        ((0,), 0, "over 0 ranks"),
    ],
)
def test_maps_that_cannot_be(slots, ranks, message):
    with pytest.raises(ConfigError, match=message):
        SlotMap(slots, ranks)


@given(
    slots=st.lists(st.integers(0, 5), max_size=8).flatmap(lambda more: st.permutations([*range(6), *more])),
    tokens=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_choices_go_to_all_copies_evenly(slots, tokens, seed):
    slot_map = SlotMap(tuple(slots), 1)
    ids = torch.randint(0, 6, (tokens, 3), generator=torch.Generator().manual_seed(seed))
    assigned = slot_map.assign(ids)
    assert torch.equal(torch.tensor(slots)[assigned], ids)
    assert torch.equal(slot_map.assign(ids), assigned)
    load = torch.bincount(assigned.flatten(), minlength=len(slots)).tolist()
    for expert in range(6):
        of_copies = [count for slot, count in zip(slots, load, strict=True) if slot == expert]
        assert max(of_copies) - min(of_copies) <= 1


def test_ranks_with_different_tokens_begin_with_different_copies():
    slot_map = SlotMap((0, 1, 0, 1), 2)
    first = {int(slot_map.assign(torch.tensor([[0, other]]))[0, 0]) for other in (0, 1)}
    assert first == {0, 2}
