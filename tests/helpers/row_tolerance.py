"""How near a row that travelled in 8 bits must be to what it was."""

from __future__ import annotations

import torch

UNIT = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half a unit in the last place of a restored value."""


def within(dispatch_dtype: str, rows_TD: torch.Tensor) -> torch.Tensor:
    """How far each value may be off when it arrives."""
    size = rows_TD.abs()
    if dispatch_dtype == "full":
        return torch.zeros_like(size)
    if dispatch_dtype == "int8":
        error = (size.amax(1, keepdim=True) / 254).expand_as(size)
    else:
        blocks = [block.amax(1, keepdim=True).expand_as(block) for block in size.split(128, dim=1)]
        error = torch.maximum(size / 16, torch.cat(blocks, 1) / 458752)
    return error * 1.0001 + (size + error) * UNIT[rows_TD.dtype] + 1e-7
