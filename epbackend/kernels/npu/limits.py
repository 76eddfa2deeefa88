"""What the operators cannot take, said before they are called, by the name of the setting that helps."""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.errors import ConfigError
from epbackend.kernels.int8 import Int8Weights

MOST_GROUPS = 1024
"""Matrices of one grouped product."""

INNER_LIMIT = 65536
"""Rows and columns of a matrix stay below it."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
QUANTISED = (torch.bfloat16, torch.float16)
"""Types of rows that can be quantised as they come."""

TILE_ROWS, TILE_COLUMNS, TILED_LIMIT = 16, 32, 10240
"""A tile of FRACTAL_NZ in int8 [in, out], and the most columns that `grouped_matmul_swiglu_quant` takes."""

FUSED_INT8_STEP, FUSED_INT8_LIMIT = 64, 10496
"""`dequant_swiglu_quant` takes an F that is a multiple of the one and at most the other."""


def check_weights(weights: Tensor | Int8Weights) -> None:
    """Raise ConfigError for packed matrices that the grouped product does not take."""
    values_LNK = weights.values_LNK if isinstance(weights, Int8Weights) else weights
    slots, *sides = values_LNK.shape
    if slots > MOST_GROUPS:
        raise ConfigError(
            f"device ascend: a rank may hold {MOST_GROUPS} experts, and holds {slots}; raise ep_size"
        )
    if max(sides) >= INNER_LIMIT:
        raise ConfigError(
            f"device ascend: an expert's matrix is {sides[0]} x {sides[1]}; its sides must be below {INNER_LIMIT}"
        )
    if not isinstance(weights, Int8Weights) and weights.dtype not in FLOATS:
        raise ConfigError(
            f"device ascend: experts of {weights.dtype} are not supported; set engine.dtype: bfloat16"
        )


def check_int8(rows: torch.dtype, bias_LN: Tensor | None) -> None:
    """Raise ConfigError for what W8A8 does not take; `rows` is the type of the rows before they are quantised."""
    if rows not in QUANTISED:
        raise ConfigError(
            f"device ascend: W8A8 quantises bfloat16 and float16 rows, not {rows}; set engine.dtype: bfloat16"
        )
    if bias_LN is not None:
        raise ConfigError("device ascend: W8A8 experts with biases are not supported; use bfloat16 weights")


def not_tiled(weights: Int8Weights) -> str | None:
    """Why matrices cannot be laid out in tiles for the fused product; None if they can."""
    _, outer, inner = weights.values_LNK.shape
    if inner % TILE_ROWS or outer % TILE_COLUMNS:
        return f"{inner} x {outer} is not a whole number of tiles of {TILE_ROWS} x {TILE_COLUMNS}"
    return f"{outer} columns are more than {TILED_LIMIT}" if outer > TILED_LIMIT else None


def fuses(gate_up: Int8Weights) -> bool:
    """Whether what stands between the products can be one operator."""
    width = gate_up.values_LNK.shape[1] // 2
    return width % FUSED_INT8_STEP == 0 and width <= FUSED_INT8_LIMIT
