"""What W8A8 does between its two products: both scales, SwiGLU, and int8 rows again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.helpers.cann.elementwise import quantize
from tests.helpers.cann.formats import from_nz
from tests.helpers.cann.matmul import INNER_LIMIT, group_ends
from tests.helpers.cann.registry import aclnn, require

MOST_COLUMNS = 10240
SCALES = (torch.float32, torch.float16, torch.bfloat16)


def _swiglu_quant(sums_S2F: Tensor, scales_L2F: Tensor, scale_S: Tensor, ends: list[int], y, scale) -> None:
    first = 0
    for group, end in enumerate(ends):
        rows = sums_S2F[first:end].float() * scales_L2F[group].float() * scale_S[first:end].view(-1, 1)
        gate, up = rows.chunk(2, 1)
        y[first:end], scale[first:end] = quantize(silu(gate) * up)
        first = end


@aclnn(
    "x:T weight_scale:T activation_scale:T bias:T quant_scale:T quant_offset:T group_index:T activate_left:b "
    "quant_mode:s",
    "y:T scale:T",
)
def aclnnDequantSwigluQuant(
    x,
    weight_scale,
    activation_scale,
    bias,
    quant_scale,
    quant_offset,
    group_index,
    activate_left,
    quant_mode,
    y,
    scale,
) -> None:
    require(x.dtype == torch.int32 and x.dim() == 2, "only int32 sums are emulated")
    require(
        bias is None and quant_scale is None and quant_offset is None,
        "a bias or smooth scales are not emulated",
    )
    require(activate_left and quant_mode == "dynamic", "only the left half as gate, and dynamic scales")
    width = x.shape[1] // 2
    require(
        width <= 10496 and width % 64 == 0,
        f"half of a row has {width} values: not a multiple of 64 up to 10496",
    )
    require(weight_scale.dtype == torch.float32, f"weight_scale is {weight_scale.dtype}, must be float32")
    require(
        activation_scale.dtype == torch.float32,
        f"activation_scale is {activation_scale.dtype}, must be float32",
    )
    require(activation_scale.shape == (len(x), 1), "activation_scale must be [tokens, 1] (op-plugin 26.0.0)")
    ends = group_ends(group_index, 1, len(x)) if len(group_index) > 1 else group_ends(group_index, 0, len(x))
    require(weight_scale.shape == (len(ends), x.shape[1]), "weight_scale must be [groups, 2F]")
    _swiglu_quant(x, weight_scale, activation_scale, ends, y, scale)


@aclnn(
    "x:T weight:L weight_scale:L weight_assist_matrix:L bias:T x_scale:T smooth_scale:T group_list:T dequant_mode:i "
    "dequant_dtype:i quant_mode:i group_list_type:i tuning_config:I",
    "y:T scale:T",
)
def aclnnGroupedMatmulSwigluQuantWeightNzV2(
    x,
    weight,
    weight_scale,
    weight_assist_matrix,
    bias,
    x_scale,
    smooth_scale,
    group_list,
    dequant_mode,
    dequant_dtype,
    quant_mode,
    group_list_type,
    tuning_config,
    y,
    scale,
) -> None:
    require(len(weight) == len(weight_scale) == 1, "only one weight, and one scale")
    (tiles,), (weight_scale,) = weight, weight_scale
    require(x.dtype == tiles.dtype == torch.int8, "only int8 rows and weights are emulated")
    require(tiles.dim() == 5, "int8 weights must be FRACTAL_NZ")
    require(not weight_assist_matrix and bias is None and smooth_scale is None, "those are for int4")
    require(
        dequant_mode == dequant_dtype == quant_mode == 0, "A2 and A3 take scales a row, and float32 between"
    )
    weight = from_nz(tiles)
    require(x.shape[1] == weight.shape[1], f"x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
    require(weight.shape[2] <= MOST_COLUMNS, f"{weight.shape[2]} columns are more than {MOST_COLUMNS}")
    require(x.shape[1] < INNER_LIMIT, f"the inner dimension is not below {INNER_LIMIT}")
    require(weight_scale.dtype in SCALES, f"weight_scale is {weight_scale.dtype}")
    require(weight_scale.shape == (len(weight), weight.shape[2]), "weight_scale must be [groups, 2F]")
    require(
        x_scale.dtype == torch.float32 and x_scale.shape == (len(x),), "x_scale must be float32, one a row"
    )
    ends = group_ends(group_list, group_list_type, len(x))
    require(len(ends) == len(weight), f"{len(ends)} groups, but {len(weight)} matrices")
    groups = torch.bucketize(torch.arange(ends[-1]), torch.tensor(ends), right=True)
    sums = torch.stack([x[row].double() @ weight[group].double() for row, group in enumerate(groups)])
    _swiglu_quant(sums, weight_scale, x_scale, ends, y, scale)


@aclnn(
    "x:T weight:L weight_scale:L weight_assist_matrix:L bias:T x_scale:T smooth_scale:T group_list:T dequant_mode:i "
    "dequant_dtype:i quant_mode:i group_list_type:i tuning_config:I",
    "y:T scale:T",
)
def aclnnGroupedMatmulSwigluQuantV2(weight, **_) -> None:
    """What torch_npu calls for plain weights."""
    require(weight[0].dtype != torch.int8, "int8 weights must be FRACTAL_NZ")
    require(False, "other types than int8 are not emulated")
