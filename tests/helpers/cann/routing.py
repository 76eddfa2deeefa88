"""Operators that sort rows by expert and bring them back."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.cann.registry import GARBAGE, aclnn, require

MOST_EXPERTS = 10240


@aclnn(
    "x:T expert_idx:T scale:T offset:T active_num:i expert_capacity:i expert_num:i drop_pad_mode:i "
    "expert_tokens_num_type:i expert_tokens_num_flag:b quant_mode:i active_expert_range:I row_idx_type:i",
    "expanded_x:T expanded_row_idx:T expert_tokens:T expanded_scale:T",
)
def aclnnMoeInitRoutingV3(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: list[int],
    row_idx_type: int,
    expanded_x: Tensor,
    expanded_row_idx: Tensor,
    expert_tokens: Tensor,
    expanded_scale: Tensor,
) -> None:
    require(drop_pad_mode == 0, "only drop_pad_mode 0")
    require(quant_mode == -1 and scale is None and offset is None, "only quant_mode -1 is emulated")
    require(
        expert_tokens_num_flag and expert_tokens_num_type == 1, "only expert_tokens_num_type 1, with its flag"
    )
    require(row_idx_type == 1, "only row_idx_type 1 is emulated")
    require(
        x.dim() == 2 and expert_idx.dim() == 2 and len(x) == len(expert_idx), "x [T, H] and expert_idx [T, K]"
    )
    require(len(x) > 0, "x has no rows")
    require(expert_idx.dtype == torch.int32, f"expert_idx is {expert_idx.dtype}, must be int32")
    require(active_num == expert_idx.numel(), f"active_num {active_num} must be T * K, {expert_idx.numel()}")
    require(0 < expert_num <= MOST_EXPERTS, f"expert_num {expert_num} is not in 1 to {MOST_EXPERTS}")
    require(
        len(active_expert_range) == 2, "active_expert_range is missing: its default is that of the first call"
    )
    first, last = active_expert_range
    require(
        0 <= first < last <= expert_num, f"active_expert_range {active_expert_range} is not within expert_num"
    )
    flat = expert_idx.reshape(-1).long()
    require(bool(((flat >= 0) & (flat < expert_num)).all()), "an id in expert_idx is not within expert_num")
    active = (flat >= first) & (flat < last)
    order = torch.where(active, flat, expert_num).argsort(stable=True)[: int(active.sum())]
    expanded_x[: len(order)] = x[order // expert_idx.shape[1]]
    expanded_row_idx.fill_(GARBAGE)
    expanded_row_idx[: len(order)] = order.int()
    expert_tokens.copy_(torch.bincount(flat[active] - first, minlength=last - first))


@aclnn("permuted_tokens:T sorted_indices:T probs:T padded_mode:b restore_shape:I", "out:T")
def aclnnMoeTokenUnpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape, out) -> None:
    require(not padded_mode, "padded_mode is not supported")
    require(probs is not None and probs.dim() == 2, "only with probs [T, K] is emulated")
    require(sorted_indices.dtype == torch.int32, f"sorted_indices is {sorted_indices.dtype}, must be int32")
    require(sorted_indices.numel() == probs.numel(), "sorted_indices must have one entry for each of probs")
    require(probs.shape[1] <= 512, "top-k is above 512")
    require(len(permuted_tokens) > 0 and len(probs) > 0, "there are no rows")
    indices = sorted_indices.long()
    require(
        bool(((indices >= 0) & (indices < len(permuted_tokens))).all()), "an index is outside permuted_tokens"
    )
    chosen = permuted_tokens[indices].view(*probs.shape, -1).float()
    out.copy_((chosen * probs.float().unsqueeze(2)).sum(1))
