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


def check_int8(rows_SK: Tensor, bias_LN: Tensor | None) -> None:
    """Raise ConfigError for what W8A8 does not take."""
    if rows_SK.dtype not in QUANTISED:
        raise ConfigError(
            f"device ascend: W8A8 quantises bfloat16 and float16 rows, not {rows_SK.dtype}; set engine.dtype: bfloat16"
        )
    if bias_LN is not None:
        raise ConfigError("device ascend: W8A8 experts with biases are not supported; use bfloat16 weights")


def fuses(weights: Int8Weights) -> bool:
    """Whether what stands between the products can be one operator; `weights` are the down matrices."""
    width = weights.values_LNK.shape[2]
    return width % FUSED_INT8_STEP == 0 and width <= FUSED_INT8_LIMIT
