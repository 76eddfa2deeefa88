"""The MoE block of each model family gives the same answer however its experts are spread."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import lmdeploy
import pytest
import torch
from lmdeploy.pytorch.models.module_map import MODULE_MAP

from tests.helpers.expert_blocks import FAMILIES, LAYER, layer_number, run_blocks

SPREADS = {
    "replicas": (2, 1, 1, True),
    "tp 2": (2, 2, 1, False),
    "dp 2": (2, 1, 2, False),
    "4 ranks, replicas": (4, 1, 1, True),
    "4 ranks, tp 4": (4, 4, 1, False),
    "4 ranks, dp 2": (4, 1, 2, False),
}
"""(ep, tp, dp, replicas): dense layers whole or cut, all tokens on all ranks or on two groups of ranks."""


@pytest.fixture(scope="module")
def outputs(ranks):
    """(ep, tp, dp, replicas) -> each rank's outputs by family."""
    return cache(lambda *sizes: ranks.run(sizes[0], run_blocks, *sizes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "spread",
    [pytest.param(name, marks=[pytest.mark.slow] if ep > 2 else []) for name, (ep, *_) in SPREADS.items()],
)
def test_outputs_of_each_block_are_the_same_on_several_ranks(family, spread, outputs):
    ep, tp, dp, replicas = SPREADS[spread]
    spread_out = [of_rank[family] for of_rank in outputs(ep, tp, dp, replicas)]
    (whole,) = outputs(1, 1, 1, False)
    assert whole[family].abs().max() > 0.05
    # Ranks of one attention group have the same tokens; the first group's are those of the single rank.
    for out in spread_out[: ep // dp]:
        torch.testing.assert_close(out, whole[family], rtol=1e-4, atol=1e-5)
    for out in spread_out[ep // dp :]:
        torch.testing.assert_close(out, spread_out[-1])
        assert not torch.allclose(out, whole[family])


@pytest.mark.parametrize(
    "target",
    [
        "deepseek:DeepseekDecoderLayer",
        "deepseek_v2:DeepseekV2DecoderLayer",
        "glm4_moe:Glm4MoeDecoderLayer",
        "hy3:Hy3DecoderLayer",
        "kimi_k2_language:KimiK2DecoderLayer",
        "llama4:Llama4TextDecoderLayer",
        "mixtral:MixtralDecoderLayer",
        "phi3_moe:PhiMoEDecoderLayer",
        "qwen2_moe:Qwen2MoeDecoderLayer",
        "qwen3_moe:Qwen3MoeDecoderLayer",
        "qwen3_next:Qwen3NextDecoderLayer",
    ],
)
def test_experts_know_their_layer(target):
    assert layer_number(target) == LAYER


SOURCES = {
    file.stem: file.read_text() for file in (Path(lmdeploy.__file__).parent / "pytorch/models").glob("*.py")
}
HAVE_EXPERTS = {
    name for name, text in SOURCES.items() if re.search(r"(build_fused_moe|FusedMoEV4FP4)\(", text)
}
"""The modules of LMDeploy's models that build experts."""


def test_every_module_of_lmdeploy_with_experts_is_tested():
    assert {family.target.partition(":")[0] for family in FAMILIES.values()} == HAVE_EXPERTS - {"deepseek_v4"}


def test_every_model_with_experts_is_documented():
    documented = (Path(__file__).parents[2] / "docs" / "lmdeploy.md").read_text()
    with_experts = [name for name, target in MODULE_MAP.items() if _has_experts(target.split(".")[-2])]
    assert len(with_experts) > 30
    assert [name for name in with_experts if f"`{name}`" not in documented] == []


def _has_experts(module: str) -> bool:
    """Whether it builds experts, or is made of a module that does."""
    made_of = re.findall(r"^from \.(\w+) import", SOURCES.get(module, ""), re.MULTILINE)
    return module in HAVE_EXPERTS or any(_has_experts(name) for name in made_of)
