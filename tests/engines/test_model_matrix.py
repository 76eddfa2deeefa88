"""Tiny models of every MoE architecture answer as transformers does, or are refused before anything starts."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.helpers.model_matrix import MODELS, RUNS, Run, matching_tokens, refusal
from tests.helpers.processes import engine_workers

IN_CHUNKS = {"max_prefill_token_num": 32, "max_batch_size": 2, "block_size": 16, "cache_blocks": 200}
SERVED = [name for name, model in MODELS.items() if not model.refused]


@pytest.fixture(scope="module")
def matrix_model(tmp_path_factory):
    """name -> folder of the model of that row."""
    folder = tmp_path_factory.mktemp("matrix")
    return cache(lambda name: MODELS[name].save(folder / name))


@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(name, way, marks=pytest.mark.slow) for name in SERVED for way in RUNS],
)
def test_tokens_are_those_of_transformers(name, way, matrix_model):
    same, all_ = matching_tokens(matrix_model(name), RUNS[way])
    assert same == all_ > 0


def test_linear_attention_keeps_its_states_between_chunks_of_prompts(matrix_model):
    """Two sequences at a time, prompts in parts of 32 tokens: states move on in parts, among other sequences'."""
    same, all_ = matching_tokens(matrix_model("qwen3-next"), Run(engine=IN_CHUNKS))
    assert same == all_ > 0


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].refused])
@pytest.mark.parametrize("run", [Run(), Run(ep_size=2)], ids=["ep 1", "ep 2"])
def test_a_model_that_cannot_run_is_refused_before_anything_starts(name, run, matrix_model):
    assert re.search(MODELS[name].refused, refusal(matrix_model(name), run))
    assert engine_workers() == []
