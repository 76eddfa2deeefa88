"""Routers that LMDeploy's models get wrong, in the place of their own top-k.

Letters of its own: Z groups of experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GroupLimitedTopK(nn.Module):
    """DeepSeek-V2's `group_limited_greedy`: the best experts of the groups that hold the best ones.

    Weights are the softmax over all experts, those of other groups too.
    """

    def __init__(self, top_k: int, groups: int, chosen_groups: int) -> None:
        super().__init__()
        self.top_k, self.groups, self.chosen_groups = top_k, groups, chosen_groups

    def forward(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, [T, K] both."""
        scores_TE = logits_TE.float().softmax(-1)
        best_TZ = scores_TE.unflatten(-1, (self.groups, -1)).amax(-1)
        weights_TK, experts_TK = within_groups(scores_TE, best_TZ, self.chosen_groups).topk(self.top_k)
        return weights_TK, experts_TK


def within_groups(scores_TE: Tensor, of_groups_TZ: Tensor, chosen: int) -> Tensor:
    """The scores of experts in each token's `chosen` best groups; of the others minus infinity."""
    allowed_TZ = torch.zeros_like(of_groups_TZ, dtype=torch.bool)
    allowed_TZ.scatter_(1, of_groups_TZ.topk(chosen).indices, True)
    experts_a_group = scores_TE.shape[1] // of_groups_TZ.shape[1]
    return scores_TE.masked_fill(~allowed_TZ.repeat_interleave(experts_a_group, 1), float("-inf"))


class CorrectedTopK:
    """GLM-4.5's router: DeepSeek-V3's, whose correction bias is a parameter of the `gate`.

    No module, so that the bias has one name only. Weights are neither renormalised nor scaled: the block does both.
    """

    def __init__(self, router: nn.Module, gate: Any) -> None:
        self.router, self.gate = router, gate

    def __call__(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, [T, K] both."""
        return self.router(logits_TE, self.gate.e_score_correction_bias)
