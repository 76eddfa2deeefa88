"""Both sorts, for few choices and for many, on several blocks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.kernels.reference import ReferenceKernels
from epbackend.kernels.triton import permute
from tests.helpers.routing import routing

pytestmark = pytest.mark.cuda


@pytest.fixture(params=["few", "many"])
def way(request, monkeypatch):
    if request.param == "many":
        monkeypatch.setattr(permute, "MOST_CHOICES", 0)
        monkeypatch.setattr(permute, "MOST_ROWS", 0)


@pytest.mark.parametrize("window", [None, (0, 0), (5, 9), (130, 290), (300, 999)])
@pytest.mark.parametrize(("tokens", "top_k", "slots"), [(100, 3, 5), (37, 8, 31), (130, 1, 1)])
def test_permute_and_unpermute_equal_the_reference(way, place, tokens, top_k, slots, window):
    # A slice, as unpacked rows are: not all strides are those of a contiguous tensor.
    hidden_TD = torch.randn(tokens, 12, device=place)[:, 2:9]
    ids_TK = routing(tokens, 2 * top_k, -1, slots + 2, seed=tokens).to(place)[:, :top_k]
    expected = ReferenceKernels().permute(hidden_TD, ids_TK, slots, window)
    found = permute.permute(hidden_TD, ids_TK, slots, window)
    rows = len(expected.rows_SD)
    assert torch.equal(found.counts_L, expected.counts_L)
    assert found.choice_of_row_S[:rows].equal(expected.choice_of_row_S)
    assert (found.choice_of_row_S[rows:] == -1).all()
    assert found.rows_SD[:rows].equal(expected.rows_SD)
    found.rows_SD[rows:] = torch.nan
    weights_TK = torch.rand(tokens, 2 * top_k, device=place)[:, ::2]
    sums = [torch.ones(tokens, 7, device=place) for _ in range(2)]
    permute.unpermute(found.rows_SD, found.choice_of_row_S, weights_TK, sums[0])
    ReferenceKernels().unpermute(expected.rows_SD, expected.choice_of_row_S, weights_TK, sums[1])
    torch.testing.assert_close(*sums)
