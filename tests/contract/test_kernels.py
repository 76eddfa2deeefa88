"""Every device's kernels against their contract and against plain torch."""

from __future__ import annotations

import pytest
import torch

from contract.dense import swiglu, tolerance
from contract.routing import routing
from epbackend.kernels import ExpertWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_unpermute_inverts_permute(kernels, device):
    place = device.torch_device(0)
    hidden_TD = torch.randn(7, 5, device=place)
    slot_ids_TK = routing(7, 3, 0, 4, seed=1).to(place)
    weights_TK = torch.rand(7, 3, device=place)
    permuted = kernels.permute(hidden_TD, slot_ids_TK, 4)
    out_TD = torch.ones(7, 5, device=place)
    kernels.unpermute(permuted.rows_SD, permuted.source_S, weights_TK, out_TD)
    torch.testing.assert_close(out_TD, 1 + hidden_TD * weights_TK.sum(1, keepdim=True))


def test_unpermute_leaves_garbage_rows_alone(kernels, device):
    place = device.torch_device(0)
    rows_SD = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]], device=place)
    out_TD = torch.zeros(2, 2, device=place)
    kernels.unpermute(
        rows_SD, torch.tensor([3, -1], device=place), torch.full((2, 2), 2.0, device=place), out_TD
    )
    assert out_TD.tolist() == [[0.0, 0.0], [2.0, 4.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_grouped_matmul(kernels, device, dtype, bias):
    place = device.torch_device(0)
    weight_LNK = torch.randn(5, 24, 16, device=place).to(dtype) / 4
    bias_LN = torch.randn(5, 24, device=place).to(dtype) if bias else None
    counts_L = torch.tensor([3, 0, 1, 7, 0], device=place)
    rows_SK = torch.randn(13, 16, device=place).to(dtype)
    rows_SK[11:] = torch.nan  # past the counts: garbage that must not reach a valid row
    rows_SN = kernels.grouped_matmul(rows_SK, kernels.pack(weight_LNK), counts_L, bias_LN)
    slot_S = torch.repeat_interleave(torch.arange(5, device=place), counts_L)
    expected = torch.einsum("sk,snk->sn", rows_SK[:11].double(), weight_LNK[slot_S].double())
    if bias_LN is not None:
        expected += bias_LN[slot_S].double()
    assert rows_SN.dtype == dtype
    torch.testing.assert_close(rows_SN[:11].double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(kernels, device, dtype):
    rows_S2F = torch.randn(6, 8, device=device.torch_device(0)).to(dtype)
    before = rows_S2F.clone()
    torch.testing.assert_close(
        kernels.swiglu(rows_S2F).double(), swiglu(rows_S2F.double()), **tolerance(dtype)
    )
    assert torch.equal(rows_S2F, before)


@pytest.mark.parametrize(
    "activation", [None, lambda rows: rows[:, ::2].tanh() * rows[:, 1::2]], ids=["swiglu", "own"]
)
def test_expert_mlp(kernels, device, activation):
    place = device.torch_device(0)
    gate_up_L2FD, down_LDF = torch.randn(2, 12, 8, device=place) / 3, torch.randn(2, 8, 6, device=place) / 3
    weights = ExpertWeights(kernels.pack(gate_up_L2FD), kernels.pack(down_LDF), activation=activation)
    rows_SD = torch.randn(5, 8, device=place)
    out_SD = kernels.expert_mlp(rows_SD, torch.tensor([2, 3], device=place), weights)
    for row, slot in enumerate([0, 0, 1, 1, 1]):
        expected = down_LDF[slot] @ (activation or swiglu)((gate_up_L2FD[slot] @ rows_SD[row])[None])[0]
        torch.testing.assert_close(out_SD[row], expected, **tolerance(torch.float32))


def test_no_rows_at_all(kernels, device):
    place = device.torch_device(0)
    weights = ExpertWeights(
        kernels.pack(torch.randn(2, 12, 8, device=place)), kernels.pack(torch.randn(2, 8, 6, device=place))
    )
    rows_SD = torch.empty(0, 8, device=place)
    assert kernels.expert_mlp(rows_SD, torch.zeros(2, dtype=torch.int64, device=place), weights).shape == (
        0,
        8,
    )
