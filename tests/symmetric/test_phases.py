"""The kernels, phase by phase, on buffers of one process: what arrives is what one rank would have sorted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from epbackend.kernels.reference import ReferenceKernels
from epbackend.kernels.triton.symmetric import (
    SymmetricTensor,
    combine_reduce,
    combine_send,
    dispatch,
    exchange_counts,
    recv_offsets,
    rows_at_receivers,
)

pytestmark = pytest.mark.cuda
D = 20


def symmetric_tensors(ranks: int, shape: tuple[int, ...], dtype: torch.dtype, place) -> list[SymmetricTensor]:
    """A tensor on each rank, full of garbage."""
    garbage = torch.nan if dtype.is_floating_point else -7
    tensors = [torch.full(shape, garbage, dtype=dtype, device=place) for _ in range(ranks)]
    addresses_R = torch.tensor([tensor.data_ptr() for tensor in tensors], device=place)
    return [SymmetricTensor(tensor, addresses_R) for tensor in tensors]


@st.composite
def routings(draw):
    """(slots of a rank, top_k, tokens of each rank, capacity, seed)"""
    ranks = draw(st.integers(1, 5))
    tokens = draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks))
    return (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
        tokens,
        draw(st.integers(1, 60)),
        draw(st.integers(0, 99)),
    )


@given(case=routings())
def test_rows_arrive_sorted_and_results_come_back(place_of, case):
    slots, top_k, tokens_R, capacity, seed = case
    ranks, most = len(tokens_R), max(tokens_R)
    total = ranks * slots
    draw = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(tokens, D, generator=draw).to(place_of) for tokens in tokens_R]
    ids = [torch.randint(-2, total + 2, (tokens, top_k), generator=draw).to(place_of) for tokens in tokens_R]
    weights = [torch.rand(tokens, top_k, generator=draw).to(place_of) for tokens in tokens_R]
    tables = symmetric_tensors(ranks, (ranks, total + 1), torch.int32, place_of)
    rows = symmetric_tensors(ranks, (capacity, D), torch.float32, place_of)
    choice_of_row = symmetric_tensors(ranks, (capacity,), torch.int64, place_of)
    results = symmetric_tensors(ranks, (most * top_k, D), torch.float32, place_of)

    before = [exchange_counts(ids[rank], tokens_R[rank], tables[rank], rank) for rank in range(ranks)]
    offsets = [recv_offsets(table.local, rank, slots, (0, capacity)) for rank, table in enumerate(tables)]
    row_of_choices_R = [
        rows_at_receivers(ids[rank], before[rank], offsets[rank].bases_P) for rank in range(ranks)
    ]

    # One rank that holds all tokens, padded to as many on each, sorts them like this.
    padded_ids = torch.cat(
        [torch.nn.functional.pad(each, (0, 0, 0, most - len(each)), value=-1) for each in ids]
    )
    padded_hidden = torch.cat([torch.nn.functional.pad(each, (0, 0, 0, most - len(each))) for each in hidden])
    sorted_R = [
        ReferenceKernels().permute(padded_hidden, padded_ids - rank * slots, slots) for rank in range(ranks)
    ]
    needs = [[int(each.counts_L.sum()), tokens] for each, tokens in zip(sorted_R, tokens_R, strict=True)]
    assert all(offset.needs_R2.tolist() == needs for offset in offsets)

    for first in range(0, max(rows for rows, _ in needs), capacity):
        for rank in range(ranks):
            own = rank * most * top_k
            dispatch(
                hidden[rank],
                ids[rank],
                row_of_choices_R[rank],
                first,
                rows[rank],
                choice_of_row[rank],
                own,
                slots,
            )
        for rank, expected in enumerate(sorted_R):
            window = first, first + capacity
            counts_L = recv_offsets(tables[rank].local, rank, slots, window).counts_L
            valid = int(counts_L.sum())
            cut = ReferenceKernels().permute(padded_hidden, padded_ids - rank * slots, slots, window)
            assert torch.equal(counts_L, cut.counts_L)
            assert torch.equal(rows[rank].local[:valid], expected.rows_SD[first : first + valid])
            assert torch.equal(
                choice_of_row[rank].local[:valid], expected.choice_of_row_S[first : first + valid]
            )
            combine_send(rows[rank].local * (rank + 1), counts_L, choice_of_row[rank].local, results[rank])

    for rank in range(ranks):
        out_TD = torch.empty_like(hidden[rank])
        combine_reduce(results[rank].local, ids[rank], weights[rank], total, out_TD)
        known = (ids[rank] >= 0) & (ids[rank] < total)
        factors_TK = torch.where(known, weights[rank] * (ids[rank] // slots + 1), 0.0)
        torch.testing.assert_close(out_TD, hidden[rank] * factors_TK.sum(1, keepdim=True))


def test_strided_tokens_weights_and_wide_rows(place_of):
    """Rows of more than one column block, tokens and weights that are parts of wider tensors."""
    tokens, top_k, width = 5, 3, 1500
    hidden_TD = torch.randn(tokens, 2 * width, device=place_of)[:, :width]
    ids_TK = torch.zeros(tokens, top_k, dtype=torch.int64, device=place_of)
    weights_TK = torch.rand(tokens, 2 * top_k, device=place_of)[:, ::2]
    (table,) = symmetric_tensors(1, (1, 2), torch.int32, place_of)
    (rows,) = symmetric_tensors(1, (tokens * top_k, width), torch.float32, place_of)
    (choice_of_row,) = symmetric_tensors(1, (tokens * top_k,), torch.int64, place_of)
    (results,) = symmetric_tensors(1, (tokens * top_k, width), torch.float32, place_of)
    before = exchange_counts(ids_TK, tokens, table, 0)
    offset = recv_offsets(table.local, 0, 1, (0, tokens * top_k))
    dispatch(
        hidden_TD, ids_TK, rows_at_receivers(ids_TK, before, offset.bases_P), 0, rows, choice_of_row, 0, 1
    )
    combine_send(rows.local, offset.counts_L, choice_of_row.local, results)
    out_TD = torch.zeros(tokens, 2 * width, device=place_of)[:, :width]
    combine_reduce(results.local, ids_TK, weights_TK, 1, out_TD)
    torch.testing.assert_close(out_TD, hidden_TD * weights_TK.sum(1, keepdim=True))


def test_more_choices_than_one_block_counts(place_of):
    """Blocks of choices are counted one after the other, and stay in order."""
    tokens, top_k, slots = 150, 2, 3
    hidden_TD = torch.randn(tokens, D, device=place_of)
    ids_TK = torch.randint(0, slots, (tokens, top_k), generator=torch.Generator().manual_seed(1)).to(place_of)
    (table,) = symmetric_tensors(1, (1, slots + 1), torch.int32, place_of)
    before = exchange_counts(ids_TK, tokens, table, 0)
    row_S = rows_at_receivers(ids_TK, before, recv_offsets(table.local, 0, slots, (0, 999)).bases_P)
    order = ReferenceKernels().permute(hidden_TD, ids_TK, slots).choice_of_row_S
    assert torch.equal(row_S[order], torch.arange(tokens * top_k, device=place_of))
