"""The experts' two products, in every weight format: choose tiles, make the schedule, quantize the rows that come in.

`ExpertMlp` is what `TritonKernels.expert_mlp` calls: gate_up with SwiGLU in the same launch, then down. It is made once
for a layer, so that a call finds tile, descriptors of the weights and compiled kernels ready. `swiglu` is a launch of
its own, for rows that were not multiplied by a gated product.

Shapes: S rows, D hidden size, F expert width, L slots, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels import ExpertWeights
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.triton.grouped_matmul import GroupedMatmul, Rows, silu_and_mul
from epbackend.kernels.triton.launch import cdiv, named_launch
from epbackend.kernels.triton.permute import TokenRows, source_of
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
from epbackend.kernels.weight_formats import Experts, check_width

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


class ExpertMlp:
    """The experts of one layer on one chip: both products, with the schedule that they share."""

    def __init__(self, chip: Chip, weights: ExpertWeights, promote: bool = True) -> None:
        """Check the weights, and make what depends on them alone; `promote` as in `GroupedMatmul`.

        Raises:
            ConfigError: The two matrices differ in format, or the chip does not multiply it.
        """
        check_same_format(weights.gate_up, weights.down)
        self.weights, self._activation = weights, weights.activation
        self._gate_up = ExpertProduct(
            chip, weights.gate_up, weights.gate_up_bias_L2F, gated=weights.activation is None, promote=promote
        )
        self._down = ExpertProduct(chip, weights.down, weights.down_bias_LD, gated=False, promote=promote)

    def gathers(self, expected: int) -> bool:
        """Whether so many rows are best left where they are, as `TokenRows`."""
        return self._gate_up.gathers(expected)

    def __call__(
        self,
        rows: Tensor | TokenRows,
        counts_L: Tensor,
        expected: int | None = None,
        total_L: Tensor | None = None,
    ) -> Tensor:
        """rows_SD; see `epbackend.kernels.Kernels.expert_mlp`."""
        count, dtype = len(rows), source_of(rows)[0].dtype
        expected = count if expected is None else expected
        matmul, tile = self._gate_up.cut(expected)
        schedule = row_tiles(counts_L, count, tile.rows, total_L)
        if isinstance(rows, TokenRows) and not self.gathers(expected):
            rows = rows.copied()
        hidden = self._gate_up.multiply(matmul, rows, schedule, dtype)
        if self._activation is not None:
            assert isinstance(hidden, Tensor)  # only a gated product is stored as float8
            hidden = self._activation(hidden)
        matmul, tile = self._down.cut(expected)
        if tile.rows != schedule.block_rows:
            schedule = row_tiles(counts_L, count, tile.rows)
        out_SD = self._down.multiply(matmul, hidden, schedule, dtype)
        assert isinstance(out_SD, Tensor)
        return out_SD


MOST_CUTS = 4096
"""Numbers of rows whose tile is remembered."""


class ExpertProduct:
    """One of the two products: its tile by the number of rows."""

    def __init__(
        self, chip: Chip, experts: Experts, bias_LN: Tensor | None, *, gated: bool, promote: bool = True
    ) -> None:
        """Raises ConfigError where the chip does not multiply the experts' format."""
        if isinstance(experts, Fp8Blocks) and not chip.fp8:
            raise ConfigError(
                f"{chip.name} has no float8 matrix units (they come with compute capability 8.9); "
                "serve this model in bfloat16 or int8"
            )
        self._chip, self._experts, self._bias_LN = chip, experts, bias_LN
        self._gated, self._promote = gated, promote
        self._depth = weight_values(experts).shape[2]
        self._by_tile: dict[Tile, GroupedMatmul] = {}
        self._by_rows: dict[int, tuple[GroupedMatmul, Tile]] = {}

    def gathers(self, expected: int) -> bool:
        """Whether about so many rows are best read where the tokens lie. What quantizes them does so at no cost."""
        return not isinstance(self._experts, Tensor) or self.cut(expected)[1].gather

    def cut(self, expected: int) -> tuple[GroupedMatmul, Tile]:
        """The product for about so many rows, and its tile."""
        found = self._by_rows.get(expected)
        if found is None:
            tile = choose_tile(self._chip, Product.of(expected, self._experts, self._gated))
            if tile not in self._by_tile:
                self._by_tile[tile] = GroupedMatmul(
                    self._experts,
                    tile,
                    self._chip,
                    gated=self._gated,
                    bias_LN=self._bias_LN,
                    promote=self._promote,
                )
            if len(self._by_rows) >= MOST_CUTS:
                self._by_rows.clear()
            found = self._by_rows[expected] = self._by_tile[tile], tile
        return found

    def multiply(
        self,
        matmul: GroupedMatmul,
        rows: Tensor | TokenRows | Fp8Tokens,
        schedule: Schedule,
        dtype: torch.dtype,
    ) -> Tensor | Fp8Tokens:
        """The product in `dtype`, or gated as float8 where the experts are.

        Raises:
            ConfigError: rows and experts do not go together; the message says what to change.
        """
        experts = self._experts
        matching: Rows = rows
        values_SK = rows.values_SK if isinstance(rows, Fp8Tokens) else source_of(rows)[0]
        check_width(values_SK, self._depth)
        if isinstance(experts, Tensor):
            if values_SK.dtype != experts.dtype:
                raise ConfigError(
                    f"rows are {values_SK.dtype} and experts {experts.dtype}; load the model in one dtype"
                )
        elif not isinstance(rows, Fp8Tokens):
            quantize = quantize_fp8 if isinstance(experts, Fp8Blocks) else quantize_int8
            matching = quantize(rows, schedule)
        return matmul(matching, schedule, dtype)


def check_same_format(gate_up: Experts, down: Experts) -> None:
    """Check that both matrices of the experts have one weight format.

    Raises:
        ConfigError: They do not, for example where only one of them is quantized.
    """
    first, second = weight_format(gate_up), weight_format(down)
    if first != second:
        raise ConfigError(f"gate_up is {first} and down is {second}; quantize both in one way, or neither")
