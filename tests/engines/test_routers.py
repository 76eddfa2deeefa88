"""Routers that stand in for LMDeploy's choose what transformers' own choose."""

from __future__ import annotations

import pytest
import torch
from lmdeploy.pytorch.backends.default.moe_router import DefaultRouterNoauxTCImpl
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from epbackend.engines.lmdeploy.patches.models import other_groups_never_win
from epbackend.engines.lmdeploy.routers import GroupLimitedTopK

SIZES = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}
TOKENS = 50


def by_expert(weights_TK, experts_TK):
    return torch.zeros(len(weights_TK), 12).scatter_(1, experts_TK, weights_TK)


@pytest.fixture
def hidden_TD():
    return torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(0))


def test_experts_of_the_best_groups_are_chosen_also_where_all_logits_are_negative(hidden_TD):
    theirs = DeepseekV2TopkRouter(
        DeepseekV2Config(**SIZES, topk_method="group_limited_greedy", routed_scaling_factor=1.0)
    )
    theirs.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    logits_TE, *chosen = theirs(hidden_TD)
    for logits in (logits_TE, logits_TE - 100):
        torch.testing.assert_close(by_expert(*GroupLimitedTopK(3, 4, 2)(logits)), by_expert(*chosen))


def test_a_negative_correction_lets_no_other_group_win(hidden_TD):
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(**SIZES, norm_topk_prob=True, routed_scaling_factor=2.5))
    theirs.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    theirs.e_score_correction_bias.fill_(-2.0)
    logits_TE, *chosen = theirs(hidden_TD)
    ours = DefaultRouterNoauxTCImpl("sigmoid", 3, 4, 2, 12, routed_scaling_factor=2.5)
    assert not torch.allclose(
        by_expert(*ours.forward(logits_TE, theirs.e_score_correction_bias)), by_expert(*chosen)
    )
    ours._forward_default = other_groups_never_win.build(type(ours)._forward_default).__get__(ours)
    torch.testing.assert_close(
        by_expert(*ours.forward(logits_TE, theirs.e_score_correction_bias)), by_expert(*chosen)
    )
