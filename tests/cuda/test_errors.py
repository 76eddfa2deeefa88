"""What the kernels do not take raises a ConfigError that says what to do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton.kernels import TritonKernels, check_is_current
from epbackend.kernels.triton.tiles import A100, H100

pytestmark = pytest.mark.cuda


def experts(form, width: int = 128, inner: int = 128) -> ExpertWeights:
    return ExpertWeights(form(torch.randn(2, 2 * inner, width)), form(torch.randn(2, width, inner)))


def same(weights: torch.Tensor) -> torch.Tensor:
    return weights


@pytest.mark.parametrize(
    ("chip", "rows", "weights", "message"),
    [
        (
            A100,
            torch.randn(3, 128),
            experts(Fp8Blocks.of),
            "A100.* no float8 matrix units .*bfloat16 or int8",
        ),
        (H100, torch.randn(3, 64), experts(same), "rows are 64 wide, but the experts take 128"),
        (H100, torch.randn(3, 128).half(), experts(same), "rows are torch.float16 and experts torch.float32"),
        (H100, torch.randn(3, 96), experts(Fp8Blocks.of, width=96), "multiples of 128, and this one is 96"),
        (
            H100,
            torch.randn(3, 128),
            ExpertWeights(experts(Int8Weights.of).gate_up, experts(same).down),
            "gate_up is int8 and down is float32; quantize both",
        ),
    ],
)
def test_experts_that_do_not_fit_chip_or_rows_raise(place, chip, rows, weights, message):
    counts_L = torch.tensor([2, 1], device=place)
    with pytest.raises(ConfigError, match=message):
        TritonKernels(chip).expert_mlp(rows.to(place), counts_L, weights)


def test_what_a_chip_does_not_multiply_is_found_before_the_first_call():
    with pytest.raises(ConfigError, match=r"A100.* no float8 matrix units"):
        TritonKernels(A100).prepare(experts(Fp8Blocks.of))


def test_experts_on_another_gpu_than_the_current_one_raise(monkeypatch):
    """Triton launches on the current one, whatever it is given."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for place in (torch.device("cpu"), torch.device("cuda", 0)):
        check_is_current(place)
    with pytest.raises(
        ConfigError, match=r"on cuda:1, but the current device .* cuda:0; call .*set_device\(1\)"
    ):
        check_is_current(torch.device("cuda", 1))


def test_prepacking_an_unknown_dtype_raises():
    with pytest.raises(
        ConfigError, match=r"experts are torch.float64, but device cuda multiplies torch.bfloat16"
    ):
        TritonKernels(H100).prepack(torch.randn(2, 4, 4).double())


def test_scales_of_the_wrong_shape_raise():
    blocks, rows = Fp8Blocks.of(torch.randn(2, 130, 256)), Int8Weights.of(torch.randn(2, 3, 4))
    assert blocks.scale_LBB.shape == (2, 2, 2)
    with pytest.raises(ConfigError, match=r"scales of shape \[2, 2, 2\], one for each 128 x 128 block"):
        Fp8Blocks(blocks.values_LNK, blocks.scale_LBB[:, :1])
    with pytest.raises(
        ConfigError, match=r"int8 experts need torch.int8 values and torch.float32 scales of shape \[2, 3\]"
    ):
        Int8Weights(rows.values_LNK, rows.scale_LN.T)
