"""However experts are placed and tokens split, the engine's greedy tokens in float32 are those of Hugging Face."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import epbackend
from epbackend import EPConfig
from epbackend.engines.placement import finished_placement, from_env, to_env
from epbackend.errors import ConfigError
from epbackend.models import resolve
from epbackend.placement import Layout, Loads, Placement, plan
from epbackend.placement.formats import write
from tests.helpers.engine_models import greedy_tokens, prompts
from tests.helpers.engines import GREEDY, config
from tests.helpers.processes import engine_workers

pytestmark = pytest.mark.usefixtures("forked_ranks")

EXPERTS, LAYERS = 32, 4
FLOAT32 = {"dtype": "float32"}
DENSE = {"tiny-qwen3-moe": (), "tiny-deepseek-v3": (0,)}
TEXTS = prompts()[:5]


@cache
def expected(model: str) -> list[list[int]]:
    return greedy_tokens(Path(resolve(model)), TEXTS)


def skewed_loads(model: str, seed: int = 0) -> np.ndarray:
    loads_YE = np.random.default_rng(seed).lognormal(4, 1.2, (LAYERS, EXPERTS)).round()
    loads_YE[list(DENSE[model])] = 0
    return loads_YE


def duplicates(model: str, ranks: int) -> Placement:
    """Experts twice on a rank, and ranks with unequal slots that follow no order."""
    draw = np.random.default_rng(1)
    layers = []
    for _ in range(LAYERS):
        slots = draw.permutation([*range(EXPERTS), *draw.integers(0, EXPERTS, 7)]).tolist()
        cuts = [
            0,
            *sorted(draw.choice(np.arange(4, len(slots) - 4, 3), ranks - 1, replace=False)),
            len(slots),
        ]
        held = [slots[cuts[rank] : cuts[rank + 1]] for rank in range(ranks)]
        layers.append(Layout(tuple((*each, each[0]) for each in held), EXPERTS))
    return Placement(tuple(layers))


def incremental(model: str, ranks: int) -> Placement:
    current = plan(skewed_loads(model), ranks=ranks, slots=EXPERTS + 8, algorithm="eplb")
    return plan(skewed_loads(model, seed=1), ranks=ranks, algorithm="incremental", current=current)


PLACEMENTS = {
    "eplb": lambda model, ranks: plan(skewed_loads(model), ranks=ranks, slots=40, algorithm="eplb"),
    "omni-uneven": lambda model, ranks: plan(skewed_loads(model), ranks=ranks, budget=13, algorithm="omni"),
    "lplb": lambda model, ranks: plan(
        skewed_loads(model), ranks=ranks, slots=32 + ranks, algorithm="lplb", topology="ring"
    ),
    "refined": lambda model, ranks: plan(skewed_loads(model), ranks=ranks, slots=EXPERTS + 4),
    "incremental": incremental,
    "duplicates": duplicates,
}
QWEN, DEEPSEEK = DENSE
CASES = [
    (QWEN, 2, 1, ["refined", "omni-uneven", "lplb", "duplicates"], {"prefill": "level", "decode": "nearest"}),
    (DEEPSEEK, 2, 2, ["eplb", "duplicates", "lplb", "incremental"], {"prefill": "even", "decode": "level"}),
]
"""The placement of each layer: they have nothing to do with one another, so that one engine shows several."""
RARER = [
    (model, ranks, level, [placement] * LAYERS, split)
    for model in DENSE
    for ranks in (2, 4)
    for placement, level, split in [
        ("eplb", 1, "even"),
        ("eplb", 2, "level"),
        ("omni-uneven", 1, "level"),
        ("omni-uneven", 2, "even"),
        ("lplb", 2, "level"),
        ("refined", 2, "nearest"),
        ("incremental", 2, "level"),
        ("duplicates", 1, "nearest"),
        ("duplicates", 2, "even"),
    ]
]
RARER.append((QWEN, 4, 2, ["omni-uneven", "omni-uneven", "duplicates", "eplb"], "level"))


def answer(model: str, settings: EPConfig) -> tuple[list[list[int]], Any]:
    with epbackend.pipeline(model, settings) as pipe:
        before = pipe.load()
        answers = pipe(TEXTS, gen_config=GREEDY, do_preprocess=False)
        return [each.token_ids for each in answers], pipe.load().since(before)


@pytest.mark.parametrize(
    ("model", "ranks", "level", "placements", "split"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in RARER)],
)
def test_tokens_do_not_depend_on_placement_and_split(model, ranks, level, placements, split, tmp_path):
    whole = {name: PLACEMENTS[name](model, ranks) for name in set(placements)}
    placed = Placement(tuple(whole[name].layers[layer] for layer, name in enumerate(placements)))
    (tmp_path / "placement.json").write_text(placed.to_json())
    section = {"file": str(tmp_path / "placement.json"), "split": split}
    tokens, load = answer(model, config(FLOAT32, ep_size=ranks, ep_level=level, placement=section))
    assert tokens == expected(model)
    assert load.layers == tuple(layer for layer in range(LAYERS) if layer not in DENSE[model])
    for index, layer in enumerate(load.layers):
        for rank, held in enumerate(placed.layers[layer].experts_of_rank):
            assert set(np.flatnonzero(load.tokens_RYE[rank, index])) <= set(held)


@pytest.mark.parametrize("form", ["mixtral", pytest.param("qwen2-moe", marks=pytest.mark.slow)])
def test_layers_that_lmdeploy_does_not_number_get_their_own_experts(form, checkpoint, reference, tmp_path):
    """Each layer has a placement of its own, so one that took another's would load the wrong experts."""
    loads = np.random.default_rng(2).lognormal(3, 1, (3, 16))
    placed = plan(loads, ranks=2, slots=20, algorithm="eplb")
    (tmp_path / "placement.json").write_text(placed.to_json())
    settings = config(ep_size=2, placement={"file": str(tmp_path / "placement.json")})
    with epbackend.pipeline(str(checkpoint(form)), settings) as pipe:
        answers = pipe(prompts()[:3], gen_config=GREEDY, do_preprocess=False)
        load = pipe.load()
    assert [each.token_ids for each in answers] == reference(form)[:3]
    assert load.layers == (0, 1, 2)
    for layer in load.layers:
        for rank, held in enumerate(placed.layers[layer].experts_of_rank):
            assert set(np.flatnonzero(load.tokens_RYE[rank, layer])) <= set(held)


@pytest.mark.slow  # the default run has it in the demo, see tests/cli/test_commands.py
@pytest.mark.parametrize("dp", [1, 2])
def test_a_placement_planned_from_recorded_loads_balances_the_next_run(dp, tmp_path):
    """Recorded by one run, planned on by the next, which is better balanced and answers the same."""
    engine = FLOAT32 | {"dp": dp}
    without, load = answer(QWEN, config(engine, ep_size=2, ep_level=2))
    loads = Loads.of(load.loads_YE(LAYERS, ep_size=2))
    write(loads, tmp_path / "loads.json", "sglang")
    section = {"loads": str(tmp_path / "loads.json"), "redundant_experts": 8, "split": "level"}
    tokens, placed = answer(QWEN, config(engine, ep_size=2, ep_level=2, placement=section))
    assert tokens == without == expected(QWEN)
    assert placed.step_imbalance_Y.mean() < load.step_imbalance_Y.mean()


def test_a_packed_placement_unpacks_to_the_same():
    placement = duplicates(QWEN, 2)
    assert from_env(to_env(placement)) == placement
    large = plan(np.random.default_rng(0).random((61, 256)), ranks=64, slots=320, algorithm="eplb")
    assert from_env(to_env(large)) == large


def test_without_a_section_there_is_no_placement():
    assert finished_placement(config(ep_size=2)) is None


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement.even(LAYERS, EXPERTS, ranks=4), "placement: it has 4 ranks, but 2 are those of ep_size"),
        (Placement.even(LAYERS, 16, ranks=2), "placement: it has 16 experts, but 32 .*record"),
        (Placement.even(3, EXPERTS, ranks=2), r"placement: it has 3 layers, but 4 .*dense layers count"),
    ],
    ids=["ranks", "experts", "layers"],
)
def test_a_placement_of_something_else_is_refused_before_anything_starts(placement, message, tmp_path):
    (tmp_path / "placement.json").write_text(placement.to_json())
    with pytest.raises(ConfigError, match=message):
        epbackend.pipeline(QWEN, config(ep_size=2, placement={"file": str(tmp_path / "placement.json")}))
    assert engine_workers() == []


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"file": "nowhere.json"}, "placement: nowhere.json: there is no such file"),
        (
            {"loads": "loads.json", "redundant_experts": 3},
            r"redundant_experts: 3 beside 32.*use 4, or a budget",
        ),
        ({"loads": "quiet.json"}, "placement: loads: no expert has had a token.*record"),
        ({"loads": "loads.json", "objective": "speed"}, "placement: objective: .*speed"),
    ],
)
def test_a_section_that_cannot_be_planned_names_the_setting(section, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Loads.of(skewed_loads(QWEN)), tmp_path / "loads.json", "sglang")
    write(Loads.of(np.zeros((LAYERS, EXPERTS))), tmp_path / "quiet.json", "sglang")
    with pytest.raises(ConfigError, match=message):
        finished_placement(config(ep_size=2, placement=section))


def test_ranks_that_do_not_divide_the_experts_need_a_placement(tmp_path):
    """Refused without a placement; with one, ranks may have unequal parts."""
    with pytest.raises(ConfigError, match=r"ep_size: 3 does not divide the 32 experts .* or a placement"):
        epbackend.pipeline(QWEN, config(ep_size=3))
    settings = config(ep_size=3, placement={"file": str(tmp_path / "placement.json")})
    (tmp_path / "placement.json").write_text(Placement.even(LAYERS, EXPERTS, ranks=3).to_json())
    from epbackend.engines.lmdeploy.checks import check_model

    check_model(resolve(QWEN), settings, finished_placement(settings))
