"""The router: which experts a token takes, and with what weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.cann.registry import aclnn, require


def best(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest of each row, the lower of equal ones first."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@aclnn(
    "x:T bias:T k:i k_group:i group_count:i group_select_mode:i renorm:i norm_type:i out_flag:b "
    "routed_scaling_factor:d eps:d",
    "y:T expert_idx:T norm_out:T",
)
def aclnnMoeGatingTopK(
    x,
    bias,
    k,
    k_group,
    group_count,
    group_select_mode,
    renorm,
    norm_type,
    out_flag,
    routed_scaling_factor,
    eps,
    y,
    expert_idx,
    norm_out,
) -> None:
    require(x.dim() == 2 and x.dtype in FLOATS, "x must be float, [T, E]")
    tokens, experts = x.shape
    require(tokens > 0, "x has no rows")
    require(renorm == 0, f"renorm {renorm} must be 0")
    require(
        norm_type == 1 and group_select_mode == 1, "only sigmoid, and groups by their two best, are emulated"
    )
    require(
        bias is not None and bias.dtype == x.dtype and bias.shape == (experts,), "bias must be like x, [E]"
    )
    require(group_count > 0 and experts % group_count == 0, f"{experts} experts in {group_count} groups")
    size = experts // group_count
    require(size > 2, f"groups of {size} experts are too small")
    require(-(-size // 32) * 32 * group_count <= 2048, f"{group_count} groups of {size} experts are too many")
    require(1 <= k_group <= group_count and 1 <= k <= k_group * size, f"k {k} of {k_group} groups of {size}")
    scores = x.float().sigmoid()
    by_group = (scores + bias.float()).view(tokens, group_count, size)
    # Of equal scores the one with the lower number comes first, as in the vendor's own tests.
    kept = best(by_group.topk(2).values.sum(2), k_group)
    left_out = torch.ones(tokens, group_count, dtype=torch.bool).scatter_(1, kept, False)
    chosen = best(by_group.masked_fill(left_out[:, :, None], -torch.inf).view(tokens, experts), k)
    weights = scores.gather(1, chosen)
    y.copy_(weights / (weights.sum(1, keepdim=True) + eps) * routed_scaling_factor)
    expert_idx.copy_(chosen)
    if out_flag:
        norm_out.copy_(scores)


@aclnn("x:T finished:T k:i", "y:T expert_idx:T row_idx:T")
def aclnnMoeGatingTopKSoftmax(x, finished, k, y, expert_idx, row_idx) -> None:
    require(x.dim() == 2 and x.dtype in FLOATS, "x must be float, [T, E]")
    require(finished is None, "finished rows are not emulated")
    require(0 < k <= min(x.shape[1], 1024), f"k {k} is not within {x.shape[1]} experts")
    scores = x.float().softmax(1)
    chosen = best(scores, k)
    y.copy_(scores.gather(1, chosen))
    expert_idx.copy_(chosen)
    row_idx.copy_(torch.arange(len(x) * k).view(k, -1).T)
