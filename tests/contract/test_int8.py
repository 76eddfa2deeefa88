"""W8A8 on every device: equal to the same layer with float weights within what rounding to int8 costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epbackend.dispatch.base import DispatchSettings
from epbackend.kernels import ExpertWeights, int8
from tests.helpers.dense import dense_moe
from tests.helpers.layer_case import REPLICAS
from tests.helpers.quantized_layer import INT8, E, assert_near, int8_matrices, int8_weights, layer_is_near

D = INT8.hidden
WAYS = {
    "level1": DispatchSettings(level=1),
    "level2": DispatchSettings(level=2),
    "passes": DispatchSettings(level=1, topk_scaling_factor=0.34, cutoff_min_tokens=1),
    "rounds": DispatchSettings(level=2, buffer_scale_factors=((0, 0.3),)),
}


def test_quantized_rows_are_within_half_a_step():
    rows_SK = torch.randn(5, 33) * torch.tensor([1e-6, 0.1, 1, 10, 0]).unsqueeze(1)
    values_SK, scale_S = int8.quantize_rows(rows_SK)
    assert values_SK.dtype == torch.int8
    steps = (values_SK * scale_S.unsqueeze(1) - rows_SK).abs() / scale_S.unsqueeze(1)
    assert steps.max() < 0.501
    assert values_SK[:4].abs().amax(1).tolist() == [127] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 40], ids=["fusable", "odd width"])
@pytest.mark.parametrize("slots", [1, 3])
def test_experts(kernels, device, dtype, width, slots):
    place = device.torch_device(0)
    gate_up_L2FD, down_LDF = torch.randn(slots, 2 * width, D) / 8, torch.randn(slots, D, width) / 8
    packed = [kernels.prepack(int8_matrices(weights, place)) for weights in (gate_up_L2FD, down_LDF)]
    counts_L = torch.tensor([4, 0, 2][:slots])
    rows_SD = torch.randn(7, D).to(dtype)
    out_SD = kernels.expert_mlp(rows_SD.to(place), counts_L.to(place), ExpertWeights(*packed)).cpu()
    assert out_SD.dtype == dtype
    rows = int(counts_L.sum())
    slot_S1 = torch.repeat_interleave(torch.arange(slots), counts_L).unsqueeze(1)
    dense_SD = dense_moe(rows_SD[:rows], slot_S1, torch.ones(rows, 1), gate_up_L2FD, down_LDF)
    assert_near(out_SD[:rows], dense_SD, INT8)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("slots", [tuple(range(E)), REPLICAS], ids=["uniform", "replicas"])
def test_layer(ranks, device, way, size, slots):
    ranks.run(size, layer_is_near, WAYS[way], slots, device.name)


@pytest.mark.parametrize("size", [1, 2])
def test_layer_of_whole_weights(ranks, device, size):
    ranks.run(
        size, layer_is_near, WAYS["level1"], REPLICAS, device.name, replace(INT8, quantize=int8_weights)
    )
