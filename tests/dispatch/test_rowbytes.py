"""Tokens packed as bytes come out as they went in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epbackend.dispatch.rowbytes import pack, row_bytes, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(tokens=st.integers(0, 5), hidden=st.integers(1, 9), top_k=st.integers(1, 5), padding=st.integers(0, 3))
def test_round_trip(dtype, tokens, hidden, top_k, padding):
    rows = torch.randn(tokens, hidden).to(dtype)
    ids, weights = torch.randint(0, 1 << 30, (tokens, top_k)), torch.rand(tokens, top_k)
    packed = pack(rows, ids, weights, tokens + padding)
    assert packed.shape == (tokens + padding, row_bytes(hidden, top_k, dtype))
    hidden_out, ids_out, weights_out = unpack(packed, hidden, top_k, dtype)
    assert torch.equal(hidden_out[:tokens], rows)
    assert torch.equal(ids_out[:tokens], ids)
    assert torch.equal(weights_out[:tokens], weights)
    assert (ids_out[tokens:] == -1).all()


def test_rows_stay_aligned():
    assert row_bytes(7, 3, torch.bfloat16) % 8 == 0
    hidden, _, weights = unpack(
        pack(torch.ones(2, 7).bfloat16(), torch.ones(2, 3), torch.ones(2, 3)), 7, 3, torch.bfloat16
    )
    assert hidden.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr(), (
        "unpacking copied the rows"
    )
