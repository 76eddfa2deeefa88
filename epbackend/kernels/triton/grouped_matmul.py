"""Grouped matmul in every weight format: each row times the transposed matrix of its slot.

One persistent launch: as many programs as fit on the chip take tiles in turn, whatever the counts say, so that empty
and huge groups cost what their rows cost, and nothing is read back to the host. With `gated` the two halves of gate_up
are multiplied side by side and stored as silu(gate) * up: the wide intermediate never reaches memory. Float8 experts
get it as float8, with a new scale for each 128 columns, so that the second product reads it as it is.

Rows of the first product may be read where the tokens lie (`TokenRows`), by pointers, without a copy of them.

From the inside out: blocks (loaded by the copy engine's descriptors, TMA, or by pointers; multiplied; stored), the
inner loops that sum one tile along the depth (`sums`, `scaled_sums`), the kernel, and the call.

Shapes: S rows, L slots, N outputs and K inputs of a matrix, H = L * N the rows of all matrices one below the other,
F = N / 2 of gate_up, B blocks of 128 values; M, N and K also for the rows, columns and depth of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton.launch import named_launch
from epbackend.kernels.triton.permute import TokenRows, places, source_of
from epbackend.kernels.triton.quantize import Fp8Tokens, Int8Tokens, empty_fp8, to_fp8
from epbackend.kernels.triton.tiles import INTERPRETED, Chip, Schedule, Tile, aligned, find_tile
from epbackend.kernels.weight_formats import Experts


def matrix(tensor: Tensor, block: tuple[int, ...], tma: bool) -> Tensor | TensorDescriptor:
    """`tensor` as a kernel takes it, in blocks of that shape; a descriptor is made on the host and passed by value."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if tma else tensor


@triton.jit
def load_block(
    matrix, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """block [ROWS, COLUMNS] of a row-major matrix; zeros past its last row and column.

    `matrix` is a tensor descriptor with TMA, which knows the bounds, and otherwise a pointer.
    """
    if TMA:
        block = matrix.load([row, column])
    else:
        at_row = row + tl.arange(0, ROWS)
        at_column = column + tl.arange(0, COLUMNS)
        inside = (at_row < rows)[:, None] & (at_column < columns)[None, :]
        place = matrix + at_row.to(tl.int64)[:, None] * stride + at_column[None, :]
        block = tl.load(place, mask=inside, other=0.0)
    return block


@triton.jit
def load_rows(
    rows_SK,
    choice_of_row_S,
    place_M,
    first,
    depth,
    S,
    row_stride,
    K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, BLOCK_K] of the rows from `first` on; where their tokens are read, `place_M` says which."""
    if choice_of_row_S is not None:
        column = depth + tl.arange(0, BLOCK_K)
        place = rows_SK + place_M[:, None] * row_stride + column[None, :]
        # Without a mask where none is needed: it would be computed for each copy.
        block = tl.load(place) if K % BLOCK_K == 0 else tl.load(place, mask=(column < K)[None, :], other=0.0)
    else:
        block = load_block(rows_SK, first, depth, S, K, row_stride, BLOCK_M, BLOCK_K, TMA)
    return block


@triton.jit
def load_pair(
    matrix, slot, column, depth, N, K, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr
):
    """[2 * COLUMNS, DEPTH]: COLUMNS rows of a slot's gate matrix, and the same rows of its up matrix, N rows below."""
    if TMA:
        block = tl.reshape(matrix.load([2 * slot, column, depth]), (2 * COLUMNS, DEPTH))
    else:
        each = tl.arange(0, 2 * COLUMNS)
        at_row = column + each % COLUMNS
        at_column = depth + tl.arange(0, DEPTH)
        inside = (at_row < N)[:, None] & (at_column < K)[None, :]
        row = ((2 * slot + each // COLUMNS) * N + at_row).to(tl.int64)
        block = tl.load(matrix + row[:, None] * K + at_column[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def multiply(block_MK, block_NK, sum_MN):
    """sum_MN + block_MK @ block_NK.T; float32 blocks are multiplied in full precision."""
    if INTERPRETED and block_MK.dtype == tl.bfloat16:
        # Triton 3.7's interpreter would multiply the bit patterns of bfloat16.
        product = tl.dot(block_MK.to(tl.float32), block_NK.to(tl.float32).T, sum_MN, input_precision="ieee")
    else:
        product = tl.dot(block_MK, block_NK.T, sum_MN, input_precision="ieee", out_dtype=sum_MN.dtype)
    return product


@triton.jit
def silu_and_mul(gate_MN, up_MN):
    """SwiGLU: silu(gate) * up, in float32."""
    return gate_MN * tl.sigmoid(gate_MN) * up_MN


@triton.jit
def load_columns(values_N, column_N, N):
    """[1, columns] in float32 of a bias or a scale; zeros past N."""
    return tl.load(values_N + column_N, mask=column_N < N, other=0).to(tl.float32)[None, :]


@triton.jit
def store_block(out_SN, values_MN, row_M, end, column_N, N):
    """Store the rows before `end` and the columns before N, in the matrix's own dtype."""
    inside = (row_M < end)[:, None] & (column_N < N)[None, :]
    place = out_SN + row_M.to(tl.int64)[:, None] * N + column_N[None, :]
    tl.store(place, values_MN.to(out_SN.dtype.element_ty), mask=inside)


@triton.jit
def sums(
    rows_SK,
    choice_of_row_S,
    weight_HK,
    slot,
    column,
    first,
    end,
    S,
    H,
    row_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    TMA: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(sum_MN, up_MN) in DTYPE: the products of rows from `first` on with the slot's columns from `column` on.

    Gate and up are one product twice as wide, for which the matrix units read each block of rows once. Without GATED
    up_MN is not used.
    """
    row_M = first + tl.arange(0, BLOCK_M)
    place_M = places(choice_of_row_S, row_M, row_M < end, TOP_K)
    if GATED:
        both_MN = tl.zeros((BLOCK_M, 2 * BLOCK_N), DTYPE)
        for depth in range(0, K, BLOCK_K):
            row_block = load_rows(
                rows_SK, choice_of_row_S, place_M, first, depth, S, row_stride, K, TMA, BLOCK_M, BLOCK_K
            )
            pair = load_pair(weight_HK, slot, column, depth, N, K, BLOCK_N, BLOCK_K, TMA)
            both_MN = multiply(row_block, pair, both_MN)
        sum_MN, up_MN = tl.split(tl.permute(tl.reshape(both_MN, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    else:
        sum_MN = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
        up_MN = sum_MN
        for depth in range(0, K, BLOCK_K):
            row_block = load_rows(
                rows_SK, choice_of_row_S, place_M, first, depth, S, row_stride, K, TMA, BLOCK_M, BLOCK_K
            )
            block = load_block(weight_HK, slot * N + column, depth, H, K, K, BLOCK_N, BLOCK_K, TMA)
            sum_MN = multiply(row_block, block, sum_MN)
    return sum_MN, up_MN


LEAST_SCALE = tl.constexpr(2.0**-60)
"""Products of smaller scales are taken for this one where they are not promoted: no ratio of two scales overflows."""


@triton.jit
def add_product(sum_MN, unit_M1, block_MK, block_NK, scale_M1, PROMOTE: tl.constexpr):
    """(sum, unit) with block_MK @ block_NK.T * scale_M1 added to what sum_MN * unit_M1 stands for.

    The matrix units keep fewer bits than float32 when they add up float8 products. With PROMOTE each product is scaled
    and added in float32, as in DeepGEMM, and units stay 1. Without it the sum stays where it is and changes its unit
    to the scale of the next product.
    """
    if PROMOTE:
        sum_MN += multiply(block_MK, block_NK, tl.zeros_like(sum_MN)) * scale_M1
    else:
        scale_M1 = tl.maximum(scale_M1, LEAST_SCALE)
        sum_MN = multiply(block_MK, block_NK, sum_MN * (unit_M1 / scale_M1))
        unit_M1 = scale_M1
    return sum_MN, unit_M1


@triton.jit
def scaled_sums(
    rows_SK,
    weight_HK,
    row_scale_BS,
    scale_LBB,
    slot,
    column,
    first,
    end,
    S,
    H,
    N: tl.constexpr,
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    GATED: tl.constexpr,
    PROMOTE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same for float8 blocks with a scale each; sums in float32, by `add_product`.

    Gate and up stay two products, because the sums of both beside one product of both would not fit the registers.
    """
    DEEP: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    scale = scale_LBB + (slot * ((HEIGHT + BLOCK_K - 1) // BLOCK_K) + column // BLOCK_K) * DEEP
    at = slot * HEIGHT + column
    row_M = first + tl.arange(0, BLOCK_M)
    nothing_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_MN, up_MN = nothing_MN, nothing_MN
    one_M1 = tl.full((BLOCK_M, 1), 1.0, tl.float32)
    unit_M1, up_unit_M1 = one_M1, one_M1
    for deep in range(0, DEEP):
        row_block = load_block(rows_SK, first, deep * BLOCK_K, S, K, K, BLOCK_M, BLOCK_K, TMA)
        block = load_block(weight_HK, at, deep * BLOCK_K, H, K, K, BLOCK_N, BLOCK_K, TMA)
        row_scale = row_scale_BS + S.to(tl.int64) * deep + row_M
        row_scale_M1 = tl.load(row_scale, mask=row_M < end, other=0)[:, None]
        scale_M1 = row_scale_M1 * tl.load(scale + deep)
        sum_MN, unit_M1 = add_product(sum_MN, unit_M1, row_block, block, scale_M1, PROMOTE)
        if GATED:
            up_block = load_block(weight_HK, at + N, deep * BLOCK_K, H, K, K, BLOCK_N, BLOCK_K, TMA)
            up_scale_M1 = row_scale_M1 * tl.load(scale + (N // BLOCK_K) * DEEP + deep)
            up_MN, up_unit_M1 = add_product(up_MN, up_unit_M1, row_block, up_block, up_scale_M1, PROMOTE)
    if not PROMOTE:
        sum_MN, up_MN = sum_MN * unit_M1, up_MN * up_unit_M1
    return sum_MN, up_MN


Rows = Tensor | TokenRows | Fp8Tokens | Int8Tokens
"""The rows that come in, quantized as the experts are; experts that are not can read tokens where they lie."""


class GroupedMatmul:
    """The product with the experts of one layer, cut by one tile; what no call changes is made once."""

    def __init__(
        self,
        experts: Experts,
        tile: Tile,
        chip: Chip,
        *,
        gated: bool,
        bias_LN: Tensor | None = None,
        promote: bool = True,
    ) -> None:
        """Takes what the calls share.

        Args:
            experts: The matrices [L, N, K] of all slots; with `gated` N = 2F, gate above up.
            tile: How the product is cut.
            chip: What the product runs on.
            gated: Whether silu(gate) * up is stored instead of the product.
            bias_LN: Added to the product, before the activation.
            promote: Whether sums of float8 products go to float32 every 128 values (`add_product`).
        """
        weight_LNK, weight_scale = _parts(experts)
        slots, height, depth = weight_LNK.shape
        self._columns, fp8 = height // 2 if gated else height, isinstance(experts, Fp8Blocks)
        self._to_fp8 = gated and fp8
        shared = {
            "weight_scale": weight_scale,
            "bias_LN": bias_LN,
            "N": self._columns,
            "K": depth,
            "GATED": gated,
            "PROMOTE": promote,
        }
        weight = weight_LNK.view(slots * height, depth)
        self._specialized: Callable[..., None] | None = None
        if tile.specialize:
            # Imported where it serves: Gluon is an experimental part of Triton.
            from epbackend.kernels.triton.specialized_matmul import specialized_matmul

            self._specialized = specialized_matmul(weight, tile, chip, **shared)
            return
        block: tuple[int, ...] = (tile.columns, tile.depth)
        if gated and not fp8:  # gate and up of a tile are loaded as one block
            weight, block = weight.view(2 * slots, self._columns, depth), (2, *block)
        self._tma, self._block = tile.tma and chip.tma and aligned(weight), (tile.rows, tile.depth)

        def bound(tma: bool) -> Callable[..., None]:
            launch = _grouped_matmul.bind(
                weight_HK=matrix(weight, block, tma),
                H=slots * height,
                FP8=fp8,
                INT8=isinstance(experts, Int8Weights),
                TMA=tma,
                **shared,
                **tile.constants(),
            )
            return launch[(chip.sms * tile.programs,)]

        self._by_tma = {tma: bound(tma) for tma in {False, self._tma}}
        self._options = {"num_warps": tile.warps, "num_stages": tile.stages}

    def __call__(self, rows: Rows, schedule: Schedule, dtype: torch.dtype) -> Tensor | Fp8Tokens:
        """rows_SN in `dtype`, or if gated rows_SF: as `Fp8Tokens` where the experts are float8.

        Rows past the counts are left unwritten.

        Args:
            rows: rows_SK, quantized as the experts are (`quantize_fp8`, `quantize_int8`).
            schedule: Which rows each tile multiplies; its tiles have as many rows as this product's.
            dtype: Of the output, unless it is float8.
        """
        choice_of_row_S, top_k = None, 1
        if isinstance(rows, Tensor | TokenRows):
            (values_SK, choice_of_row_S, top_k), row_scale = source_of(rows), None
        else:
            values_SK, row_scale = _parts(rows)
        count = len(values_SK) if choice_of_row_S is None else len(choice_of_row_S)
        device = values_SK.device
        out: Tensor | Fp8Tokens
        if self._to_fp8:
            out = empty_fp8(count, self._columns, device)
        else:
            out = torch.empty((count, self._columns), dtype=dtype, device=device)
        if count == 0:
            return out
        out_SN, out_scale_BS = _parts(out)
        called = {
            "row_scale": row_scale,
            "out_SN": out_SN,
            "out_scale_BS": out_scale_BS,
            "tiles_M3": schedule.tiles_M3,
            "total_1": schedule.total_1,
            "S": count,
        }
        if self._specialized is not None:
            assert choice_of_row_S is None, "a tile that specializes does not gather"
            self._specialized(values_SK, **called)
            return out
        gather = choice_of_row_S is not None
        tma = self._tma and (gather or aligned(values_SK))
        self._by_tma[tma](
            rows_SK=matrix(values_SK, self._block, tma and not gather),
            choice_of_row_S=choice_of_row_S,
            row_stride=values_SK.stride(0),
            TOP_K=top_k,
            **called,
            **self._options,
        )
        return out


def grouped_matmul(
    rows: Rows,
    experts: Experts,
    schedule: Schedule,
    tile: Tile,
    chip: Chip,
    *,
    gated: bool,
    dtype: torch.dtype,
) -> Tensor | Fp8Tokens:
    """One call of `GroupedMatmul`."""
    return GroupedMatmul(experts, tile, chip, gated=gated)(rows, schedule, dtype)


def _parts(given: Tensor | Fp8Tokens | Int8Tokens | Experts) -> tuple[Tensor, Tensor | None]:
    """The values, and their scales if they have any."""
    match given:
        case Fp8Tokens():
            return given.values_SK, given.scale_BS
        case Int8Tokens():
            return given.values_SK, given.scale_S
        case Fp8Blocks():
            return given.values_LNK, given.scale_LBB
        case Int8Weights():
            return given.values_LNK, given.scale_LN
    return given, None


@named_launch
@triton.jit(do_not_specialize=["S"])
def _grouped_matmul(
    rows_SK,
    choice_of_row_S,
    weight_HK,
    row_scale,
    weight_scale,
    bias_LN,
    out_SN,
    out_scale_BS,
    tiles_M3,
    total_1,
    S,
    H,
    row_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    FP8: tl.constexpr,
    INT8: tl.constexpr,
    GATED: tl.constexpr,
    PROMOTE: tl.constexpr,
    TMA: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Tiles [BLOCK_M, BLOCK_N] of out_SN, from this program's number on in steps of the number of programs.

    With `choice_of_row_S` rows_SK are tokens of TOP_K choices each. Float8: BLOCK_K is 128, BLOCK_N at most 128, with
    GATED exactly 128.
    """
    HEIGHT: tl.constexpr = 2 * N if GATED else N
    row_tiles = tl.load(total_1)
    column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(
        tl.program_id(0),
        row_tiles * column_tiles,
        tl.num_programs(0),
        flatten=FLATTEN,
    ):
        slot, first, end, column_tile = find_tile(tile, tiles_M3, row_tiles, column_tiles, BAND)
        column = column_tile * BLOCK_N
        if FP8:
            sum_MN, up_MN = scaled_sums(
                rows_SK, weight_HK, row_scale, weight_scale, slot, column, first, end, S, H,
                N, K, HEIGHT, GATED, PROMOTE, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            sum_MN, up_MN = sums(
                rows_SK, choice_of_row_S, weight_HK, slot, column, first, end, S, H, row_stride,
                N, K, GATED, TMA, TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, tl.int32 if INT8 else tl.float32,
            )  # fmt: skip
        row_M = first + tl.arange(0, BLOCK_M)
        column_N = column + tl.arange(0, BLOCK_N)
        if INT8:
            row_scale_M1 = tl.load(row_scale + row_M, mask=row_M < end, other=0)[:, None]
            scale = weight_scale + slot * HEIGHT
            sum_MN = sum_MN.to(tl.float32) * row_scale_M1 * load_columns(scale, column_N, N)
            if GATED:
                up_MN = up_MN.to(tl.float32) * row_scale_M1 * load_columns(scale + N, column_N, N)
        if bias_LN is not None:
            bias = bias_LN + slot * HEIGHT
            sum_MN += load_columns(bias, column_N, N)
            if GATED:
                up_MN += load_columns(bias + N, column_N, N)
        if GATED:
            sum_MN = silu_and_mul(sum_MN, up_MN)
        if out_scale_BS is not None:
            sum_MN, out_scale_M = to_fp8(sum_MN)
            tl.store(out_scale_BS + column_tile.to(tl.int64) * S + row_M, out_scale_M, mask=row_M < end)
        store_block(out_SN, sum_MN, row_M, end, column_N, N)
