"""The product with a warp that loads beside the one whose warps do all: on a Hopper GPU, not in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.kernels.fp8 import BLOCK, Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton.grouped_matmul import GroupedMatmul
from epbackend.kernels.triton.quantize import Fp8Tokens, quantize_fp8, quantize_int8
from epbackend.kernels.triton.tiles import Tile, chip_of, row_tiles
from epbackend.kernels.triton.tuning import specialized_tile
from tests.helpers.dense import tolerance

pytestmark = pytest.mark.cuda

GROUPS = {"tails": [130, 0, 64, 1, 200, 65], "one row": [0, 1], "none": [0, 0], "many tiles": [5000, 3, 1029]}
FORMS = {
    "bfloat16": (torch.bfloat16, lambda weights: weights.bfloat16(), lambda rows, _: rows),
    "float16": (torch.float16, lambda weights: weights.half(), lambda rows, _: rows),
    "fp8": (torch.bfloat16, Fp8Blocks.of, quantize_fp8),
    "fast fp8": (torch.bfloat16, Fp8Blocks.of, quantize_fp8),
    "int8": (torch.bfloat16, Int8Weights.of, quantize_int8),
}
FORMATS = {"fp8": "fp8", "fast fp8": "fp8", "int8": "int8"}
PLAIN = Tile(64, 128, 128, 8, 2)
"""What it is compared with."""


@pytest.fixture
def hopper(place):
    if not chip_of(place).specializes:
        pytest.skip("specialized_matmul runs on a Hopper GPU alone")
    return chip_of(place)


def values(found: torch.Tensor | Fp8Tokens) -> torch.Tensor:
    if isinstance(found, torch.Tensor):
        return found.float()
    return found.values_SK.float() * found.scale_BS.repeat_interleave(BLOCK, 0).T


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["sums", "gated"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_both_products_agree(hopper, place, counts, form, gated, bias):
    dtype, pack, quantize = FORMS[form]
    draw = torch.Generator(place).manual_seed(len(counts))
    width = 5 * BLOCK  # a ring that ends within a tile
    columns = (6 if gated else 7) * BLOCK  # and a tile without a right half
    rows = torch.randn(sum(counts) + 7, width, device=place, generator=draw).to(dtype)
    weights = torch.randn(len(counts), columns, width, device=place, generator=draw) / width**0.5
    experts, counts_L = pack(weights), torch.tensor(counts, device=place)
    bias_LN = torch.randn(len(counts), columns, device=place, generator=draw).to(dtype) if bias else None
    found = []
    for tile in (PLAIN, *[specialized_tile(FORMATS.get(form, "half"), gated)] * 5):
        schedule = row_tiles(counts_L, len(rows), tile.rows)
        product = GroupedMatmul(
            experts, tile, hopper, gated=gated, bias_LN=bias_LN, promote=form != "fast fp8"
        )
        found.append(values(product(quantize(rows, schedule), schedule, dtype))[: sum(counts)])
    expected, first, *others = found
    assert (first - expected).norm() <= 1e-3 * expected.norm()
    assert all(torch.equal(first, each) for each in others), "a race: the same call, another answer"


@pytest.mark.parametrize("columns", [24, 136, 264])
@pytest.mark.parametrize("width", [8, 72, 200])
def test_odd_shapes_of_half_precision_and_rows_that_tma_cannot_read(hopper, place, width, columns):
    rows = torch.randn(301, width + 1, device=place).bfloat16()[:, 1:]
    experts = (torch.randn(3, columns, width, device=place) / width**0.5).bfloat16()
    counts_L = torch.tensor([150, 1, 150], device=place)
    for gated in (False, True):
        tile = specialized_tile("half", gated)
        schedule = row_tiles(counts_L, len(rows), tile.rows)
        found, expected = (
            GroupedMatmul(experts, each, hopper, gated=gated)(rows, each_schedule, torch.bfloat16)
            for each, each_schedule in ((tile, schedule), (PLAIN, row_tiles(counts_L, len(rows), PLAIN.rows)))
        )
        torch.testing.assert_close(found, expected, **tolerance(torch.bfloat16))
