"""The fused dispatch and combine: rows to the ranks of their experts, weighted sums back."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.cann.elementwise import quantize
from tests.helpers.cann.hccl import Communicator
from tests.helpers.cann.registry import aclnn, chip, require

MEGABYTE = 1 << 20
NOTE = 128
"""int32 numbers of assist_info for each row; the first three are ours: source rank, token, choice."""

_GROUP = (
    "group_ep:s ep_world_size:i ep_rank_id:i moe_expert_num:i group_tp:s tp_world_size:i tp_rank_id:i "
    "expert_shard_type:i shared_expert_num:i shared_expert_rank_num:i"
)
_OTHER_EXPERTS = "zero_expert_num:i copy_expert_num:i const_expert_num:i"


_used: set[str] = set()
"""Communicators of the calls so far; those of an engine that is closed are gone."""


def _communicator(group: dict, tokens: int, hidden: int, top_k: int) -> tuple[Communicator, int]:
    """The communicator of a call that keeps all limits, and the experts of a rank."""
    size, experts = group["ep_world_size"], group["moe_expert_num"]
    require(
        not group["group_tp"] and group["tp_world_size"] in (0, 1), "a second group of ranks is not emulated"
    )
    require(group["shared_expert_rank_num"] == 0, "shared experts are not emulated")
    require(1 <= experts <= 1024 and experts % size == 0, f"{experts} experts on {size} ranks")
    slots = experts // size
    if chip() == "A2":
        require(size in (*range(2, 9), 16, 32, 64, 128, 256), f"ep_world_size {size}")
        # Op-plugin 7.2.0 has at most 24 experts a rank, 26.0.0 (CANN 9.0) no such limit: this is a CANN 9.1.
        require(0 < tokens <= 256, f"{tokens} tokens are not in 1 to 256")
        require(0 < hidden <= 7168 and hidden % 32 == 0, f"hidden size {hidden}")
        require(top_k <= 16, f"top-k {top_k}")
        require(group["comm_alg"] == "fullmesh", "only comm_alg fullmesh is emulated on A2")
    else:
        require(2 <= size <= 768, f"ep_world_size {size}")
        require(0 < tokens <= 512, f"{tokens} tokens are not in 1 to 512")
        require(1024 <= hidden <= 8192, f"hidden size {hidden} is not in 1024 to 8192")
        # 12 is the limit of comm_alg fullmesh_v2 (op-plugin 7.2.0 to master).
        require(top_k <= 16, f"top-k {top_k} is above 16")
        require(group["comm_alg"] == "", "only the default comm_alg is emulated on A3")
    communicator = Communicator(group["group_ep"], size, group["ep_rank_id"])
    others = {name for name in _used if name != group["group_ep"] and Communicator.alive(name)}
    require(
        not others, f"group_ep must be the same in all layers (op-plugin 7.2.0), and {others} served others"
    )
    _used.add(group["group_ep"])
    said = communicator.all_gather([tokens, hidden, top_k, experts, group["global_bs"]])
    require(all(other == said[0] for other in said), f"the ranks call with different sizes: {said}")
    needed = _buffer_bytes(tokens, size, slots, hidden, top_k, group["shared_expert_num"])
    require(
        communicator.buffer_mb * MEGABYTE >= needed, f"the buffer of {communicator.buffer_mb} MB is too small"
    )
    return communicator, slots


def _buffer_bytes(tokens: int, size: int, slots: int, hidden: int, top_k: int, shared: int) -> int:
    def align(value: int, step: int) -> int:
        return -(-value // step) * step

    if chip() == "A2":
        return 2 * (tokens * size * min(slots, top_k) * hidden * 2 + 2 * MEGABYTE)
    row = align(align(2 * hidden, 32) + 64, 512)
    return 2 * (slots * tokens * size * row + (top_k + shared) * tokens * align(2 * hidden, 512))


def _check_routing(expert_ids: Tensor, mask: Tensor | None, experts: int) -> Tensor:
    """The mask, all True where none is given."""
    require(expert_ids.dtype == torch.int32, f"expert_ids is {expert_ids.dtype}, must be int32")
    require(bool(((expert_ids >= 0) & (expert_ids < experts)).all()), "an id is outside of the experts")
    different = all(len(set(row)) == len(row) for row in expert_ids.tolist())
    require(different, "a token names an expert twice")
    if mask is None:
        return torch.ones(len(expert_ids), dtype=torch.bool)
    require(
        mask.dtype == torch.bool and mask.shape == (len(expert_ids),),
        "x_active_mask must be bool, one a token",
    )
    require(bool((mask.int().diff() <= 0).all()), "x_active_mask must be True first, then False")
    return mask


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _split(rows_SB: Tensor, values: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first `values` of each row that traveled as bytes, and the bytes after them."""
    width = values * dtype.itemsize
    return rows_SB[:, :width].contiguous().view(dtype), rows_SB[:, width:].contiguous()


@aclnn(
    "x:T expert_ids:T scales:T x_active_mask:T expert_scales:T elastic_info:T performance_info:T "
    + _GROUP
    + " quant_mode:i global_bs:i expert_token_nums_type:i comm_alg:s "
    + _OTHER_EXPERTS,
    "expand_x:T dynamic_scales:T assist_info:T expert_token_nums:T ep_recv_counts:T tp_recv_counts:T expand_scales:T",
)
def aclnnMoeDistributeDispatchV4(
    x,
    expert_ids,
    x_active_mask,
    expand_x,
    dynamic_scales,
    assist_info,
    expert_token_nums,
    ep_recv_counts,
    **group,
) -> None:
    require(group["quant_mode"] in (0, 2), f"quant_mode {group['quant_mode']} is neither 0 nor 2")
    require(group["scales"] is None, "smooth scales are not emulated")
    require(group["expert_token_nums_type"] == 1, "only expert_token_nums_type 1")
    require(x.dtype in (torch.bfloat16, torch.float16), f"x is {x.dtype}")
    (tokens, hidden), top_k = x.shape, expert_ids.shape[1]
    communicator, slots = _communicator(group, tokens, hidden, top_k)
    mask = _check_routing(expert_ids, x_active_mask, group["moe_expert_num"])
    require(
        group["global_bs"] in (0, tokens * communicator.size), "a mask asks for as many tokens on each rank"
    )

    expert_S = expert_ids[mask].reshape(-1).long()
    order_S = expert_S.argsort(stable=True)
    slot_S, rank_S = expert_S[order_S] % slots, torch.full_like(expert_S, communicator.rank)
    notes_S4 = torch.stack([slot_S, rank_S, order_S // top_k, order_S % top_k], 1)
    rows, scales = quantize(x) if group["quant_mode"] else (x, torch.full((tokens,), torch.nan))
    token_S = order_S // top_k
    parts = rows[token_S], scales[token_S, None], notes_S4.int()
    rows_SB = torch.cat([_as_bytes(part) for part in parts], 1)
    send_R = torch.bincount(expert_S // slots, minlength=communicator.size).tolist()
    arrived_SB = torch.cat(communicator.exchange(rows_SB, send_R))

    rows_SD, rest_SB = _split(arrived_SB, hidden, rows.dtype)
    scale_S1, notes_S4 = _split(rest_SB, 1, torch.float32)
    notes_S4 = notes_S4.view(torch.int32).long()
    order_S = notes_S4[:, 0].argsort(stable=True)
    count = len(order_S)
    require(count <= len(expand_x), f"{count} rows do not fit into {len(expand_x)}")
    expand_x[:count] = rows_SD[order_S]
    dynamic_scales[:count] = scale_S1[order_S, 0]  # without quantization documented as missing: NaN
    assist_info.view(-1, NOTE)[:count, :3] = notes_S4[order_S, 1:].int()
    expert_token_nums.copy_(torch.bincount(notes_S4[:, 0], minlength=slots))
    pair_S, pairs = notes_S4[:, 0] * communicator.size + notes_S4[:, 1], slots * communicator.size
    ep_recv_counts[:pairs] = torch.bincount(pair_S, minlength=pairs).cumsum(0).int()


@aclnn(
    "expand_x:T expert_ids:T assist_info:T ep_send_counts:T expert_scales:T tp_send_counts:T x_active_mask:T "
    "activation_scale:T weight_scale:T group_list:T expand_scales:T shared_expert_x:T elastic_info:T ori_x:T "
    "const_expert_alpha_1:T const_expert_alpha_2:T const_expert_v:T performance_info:T "
    + _GROUP
    + " global_bs:i out_dtype:i comm_quant_mode:i group_list_type:i comm_alg:s "
    + _OTHER_EXPERTS,
    "out:T",
)
def aclnnMoeDistributeCombineV4(
    expand_x,
    expert_ids,
    assist_info,
    ep_send_counts,
    expert_scales,
    x_active_mask,
    shared_expert_x,
    out,
    **group,
) -> None:
    require(
        group["comm_quant_mode"] == 0 and shared_expert_x is None, "only the plain weighted sum is emulated"
    )
    require(expert_scales.dtype == torch.float32, f"expert_scales is {expert_scales.dtype}, must be float32")
    (tokens, hidden), top_k = out.shape, expert_ids.shape[1]
    communicator, slots = _communicator(group, tokens, hidden, top_k)
    mask = _check_routing(expert_ids, x_active_mask, group["moe_expert_num"])

    count = int(ep_send_counts[slots * communicator.size - 1])
    notes_S3 = assist_info.view(-1, NOTE)[:count, :3]
    order_S = notes_S3[:, 0].argsort(stable=True)
    rows_SB = torch.cat([_as_bytes(expand_x[order_S]), _as_bytes(notes_S3[order_S, 1:])], 1)
    send_R = torch.bincount(notes_S3[:, 0], minlength=communicator.size).tolist()
    arrived_SB = torch.cat(communicator.exchange(rows_SB, send_R))

    rows_SD, notes_S2 = _split(arrived_SB, hidden, expand_x.dtype)
    notes_S2 = notes_S2.view(torch.int32).long()
    token_S, choice_S = notes_S2.unbind(1)
    require(len(token_S) == int(mask.sum()) * top_k, "rows got lost on the way")
    weighted_SD = rows_SD.float() * expert_scales[token_S, choice_S].unsqueeze(1)
    sums_TD = torch.zeros(tokens, hidden).index_add_(0, token_S, weighted_SD)
    out[: int(mask.sum())] = sums_TD[: int(mask.sum())].to(out.dtype)
