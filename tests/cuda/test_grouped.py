"""Grouped matmuls of every form against plain torch: odd shapes, empty and huge groups, poisoned memory."""

from __future__ import annotations

import pytest
import torch

from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights
from epbackend.kernels.fp8 import BLOCK, Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.reference import ReferenceKernels
from tests.helpers.dense import swiglu, tolerance

triton = pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.cuda.cases import gathering
from epbackend.kernels.triton import expert_mlp as products
from epbackend.kernels.triton import permute as permute_module
from epbackend.kernels.triton.grouped_matmul import grouped_matmul
from epbackend.kernels.triton.permute import TokenRows, permute
from epbackend.kernels.triton.quantize import quantize_fp8, quantize_int8
from epbackend.kernels.triton.tiles import Tile, chip_of, choose_tile, row_tiles
from epbackend.kernels.triton.tuning import ExpertShape

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


# How blocks are loaded knows nothing of the groups: one that has all of them together shows it.
LOADS = [
    pytest.param(tma, counts, id=f"{by}-{name}", marks=[pytest.mark.slow] * (tma and name != "mixed"))
    for by, tma in (("pointer", False), ("tma", True))
    for name, counts in GROUPS.items()
]


@pytest.mark.parametrize(("tma", "counts"), LOADS)
@pytest.mark.parametrize(("width", "columns"), [(32, 16), (40, 24), (7, 10), (96, 34)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
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


def test_fast_sums_of_float8_are_near_the_promoted_ones(cuda, kernels, place):
    """Also where a block is nothing, or very small beside the one before: no ratio of two scales overflows."""
    if not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")
    fast = cuda.kernel_set("triton_fast_fp8")
    rows, gate_up, counts_L = draw(place, [5, 0, 18], 3 * BLOCK, 2 * BLOCK, torch.bfloat16, spare=3)
    rows[:, BLOCK : 2 * BLOCK] *= 1e-30
    rows[3, BLOCK:] = 0
    gate_up[:, :, BLOCK : 2 * BLOCK] *= 1e-30
    down = draw(place, [5, 0, 18], BLOCK, 2 * BLOCK, torch.float32)[1]
    packed = [Fp8Blocks.of(gate_up.float()), Fp8Blocks.of(down)]
    found, expected = (
        each.expert_mlp(rows, counts_L, ExpertWeights(*map(each.prepack, packed)))[:23].double()
        for each in (fast, kernels)
    )
    assert expected.norm() > 0
    assert (found - expected).norm() / expected.norm() < 0.01
    with pytest.raises(ConfigError, match=r"^kernels: triton_fast_fp8 .*write triton"):
        fast.prepack(down)


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


def left_in_place(place, width, dtype=torch.float16):
    """(tokens, rows left where they lie, counts); the garbage rows past the counts have choice -1."""
    generator = torch.Generator().manual_seed(width)
    hidden_TD = torch.randn(23, width, generator=generator).to(place, dtype)
    slot_ids_TK = torch.randint(-1, 4, (23, 2), generator=generator).to(place)  # -1 and 3 are other ranks'
    permuted = permute(hidden_TD, slot_ids_TK, 3, copy=False)
    return hidden_TD, permuted.rows_SD, permuted.counts_L


def plainly_copied(rows: TokenRows) -> torch.Tensor:
    """rows_SD, in plain torch."""
    return rows.hidden_TD.index_select(0, rows.choice_of_row_S.clamp(min=0) // rows.top_k)


@pytest.mark.parametrize("width", [32, 40, 7])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tma", [False, True], ids=["pointer", "tma"])
def test_rows_left_in_place_give_what_their_copies_give(place, width, gated, tma):
    _, rows, counts_L = left_in_place(place, width)
    valid = int(counts_L.sum())
    assert 0 < valid < len(rows)
    weights = draw(place, [1, 1, 1], width, 34, torch.float16)[1]
    tile = Tile(**{**vars(SMALL), "tma": tma})
    schedule = row_tiles(counts_L, len(rows), tile.rows)
    both = [
        grouped_matmul(each, weights, schedule, tile, chip_of(place), gated=gated, dtype=torch.float16)
        for each in (rows, plainly_copied(rows))
    ]
    assert torch.equal(both[0][:valid], both[1][:valid])
    assert torch.equal(rows.copied()[:valid], plainly_copied(rows)[:valid])


def test_quantizers_read_rows_in_place(place):
    _, rows, counts_L = left_in_place(place, 2 * BLOCK, torch.bfloat16)
    schedule, valid = row_tiles(counts_L, len(rows), 16), int(counts_L.sum())
    found, expected = quantize_int8(rows, schedule), quantize_int8(plainly_copied(rows), schedule)
    assert torch.equal(found.values_SK[:valid], expected.values_SK[:valid])
    assert torch.equal(found.scale_S[:valid], expected.scale_S[:valid])
    if chip_of(place).fp8:
        found, expected = quantize_fp8(rows, schedule), quantize_fp8(plainly_copied(rows), schedule)
        assert torch.equal(
            found.values_SK.view(torch.uint8)[:valid], expected.values_SK.view(torch.uint8)[:valid]
        )
        assert torch.equal(found.scale_BS[:, :valid], expected.scale_BS[:, :valid])


@pytest.mark.parametrize("form", ["half", "int8", "fp8"])
@pytest.mark.parametrize("most_choices", [2048, 4], ids=["few", "many"])
def test_a_layer_copies_no_row_that_its_plan_reads_in_place(cuda, place, monkeypatch, form, most_choices):
    """From its second call on; the answers are the same."""
    if form == "fp8" and not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")
    monkeypatch.setattr(permute_module, "MOST_CHOICES", most_choices)
    kernels, tokens = cuda.kernel_set("triton"), 5
    shape = ExpertShape("small", slots=3, D=BLOCK, F=BLOCK, top_k=2)
    weights = ExpertWeights(*shape.weights(form, place))
    hidden_TD = torch.randn(tokens, BLOCK, device=place).bfloat16()
    slot_ids_TK, weights_TK = (
        torch.rand(tokens, 4, device=place).topk(2).indices,
        torch.rand(tokens, 2, device=place),
    )
    rows, sums = [], []
    with gathering():
        for _ in range(2):
            permuted = kernels.permute(hidden_TD, slot_ids_TK, 3, expected=9)
            rows.append(permuted.rows_SD)
            out_SD = kernels.expert_mlp(permuted.rows_SD, permuted.counts_L, weights, 9)
            sums.append(kernels.weighted_sums(out_SD, permuted, weights_TK, torch.bfloat16))
    assert [isinstance(each, TokenRows) for each in rows] == [False, True]
    assert torch.equal(*sums)
    if form == "half":  # other weights, whose plan wants copies
        other = ExpertWeights(*shape.weights(form, place))
        given = kernels.permute(hidden_TD, slot_ids_TK, 3, expected=9)
        out_SD = kernels.expert_mlp(given.rows_SD, given.counts_L, other, 9)
        copied = cuda.kernel_set("triton").expert_mlp(rows[0], given.counts_L, other, 9)
        valid = int(given.counts_L.sum())
        assert torch.equal(out_SD[:valid], copied[:valid])


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
