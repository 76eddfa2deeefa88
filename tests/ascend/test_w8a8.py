"""Int8 experts in each layout, with rows that come as they are or quantized."""

from __future__ import annotations

import pytest
import torch

from epbackend.kernels import ExpertWeights, int8
from epbackend.kernels.npu import kernels, ops
from epbackend.kernels.npu.kernels import NpuKernels
from tests.helpers.dense import dense_moe, swiglu
from tests.helpers.layer_case import relu_product
from tests.helpers.quantized_layer import INT8, assert_near, int8_matrices, int8_weights

pytestmark = pytest.mark.ascend

D, SLOTS, COUNTS = 64, 3, (4, 0, 2)


def experts(form, hidden: int, width: int) -> tuple[ExpertWeights, list[torch.Tensor]]:
    """Packed in a form, and as float matrices."""
    matrices = [torch.randn(SLOTS, 2 * width, hidden) / 8, torch.randn(SLOTS, hidden, width) / 8]
    packed = [NpuKernels().prepack(form(each, torch.device("npu"))) for each in matrices]
    return ExpertWeights(*packed), matrices


@pytest.mark.parametrize("form", [int8_matrices, int8_weights], ids=["one by one", "whole"])
@pytest.mark.parametrize(
    ("hidden", "width", "layout"),
    [(64, 64, kernels.Tiled), (40, 64, int8.Int8Weights), (40, 40, int8.Int8Weights)],
    ids=["tiles", "plain", "plain and odd"],
)
@pytest.mark.parametrize("activation", [None, relu_product], ids=["swiglu", "own"])
def test_int8_rows_give_what_their_float_rows_give(npu, form, hidden, width, layout, activation):
    weights, matrices = experts(form, hidden, width)
    assert isinstance(weights.gate_up, layout)
    weights = ExpertWeights(weights.gate_up, weights.down, activation=activation)
    rows_SD, counts_L = torch.randn(7, hidden).bfloat16(), torch.tensor(COUNTS).npu()
    values_SD, scale_S = (each.npu() for each in int8.quantize_rows(rows_SD))
    quantized = int8.Int8Rows(values_SD, scale_S, torch.bfloat16)
    out_SD = NpuKernels().expert_mlp(quantized, counts_L, weights)
    assert out_SD.dtype == torch.bfloat16
    slot_S1 = torch.repeat_interleave(torch.arange(SLOTS), counts_L.cpu()).unsqueeze(1)
    ones_S1 = torch.ones(6, 1)
    dense = dense_moe(rows_SD[:6], slot_S1, ones_S1, *matrices, activation=activation or swiglu)
    assert_near(out_SD[:6].cpu(), dense, INT8)


def test_float_experts_dequantize_int8_rows(npu):
    rows = int8.Int8Rows(*(each.npu() for each in int8.quantize_rows(torch.randn(7, D))), torch.bfloat16)
    weights, _ = experts(lambda each, place: each.bfloat16().to(place), D, 64)
    counts_L = torch.tensor(COUNTS).npu()
    as_they_were = NpuKernels().expert_mlp(rows.dequantized(), counts_L, weights)
    assert torch.equal(NpuKernels().expert_mlp(rows, counts_L, weights)[:6], as_they_were[:6])


def test_a_tiled_layer_takes_two_operators(npu):
    """Tiled: one operator from int8 rows to int8 rows, one back; the setting of the process is as it was."""
    from tests.helpers.ascend import REAL
    from tests.helpers.cann import registry

    if npu == REAL:
        pytest.skip("only the emulation notes its calls")
    weights, _ = experts(int8_matrices, D, 64)
    rows = int8.Int8Rows(*(each.npu() for each in int8.quantize_rows(torch.randn(7, D))), torch.bfloat16)
    registry.calls.clear()
    NpuKernels().expert_mlp(rows, torch.tensor(COUNTS).npu(), weights)
    products = [name for name, _ in registry.calls if "Matmul" in name or "Quant" in name]
    assert products == ["aclnnGroupedMatmulSwigluQuantWeightNzV2", "aclnnGroupedMatmulWeightNz"]


@pytest.mark.parametrize(
    ("outer", "inner", "message"),
    [(80, 64, "64 x 80 is not a whole number of tiles"), (64, 40, "40 x 64"), (10272, 16, "more than 10240")],
)
def test_matrices_of_other_sizes_stay_plain_with_the_reason(npu, outer, inner, message):
    plain = int8.Int8Weights.of(torch.randn(1, outer, inner))
    assert message in ops.not_tiled(plain)
    assert kernels.tiled(plain) is plain
