"""Greedy tokens of a real engine in float32 are those of Hugging Face's generate, however the experts are spread."""

from __future__ import annotations

import pytest
from lmdeploy import GenerationConfig

import epbackend
from tests.helpers.engine_models import EXPERTS, NEW_TOKENS, TOP_K, prompts
from tests.helpers.engines import GREEDY, config

pytestmark = pytest.mark.usefixtures("forked_ranks")

# Small enough that the twelve prompts wait in line, the long ones are cut in chunks, and shared beginnings are found.
CROWDED = {
    "max_batch_size": 4,
    "max_prefill_token_num": 64,
    "block_size": 16,
    "cache_blocks": 200,
    "enable_prefix_caching": True,
    "session_len": 400,
}


ONE_RANK = [("qwen3-moe", config()), ("deepseek-v2", config(CROWDED))]
TWO_RANKS = [
    ("qwen3-moe", config(ep_size=2)),
    ("deepseek-v2", config(ep_size=2, ep_level=2)),
    ("deepseek-v3", config(CROWDED | {"tp": 2}, ep_size=2, ep_level=1)),
]
RARER = [
    ("qwen3-moe", config(CROWDED, ep_size=2, ep_level={"prefill": 2, "decode": 1})),
    ("qwen3-moe", config({"tp": 2})),
    ("qwen3-moe", config({"executor": "ray"}, ep_size=2, ep_level=2)),
    ("deepseek-v2", config({"tp": 2}, ep_size=2)),
    ("deepseek-v3", config(CROWDED)),
    ("deepseek-v3", config(ep_size=2, ep_level=2)),
    ("deepseek-v3", config({"tp": 4}, ep_size=4, ep_level=2)),
    ("deepseek-v2", config(ep_size=4)),
]


@pytest.mark.parametrize(
    ("form", "settings"),
    [*ONE_RANK, *TWO_RANKS, *(pytest.param(*case, marks=pytest.mark.slow) for case in RARER)],
)
def test_tokens_are_those_of_hugging_face(form, settings, checkpoint, reference):
    texts = prompts()
    with epbackend.pipeline(str(checkpoint(form)), settings) as pipe:
        before = pipe.load()
        first = pipe(texts, gen_config=GREEDY, do_preprocess=False)
        load = pipe.load().since(before)
        cached = settings.engine.enable_prefix_caching
        again = pipe(texts, gen_config=GREEDY, do_preprocess=False) if cached else []

    assert [answer.token_ids for answer in first] == reference(form)
    if cached:
        assert [answer.token_ids for answer in again] == reference(form)
        assert max(answer.cached_tokens for answer in again) >= 16
    _check_load(load, settings, [answer.input_token_len - answer.cached_tokens for answer in first])


def _check_load(load, settings, prompt_lengths):
    """Every token of every prompt went to TOP_K experts of each MoE layer, once."""
    ranks, layers, experts = load.tokens_RYE.shape
    assert (ranks, experts) == (settings.world_size, EXPERTS)
    assert load.layers in ((0, 1, 2), (1, 2))
    assert {choice["name"] for choice in load.dispatchers.values()} <= {"replicated", "allgather", "alltoall"}
    if settings.ep_size > 1:
        shared = load.tokens_RYE.reshape(ranks, layers, settings.ep_size, -1).any(axis=(1, 3))
        assert (shared == [[rank == part for part in range(ranks)] for rank in range(ranks)]).all()
        routed = load.tokens_RYE.sum(axis=(0, 2))
    else:
        routed = load.tokens_RYE[0].sum(axis=1)
    # A prompt's last new token need not be fed back; the engine may be doing it while we read.
    fed = sum(length + NEW_TOKENS - 1 for length in prompt_lengths)
    assert (routed >= fed * TOP_K).all()
    assert (routed <= (fed + len(prompt_lengths)) * TOP_K).all()


@pytest.mark.parametrize(
    ("level", "forced", "counted"),
    [
        (
            1,
            {
                "enable_init_routing_cutoff": True,
                "topk_scaling_factor": 0.25,
                "init_routing_cutoff_min_tokens": 1,
            },
            "passes",
        ),
        (2, {"alltoall_ep_buffer_scale_factors": [[0, 0.25]]}, "rounds"),
    ],
    ids=["passes", "rounds"],
)
def test_forced_passes_and_rounds_lose_nothing(level, forced, counted, checkpoint, reference):
    with epbackend.pipeline(
        str(checkpoint("qwen3-moe")), config(ep_size=2, ep_level=level, **forced)
    ) as pipe:
        answers = pipe(prompts()[:4], gen_config=GREEDY, do_preprocess=False)
        load = pipe.load()
    assert [answer.token_ids for answer in answers] == reference("qwen3-moe")[:4]
    assert getattr(load, counted) > 1


def test_streamed_parts_and_seeded_samples_are_reproducible(checkpoint, reference):
    """One rank, in this process: parts come one by one, and a seed draws the same tokens again in any company."""
    texts = prompts()[:4]
    with epbackend.pipeline(str(checkpoint("qwen3-moe")), config()) as pipe:
        parts = list(pipe.stream_infer(texts[1], gen_config=GREEDY, do_preprocess=False))
        sampled = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=True, random_seed=7, ignore_eos=True)
        other = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=True, random_seed=8, ignore_eos=True)
        alone = pipe(texts[0], gen_config=sampled, do_preprocess=False)
        crowd = pipe(texts, gen_config=[sampled, other, other, other], do_preprocess=False)
        differently = pipe(texts[0], gen_config=other, do_preprocess=False)

    assert len(parts) >= NEW_TOKENS
    assert [token for part in parts for token in part.token_ids] == reference("qwen3-moe")[1]
    assert alone.token_ids == crowd[0].token_ids
    assert alone.token_ids != differently.token_ids
