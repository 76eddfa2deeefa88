"""What docs/engines.md asks of every adapter of an engine, on two ranks with copies of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import epbackend
from epbackend.cli.demo import PROMPTS, Engine, engine_settings, greedy_tokens
from epbackend.config import EPConfig
from epbackend.engines.load_report import LoadReport
from epbackend.engines.transformers.ranks import generate
from epbackend.models import resolve
from epbackend.placement.placement import Layout, Placement

pytestmark = pytest.mark.usefixtures("forked_ranks")

MODEL, LAYERS, EXPERTS, TOP_K = "tiny-qwen3-moe", 4, 32, 4
NEW_TOKENS = 10
HELD = (tuple(range(20)), (*range(20, 32), 0, 1, 2))
"""Ranks with unequal numbers of slots, and three experts on both."""


def settings(engine: Engine, folder: Path) -> EPConfig:
    file = folder / "placement.json"
    file.write_text(Placement((Layout(HELD, EXPERTS),) * LAYERS).to_json())
    asked: dict[str, Any] = {
        "ep_level": {"prefill": 2, "decode": 1},
        "placement": {"file": str(file), "split": "level"},
    }
    return EPConfig.load({**engine_settings(engine, 2), **asked})


def answers(engine: Engine, config: EPConfig) -> tuple[list[list[int]], LoadReport]:
    """The tokens that follow each prompt, and the load report of the run."""
    if engine == "transformers":
        done = generate(resolve(MODEL), config, PROMPTS, NEW_TOKENS)
        return done.token_ids, done.load
    from lmdeploy import GenerationConfig

    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True)
    with epbackend.pipeline(MODEL, config) as pipe:
        said = pipe([*PROMPTS], gen_config=greedy, do_preprocess=False)
        return [each.token_ids for each in said], pipe.load()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["lmdeploy", "transformers"])
def test_an_adapter_brings_experts_routing_phases_and_steps(engine, tmp_path):
    tokens, load = answers(engine, settings(engine, tmp_path))
    assert tokens == greedy_tokens(resolve(MODEL), PROMPTS, NEW_TOKENS)

    # Experts of a rank: it computes those of its slots, and no others; those on both ranks are split.
    assert load.layers == tuple(range(LAYERS))
    for rank, held in enumerate(HELD):
        assert set(np.flatnonzero(load.tokens_RYE[rank].sum(axis=0))) <= set(held)

    # The router's output: each token is computed K times in every layer, on whatever ranks.
    tokens_Y = load.tokens_RYE.sum(axis=(0, 2))
    assert len(set(tokens_Y)) == 1
    assert tokens_Y[0] % TOP_K == 0
    assert tokens_Y[0] >= TOP_K * len(PROMPTS) * NEW_TOKENS

    # The phase of a step: each has the dispatcher that the config gives it.
    names = {phase: choice["name"] for phase, choice in load.dispatchers.items()}
    assert names["prefill"] == "alltoall"
    assert names["decode"] in ("replicated", "allgather")

    # The bounds of steps: the load is known step by step, and there the ranks wait for the busiest.
    assert load.calls >= NEW_TOKENS
    assert (load.step_imbalance_Y >= load.imbalance_Y - 1e-9).all()
