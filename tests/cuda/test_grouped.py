"""Grouped matmuls of every form against plain torch: odd shapes, empty and huge groups, poisoned memory."""

from __future__ import annotations

import pytest
import torch

from epbackend.kernels import ExpertWeights
from epbackend.kernels.fp8 import BLOCK, Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.reference import ReferenceKernels
from tests.helpers.dense import swiglu, tolerance

triton = pytest.importorskip("triton", reason="triton is not installed")

from epbackend.kernels.triton import expert_mlp as products
from epbackend.kernels.triton.grouped_matmul import grouped_matmul
from epbackend.kernels.triton.quantize import quantize_fp8, quantize_int8
from epbackend.kernels.triton.tiles import Tile, chip_of, choose_tile, row_tiles

pytestmark = [
    pytest.mark.cuda,
    # Rows past the counts are poisoned, and the interpreter's NumPy says so.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

GROUPS = {
    "one row": [1],
    "empty ends": [0, 5, 0],
    "all in one": [0, 0, 70, 0],
    "none": [0, 0],
    "mixed": [3, 16, 0, 17, 1, 33],
}
SMALL = Tile(rows=16, columns=16, depth=32, warps=4, stages=2, band=2)


def draw(place, counts, width, columns, dtype, spare=9):
    """(rows with NaN past the counts, matrices, counts on the device)."""
    generator = torch.Generator().manual_seed(len(counts) * width + columns)
    rows = torch.randn(sum(counts) + spare, width, generator=generator)
    rows[sum(counts) :] = torch.nan
    weights = torch.randn(len(counts), columns, width, generator=generator) / width**0.5
    return rows.to(place, dtype), weights.to(place, dtype), torch.tensor(counts, device=place)


def slots_of(counts_L):
    return torch.repeat_interleave(torch.arange(len(counts_L), device=counts_L.device), counts_L)


def expected_product(rows, weights, counts_L):
    slot_S = slots_of(counts_L)
    return torch.einsum("sk,snk->sn", rows[: len(slot_S)].double(), weights[slot_S].double())


@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("width", "columns"), [(32, 16), (40, 24), (7, 10), (96, 34)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tma", [False, True], ids=["pointer", "tma"])
def test_products_of_odd_shapes_and_groups_equal_einsum(place, counts, width, columns, gated, tma):
    rows, weights, counts_L = draw(place, counts, width, columns, torch.float16)
    tile = Tile(**{**vars(SMALL), "tma": tma})
    schedule = row_tiles(counts_L, len(rows), tile.rows)
    out = grouped_matmul(rows, weights, schedule, tile, chip_of(place), gated=gated, dtype=torch.float16)
    expected = expected_product(rows, weights, counts_L)
    if gated:
        expected = swiglu(expected)
    torch.testing.assert_close(out[: sum(counts)].double(), expected, **tolerance(torch.float16))


def test_tiles_do_not_write_rows_of_the_next_slot(place):
    """The last tile of a slot reaches over the next slot's rows, and must not write them."""
    rows, weights, counts_L = draw(place, [5, 5], 32, 16, torch.float32, spare=20)
    alone = grouped_matmul(
        rows[:5],
        weights,
        row_tiles(torch.tensor([5, 0], device=place), 5, 16),
        SMALL,
        chip_of(place),
        gated=False,
        dtype=torch.float32,
    )
    schedule = row_tiles(counts_L, len(rows), 16)
    both = grouped_matmul(rows, weights, schedule, SMALL, chip_of(place), gated=False, dtype=torch.float32)
    assert torch.equal(both[:5], alone)
    assert not both[:10].isnan().any()


def test_schedule_covers_each_row_once(place):
    counts = [3, 0, 40, 16, 0, 1]
    schedule = row_tiles(torch.tensor(counts, device=place), 90, 16)
    tiles = schedule.tiles_M3[: int(schedule.total_1)].tolist()
    covered = [(slot, row) for slot, first, end in tiles for row in range(first, min(first + 16, end))]
    assert covered == [(slot, row) for row, slot in enumerate(slots_of(torch.tensor(counts)).tolist())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_format", [Fp8Blocks, Int8Weights])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_quantized_experts_are_near_full_precision(kernels, place, weight_format, dtype, bias):
    """Near the same experts in full precision; the bound is what 3 or 7 bits of mantissa leave of random rows."""
    if weight_format is Fp8Blocks and not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")
    rows, gate_up, counts_L = draw(place, [5, 0, 18], 2 * BLOCK, 2 * BLOCK, torch.float32, spare=3)
    down = draw(place, [5, 0, 18], BLOCK, 2 * BLOCK, torch.float32)[1]
    packed = [weight_format.of(gate_up), weight_format.of(down)]
    rows = rows.to(dtype)
    biases = [torch.randn(3, 2 * BLOCK, device=place).to(dtype) if bias else None for _ in packed]
    out = kernels.expert_mlp(rows, counts_L, ExpertWeights(*map(kernels.prepack, packed), *biases))[:23]
    full = [weights.dequantized().double() for weights in packed]
    wide = [None if each is None else each.double() for each in biases]
    expected = ReferenceKernels().expert_mlp(rows[:23].double(), counts_L, ExpertWeights(*full, *wide))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() / expected.norm() < (0.05 if weight_format is Fp8Blocks else 0.03)


def test_quantizers_read_only_counted_rows(place):
    rows, _, counts_L = draw(place, [2, 3], BLOCK, 16, torch.bfloat16)
    rows[1] = 0
    schedule = row_tiles(counts_L, len(rows), 16)
    fp8 = quantize_fp8(rows, schedule)
    restored = fp8.values_SK.float() * fp8.scale_BS.repeat_interleave(BLOCK, 0).T
    torch.testing.assert_close(restored[:5], rows[:5].float(), rtol=1 / 16, atol=1e-2)
    int8 = quantize_int8(rows, schedule)
    restored = int8.values_SK[:5].float() * int8.scale_S[:5, None]
    torch.testing.assert_close(restored, rows[:5].float(), rtol=0, atol=float(rows[:5].abs().max()) / 127)
    assert restored[1].count_nonzero() == 0


def test_tiles_are_chosen_by_expected_rows(kernels, place, monkeypatch):
    """A rank's share of a gathered decode step is small, and so are its tiles; the answer is the same."""
    rows, gate_up, counts_L = draw(place, [3, 0, 2], 32, 64, torch.float16, spare=300)
    weights = ExpertWeights(gate_up, draw(place, [3, 0, 2], 32, 32, torch.float16)[1])
    found = []

    def watched(chip, product):
        found.append(product.rows)
        return choose_tile(chip, product)

    monkeypatch.setattr(products, "choose_tile", watched)
    few, many = (kernels.expert_mlp(rows, counts_L, weights, expected)[:5] for expected in (5, None))
    assert found == [5, 5, 305, 305]
    torch.testing.assert_close(few, many, **tolerance(torch.float16))
