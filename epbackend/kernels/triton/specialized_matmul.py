"""The grouped matmul of Hopper for many rows: one warp loads, two warpgroups multiply.

It computes what `grouped_matmul` computes, a tile in another way. There all warps load, multiply and store together, so
that the matrix units idle while products are scaled and stored. Here each warpgroup has 64 of the tile's 128 rows and
waits for no other: while one scales or stores, the other's products run. A warp of its own has the copy engine fill a
ring of buffers ahead of both, across the ends of tiles. It is written in Gluon, Triton's language for what each warp
of a program does. Triton's interpreter does not run Gluon: a real GPU is needed.

A tile has 256 columns of the weights: 128 of the gate and 128 of the up matrix, or 256 neighbours. Rows come in blocks
of 128 bytes, which is what the copy engine lays out for the matrix units. Loader and warpgroups meet at two barriers of
each buffer: `full` when its bytes have come, `empty` when both warpgroups have multiplied them.

Shapes: those of `grouped_matmul`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from epbackend.kernels.triton.launch import named_launch
from epbackend.kernels.triton.tiles import Chip, Tile, aligned, find_tile

BYTES = 128
"""Of a row in one block."""
WARPGROUP = gl.constexpr(4)
"""Warps whose registers hold the sums of one matrix instruction."""
GROUP_ROWS = gl.constexpr(64)
"""Of a warpgroup: what its matrix instruction takes."""
COLUMNS = gl.constexpr(128)
"""Of each of the tile's two halves."""
SCALED = gl.constexpr(128)
"""Values of a row, and columns of the weights, that share a scale in float8."""
MULTIPLYING_REGISTERS, LOADING_REGISTERS = gl.constexpr(232), gl.constexpr(40)
"""Of a thread. Two warpgroups and the loader's, rounded up to four warps, share 65536."""
LEAST_SCALE = gl.constexpr(2.0**-60)
"""As in `grouped_matmul`."""


def specialized_matmul(weight_HK: Tensor, tile: Tile, chip: Chip, **fixed: Any) -> Callable[..., None]:
    """The product with one layer's weights, called with rows_SK and the other arguments that change.

    Rows that TMA cannot read are copied. `fixed` are arguments of the kernel that do not change.
    """
    kernel = _specialized_matmul.bind(
        weight_HK=_blocks(weight_HK, COLUMNS.value), BAND=tile.band, STAGES=tile.stages, **fixed
    )
    launch = kernel[(chip.sms,)]

    def multiply(rows_SK: Tensor, **changing: Any) -> None:
        rows_SK = rows_SK if aligned(rows_SK) else rows_SK.contiguous()
        launch(rows_SK=_blocks(rows_SK, GROUP_ROWS.value), num_warps=WARPGROUP.value, **changing)

    return multiply


def _blocks(matrix: Tensor, rows: int) -> TensorDescriptor:
    """A matrix in blocks of so many rows and 128 bytes of each."""
    size = matrix.itemsize
    return TensorDescriptor.from_tensor(matrix, [rows, BYTES // size], _block_layout(size))


@cache
def _block_layout(size: int) -> gl.NVMMASharedLayout:
    """Of values of so many bytes, as the matrix units read them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=BYTES, element_bitwidth=8 * size, rank=2)


@gluon.constexpr_function
def sums_layout(dtype):
    """How the registers of a warpgroup hold [64, 128] sums of products of this dtype."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 256 // dtype.primitive_bitwidth]
    )


@dataclass(frozen=True)
class Cut:
    """How a product is cut into tiles and blocks: what is known when its kernel is compiled."""

    N: int
    GATED: bool
    PROMOTE: bool
    BAND: int
    STAGES: int
    BLOCK_K: int
    DEPTH: int
    """Blocks along K."""
    HEIGHT: int
    """Rows of a slot's weights."""
    STEP: int
    """Rows of the weights from a tile to the next one."""
    SECOND: int
    """Rows of the weights from a tile's left half to its right one."""
    COLUMN_TILES: int


@gluon.constexpr_function
def cut(N, K, GATED, PROMOTE, BAND, STAGES, BLOCK_K):
    """Whole here, and not in `Cut`: Triton compiles again when this function changes."""
    STEP = COLUMNS.value if GATED else 2 * COLUMNS.value
    return Cut(
        N=N,
        GATED=GATED,
        PROMOTE=PROMOTE,
        BAND=BAND,
        STAGES=STAGES,
        BLOCK_K=BLOCK_K,
        DEPTH=(K + BLOCK_K - 1) // BLOCK_K,
        HEIGHT=2 * N if GATED else N,
        STEP=STEP,
        SECOND=N if GATED else COLUMNS.value,
        COLUMN_TILES=(N + STEP - 1) // STEP,
    )


class Ring(NamedTuple):
    """The buffers that the loader fills and the warpgroups multiply."""

    rows: Any
    """Two blocks a buffer: 64 rows for each warpgroup."""
    weights: Any
    """Two blocks a buffer: the tile's left and right 128 columns."""
    full: Any
    empty: Any


class Factors(NamedTuple):
    """What sums are multiplied by, and what is added to them; None where there is none."""

    row_scale: Any
    weight_scale: Any
    bias_LN: Any


class Output(NamedTuple):
    """Where results go, and in float8 the scale of each row's 128 columns."""

    out_SN: Any
    scale_BS: Any


@gluon.jit
def _load(rows_SK, weight_HK, ring, tiles_M3, total_1, CUT: gl.constexpr):
    """Fill the ring, buffer after buffer, for all tiles of this program."""
    COLUMN_TILES: gl.constexpr = CUT.value.COLUMN_TILES
    STAGES: gl.constexpr = CUT.value.STAGES
    row_tiles = gl.load(total_1)
    at = 0
    for tile in range(gl.program_id(0), row_tiles * COLUMN_TILES, gl.num_programs(0)):
        slot, first, _, column_tile = find_tile(tile, tiles_M3, row_tiles, COLUMN_TILES, CUT.value.BAND)
        height = slot * CUT.value.HEIGHT + column_tile * CUT.value.STEP
        for deep in range(CUT.value.DEPTH):
            stage = at % STAGES
            ready = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), ((at // STAGES) & 1) ^ 1)
            mbarrier.expect(ready, 2 * rows_SK.block_type.nbytes + 2 * weight_HK.block_type.nbytes)
            depth = deep * CUT.value.BLOCK_K
            for half in gl.static_range(2):
                block = 2 * stage + half
                tma.async_copy_global_to_shared(
                    rows_SK, [first + half * GROUP_ROWS, depth], ready, ring.rows.index(block)
                )
                tma.async_copy_global_to_shared(
                    weight_HK, [height + half * CUT.value.SECOND, depth], ready, ring.weights.index(block)
                )
            at += 1


@gluon.jit
def _next_blocks(ring, at, GROUP: gl.constexpr, CUT: gl.constexpr):
    """(stage, rows, left, right): what this group multiplies of the at-th buffer, once that is full."""
    STAGES: gl.constexpr = CUT.value.STAGES
    stage = at % STAGES
    mbarrier.wait(ring.full.index(stage), (at // STAGES) & 1)
    rows = ring.rows.index(2 * stage + GROUP)
    left = ring.weights.index(2 * stage).permute((1, 0))
    right = ring.weights.index(2 * stage + 1).permute((1, 0))
    return stage, rows, left, right


@gluon.jit
def _sums(ring, at, GROUP: gl.constexpr, CUT: gl.constexpr):
    """(left, right) of this group's rows, added up by the matrix units: float32, or int32 of int8."""
    SUMS: gl.constexpr = sums_layout(ring.rows.dtype)
    DTYPE: gl.constexpr = gl.int32 if ring.rows.dtype == gl.int8 else gl.float32
    STAGES: gl.constexpr = CUT.value.STAGES
    left_MN = gl.zeros((GROUP_ROWS, COLUMNS), DTYPE, SUMS)
    right_MN = gl.zeros((GROUP_ROWS, COLUMNS), DTYPE, SUMS)
    for deep in range(CUT.value.DEPTH):
        _, rows, left, right = _next_blocks(ring, at + deep, GROUP, CUT)
        left_MN = warpgroup_mma(rows, left, left_MN, is_async=True)
        right_MN = warpgroup_mma(rows, right, right_MN, is_async=True)
        # The products of the buffer before this one have ended.
        left_MN, right_MN = warpgroup_mma_wait(2, deps=(left_MN, right_MN))
        mbarrier.arrive(ring.empty.index((at + deep + STAGES - 1) % STAGES), pred=deep > 0)
    left_MN, right_MN = warpgroup_mma_wait(0, deps=(left_MN, right_MN))
    mbarrier.arrive(ring.empty.index((at + CUT.value.DEPTH - 1) % STAGES))
    return left_MN, right_MN


@gluon.jit
def _scaled_sums(
    ring,
    at,
    row_scale_BS,
    left_scale,
    right_scale,
    row_M,
    inside_M,
    S,
    GROUP: gl.constexpr,
    CUT: gl.constexpr,
):
    """The same of float8 blocks with a scale each, as `grouped_matmul.add_product` adds them up."""
    SUMS: gl.constexpr = sums_layout(ring.rows.dtype)
    nothing_MN = gl.zeros((GROUP_ROWS, COLUMNS), gl.float32, SUMS)
    left_MN, right_MN = nothing_MN, nothing_MN
    left_unit_M = gl.full((GROUP_ROWS,), 1.0, gl.float32, gl.SliceLayout(1, SUMS))
    right_unit_M = left_unit_M
    for deep in range(CUT.value.DEPTH):
        row_scale = row_scale_BS + S.to(gl.int64) * deep + row_M
        scale_M = gl.load(row_scale, mask=inside_M, other=0.0)
        left_scale_M = scale_M * gl.load(left_scale + deep)
        right_scale_M = scale_M * gl.load(right_scale + deep)
        stage, rows, left, right = _next_blocks(ring, at + deep, GROUP, CUT)
        if CUT.value.PROMOTE:
            product = warpgroup_mma(rows, left, nothing_MN, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            left_MN += product * left_scale_M[:, None]
            product = warpgroup_mma(rows, right, nothing_MN, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
        else:
            left_scale_M = gl.maximum(left_scale_M, LEAST_SCALE)
            right_scale_M = gl.maximum(right_scale_M, LEAST_SCALE)
            left_MN = left_MN * (left_unit_M / left_scale_M)[:, None]
            left_MN = warpgroup_mma(rows, left, left_MN, is_async=True)
            right_MN = right_MN * (right_unit_M / right_scale_M)[:, None]
            right_MN = warpgroup_mma(rows, right, right_MN, is_async=True)
            left_MN, right_MN = warpgroup_mma_wait(0, deps=(left_MN, right_MN))
            left_unit_M, right_unit_M = left_scale_M, right_scale_M
        fence_async_shared()
        mbarrier.arrive(ring.empty.index(stage))
        if CUT.value.PROMOTE:
            right_MN += product * right_scale_M[:, None]
    if not CUT.value.PROMOTE:
        left_MN, right_MN = left_MN * left_unit_M[:, None], right_MN * right_unit_M[:, None]
    return left_MN, right_MN


@gluon.jit
def _store(out_SN, values_MN, first, end, column, N: gl.constexpr):
    """Store the rows before `end` and the columns before N, 16 bytes a thread."""
    WIDE: gl.constexpr = 128 // out_SN.dtype.element_ty.primitive_bitwidth
    BY_ROWS: gl.constexpr = gl.BlockedLayout([1, WIDE], [WIDE // 4, 128 // WIDE], [4, 1], [1, 0])
    values_MN = gl.convert_layout(values_MN.to(out_SN.dtype.element_ty), BY_ROWS)
    row_M = first + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, BY_ROWS))
    column_N = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, BY_ROWS))
    place = out_SN + row_M.to(gl.int64)[:, None] * N + column_N[None, :]
    gl.store(place, values_MN, mask=(row_M < end)[:, None] & (column_N < N)[None, :])


@gluon.jit
def _columns(values_N, column, N: gl.constexpr, SUMS: gl.constexpr):
    """[1, 128] in float32 of a bias or a scale; zeros past N."""
    column_N = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, SUMS))
    return gl.load(values_N + column_N, mask=column_N < N, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _multiply(ring, factors, output, tiles_M3, total_1, S, GROUP: gl.constexpr, CUT: gl.constexpr):
    """The GROUP-th 64 rows of all tiles of this program."""
    SUMS: gl.constexpr = sums_layout(ring.rows.dtype)
    COLUMN_TILES: gl.constexpr = CUT.value.COLUMN_TILES
    HEIGHT: gl.constexpr = CUT.value.HEIGHT
    DEPTH: gl.constexpr = CUT.value.DEPTH
    N: gl.constexpr = CUT.value.N
    row_tiles = gl.load(total_1)
    at = 0
    for tile in range(gl.program_id(0), row_tiles * COLUMN_TILES, gl.num_programs(0)):
        slot, first, end, column_tile = find_tile(tile, tiles_M3, row_tiles, COLUMN_TILES, CUT.value.BAND)
        column = column_tile * CUT.value.STEP
        right_column = column + CUT.value.SECOND
        first += GROUP * GROUP_ROWS
        if first < end:
            row_M = first + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SUMS))
            inside_M = row_M < end
            if ring.rows.dtype == gl.float8e4nv:
                scale = factors.weight_scale + slot * (HEIGHT // SCALED) * DEPTH
                left_scale = scale + column // SCALED * DEPTH
                # A tile at the end of an odd number of halves has no right one, and stores none.
                right_scale = scale + gl.minimum(right_column // SCALED, HEIGHT // SCALED - 1) * DEPTH
                left_MN, right_MN = _scaled_sums(
                    ring, at, factors.row_scale, left_scale, right_scale, row_M, inside_M, S, GROUP, CUT
                )
            else:
                left_MN, right_MN = _sums(ring, at, GROUP, CUT)
            if ring.rows.dtype == gl.int8:
                scale_M1 = gl.load(factors.row_scale + row_M, mask=inside_M, other=0.0)[:, None]
                scale = factors.weight_scale + slot * HEIGHT
                left_MN = left_MN.to(gl.float32) * scale_M1 * _columns(scale, column, HEIGHT, SUMS)
                right_MN = right_MN.to(gl.float32) * scale_M1 * _columns(scale, right_column, HEIGHT, SUMS)
            if factors.bias_LN is not None:
                bias = factors.bias_LN + slot * HEIGHT
                left_MN += _columns(bias, column, HEIGHT, SUMS)
                right_MN += _columns(bias, right_column, HEIGHT, SUMS)
            if CUT.value.GATED:
                left_MN = left_MN / (1.0 + gl.exp(-left_MN)) * right_MN
            if output.scale_BS is not None:
                largest_M = gl.max(gl.abs(left_MN), 1)
                scale_M = gl.where(largest_M > 0, largest_M / 448.0, 1.0)
                gl.store(output.scale_BS + column_tile.to(gl.int64) * S + row_M, scale_M, mask=inside_M)
                left_MN = left_MN / scale_M[:, None]
            _store(output.out_SN, left_MN, first, end, column, N)
            if not CUT.value.GATED:
                _store(output.out_SN, right_MN, first, end, right_column, N)
        else:  # the tile ends before this group's rows
            for deep in range(DEPTH):
                stage, _, _, _ = _next_blocks(ring, at + deep, GROUP, CUT)
                mbarrier.arrive(ring.empty.index(stage))
        at += DEPTH


@named_launch
@gluon.jit(do_not_specialize=["S"])
def _specialized_matmul(
    rows_SK,
    weight_HK,
    row_scale,
    weight_scale,
    bias_LN,
    out_SN,
    out_scale_BS,
    tiles_M3,
    total_1,
    S,
    N: gl.constexpr,
    K: gl.constexpr,
    GATED: gl.constexpr,
    PROMOTE: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Tiles of 128 rows of out_SN, from this program's number on in steps of the number of programs."""
    BLOCK_K: gl.constexpr = rows_SK.block_type.shape[1]
    CUT: gl.constexpr = cut(N, K, GATED, PROMOTE, BAND, STAGES, BLOCK_K)
    rows = gl.allocate_shared_memory(rows_SK.dtype, [2 * STAGES, GROUP_ROWS, BLOCK_K], rows_SK.layout)
    weights = gl.allocate_shared_memory(weight_HK.dtype, [2 * STAGES, COLUMNS, BLOCK_K], weight_HK.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    ring = Ring(rows, weights, full, empty)
    factors = Factors(row_scale, weight_scale, bias_LN)
    output = Output(out_SN, out_scale_BS)
    gl.warp_specialize(
        [
            (_multiply, (ring, factors, output, tiles_M3, total_1, S, gl.constexpr(0), CUT)),
            (_multiply, (ring, factors, output, tiles_M3, total_1, S, gl.constexpr(1), CUT)),
            (_load, (rows_SK, weight_HK, ring, tiles_M3, total_1, CUT)),
        ],
        [WARPGROUP, 1],
        [MULTIPLYING_REGISTERS, LOADING_REGISTERS],
    )
