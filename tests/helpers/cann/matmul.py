"""Matrix products of int8 with scales, and grouped ones: y[rows of g] = x[rows of g] @ weight[g], of both."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.cann.formats import from_nz
from tests.helpers.cann.registry import aclnn, require

MOST_GROUPS = 1024
INNER_LIMIT = 65536
BIAS_OF = {torch.float16: torch.float16, torch.bfloat16: torch.float32, torch.float32: torch.float32}
"""The bias that goes with each type of x."""

SCALE_OF = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
"""The scale that goes with each output of an int8 product."""

_INPUTS = (
    "x:L weight:L bias:L scale:L offset:L antiquant_scale:L antiquant_offset:L per_token_scale:L group_list:T "
    "activation_input:L activation_quant_scale:L activation_quant_offset:L split_item:i group_type:i "
    "group_list_type:i act_type:i"
)
_OUTPUTS = "y:L activation_out:L dynamic_scale_out:L"
NOT_EMULATED = (
    "offset",
    "antiquant_scale",
    "antiquant_offset",
    "activation_input",
    "activation_quant_scale",
    "activation_quant_offset",
)


def group_ends(group_list: Tensor | None, group_list_type: int, rows: int) -> list[int]:
    """Where each group's rows end, of a list of ends (type 0) or of sizes (type 1)."""
    require(group_list is not None, "group_list is missing")
    require(
        group_list.dtype == torch.int64 and group_list.dim() == 1,
        "group_list must be int64 with one dimension",
    )
    require(group_list_type in (0, 1), f"group_list_type {group_list_type} is not emulated")
    require(len(group_list) <= MOST_GROUPS, f"{len(group_list)} groups are more than {MOST_GROUPS}")
    require(
        group_list_type == 0 or len(group_list) > 1,
        "sizes (group_list_type 1) of a single group are not allowed",
    )
    ends = (group_list if group_list_type == 0 else group_list.cumsum(0)).tolist()
    require(ends == sorted(ends) and ends[0] >= 0, f"group_list {group_list.tolist()} is not ascending")
    require(ends[-1] <= rows, f"group_list ends at {ends[-1]}, past the {rows} rows of x")
    return ends


def _grouped_matmul(
    x,
    weight,
    bias,
    scale,
    per_token_scale,
    group_list,
    split_item,
    group_type,
    group_list_type,
    act_type,
    y,
    **rest,
) -> None:
    for name in NOT_EMULATED:
        require(not rest[name], f"{name} is not emulated")
    require(group_type == 0 and split_item in (2, 3), "only groups of rows (group_type 0, split_item 2 or 3)")
    require(act_type == 0, "an activation inside the product is not emulated")
    require(
        len(x) == len(weight) == 1 and weight[0].dim() == 3, "only one x, and one weight of three dimensions"
    )
    (x,), (weight,), (y,) = x, weight, y
    ends = group_ends(group_list, group_list_type, len(x))
    require(len(ends) == len(weight), f"{len(ends)} groups, but {len(weight)} matrices")
    require(x.shape[1] == weight.shape[1], f"x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
    require(x.is_contiguous(), "x must not be transposed")
    inner = weight.shape[2] if weight.stride(2) == 1 else weight.shape[1]
    require(max(inner, x.shape[1]) < INNER_LIMIT, f"an inner dimension is not below {INNER_LIMIT}")
    require(x.dtype == weight.dtype, f"x is {x.dtype}, weight {weight.dtype}")
    product = _int8 if x.dtype == torch.int8 else _plain
    product(x, weight, bias, scale, per_token_scale, ends, y)


def _plain(x, weight, bias, scale, per_token_scale, ends, y) -> None:
    require(x.dtype in BIAS_OF, f"x of {x.dtype} is not supported")
    require(not scale and not per_token_scale, "scales are for int8")
    require(y.dtype == x.dtype, f"y is {y.dtype}, must be {x.dtype}")
    require(not bias or bias[0].dtype == BIAS_OF[x.dtype], f"bias for {x.dtype} must be {BIAS_OF[x.dtype]}")
    first = 0
    for group, end in enumerate(ends):
        rows = x[first:end].float() @ weight[group].float()
        y[first:end] = rows + bias[0][group].float() if bias else rows
        first = end


def _int8(x, weight, bias, scale, per_token_scale, ends, y) -> None:
    require(not bias, "a bias of an int8 product is not emulated")
    if y.dtype == torch.int32:
        require(not scale and not per_token_scale, "int32 is the sum before any scale")
        factors = torch.ones(weight.shape[0], weight.shape[2]), torch.ones(len(x))
    else:
        require(bool(scale) and bool(per_token_scale), "scale and per_token_scale are needed")
        require(y.dtype in SCALE_OF, f"y of {y.dtype} is not supported")
        require(scale[0].dtype == SCALE_OF[y.dtype], f"scale for {y.dtype} must be {SCALE_OF[y.dtype]}")
        require(scale[0].shape == (weight.shape[0], weight.shape[2]), "scale must be [groups, N]")
        require(per_token_scale[0].dtype == torch.float32, "per_token_scale must be float32")
        require(per_token_scale[0].shape == (len(x),), "per_token_scale must have one number a row of x")
        factors = scale[0], per_token_scale[0]
    first = 0
    for group, end in enumerate(ends):
        sums = x[first:end].double() @ weight[group].double()
        y[first:end] = sums * factors[0][group].double() * factors[1][first:end, None].double()
        first = end


@aclnn(_INPUTS + " tuning_config:I", _OUTPUTS)
def aclnnGroupedMatmulV5(**arguments) -> None:
    _grouped_matmul(**arguments)


@aclnn(_INPUTS, _OUTPUTS)
def aclnnGroupedMatmulV4(**arguments) -> None:
    _grouped_matmul(**arguments)


@aclnn(
    "x1:T x2:T x1_scale:T x2_scale:T y_scale:T x1_offset:T x2_offset:T y_offset:T bias:T transpose_x1:b "
    "transpose_x2:b group_size:i",
    "out:T",
)
def aclnnQuantMatmulV5(
    x1, x2, x1_scale, x2_scale, transpose_x1, transpose_x2, group_size, out, **rest
) -> None:
    """Int8 rows with a scale each, times int8 columns with a scale each (mode K-C of hicann/ops-nn's document)."""
    for name, given in rest.items():
        require(given is None or given.numel() == 0, f"{name} is not emulated")
    require(group_size == 0 and not transpose_x1 and not transpose_x2, "only plain products are emulated")
    require(
        x1.dtype == x2.dtype == torch.int8 and x1.dim() == x2.dim() == 2, "only int8 matrices are emulated"
    )
    require(x1.numel() > 0 and x2.numel() > 0, "empty tensors are not supported")
    require(x1.shape[1] == len(x2), f"x1 {tuple(x1.shape)} does not fit x2 {tuple(x2.shape)}")
    require(max(*x1.shape[1:], *x2.shape) < INNER_LIMIT, f"a dimension is not below {INNER_LIMIT}")
    require(x1_scale is not None and x1_scale.dtype == torch.float32, "x1_scale must be float32, one a row")
    require(x1_scale.shape == (len(x1),) and x2_scale.shape == (x2.shape[1],), "a scale a row and a column")
    scales = {torch.bfloat16: (torch.bfloat16, torch.float32), torch.float16: (torch.float32,)}
    require(x2_scale.dtype in scales.get(out.dtype, ()), f"x2_scale is {x2_scale.dtype}, out {out.dtype}")
    out.copy_((x1.double() @ x2.double()) * x2_scale.double() * x1_scale.double()[:, None])


@aclnn(_INPUTS + " tuning_config:I quant_group_size:i", _OUTPUTS)
def aclnnGroupedMatmulWeightNz(weight, y, **arguments) -> None:
    require(weight[0].dim() == 5 and weight[0].dtype == torch.int8, "only int8 tiles are emulated")
    require(y[0].dtype != torch.int32, "sums before any scale are for plain weights")
    _grouped_matmul(weight=[from_nz(weight[0])], y=y, **arguments)
