"""DeepSeek-V3's router in one operator (section 2.1.2 of its report; GLM-4.5 and Kimi-K2 have it too).

scores = sigmoid(logits). Those groups of experts are kept whose two best scores, bias included, have the largest sums;
of their experts the K best, bias included, are chosen. Their scores without it, divided by their sum and times a
factor, are the weights.
"""

from __future__ import annotations

from torch import Tensor

from epbackend.kernels.npu import ops

MOST_EXPERTS, GROUP_ALIGNMENT = 2048, 32
"""Of the operator, and what a group is padded to before it counts as experts."""


def sigmoid_top_k(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, groups: int, top_groups: int, factor: float
) -> tuple[Tensor, Tensor]:
    """(weights_TK float32, ids_TK int32), largest score with bias first; the sizes must be ones that `fits`."""
    if not len(logits_TE):
        weights_TK = logits_TE.new_empty(0, top_k).float()
        return weights_TK, weights_TK.int()
    return ops.moe_gating_top_k(logits_TE.float(), bias_E.float(), top_k, groups, top_groups, factor)


def router_fits(experts: int, top_k: int, groups: int, top_groups: int) -> bool:
    """Whether the operator takes a router of this size."""
    size, rest = divmod(experts, groups)
    padded = -(-size // GROUP_ALIGNMENT) * GROUP_ALIGNMENT
    return rest == 0 and size > 2 and padded * groups <= MOST_EXPERTS and top_k <= top_groups * size
