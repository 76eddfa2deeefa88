"""Rows encoded as bytes come out as they went in, or as near as their dispatch dtype promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epbackend.dispatch.row_format import RowFormat
from epbackend.kernels import int8
from epbackend.kernels.reference import ReferenceKernels
from tests.helpers.row_tolerance import within

KERNELS = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dispatch_dtype", ["full", "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    tokens=st.integers(0, 5),
    hidden=st.sampled_from([1, 2, 3, 5, 8, 127, 128, 129, 300]),
    top_k=st.integers(1, 5),
    padding=st.integers(0, 3),
    spread=st.floats(0, 6),
)
def test_rows_decode_to_what_was_encoded(dtype, dispatch_dtype, tokens, hidden, top_k, padding, spread):
    """Rows of one size, and rows whose values differ by many orders."""
    rows = (torch.randn(tokens, hidden) * torch.exp(-spread * torch.rand(tokens, hidden))).to(dtype)
    ids, weights = torch.randint(0, 1 << 30, (tokens, top_k)), torch.rand(tokens, top_k)
    form = RowFormat.of(rows, ids, dispatch_dtype)
    packed = form.encode(KERNELS, rows, ids, weights, tokens + padding)
    assert packed.shape == (tokens + padding, form.bytes)
    hidden_out, ids_out, weights_out = form.decode(KERNELS, packed)
    assert (hidden_out.dtype, hidden_out.shape) == (dtype, (tokens + padding, hidden))
    off = (hidden_out[:tokens].double() - rows.double()).abs()
    assert (off <= within(dispatch_dtype, rows).double()).all()
    assert torch.equal(ids_out[:tokens], ids)
    assert torch.equal(weights_out[:tokens], weights)
    assert (ids_out[tokens:] == -1).all()


@pytest.mark.parametrize("dispatch_dtype", ["int8", "fp8"])
def test_rows_of_zeros_stay_zeros(dispatch_dtype):
    rows, ids = torch.zeros(3, 200), torch.zeros(3, 1, dtype=torch.int64)
    form = RowFormat.of(rows, ids, dispatch_dtype)
    assert torch.equal(form.decode(KERNELS, form.encode(KERNELS, rows, ids, torch.ones(3, 1)))[0], rows)


def test_int8_experts_find_the_values_that_travelled():
    rows, ids = torch.randn(50, 96), torch.zeros(50, 1, dtype=torch.int64)
    form = RowFormat.of(rows, ids, "int8")
    arrived, *_ = form.decode(KERNELS, form.encode(KERNELS, rows, ids, torch.ones(50, 1)))
    assert torch.equal(int8.quantize_rows(arrived)[0], int8.quantize_rows(rows)[0])


def test_a_row_has_the_documented_bytes():
    """DeepSeek-V3's: 7168 values, 8 choices."""
    sizes = {name: RowFormat(7168, torch.bfloat16, name, top_k=8).bytes for name in ("full", "int8", "fp8")}
    assert sizes == {"full": 64 + 14336, "int8": 64 + 8 + 7168, "fp8": 64 + 4 * 56 + 7168}


@pytest.mark.parametrize("dispatch_dtype", ["full", "int8", "fp8"])
def test_rows_stay_aligned(dispatch_dtype):
    assert RowFormat(7, torch.bfloat16, dispatch_dtype, top_k=3).bytes % 8 == 0


@pytest.mark.parametrize("dispatch_dtype", ["full", "int8", "fp8"])
@pytest.mark.parametrize(("top_k", "alignment"), [(0, 16), (3, 8), (3, 16)])
def test_fields_begin_at_multiples_of_the_alignment_and_do_not_overlap(dispatch_dtype, top_k, alignment):
    row_format = RowFormat(200, torch.bfloat16, dispatch_dtype, top_k, alignment)
    bytes_TB = torch.zeros(2, row_format.bytes, dtype=torch.uint8)
    fields = row_format.fields(bytes_TB)
    assert row_format.bytes % alignment == 0
    for number, field in enumerate(fields, start=1):
        field.view(torch.uint8).fill_(number)
    for field in (fields.scales_TX, fields.values_TD):
        assert field.numel() == 0 or field.storage_offset() * field.element_size() % alignment == 0
    for number, field in enumerate(fields, start=1):
        assert (field.view(torch.uint8) == number).all()


def test_full_rows_are_not_copied():
    rows, ids = torch.ones(2, 7).bfloat16(), torch.ones(2, 3)
    form = RowFormat.of(rows, ids, "full")
    hidden, _, weights = form.decode(KERNELS, form.encode(KERNELS, rows, ids, torch.ones(2, 3)))
    assert hidden.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr()
