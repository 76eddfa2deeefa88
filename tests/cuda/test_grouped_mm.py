"""The kernels with torch's own grouped product, chosen by name, against the reference."""

from __future__ import annotations

import pytest
import torch

from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights
from epbackend.kernels.reference import ReferenceKernels
from tests.helpers.dense import tolerance
from tests.helpers.routing import routing

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def grouped(cuda):
    return cuda.kernel_set("grouped_mm")


@pytest.mark.parametrize("window", [None, (3, 11)], ids=["all", "window"])
def test_permute_and_unpermute_equal_the_reference(grouped, place, window):
    hidden_TD = torch.randn(9, 16, device=place)
    slot_ids_TK, weights_TK = routing(9, 3, -1, 6, seed=2).to(place), torch.rand(9, 3, device=place)
    expected = ReferenceKernels().permute(hidden_TD, slot_ids_TK, 4, window)
    found = grouped.permute(hidden_TD, slot_ids_TK, 4, window)
    rows = int(found.counts_L.sum())
    assert torch.equal(found.counts_L, expected.counts_L)
    assert torch.equal(found.choice_of_row_S[:rows], expected.choice_of_row_S)
    assert torch.equal(found.rows_SD[:rows], expected.rows_SD)
    assert torch.equal(grouped.count(slot_ids_TK, 4), ReferenceKernels().count(slot_ids_TK, 4))
    sums = [torch.zeros(9, 16, device=place) for _ in range(2)]
    found.rows_SD[rows:] = torch.nan
    grouped.unpermute(found.rows_SD, found.choice_of_row_S, weights_TK, sums[0])
    ReferenceKernels().unpermute(expected.rows_SD, expected.choice_of_row_S, weights_TK, sums[1])
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_experts_equal_the_reference(grouped, place, bias):
    torch.manual_seed(0)  # bfloat16 sums in another order: one draw in a hundred is past the tolerance
    matrices = [torch.randn(3, *shape, device=place).bfloat16() / 4 for shape in ((32, 16), (16, 16))]
    biases = [torch.randn(3, n, device=place).bfloat16() if bias else None for n in (32, 16)]
    rows_SD, counts_L = torch.randn(12, 16, device=place).bfloat16(), torch.tensor([4, 0, 5], device=place)
    weights = ExpertWeights(*(grouped.prepack(each) for each in matrices), *biases)
    expected = ReferenceKernels().expert_mlp(rows_SD[:9], counts_L, ExpertWeights(*matrices, *biases))
    out = grouped.expert_mlp(rows_SD, counts_L, weights)[:9]
    torch.testing.assert_close(out, expected, **tolerance(torch.bfloat16))


def test_widths_off_16_bytes_raise(grouped, place):
    with pytest.raises(ConfigError, match=r"multiple of 16 bytes.*use the kernels triton"):
        grouped.prepack(torch.randn(2, 16, 5, device=place))


def test_unknown_kernels_raise(cuda):
    with pytest.raises(
        ConfigError, match=r"'cutlass' are unknown.*triton, triton_fast_fp8, grouped_mm, reference"
    ):
        cuda.kernel_set("cutlass")
    assert type(cuda.kernel_set("reference")) is ReferenceKernels
