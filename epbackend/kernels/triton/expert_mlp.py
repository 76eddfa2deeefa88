"""The experts' two products, in every weight format: choose tiles, make the schedule, quantize the rows that come in.

`Products` is what `TritonKernels.expert_mlp` calls: gate_up with SwiGLU in the same launch (`gated`), then down
(`plain`). `swiglu` is a launch of its own, for rows that were not multiplied by a gated product.

Shapes: S rows, D hidden size, F expert width, L slots, N outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton.grouped_matmul import Rows, grouped_matmul, silu_and_mul
from epbackend.kernels.triton.launch import cdiv, named_launch
from epbackend.kernels.triton.quantize import Fp8Tokens, quantize_fp8, quantize_int8
from epbackend.kernels.triton.tiles import (
    Chip,
    Product,
    Schedule,
    Tile,
    choose_tile,
    row_tiles,
    weight_format,
    weight_values,
)
from epbackend.kernels.weight_formats import Experts

BLOCK = 1024


def swiglu(rows_S2F: Tensor) -> Tensor:
    """rows_SF, computed in float32 and rounded once."""
    rows, width = len(rows_S2F), rows_S2F.shape[1] // 2
    rows_SF = rows_S2F.new_empty(rows, width)
    if rows:
        _swiglu[(rows, cdiv(width, BLOCK))](
            rows_S2F=rows_S2F, rows_SF=rows_SF, row_stride=rows_S2F.stride(0), F=width, BLOCK=BLOCK
        )
    return rows_SF


@named_launch
@triton.jit
def _swiglu(rows_S2F, rows_SF, row_stride, F: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(rows_S2F + row * row_stride + column, mask=column < F, other=0).to(tl.float32)
    up = tl.load(rows_S2F + row * row_stride + F + column, mask=column < F, other=0).to(tl.float32)
    out = silu_and_mul(gate, up)
    tl.store(rows_SF + row * F + column, out.to(rows_SF.dtype.element_ty), mask=column < F)


class Products:
    """Products over the same rows and counts; they share the schedules, and the dtype of what comes out."""

    def __init__(self, chip: Chip, rows_SD: Tensor, counts_L: Tensor, expected: int | None = None) -> None:
        """`expected` is about how many rows the counts cover, None for all: tiles are chosen by it."""
        self._chip, self._counts_L = chip, counts_L
        self._rows, self._dtype = len(rows_SD), rows_SD.dtype
        self._expected = self._rows if expected is None else expected
        self._schedules: dict[int, Schedule] = {}

    def gated(self, rows_SD: Tensor, experts: Experts, bias_L2F: Tensor | None) -> Tensor | Fp8Tokens:
        """rows_SF: silu(gate) * up of the product; as float8 where the experts are."""
        return self._multiply(rows_SD, experts, bias_L2F, gated=True)

    def plain(self, rows: Tensor | Fp8Tokens, experts: Experts, bias_LN: Tensor | None) -> Tensor:
        """rows_SN: each row times its slot's matrix, in the dtype of the call's rows."""
        rows_SN = self._multiply(rows, experts, bias_LN, gated=False)
        assert isinstance(rows_SN, Tensor)  # only a gated product is stored as float8
        return rows_SN

    def _multiply(
        self, rows: Tensor | Fp8Tokens, experts: Experts, bias_LN: Tensor | None, *, gated: bool
    ) -> Tensor | Fp8Tokens:
        self._check(rows, experts)
        tile, schedule = self._cut(experts, gated)
        matching: Rows = rows
        if isinstance(rows, Tensor):
            matching = _quantized(rows, experts, schedule)
        return grouped_matmul(
            matching, experts, schedule, tile, self._chip, gated=gated, dtype=self._dtype, bias_LN=bias_LN
        )

    def _cut(self, experts: Experts, gated: bool) -> tuple[Tile, Schedule]:
        """The tile of a product, and the schedule for tiles with that many rows."""
        tile = choose_tile(self._chip, Product.of(self._expected, experts, gated))
        if tile.rows not in self._schedules:
            self._schedules[tile.rows] = row_tiles(self._counts_L, self._rows, tile.rows)
        return tile, self._schedules[tile.rows]

    def _check(self, rows: Tensor | Fp8Tokens, experts: Experts) -> None:
        """Check that chip, rows and experts go together.

        Raises:
            ConfigError: They do not; the message says what to change.
        """
        if isinstance(experts, Fp8Blocks) and not self._chip.fp8:
            raise ConfigError(
                f"{self._chip.name} has no float8 matrix units (they come with compute capability 8.9); "
                "serve this model in bfloat16 or int8"
            )
        values_SK = rows if isinstance(rows, Tensor) else rows.values_SK
        width, depth = values_SK.shape[1], weight_values(experts).shape[2]
        if width != depth:
            raise ConfigError(f"rows are {width} wide, but the experts take {depth}")
        if isinstance(experts, Tensor) and values_SK.dtype != experts.dtype:
            raise ConfigError(
                f"rows are {values_SK.dtype} and experts {experts.dtype}; load the model in one dtype"
            )


def _quantized(rows_SK: Tensor, experts: Experts, schedule: Schedule) -> Rows:
    """The rows, quantized as the experts are."""
    if isinstance(experts, Fp8Blocks):
        return quantize_fp8(rows_SK, schedule)
    return quantize_int8(rows_SK, schedule) if isinstance(experts, Int8Weights) else rows_SK


def check_same_format(gate_up: Experts, down: Experts) -> None:
    """Check that both matrices of the experts have one weight format.

    Raises:
        ConfigError: They do not, for example where only one of them is quantized.
    """
    first, second = weight_format(gate_up), weight_format(down)
    if first != second:
        raise ConfigError(f"gate_up is {first} and down is {second}; quantize both in one way, or neither")
