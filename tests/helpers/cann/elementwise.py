"""Operators that treat each row, or each element, by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.helpers.cann.registry import aclnn, require


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 rows, one float32 scale a row): the formula of every dynamic quantization of CANN."""
    scale = rows.float().abs().amax(-1) / 127
    return (rows.float() / scale.clamp(min=1e-30).unsqueeze(-1)).round().clamp(-128, 127).to(
        torch.int8
    ), scale


@aclnn("x:T dim:i", "out:T")
def aclnnSwiGlu(x: Tensor, dim: int, out: Tensor) -> None:
    require(x.shape[dim] % 2 == 0, f"dimension {dim} of {tuple(x.shape)} cannot be halved")
    gate, up = x.float().chunk(2, dim)
    out.copy_(silu(gate) * up)


@aclnn("x:T smooth_scales:T group_index:T dst_type:i", "y:T scale:T offset:T")
def aclnnDynamicQuantV2(x, smooth_scales, group_index, dst_type, y, scale, offset) -> None:
    require(x.dtype in (torch.float16, torch.bfloat16), f"x is {x.dtype}, must be float16 or bfloat16")
    require(smooth_scales is None and group_index is None, "smooth scales are not emulated")
    rows, scales = quantize(x)
    y.copy_(rows)
    scale.copy_(scales)


@aclnn("dst:T src:T")
def aclnnInplaceCopy(dst: Tensor, src: Tensor) -> None:
    dst.copy_(src)


@aclnn("tensor:T")
def aclnnInplaceZero(tensor: Tensor) -> None:
    tensor.zero_()


@aclnn("tensor:T")
def aclnnInplaceOne(tensor: Tensor) -> None:
    tensor.fill_(1)


@aclnn("tensor:T value:S")
def aclnnInplaceFillScalar(tensor: Tensor, value: float) -> None:
    tensor.fill_(value)
