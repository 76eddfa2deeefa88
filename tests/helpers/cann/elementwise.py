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
    require(x.numel() > 0, "empty tensors are not supported (aclnnSwiGlu, CANN 8.0 to 8.5)")
    require(x.shape[dim] % 2 == 0, f"dimension {dim} of {tuple(x.shape)} cannot be halved")
    gate, up = x.float().chunk(2, dim)
    out.copy_(silu(gate) * up)


@aclnn("x:T smooth_scales:T group_index:T dst_type:i", "y:T scale:T offset:T")
def aclnnDynamicQuantV2(x, smooth_scales, group_index, dst_type, y, scale, offset) -> None:
    require(x.dtype in (torch.float16, torch.bfloat16), f"x is {x.dtype}, must be float16 or bfloat16")
    require(smooth_scales is None and group_index is None, "smooth scales are not emulated")
    require(offset is None, "asymmetric quantization is not emulated")
    require(x.numel() > 0, "x is empty")
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


FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _normed(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    require(x.dtype in FLOATS and x.numel() > 0, f"x is {x.dtype} {tuple(x.shape)}")
    require(gamma.dtype in (x.dtype, torch.float32), f"gamma is {gamma.dtype} beside x of {x.dtype}")
    require(
        gamma.shape == x.shape[x.dim() - gamma.dim() :], f"gamma {tuple(gamma.shape)} of {tuple(x.shape)}"
    )
    axes = tuple(range(x.dim() - gamma.dim(), x.dim()))
    scale = (x.float().pow(2).mean(axes, keepdim=True) + epsilon).rsqrt()
    return x.float() * scale * gamma.float(), scale


@aclnn("x:T gamma:T epsilon:d", "y:T rstd:T")
def aclnnRmsNorm(x, gamma, epsilon, y, rstd) -> None:
    normed, scale = _normed(x, gamma, epsilon)
    y.copy_(normed)
    rstd.copy_(scale)


@aclnn("x1:T x2:T gamma:T epsilon:d", "y:T rstd:T x:T")
def aclnnAddRmsNorm(x1, x2, gamma, epsilon, y, rstd, x) -> None:
    require(x1.dtype == x2.dtype and x1.shape == x2.shape, "x1 and x2 must be alike")
    total = x1.float() + x2.float()
    x.copy_(total)
    normed, scale = _normed(total.to(x1.dtype), gamma, epsilon)
    y.copy_(normed)
    rstd.copy_(scale)


@aclnn("input:T indices:T updates:T")
def aclnnScatterNdUpdate(input: Tensor, indices: Tensor, updates: Tensor) -> None:
    """input[indices[i]] = updates[i], for each row of indices."""
    require(input.dtype == updates.dtype, f"rows of {updates.dtype} do not fit an input of {input.dtype}")
    require(indices.dtype in (torch.int32, torch.int64), f"indices are {indices.dtype}")
    depth = indices.shape[-1]
    require(updates.shape == indices.shape[:-1] + input.shape[depth:], "updates do not fit indices and input")
    places = indices.long().unbind(-1)
    for place, size in zip(places, input.shape, strict=False):
        require(bool(((place >= 0) & (place < size)).all()), "an index is outside the input")
    input[places] = updates
