"""Every device's kernels against their contract and against plain torch.

Inputs are drawn, and results compared, on the CPU: not every device has float64, or draws the same numbers.
"""

from __future__ import annotations

import pytest
import torch

from epbackend.kernels import ExpertWeights, Permuted, renormalized
from tests.helpers.dense import swiglu, tolerance
from tests.helpers.routing import routing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_unpermute_inverts_permute(kernels, place):
    hidden_TD, weights_TK = torch.randn(7, 5), torch.rand(7, 3)
    slot_ids_TK = routing(7, 3, 0, 4, seed=1)
    permuted = kernels.permute(hidden_TD.to(place), slot_ids_TK.to(place), 4)
    out_TD = torch.ones(7, 5).to(place)
    kernels.unpermute(permuted.rows_SD, permuted.choice_of_row_S, weights_TK.to(place), out_TD)
    torch.testing.assert_close(out_TD.cpu(), 1 + hidden_TD * weights_TK.sum(1, keepdim=True))


def test_unpermute_ignores_garbage_rows(kernels, place):
    rows_SD = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]]).to(place)
    out_TD = torch.zeros(2, 2).to(place)
    choice_of_row_S, weights_TK = torch.tensor([3, -1]).to(place), torch.full((2, 2), 2.0).to(place)
    kernels.unpermute(rows_SD, choice_of_row_S, weights_TK, out_TD)
    assert out_TD.tolist() == [[0.0, 0.0], [2.0, 4.0]]
    choice_of_row_S, weights_TK = torch.tensor([1, -1]).to(place), torch.full((1, 2), 2.0).to(place)
    row_of_choice_S = torch.tensor([-1, 0], dtype=torch.int32).to(place)
    permuted = Permuted(rows_SD, torch.tensor([1]).to(place), choice_of_row_S, row_of_choice_S)
    assert kernels.weighted_sums(rows_SD, permuted, weights_TK, torch.float32).tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [*((tokens, dtype) for tokens in (0, 1, 7) for dtype in DTYPES), (300, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("renormalize", [False, True])
def test_weighted_sums_equal_what_unpermute_adds_to_zeros(kernels, place, dtype, tokens, renormalize):
    hidden_TD, weights_TK = torch.randn(tokens, 40).to(dtype), torch.rand(tokens, 3)
    slot_ids_TK = routing(tokens, 3, 0, 9, seed=2)  # some tokens have no choice of the 4 slots
    permuted = kernels.permute(hidden_TD.to(place), slot_ids_TK.to(place), 4)
    sums_TD = torch.zeros(tokens, 40).to(place)
    used_TK = renormalized(weights_TK) if renormalize else weights_TK
    kernels.unpermute(permuted.rows_SD, permuted.choice_of_row_S, used_TK.to(place), sums_TD)
    found_TD = kernels.weighted_sums(
        permuted.rows_SD, permuted, weights_TK.to(place), dtype, renormalize
    ).cpu()
    assert found_TD.dtype == dtype
    torch.testing.assert_close(found_TD.double(), sums_TD.cpu().double(), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_grouped_matmul_equals_a_product_for_each_row(kernels, place, dtype, bias):
    weight_LNK = torch.randn(5, 24, 16).to(dtype) / 4
    bias_LN = torch.randn(5, 24).to(dtype) if bias else None
    counts_L = torch.tensor([3, 0, 1, 7, 0])
    rows_SK = torch.randn(13, 16).to(dtype)
    rows_SK[11:] = torch.nan  # past the counts: garbage that must not reach a valid row
    packed = kernels.prepack(weight_LNK.to(place))
    on_place = None if bias_LN is None else bias_LN.to(place)
    rows_SN = kernels.grouped_matmul(rows_SK.to(place), packed, counts_L.to(place), on_place).cpu()
    slot_S = torch.repeat_interleave(torch.arange(5), counts_L)
    expected = torch.einsum("sk,snk->sn", rows_SK[:11].double(), weight_LNK[slot_S].double())
    if bias_LN is not None:
        expected += bias_LN[slot_S].double()
    assert rows_SN.dtype == dtype
    torch.testing.assert_close(rows_SN[:11].double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_equals_its_formula_and_keeps_its_input(kernels, place, dtype):
    rows_S2F = torch.randn(6, 8).to(dtype)
    given_S2F = rows_S2F.to(place)
    rows_SF = kernels.swiglu(given_S2F).cpu()
    torch.testing.assert_close(rows_SF.double(), swiglu(rows_S2F.double()), **tolerance(dtype))
    assert torch.equal(given_S2F.cpu(), rows_S2F)


@pytest.mark.parametrize(
    "activation", [None, lambda rows: rows[:, ::2].tanh() * rows[:, 1::2]], ids=["swiglu", "own"]
)
def test_expert_mlp_equals_its_formula_for_each_row(kernels, place, activation):
    gate_up_L2FD, down_LDF = torch.randn(2, 12, 8) / 3, torch.randn(2, 8, 6) / 3
    packed = kernels.prepack(gate_up_L2FD.to(place)), kernels.prepack(down_LDF.to(place))
    rows_SD = torch.randn(5, 8)
    counts_L = torch.tensor([2, 3]).to(place)
    total_L = torch.tensor([10, 20]).to(place)
    weights = ExpertWeights(*packed, activation=activation)
    out_SD = kernels.expert_mlp(rows_SD.to(place), counts_L, weights, total_L=total_L)
    assert total_L.tolist() == [12, 23]
    for row, slot in enumerate([0, 0, 1, 1, 1]):
        expected = down_LDF[slot] @ (activation or swiglu)((gate_up_L2FD[slot] @ rows_SD[row])[None])[0]
        torch.testing.assert_close(out_SD[row].cpu(), expected, **tolerance(torch.float32))


def test_expert_mlp_of_no_rows_returns_none(kernels, place):
    weights = ExpertWeights(
        kernels.prepack(torch.randn(2, 12, 8).to(place)), kernels.prepack(torch.randn(2, 8, 6).to(place))
    )
    rows_SD, counts_L = torch.empty(0, 8).to(place), torch.zeros(2, dtype=torch.int64).to(place)
    assert kernels.expert_mlp(rows_SD, counts_L, weights).shape == (0, 8)
