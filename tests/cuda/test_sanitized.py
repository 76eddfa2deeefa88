"""Each kernel once, in buffers without a spare byte: what `make test-cuda` runs under compute-sanitizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.kernels import ExpertWeights
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.replica_split import EvenReplicas
from epbackend.kernels.triton.tiles import chip_of
from tests.helpers.routing import routing

pytestmark = pytest.mark.cuda

WEIGHTS = {
    "odd float32": (7, 5, torch.float32, lambda weights: weights),
    "odd bfloat16": (12, 10, torch.bfloat16, lambda weights: weights),
    "even bfloat16": (64, 32, torch.bfloat16, lambda weights: weights),
    "fp8": (128, 128, torch.bfloat16, Fp8Blocks.of),
    "int8": (48, 32, torch.bfloat16, Int8Weights.of),
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_kernel_runs_in_exact_buffers(kernels, place, weights):
    width, inner, dtype, quantize = WEIGHTS[weights]
    if weights == "fp8" and not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")
    gate_up = quantize(torch.randn(3, 2 * inner, width, device=place).to(dtype))
    down = quantize(torch.randn(3, width, inner, device=place).to(dtype))
    ids_TK = routing(13, 2, -1, 4, seed=1).to(place)
    split = kernels.even_split(
        EvenReplicas(np.array([[0], [1], [2]]), np.ones((3, 1), bool)), place, ExpertIdCheck(3, place)
    )
    split(ids_TK)  # -1 and 3 are no experts
    permuted = kernels.permute(torch.randn(13, width, device=place).to(dtype), ids_TK, 3)
    rows_SD = kernels.expert_mlp(
        permuted.rows_SD, permuted.counts_L, ExpertWeights(kernels.prepack(gate_up), kernels.prepack(down))
    )
    out_TD = torch.zeros(13, width, device=place)
    kernels.unpermute(rows_SD, permuted.choice_of_row_S, torch.ones(13, 2, device=place), out_TD)
    kernels.swiglu(rows_SD[:, : width // 2 * 2])
    assert out_TD.isfinite().all()
