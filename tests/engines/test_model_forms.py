"""Configurations get the keys that LMDeploy reads, and keep those that they have."""

from __future__ import annotations

import pytest
from transformers import DeepseekV3Config, Glm4MoeLiteConfig, PhimoeConfig, Qwen3NextConfig

from epbackend.engines.lmdeploy.model_forms import as_released
from epbackend.errors import ConfigError


def test_what_a_release_says_is_kept():
    config = as_released(DeepseekV3Config(scoring_func="softmax"))
    assert (config.scoring_func, config.topk_method, config.moe_layer_freq) == ("softmax", "noaux_tc", 1)


def test_dense_layers_are_counted():
    assert (
        as_released(Glm4MoeLiteConfig(mlp_layer_types=["dense"] * 2 + ["sparse"] * 3)).first_k_dense_replace
        == 2
    )


def test_architectures_are_called_as_in_their_releases():
    assert as_released(PhimoeConfig(architectures=["PhimoeForCausalLM"])).architectures == [
        "PhiMoEForCausalLM"
    ]


@pytest.mark.parametrize(
    "config",
    [
        lambda: Glm4MoeLiteConfig(num_hidden_layers=3, mlp_layer_types=["dense", "sparse", "dense"]),
        lambda: Qwen3NextConfig(
            num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"]
        ),
    ],
)
def test_layers_in_an_order_that_lmdeploy_does_not_know_are_refused(config):
    with pytest.raises(ConfigError, match=r"layer_types: .*LMDeploy knows .* cannot be served"):
        as_released(config())
