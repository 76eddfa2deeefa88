"""Permutations of every device's kernels: properties that hold for any choices."""

from __future__ import annotations

import pytest
import torch

from epbackend.kernels import Permuted
from tests.helpers.routing import routing

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

shapes = st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 6), st.integers(0, 1 << 20))


def valid(permuted: Permuted) -> Permuted:
    """On the CPU, without the garbage that a device may return after the rows of all slots."""
    rows = int(permuted.counts_L.sum())
    assert (permuted.choice_of_row_S[rows:] == -1).all()
    return Permuted(
        permuted.rows_SD[:rows].cpu(), permuted.counts_L.cpu(), permuted.choice_of_row_S[:rows].cpu()
    )


@given(shape=shapes)
def test_permute_selects_local_choices_sorted_by_slot(kernels, place, shape):
    tokens, top_k, slots, seed = shape
    hidden_TD = torch.arange(tokens * 3.0).view(tokens, 3)
    slot_ids_TK = routing(tokens, top_k, -2, slots + 2, seed)
    permuted = valid(kernels.permute(hidden_TD.to(place), slot_ids_TK.to(place), slots))
    flat = slot_ids_TK.reshape(-1)
    mine = [index for slot in range(slots) for index in (flat == slot).nonzero().flatten().tolist()]
    assert permuted.choice_of_row_S.tolist() == mine
    assert permuted.counts_L.tolist() == [(flat == slot).sum().item() for slot in range(slots)]
    assert kernels.count(slot_ids_TK.to(place), slots).tolist() == permuted.counts_L.tolist()
    assert torch.equal(permuted.rows_SD, hidden_TD[torch.tensor(mine, dtype=torch.long) // top_k])


@given(shape=shapes, width=st.integers(1, 7))
def test_windows_together_are_the_whole_permutation(kernels, place, shape, width):
    tokens, top_k, slots, seed = shape
    hidden_TD = torch.arange(tokens * 2.0, device=place).view(tokens, 2)
    slot_ids_TK = routing(tokens, top_k, -1, slots + 1, seed).to(place)
    whole = valid(kernels.permute(hidden_TD, slot_ids_TK, slots))
    total = int(whole.counts_L.sum())
    parts = [
        kernels.permute(hidden_TD, slot_ids_TK, slots, (first, first + width))
        for first in range(0, total + 1, width)
    ]
    assert all(len(part.rows_SD) <= width for part in parts)
    parts = [valid(part) for part in parts]
    assert torch.equal(torch.cat([part.rows_SD for part in parts]), whole.rows_SD)
    assert torch.equal(torch.cat([part.choice_of_row_S for part in parts]), whole.choice_of_row_S)
    assert torch.equal(torch.stack([part.counts_L for part in parts]).sum(0), whole.counts_L)


def test_strided_slot_ids_give_the_same_rows(kernels, place):
    slot_ids_TK = torch.tensor([[0, 2], [1, 2], [1, 2], [0, 2]], device=place)[:, :1]
    permuted = valid(kernels.permute(torch.eye(4, device=place), slot_ids_TK, 2))
    assert permuted.choice_of_row_S.tolist() == [0, 3, 1, 2]
    assert kernels.count(slot_ids_TK, 2).tolist() == [2, 2]
