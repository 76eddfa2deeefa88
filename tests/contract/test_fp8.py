"""Experts in float8 blocks: as near to the same layer with float weights as three bits of mantissa allow."""

from __future__ import annotations

import pytest
import torch

from epbackend.dispatch.base import DispatchSettings
from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights
from epbackend.kernels.fp8 import BLOCK, Fp8Blocks
from tests.helpers.dense import dense_moe
from tests.helpers.layer_case import REPLICAS
from tests.helpers.quantized_layer import FP8, assert_near, fp8_blocks, layer_is_near

D, F = FP8.hidden, FP8.width


@pytest.fixture
def fp8_device(device):
    """Each device that takes float8 experts."""
    if device.name == "ascend":
        pytest.skip("device ascend takes no float8 experts")
    return device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts(kernels, fp8_device, dtype):
    place = fp8_device.torch_device(0)
    gate_up_L2FD, down_LDF = torch.randn(3, 2 * F, D) / D**0.5, torch.randn(3, D, F) / F**0.5
    packed = [kernels.prepack(fp8_blocks(weights, place)) for weights in (gate_up_L2FD, down_LDF)]
    counts_L = torch.tensor([4, 0, 2])
    rows_SD = torch.randn(7, D).to(dtype)
    out_SD = kernels.expert_mlp(rows_SD.to(place), counts_L.to(place), ExpertWeights(*packed)).cpu()
    assert out_SD.dtype == dtype
    slot_S1 = torch.tensor([0, 0, 0, 0, 2, 2]).unsqueeze(1)
    dense_SD = dense_moe(rows_SD[:6], slot_S1, torch.ones(6, 1), gate_up_L2FD, down_LDF)
    assert_near(out_SD[:6], dense_SD, FP8)


def test_values_that_float8_holds_are_exact(kernels, fp8_device):
    """Blocks, scales and slots that are mixed up show; so does an addition in less than float32."""
    place = fp8_device.torch_device(0)
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-2, 3, (2, 2 * BLOCK, 3 * BLOCK), generator=draw).to(torch.float8_e4m3fn)
    scales = 2.0 ** torch.randint(-3, 4, (2, 2, 3), generator=draw)
    experts = Fp8Blocks(values.to(place), scales.to(place))
    rows = torch.randint(-1, 2, (20, 3 * BLOCK), generator=draw).float() * 448
    rows *= torch.tensor([1.0, 0.5, 4.0]).repeat_interleave(BLOCK)
    rows[:, ::BLOCK] = 448 * torch.tensor([1.0, 0.5, 4.0])  # the largest of its block
    found = kernels.grouped_matmul(
        rows.to(place), kernels.prepack(experts), torch.tensor([3, 17], device=place)
    ).cpu()
    slot_S = torch.tensor([0] * 3 + [1] * 17)
    full_LNK = Fp8Blocks(values, scales).dequantized().double()
    assert torch.equal(found.double(), torch.einsum("sk,snk->sn", rows.double(), full_LNK[slot_S]))


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_layer(ranks, fp8_device, size, level):
    ranks.run(size, layer_is_near, DispatchSettings(level=level), REPLICAS, fp8_device.name, FP8)


@pytest.mark.ascend
def test_ascend_says_that_it_takes_none(device):
    if device.name != "ascend":
        pytest.skip(f"device {device.name} takes float8 experts")
    with pytest.raises(
        ConfigError, match="float8 experts are not supported; serve this model in bfloat16 or"
    ):
        device.kernels.prepack(fp8_blocks(torch.randn(1, BLOCK, BLOCK), device.torch_device(0)))
