"""Every torch_npu operator that epbackend calls; no other file calls one.

Written for torch-npu 2.9 to 2.14 (tests/ascend/schemas.json has what each accepts): arguments go by keyword, and none
is passed that one of these versions does not know. Limits are those of the operators' documentation
(https://gitcode.com/Ascend/op-plugin, docs/context). The wrappers come first, then checks of what the operators cannot
take, whose errors name the setting that helps, and DeepSeek-V3's router.

Shapes: S rows, L groups of rows, N and K as in [out, in] weights, T tokens, E experts of a router.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from epbackend.errors import ConfigError, UnavailableError
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.weight_formats import FLOATS

FRACTAL_NZ = 29
"""Its number among CANN's formats."""


@cache
def _npu() -> Any:
    """torch_npu, imported on first use: without CANN it cannot be."""
    return import_module("torch_npu")


def chip_name() -> str:
    """What CANN calls this chip, for example "Ascend910B1" (A2) or "Ascend910_9391" (A3)."""
    return torch.get_device_module("npu").get_device_name()


def cann_release() -> str | None:
    """CANN's, for example "8.3.RC1"; None where torch-npu cannot tell it."""
    find = getattr(_npu().npu.utils, "get_cann_version", None)  # older ones have none
    return (find() if find else None) or None


def init_routing(
    hidden_TD: Tensor, ids_TK: Tensor, experts: int, active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows_SD, choice_of_row_S, counts_L): each token once for each choice of an expert below `active`, sorted by
    expert.

    `ids_TK` is int32 and below `experts`; T > 0. S = T * K; rows and choices past the sum of the counts are garbage.
    """
    rows_SD, choice_of_row_S, counts_L, _ = _npu().npu_moe_init_routing_v2(
        hidden_TD,
        ids_TK,
        active_num=ids_TK.numel(),  # older versions take no other
        expert_num=experts,
        expert_tokens_num_type=1,  # counts, not sums
        expert_tokens_num_flag=True,
        active_expert_range=[0, active],  # its default is whatever the process's first call said
        quant_mode=-1,  # its default is 0 up to torch-npu 2.9
        row_idx_type=1,  # from row to choice, and the type that has the fast path for large batches
    )
    return rows_SD, choice_of_row_S, counts_L


def token_unpermute(rows_SD: Tensor, row_of_choice: Tensor, weights_TK: Tensor) -> Tensor:
    """out_TD: for each token the weighted sum of its K rows. `row_of_choice` is int32 [T * K]; S > 0 and T > 0.

    Outside the document, which wants S = T * K rows and none named twice (op-plugin 7.2.0): there may be fewer rows,
    and one of them named again with a weight of 0. The kernel reads the row of each choice by itself.
    """
    return _npu().npu_moe_token_unpermute(rows_SD, row_of_choice, probs=weights_TK)


def grouped_matmul(
    rows_SK: Tensor, weight_LKN: Tensor, ends_L: Tensor, bias_LN: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """rows_SN: rows ends[l - 1] to ends[l] times weight[l]; rows past the last end are garbage.

    At most 1024 groups; K and N below 65536. `weight_LKN` may be a transposed view. int8 rows give int32 sums.

    Outside the document, which wants the last end to be the number of rows (op-plugin 7.2.0): it may come before that,
    as vllm-ascend has it too.
    """
    return _npu().npu_grouped_matmul(
        [rows_SK],
        [weight_LKN],
        bias=None if bias_LN is None else [bias_LN],
        group_list=ends_L,
        split_item=2,  # one tensor comes back
        group_type=0,  # groups of rows
        group_list_type=0,  # ends: sizes (1) are not allowed for a single group
        output_dtype=out_dtype,
    )[0]


def grouped_matmul_scaled(
    values_SK: Tensor,
    scale_S: Tensor,
    weight_LKN: Tensor,
    scale_LN: Tensor,
    ends_L: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """rows_SN of int8 rows and weights, both scales applied.

    For bfloat16 the operator takes the weight's scale in bfloat16, for float16 in float32; the rows' is float32.
    """
    return _npu().npu_grouped_matmul(
        [values_SK],
        [weight_LKN],
        scale=[scale_LN.to(torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32)],
        per_token_scale=[scale_S],
        group_list=ends_L,
        split_item=2,
        group_type=0,
        group_list_type=0,
        output_dtype=out_dtype,
    )[0]


def swiglu(rows_S2F: Tensor) -> Tensor:
    """rows_SF: silu(first half) * second half; S > 0 (aclnnSwiGlu, CANN 8.0 to 8.5: no empty tensors)."""
    return _npu().npu_swiglu(rows_S2F, dim=-1)


def dynamic_quant(rows_SK: Tensor) -> tuple[Tensor, Tensor]:
    """(values_SK int8, scale_S float32) of bfloat16 or float16 rows."""
    return _npu().npu_dynamic_quant(rows_SK)


def dequant_swiglu_quant(
    sums_S2F: Tensor, scale_L2F: Tensor, scale_S: Tensor, counts_L: Tensor
) -> tuple[Tensor, Tensor]:
    """(values_SF int8, scale_S float32): swiglu of int32 sums times both scales, quantized again.

    F at most 10496 and a multiple of 64.
    """
    return _npu().npu_dequant_swiglu_quant(
        sums_S2F,
        weight_scale=scale_L2F,
        activation_scale=scale_S.unsqueeze(
            1
        ),  # [tokens, 1] (op-plugin 26.0.0); before, any shape of that many
        group_index=counts_L,
        activate_left=True,  # the first half is the gate
        quant_mode=1,  # a scale for each row
    )


def fractal_nz(weight_LKN: Tensor) -> Tensor | None:
    """A copy in the layout FRACTAL_NZ, which still has the shape [L, K, N]; None where torch_npu makes none.

    torch_npu makes such tensors only under a setting of the process, which is as before when this returns.
    """
    config = torch.get_device_module("npu").config
    before = _npu()._C._npu_getOption("ALLOW_INTERNAL_FORMAT")
    config.allow_internal_format = True
    try:
        tiles_LKN = format_cast(weight_LKN, FRACTAL_NZ)
    finally:
        config.allow_internal_format = before == b"enable"
    return tiles_LKN if _npu().get_npu_format(tiles_LKN) == FRACTAL_NZ else None


def raw_bytes(tensor: Tensor) -> Tensor:
    """All bytes of a whole tensor of any format as they lie in memory: uint8, and no owner of them.

    A view would keep the format, which torch_npu reads only as a whole. It makes such tensors for its own graphs.

    Raises:
        UnavailableError: this torch_npu does not.
    """
    binding, size, start = _npu()._C, tensor.untyped_storage().nbytes(), tensor.data_ptr()
    try:
        make_storage, make_tensor = (
            binding._construct_storage_from_data_pointer,
            binding._construct_NPU_Tensor_From_Storage_And_Metadata,
        )
    except AttributeError as error:
        raise UnavailableError(
            "this torch-npu does not show the bytes of W8A8 experts in FRACTAL_NZ, so that none can be "
            "replaced by itself: set balance.on: false, or use torch-npu 2.13"
        ) from error
    said = {"data_ptr": start, "nbytes": size, "size": (size,), "stride": (1,), "storage_offset": 0}
    said |= {"dtype": torch.uint8, "device": tensor.device}
    return make_tensor(said, make_storage(start, tensor.device, size))


def format_cast(tensor: Tensor, layout: int) -> Tensor:
    """A copy in another of CANN's formats."""
    return _npu().npu_format_cast(tensor, layout)


def moe_gating_top_k(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, groups: int, top_groups: int, factor: float
) -> tuple[Tensor, Tensor]:
    """(weights_TK in the logits' type, ids_TK int32) of DeepSeek-V3's router (`sigmoid_top_k`).

    E at most 2048, and E / groups more than 2.
    """
    weights_TK, ids_TK, _ = _npu().npu_moe_gating_top_k(
        logits_TE,
        top_k,
        bias=bias_E,
        k_group=top_groups,
        group_count=groups,
        group_select_mode=1,  # a group counts as much as its two best
        renorm=0,  # the only one there is
        norm_type=1,  # sigmoid
        routed_scaling_factor=factor,
        eps=1e-20,
    )
    return weights_TK, ids_TK


def grouped_matmul_swiglu_quant(
    values_SD: Tensor, scale_S: Tensor, tiles_LDN: Tensor, scale_LN: Tensor, ends_L: Tensor
) -> tuple[Tensor, Tensor]:
    """(values_SF int8, scale_S float32): the product of int8 rows, swiglu (gate first), quantized again.

    Weights in FRACTAL_NZ; N = 2F at most 10240, D below 65536. Types and modes have defaults that differ between
    versions, and are the only ones for these chips.
    """
    return _npu().npu_grouped_matmul_swiglu_quant_v2(
        values_SD, [tiles_LDN], [scale_LN], scale_S, ends_L, group_list_type=0
    )


def hccl_backend(store: Any, name: str, ranks: list[int], rank: int, buffer_mb: int) -> Any:
    """A ProcessGroupHCCL called `name`, whose communicator has a buffer of its own size instead of HCCL_BUFFSIZE's.

    `ranks` are global, `rank` is this one's place among them.
    """
    hccl = _npu()._C._distributed_c10d.ProcessGroupHCCL
    options = hccl.Options()
    options.hccl_config = {"hccl_buffer_size": buffer_mb}
    options.global_ranks_in_group = ranks
    options.group_id = name
    return hccl(store, rank, len(ranks), options)


@dataclass(frozen=True)
class FusedGroup:
    """The ranks of a fused dispatch, and what must be the same on all of them and for dispatch and combine."""

    communicator: str
    """Its name; see `epbackend.dispatch.mc2`."""
    rank: int
    size: int
    slots: int
    """Experts of each rank."""
    tokens: int
    """Of each rank: the same on all."""
    algorithm: str

    def arguments(self) -> dict[str, Any]:
        return {
            "group_ep": self.communicator,
            "ep_world_size": self.size,
            "ep_rank_id": self.rank,
            "moe_expert_num": self.slots * self.size,
            "global_bs": self.tokens * self.size,
            "comm_alg": self.algorithm,
        }


@dataclass(frozen=True)
class FusedRows:
    """What arrived, and what only combine can read."""

    rows_SD: Tensor
    """Sorted by expert; rows past the counts are garbage."""
    counts_L: Tensor
    assist_info: Tensor
    arrived: Tensor
    scale_S: Tensor | None
    """Of rows that traveled as int8."""
    expand_scales: Tensor
    """The choices' weights where dispatch brings them along; A2's combine wants it (op-plugin 7.2.0)."""


def moe_dispatch(
    hidden_TD: Tensor, ids_TK: Tensor, active_T: Tensor, group: FusedGroup, int8: bool
) -> FusedRows:
    """Send each token of the mask to its experts. `ids_TK`: int32, valid and different within a row, masked or not.

    `active_T` is True first, then False. With `int8` each row travels quantized, with a scale. Limits:
    `epbackend.dispatch.mc2`.
    """
    rows_SD, scale_S, assist_info, counts_L, arrived, _, expand_scales = (
        _npu().npu_moe_distribute_dispatch_v2(
            x=hidden_TD,
            expert_ids=ids_TK,
            x_active_mask=active_T,
            quant_mode=2 if int8 else 0,
            expert_token_nums_type=1,  # counts, not sums
            **group.arguments(),
        )
    )
    return FusedRows(rows_SD, counts_L, assist_info, arrived, scale_S if int8 else None, expand_scales)


def moe_combine(
    rows_SD: Tensor, ids_TK: Tensor, weights_TK: Tensor, active_T: Tensor, sent: FusedRows, group: FusedGroup
) -> Tensor:
    """out_TD: the weighted sums (`weights_TK` float32), on the tokens' own ranks; rows outside the mask are garbage."""
    return _npu().npu_moe_distribute_combine_v2(
        expand_x=rows_SD,
        expert_ids=ids_TK,
        assist_info_for_combine=sent.assist_info,
        ep_send_counts=sent.arrived,
        expert_scales=weights_TK,
        x_active_mask=active_T,
        expand_scales=sent.expand_scales,
        **group.arguments(),
    )


MOST_GROUPS = 1024
"""Matrices of one grouped product."""

INNER_LIMIT = 65536
"""Rows and columns of a matrix stay below it."""

QUANTIZED = (torch.bfloat16, torch.float16)
"""Dtypes of rows that the operators quantize."""

TILE_ROWS, TILE_COLUMNS, TILED_LIMIT = 16, 32, 10240
"""A tile of FRACTAL_NZ in int8 [in, out], and the most columns that `grouped_matmul_swiglu_quant` takes."""

FUSED_INT8_STEP, FUSED_INT8_LIMIT = 64, 10496
"""`dequant_swiglu_quant` takes an F that is a multiple of the one and at most the other."""


def check_weights(weights: Tensor | Int8Weights) -> None:
    """Check that the grouped product takes the matrices.

    Raises:
        ConfigError: It does not; the message names the setting that helps.
    """
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
    """Check what W8A8 takes; `rows` is the dtype of the rows before they are quantized.

    Raises:
        ConfigError: The dtype or the bias is not supported.
    """
    if rows not in QUANTIZED:
        raise ConfigError(
            f"device ascend: W8A8 quantizes bfloat16 and float16 rows, not {rows}; set engine.dtype: bfloat16"
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


MOST_EXPERTS, GROUP_ALIGNMENT = 2048, 32
"""The operator's limit on experts, and the multiple that a group is padded to before it counts."""


def sigmoid_top_k(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, groups: int, top_groups: int, factor: float
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router in one operator (section 2.1.2 of its report; GLM-4.5 and Kimi-K2 have it too).

    scores = sigmoid(logits). Those groups of experts are kept whose two best scores, bias included, have the largest
    sums; of their experts the K best, bias included, are chosen. Their scores without it, divided by their sum and
    times `factor`, are the weights.

    Returns (weights_TK float32, ids_TK int32), the largest score with bias first. The sizes must be ones for which
    `router_fits`.
    """
    if not len(logits_TE):
        weights_TK = logits_TE.new_empty(0, top_k).float()
        return weights_TK, weights_TK.int()
    return moe_gating_top_k(logits_TE.float(), bias_E.float(), top_k, groups, top_groups, factor)


def router_fits(experts: int, top_k: int, groups: int, top_groups: int) -> bool:
    """Whether the operator takes a router of this size."""
    size, rest = divmod(experts, groups)
    padded = -(-size // GROUP_ALIGNMENT) * GROUP_ALIGNMENT
    return rest == 0 and size > 2 and padded * groups <= MOST_EXPERTS and top_k <= top_groups * size
