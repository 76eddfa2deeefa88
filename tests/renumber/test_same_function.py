"""A renumbered checkpoint is the same model: to transformers, and to LMDeploy with contiguous blocks of experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import epbackend
from epbackend.models import resolve
from epbackend.placement.loads import Loads
from epbackend.placement.renumbering import Renumbering
from epbackend.renumber import plan_renumbering, write
from tests.helpers.engine_models import EXPERTS, deepseek_v3, greedy_tokens, prompts, qwen3_moe, save
from tests.helpers.engines import GREEDY, config

pytestmark = pytest.mark.cpu

LAYERS = 3


def gpt_oss():
    torch.manual_seed(0)
    settings = GptOssConfig(
        vocab_size=512, hidden_size=64, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=EXPERTS, num_experts_per_tok=4, sliding_window=32,
        initializer_range=0.2, layer_types=["full_attention"] * LAYERS,
    )  # fmt: skip
    model = GptOssForCausalLM(settings)
    for layer in model.model.layers:
        for bias in (
            layer.mlp.router.bias,
            layer.mlp.experts.gate_up_proj_bias,
            layer.mlp.experts.down_proj_bias,
        ):
            bias.data.normal_(0, 0.2)
    return model


def qwen3_moe_fused(folder: Path) -> None:
    """As transformers 5 holds it: all experts of a layer in one tensor."""
    torch.manual_seed(0)
    qwen3_moe().save_pretrained(folder, save_original_format=False)


def in_shards(folder: Path) -> None:
    torch.manual_seed(0)
    deepseek_v3().save_pretrained(folder, max_shard_size="100KB")


MODELS = {
    "qwen3-moe": lambda folder: save("qwen3-moe", folder.parent).rename(folder),
    "qwen3-moe-fused": qwen3_moe_fused,
    "deepseek-v3-in-shards": in_shards,
    "gpt-oss": lambda folder: gpt_oss().save_pretrained(folder),
}


def skewed(first_dense: int = 0, experts: int = EXPERTS, layers: int = LAYERS) -> Loads:
    """The lower its number, the busier an expert: the first rank of contiguous blocks would have nearly all."""
    tokens_YE = np.tile(np.round(1000 * 0.8 ** np.arange(experts)), (layers, 1))
    tokens_YE[:first_dense] = 0
    return Loads.of(tokens_YE, ["skewed"])


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(3, 99).reshape(2, 48)).logits


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param("qwen3-moe", 4, marks=pytest.mark.slow),
        ("qwen3-moe-fused", 4),
        ("deepseek-v3-in-shards", 2),
        ("deepseek-v3-in-shards", 8),
        ("gpt-oss", 4),
    ],
)
def test_transformers_gives_the_same_logits(name, ranks, tmp_path):
    model = tmp_path / "old"
    MODELS[name](model)
    (model / "tokenizer.json").write_text("{}")
    plan = plan_renumbering(str(model), skewed(first_dense="deepseek" in name), ranks=ranks)
    assert len(plan.changed) == LAYERS - ("deepseek" in name)
    assert plan.after.imbalance_mean < plan.before.imbalance_mean - 0.05
    written = write(plan, tmp_path / "new")
    assert plan.checkpoint.blocks[1].stacked == (name in ("qwen3-moe-fused", "gpt-oss"))
    assert written.files >= (5 if "shards" in name else 1)

    old, new = logits(model), logits(tmp_path / "new")
    torch.testing.assert_close(new, old, rtol=0, atol=1e-4 * old.abs().max().item())


@pytest.mark.parametrize("ranks", [2, 8])
def test_groups_of_the_router_stay_whole(ranks, tmp_path):
    model = tmp_path / "old"
    in_shards(model)
    (model / "tokenizer.json").write_text("{}")
    plan = plan_renumbering(str(model), skewed(1), ranks=ranks)
    groups_YGE = np.sort(plan.old_YE.reshape(LAYERS, 4, EXPERTS // 4), axis=2)
    assert (groups_YGE[:, :, 0] % (EXPERTS // 4) == 0).all()
    assert (np.diff(groups_YGE, axis=2) == 1).all()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "ranks"), [("tiny-qwen3-moe", 2), ("tiny-qwen3-moe", 4), ("tiny-deepseek-v3", 2)]
)
def test_lmdeploy_with_contiguous_experts_runs_the_planned_placement(name, ranks, tmp_path):
    texts = prompts()[:8]
    settings = config({"dtype": "float32"}, ep_size=ranks, ep_level=2)
    before, old = served(name, settings, texts)
    loads = Loads.of(before.loads_YE(4, ranks), ["served"])
    plan = plan_renumbering(name, loads, ranks=ranks)
    write(plan, tmp_path / "new")
    after, new = served(str(tmp_path / "new"), settings, texts)

    assert new == old == greedy_tokens(Path(resolve(name)), texts)
    # The same tokens went to the same experts, which are where they were planned to be.
    # A prompt's last new token may be fed back or not.
    renumbered = Renumbering.beside(tmp_path / "new")
    counted_YE = np.take_along_axis(loads.tokens_WYE[0], renumbered.old_YE, axis=1)
    np.testing.assert_allclose(after.loads_YE(4, ranks), counted_YE, rtol=0, atol=len(texts))
    measured = [
        tokens_R.max() / tokens_R.mean() for tokens_R in after.tokens_RYE.sum(axis=2).T if tokens_R.any()
    ]
    assert np.mean(measured) == pytest.approx(plan.after.imbalance_mean, rel=0.02)
    assert plan.after.imbalance_mean < plan.before.imbalance_mean


def served(model, settings, texts):
    """(what the experts did, the tokens)"""
    with epbackend.pipeline(model, settings) as pipe:
        start = pipe.load()
        answers = pipe(texts, gen_config=GREEDY, do_preprocess=False)
    return pipe.load().since(start), [answer.token_ids for answer in answers]
