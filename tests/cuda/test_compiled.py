"""Every kernel and every entry of the tile table compiles for the chips it is meant for, and fits there.

No GPU is needed: Triton brings ptxas along. What the compiler reports is held against the chip's limits.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl
from triton import knobs

from epbackend.kernels import ExpertWeights
from epbackend.kernels.fp8 import BLOCK, FP8, Fp8Blocks
from epbackend.kernels.id_check import ExpertIdCheck
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.replica_split import EvenReplicas, LevelReplicas
from epbackend.kernels.triton import quantize as quantize_module
from epbackend.kernels.triton.compile_info import compiling_for, resources
from epbackend.kernels.triton.grouped_matmul import GroupedMatmul, grouped_matmul
from epbackend.kernels.triton.kernels import TritonKernels
from epbackend.kernels.triton.permute import TokenRows
from epbackend.kernels.triton.quantize import Int8Tokens, dequantize, quantize
from epbackend.kernels.triton.tiles import (
    A100,
    B200,
    H100,
    H200,
    L40S,
    Chip,
    Product,
    Tile,
    choose_tile,
    row_tiles,
    table,
)
from epbackend.kernels.triton.tuning import (
    LARGEST_MEAN,
    ExpertShape,
    TuningCase,
    compile_candidate,
    specialized_tile,
)
from epbackend.placement.placement import Layout
from tests.helpers.compiled import compiling, shuffled_constants

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(knobs.runtime.interpret, reason="the interpreter compiles nothing"),
]

VERSION = ".".join(triton.__version__.split(".")[:2])
TUNED_CHIPS = {chip.name: chip for chip in (A100, L40S, H100, H200, B200)}
CHIPS = {"ampere": A100, "hopper": H100, "blackwell": B200}
L, D, F = 128, 2048, 768
"""Qwen3-30B's experts."""
MATRIX_UNIT = {"ampere": "mma", "hopper": "wgmma", "blackwell": "tcgen05"}
"""The instruction of each family's fast path; a tile of 64 rows or more must use it."""

SCALED_SUMS_SPILL = 80
"""Bytes a thread of `specialized_matmul` in float8: two sums and the product that is being scaled are 192 of its 232
registers. On an H200 it is 1.4 times as fast as a tile without spills (2026-11-27)."""

SMALL_STACK = 8
"""Bytes that ptxas puts aside in a kernel that waits for memory anyway."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def experts(form: str, columns: int, depth: int) -> torch.Tensor | Fp8Blocks | Int8Weights:
    if form == "fp8":
        scales = meta(L, columns // BLOCK, depth // BLOCK, dtype=torch.float32)
        return Fp8Blocks(meta(L, columns, depth, dtype=FP8), scales)
    if form == "int8":
        return Int8Weights(meta(L, columns, depth, dtype=torch.int8), meta(L, columns, dtype=torch.float32))
    return meta(L, columns, depth, dtype=torch.float32 if form == "float32" else torch.bfloat16)


def chip_for(family: str, form: str) -> Chip:
    """Float8 came with Ada, which has Ampere's tiles."""
    return L40S if (family, form) == ("ampere", "fp8") else CHIPS[family]


def cases() -> list[tuple[str, str, float]]:
    """(family, form, rows a slot) that reach every entry of the table."""
    return [
        (family, form, entry["up_to"] or LARGEST_MEAN)
        for family, forms in table()["families"].items()
        for form, kinds in forms.items()
        for entry in kinds["plain"]
    ]


def test_both_products_change_tiles_at_the_same_rows():
    for forms in table()["families"].values():
        for kinds in forms.values():
            assert [e["up_to"] for e in kinds["gated"]] == [e["up_to"] for e in kinds["plain"]]
            assert [e["rows"] for e in kinds["gated"]] == [e["rows"] for e in kinds["plain"]]


@pytest.mark.parametrize(("family", "form", "rows_per_slot"), cases())
def test_tiles_fit_their_chip(family, form, rows_per_slot):
    chip = chip_for(family, form)
    rows = int(L * rows_per_slot)
    weights = ExpertWeights(experts(form, 2 * F, D), experts(form, D, F))
    hidden = meta(rows, D, dtype=torch.float32 if form == "float32" else torch.bfloat16)
    with compiling(chip) as compiled:
        TritonKernels(chip).expert_mlp(hidden, meta(L, dtype=torch.int64), weights)
    products = [kernel for kernel in compiled if "matmul" in kernel.metadata.name]
    for kernel, packed, gated in zip(products, (weights.gate_up, weights.down), (True, False), strict=True):
        tile = choose_tile(chip, Product.of(rows, packed, gated))
        found = resources(kernel)
        assert found.spilled <= (SCALED_SUMS_SPILL if tile.specialize and form == "fp8" else 0)
        assert found.shared_bytes <= chip.shared_bytes
        assert found.programs_per_sm(chip) >= tile.programs
        if form in ("half", "fp8") and tile.rows >= 64:
            assert MATRIX_UNIT[family] in found.instructions
        if (family, form) == ("hopper", "half") and tile.rows >= 64:
            assert "pendings = 1" in kernel.asm["ttgir"]  # one product runs on while the next is prepared
        if form != "float32" and family != "ampere":
            assert "cp.async.bulk" in found.instructions


@pytest.mark.parametrize("gated", [False, True], ids=["sums", "gated"])
@pytest.mark.parametrize("form", ["half", "int8"])
def test_tiles_with_a_warp_that_loads_fit(form, gated):
    """The packaged table has those of float8 and int8; tuning tries the others too."""
    product = GroupedMatmul(experts(form, 2 * F, D), tile := specialized_tile(form, gated), H100, gated=gated)
    in_bytes = Int8Tokens(meta(512, D, dtype=torch.int8), meta(512, dtype=torch.float32))
    rows = meta(512, D) if form == "half" else in_bytes
    with compiling(H100) as compiled:
        product(rows, row_tiles(meta(L, dtype=torch.int64), 512, tile.rows), torch.bfloat16)
    found = resources(compiled[-1])
    assert found.spilled == 0
    assert found.shared_bytes <= H100.shared_bytes
    assert found.programs_per_sm(H100) == 1
    assert {"wgmma", "cp.async.bulk"} <= found.instructions
    # A buffer's products run on while those of the next one are asked for.
    assert "wgmma.wait_group.sync.aligned 2" in compiled[-1].asm["ptx"]


@pytest.mark.parametrize("rows_per_slot", [8, 16, 512])
def test_tiles_of_float8_fit_without_promotion(rows_per_slot):
    rows = L * rows_per_slot
    weights = ExpertWeights(experts("fp8", 2 * F, D), experts("fp8", D, F))
    with compiling(H100) as compiled:
        TritonKernels(H100, fast_fp8=True).expert_mlp(meta(rows, D), meta(L, dtype=torch.int64), weights)
    for kernel in (each for each in compiled if "matmul" in each.metadata.name):
        found = resources(kernel)
        assert found.spilled == 0
        assert found.shared_bytes <= H100.shared_bytes


@pytest.mark.parametrize(
    "entry", table()["families"]["hopper"]["half"]["gated"], ids=lambda each: str(each["up_to"])
)
def test_every_gated_tile_fits_with_rows_left_in_place(entry):
    """Rows come by cp.async then, and weights by TMA all the same."""
    tile = replace(choose_tile(H100, product := gated_product(entry["up_to"])), gather=True)
    rows = TokenRows(meta(product.rows // 8, D), meta(product.rows, dtype=torch.int64), 8)
    with compiling(H100) as compiled:
        schedule = row_tiles(meta(L, dtype=torch.int64), product.rows, tile.rows)
        grouped_matmul(rows, meta(L, 2 * F, D), schedule, tile, H100, gated=True, dtype=torch.bfloat16)
    found = resources(compiled[-1])
    assert found.spilled == 0
    assert found.programs_per_sm(H100) >= tile.programs
    assert {"cp.async", "cp.async.bulk"} <= found.instructions
    if tile.rows >= 64:
        assert "wgmma" in found.instructions
        assert "pendings = 1" in compiled[-1].asm["ttgir"]


def gated_product(rows_per_slot: float | None) -> Product:
    return Product("half", True, int(L * (rows_per_slot or LARGEST_MEAN)), L, 2 * F, D)


@pytest.mark.parametrize("entry", [each for each in table()["tuned"] if each["triton"] == VERSION], ids=str)
def test_tuned_tiles_fit_their_chip(entry):
    """Those of this version of Triton, which are the ones that would be used here."""
    width, inner = entry["depth"], entry["height"] // 2
    if not entry["gated"]:
        width, inner = entry["height"], entry["depth"]
    experts = ExpertShape("tuned", 8, width, inner)
    case = TuningCase(experts, entry["form"], entry["gated"], entry["up_to"])
    assert compile_candidate(case, TUNED_CHIPS[entry["chip"]], Tile(**entry["tile"]))


@pytest.mark.parametrize("tokens", [16, 4096])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_permutation_and_swiglu_compile_without_spills(chip, tokens):
    kernels = TritonKernels(chip)
    with compiling(chip) as compiled:
        ids_TK = meta(tokens, 8, dtype=torch.int64)
        permuted = kernels.permute(meta(tokens, D), ids_TK, L, (0, 999))
        weights_TK, out_TD = meta(tokens, 8, dtype=torch.float32), meta(tokens, D, dtype=torch.float32)
        kernels.unpermute(permuted.rows_SD, permuted.choice_of_row_S, weights_TK, out_TD)
        kernels.swiglu(meta(99, 2 * F))
    assert all(resources(kernel).spilled <= SMALL_STACK for kernel in compiled)


@pytest.mark.parametrize(("tokens", "launches"), [(64, 2), (4096, 3)], ids=["decode", "prefill"])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_level_split_is_one_launch_after_the_gathering(chip, tokens, launches):
    """The counting before it takes one, or two where there are many choices."""
    layout, nowhere = Layout.even(256, 32, 288), torch.device("meta")
    replicas = LevelReplicas(
        layout.slots_EC, layout, layout, 3, 8, lambda _: meta(32, 256, dtype=torch.int64)
    )
    with compiling(chip) as compiled:
        split = TritonKernels(chip).level_split(replicas, nowhere, ExpertIdCheck(256, nowhere))
        split(meta(tokens, 8, dtype=torch.int64))
    assert len(compiled) == launches
    assert all(resources(kernel).spilled <= 2 * SMALL_STACK for kernel in compiled)


@pytest.mark.parametrize(
    ("experts", "ranks", "slots", "movable"),
    [
        (128, 8, 136, False),
        (256, 64, 512, False),
        (8, 64, 64, False),
        (8, 2, 10, False),
        (256, 8, 320, True),  # with room for any layout of these slots
        (8, 2, 10, True),
    ],
)
@pytest.mark.parametrize("by_node", [False, True])
def test_the_level_split_compiles_for_layouts_of_all_kinds(experts, ranks, slots, movable, by_node):
    """Few replicas and many, few ranks and many: what fits one shape of a block need not fit another."""
    layout, nowhere = Layout.even(experts, ranks, slots), torch.device("meta")
    counts_GE = meta(layout.ranks, layout.experts, dtype=torch.int64)
    # Where ranks differ in speed it is another program.
    rank_speed = (0.5,) * 4 + (1.0,) * 4 if layout.ranks == 8 else ()
    replicas = LevelReplicas(
        layout.slots_EC, layout, layout, 0, ranks // 2, lambda _: counts_GE, rank_speed, movable, by_node
    )
    with compiling(H100) as compiled:
        TritonKernels(H100).level_split(replicas, nowhere, None)(meta(64, 8, dtype=torch.int64))
    # Triton 3.7.1; 3.6.0 puts 16 aside. Movable with 48 ranks or more it is 592 to 776: there, no experts move.
    assert resources(compiled[-1]).spilled <= SMALL_STACK


@pytest.mark.parametrize(("tokens", "launches"), [(64, 1), (4096, 3)], ids=["decode", "prefill"])
def test_the_even_split_takes_one_launch_or_three(tokens, launches):
    layout, nowhere = Layout.even(256, 32, 288), torch.device("meta")
    replicas = EvenReplicas(layout.slots_EC, layout.slots_EC >= 0)
    with compiling(H100) as compiled:
        TritonKernels(H100).even_split(replicas, nowhere, ExpertIdCheck(256, nowhere))(
            meta(tokens, 8, dtype=torch.int64)
        )
    assert len(compiled) == launches
    assert all(resources(kernel).spilled == 0 for kernel in compiled)


@pytest.mark.parametrize(("form", "group"), [(torch.int8, 7168), (torch.float8_e4m3fn, 128)], ids=str)
@pytest.mark.parametrize("chip", [A100, L40S, H100, B200], ids=lambda chip: chip.name)
def test_rows_in_8_bits_move_16_bytes_at_a_time(monkeypatch, chip, form, group):
    if form == torch.float8_e4m3fn and not chip.fp8:
        pytest.skip(f"{chip.name} has no float8")
    monkeypatch.setattr(quantize_module, "chip_of", lambda device: chip)
    values_SD, scale_SG = meta(8192, 7168, dtype=form), meta(8192, 7168 // group, dtype=torch.float32)
    with compiling(chip) as compiled:
        quantize(meta(128, 7168), values_SD[:128], scale_SG[:128])
        dequantize(values_SD, scale_SG, meta(8192, 7168))
        dequantize(values_SD, scale_SG, meta(8192, 7168), meta(32, dtype=torch.int64))
    assert all(resources(kernel).spilled == 0 for kernel in compiled)
    assert "ld.global.v4.b32" in compiled[0].asm["ptx"]
    assert all("st.global.v4.b32" in kernel.asm["ptx"] for kernel in compiled[1:])


@triton.jit
def _below_a_limit(lane_of, values, room, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    limit = tl.gather(tl.full((BLOCK,), 7, tl.int32), tl.load(lane_of + lane), 0)
    tl.store(room + lane, tl.maximum(limit - tl.load(values + lane), 0))


def test_a_number_that_lanes_pass_on_is_found():
    """What `compiling` looks for in every kernel: from this one ptxas 12.8.93 makes max(x - 7, 0) for an H100."""
    lanes = [meta(32, dtype=torch.int32) for _ in range(3)]
    with compiling_for(H100) as compiled:
        _below_a_limit[(1,)](*lanes, BLOCK=32, num_warps=1)
    assert len(shuffled_constants(compiled[0])) == 1
