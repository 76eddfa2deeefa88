"""The router's choice of experts in one operator, for routers of two kinds.

softmax    Qwen3-MoE, Mixtral: the K largest of softmax(logits)
sigmoid    DeepSeek-V3, GLM-4.5: scores = sigmoid(logits); those groups of experts are kept whose two best scores, bias
           included, have the largest sums; of their experts the K best, bias included, are chosen, and their scores
           without it, divided by their sum and times a factor, are the weights
"""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.kernels.npu import ops

MOST_EXPERTS, MOST_CHOICES, GROUP_ALIGNMENT = 2048, 1024, 32
"""Of `npu_moe_gating_top_k`, of its softmax form, and what a group is padded to before it counts as experts."""


def softmax_top_k(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(weights_TK float32, ids_TK int32), largest weight first; the weights are not renormalised."""
    if not len(logits_TE):
        return _nothing(logits_TE, top_k)
    return ops.softmax_top_k(logits_TE.float(), top_k)


def sigmoid_top_k(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, groups: int, top_groups: int, factor: float
) -> tuple[Tensor, Tensor]:
    """(weights_TK float32, ids_TK int32), largest score with bias first. `fits_sigmoid` must have found no limit."""
    if not len(logits_TE):
        return _nothing(logits_TE, top_k)
    return ops.sigmoid_top_k(logits_TE.float(), bias_E.float(), top_k, groups, top_groups, factor)


def fits_softmax(experts: int, top_k: int) -> bool:
    """Whether the operator takes a router of this size."""
    return 0 < top_k <= min(experts, MOST_CHOICES)


def fits_sigmoid(experts: int, top_k: int, groups: int, top_groups: int) -> bool:
    """Whether the operator takes a router of this size."""
    size, rest = divmod(experts, groups)
    padded = -(-size // GROUP_ALIGNMENT) * GROUP_ALIGNMENT
    return rest == 0 and size > 2 and padded * groups <= MOST_EXPERTS and top_k <= top_groups * size


def _nothing(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights_TK = logits_TE.new_empty(0, top_k, dtype=torch.float32)
    return weights_TK, weights_TK.int()
