"""transformers' models give the same tokens with their experts spread over ranks as in one process, in float32."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import epbackend.engines.transformers as plug
from epbackend.config import EPConfig
from epbackend.dispatch.base import RankGroup
from epbackend.engines.transformers import SpreadExperts, distributed_config, spread_experts
from epbackend.engines.transformers.experts import experts_of
from epbackend.errors import ConfigError, EPError, UnavailableError
from epbackend.placement.formats import write
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Layout, Placement
from tests.helpers import transformers_models as models

NEW_TOKENS = 8
ALONE = {1: RankGroup.single()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """architecture -> folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("transformers")
    return cache(lambda architecture: models.save(architecture, folder))


@pytest.fixture(scope="module")
def expected(saved: Callable[[str], Path]) -> Callable[[str, int], list[list[int]]]:
    """(architecture, rank) -> what one process answers to that rank's batch."""
    model = cache(lambda architecture: models.whole(saved(architecture)))
    return cache(lambda name, rank: models.continued(model(name), models.prompts(rank), NEW_TOKENS))


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Settings of a placement with copies, planned on skewed loads of the layers that have experts."""
    folder = tmp_path_factory.mktemp("loads")

    def settings(split: Any, experts_in: tuple[int, ...], redundant: int = 4) -> dict[str, Any]:
        loads_YE = np.zeros((models.LAYERS, models.EXPERTS), dtype=np.int64)
        loads_YE[list(experts_in)] = np.arange(1, models.EXPERTS + 1) ** 2
        file = folder / f"loads-{'-'.join(map(str, experts_in))}.json"
        write(Loads.of(loads_YE, ["skewed"]), file, "sglang")
        return {"loads": [str(file)], "redundant_experts": redundant, "split": split}

    return settings


def test_two_ranks_answer_batches_of_their_own_with_copies_of_busy_experts(ranks, saved, expected, placed):
    settings = {"ep_size": 2, "ep_level": 2, "engine": {"dp": 2}, "placement": placed("level", (0, 2))}
    found = ranks.run(2, models.answer, str(saved("qwen3_moe")), settings, NEW_TOKENS)
    assert [each.tokens for each in found] == [expected("qwen3_moe", rank) for rank in (0, 1)]
    assert [each.slots for each in found] == [[6, 6], [6, 6]], (
        "8 experts and 4 copies, half of them on each rank"
    )
    load = found[0].load
    assert load.layers == (0, 2)
    assert load.calls == NEW_TOKENS
    # Prompts of 4 and 2 * 5 tokens, then a token for each of the 3 prompts in each further step.
    assert load.tokens_RYE.sum(axis=(0, 2)).tolist() == [models.TOP_K * (14 + 3 * (NEW_TOKENS - 1))] * 2
    assert {choice["name"] for choice in load.dispatchers.values()} == {"alltoall"}


def test_a_rank_goes_on_until_the_others_of_its_group_have_their_answers(ranks, saved, expected):
    """Two of four processes, to which the other two say nothing: one rank has fewer tokens to answer, then none."""
    rounds = [[NEW_TOKENS, 3], [0, NEW_TOKENS], [2, 0]]
    settings = {"ep_size": 2, "engine": {"dp": 2}}
    found = ranks.run(2, models.answer_unevenly, str(saved("mixtral")), settings, rounds)
    for rank, answers in enumerate(found):
        wanted = [[each[: new[rank]] for each in expected("mixtral", rank)] for new in rounds]
        assert answers == [each if new[rank] else [] for each, new in zip(wanted, rounds, strict=True)]


def test_a_rank_that_waits_for_the_others_answers_waits_for_timeout_s(ranks, saved):
    said, _ = ranks.run(2, models.told_late, str(saved("mixtral")), 3.0)
    assert re.search(r"all_gather of MoE layer 0 failed after .* \(timeout_s 3\): .*rank 1", said)


def test_ranks_with_one_batch_are_told_that_none_can_join_only(saved):
    asked = distributed_config(EPConfig.load({"device": "cpu"}))
    model = AutoModelForCausalLM.from_pretrained(saved("mixtral"), distributed_config=asked)
    with pytest.raises(EPError, match=r"join_step: it is for ranks with batches of their own \(engine.dp"):
        spread_experts(model).join_generate()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_every_architecture_on_one_two_and_four_ranks(ranks, saved, expected, architecture):
    path = str(saved(architecture))
    alone = models.answer(ALONE, path, {"ep_size": 1}, NEW_TOKENS)
    assert alone.tokens == expected(architecture, 0)
    for size, level in ((2, 1), (4, 2)):
        settings = {"ep_size": size, "ep_level": level, "engine": {"dp": size}}
        found = ranks.run(size, models.answer, path, settings, NEW_TOKENS)
        assert [each.tokens for each in found] == [expected(architecture, rank) for rank in range(size)]
        assert found[0].slots == [models.EXPERTS // size] * len(alone.slots), (
            "a rank holds its own experts alone"
        )


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=[pytest.mark.slow] * (each != "qwen3_moe")) for each in models.ARCHITECTURES],
)
def test_every_architecture_with_attention_cut_and_copies_of_experts(
    ranks, saved, expected, placed, architecture
):
    path = str(saved(architecture))
    layers = models.answer(ALONE, path, {"ep_size": 1}, 1).load.layers
    settings = {"ep_size": 4, "ep_level": 2, "placement": placed("even", layers)}
    found = ranks.run(4, models.answer, path, settings, NEW_TOKENS)
    assert [each.tokens for each in found] == [expected(architecture, 0)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("split", ["even", "nearest", "level", {"prefill": "level", "decode": "nearest"}])
def test_every_split_and_level_with_an_empty_rank(ranks, saved, expected, placed, split):
    for (architecture, layers), size, level in product(
        {"qwen3_moe": (0, 2), "deepseek_v3": (1, 2)}.items(), (2, 4), (1, 2)
    ):
        settings = {
            "ep_size": size,
            "ep_level": level,
            "engine": {"dp": size},
            "placement": placed(split, layers),
        }
        found = ranks.run(size, models.answer, str(saved(architecture)), settings, NEW_TOKENS, 1)
        others = [[] if rank == 1 else expected(architecture, rank) for rank in range(size)]
        assert [each.tokens for each in found] == others
        assert {each.load.calls for each in found} == {NEW_TOKENS}


@pytest.mark.slow
def test_ranks_with_unequal_numbers_of_slots(ranks, saved, expected, tmp_path):
    """Which transformers' own expert parallelism refuses: it cuts experts into equal blocks."""
    held = Layout(((0, 1, 2), (3, 4), (5, 6, 7, 0), (1,)), models.EXPERTS)
    file = tmp_path / "placement.json"
    file.write_text(Placement((held,) * models.LAYERS).to_json())
    settings = {"ep_size": 4, "engine": {"dp": 4}, "placement": {"file": str(file)}}
    found = ranks.run(4, models.answer, str(saved("mixtral")), settings, NEW_TOKENS)
    assert [each.tokens for each in found] == [expected("mixtral", rank) for rank in range(4)]
    assert [each.slots[0] for each in found] == [3, 2, 4, 1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ep_size": 2, "balance": {"on": True}}, "balance.on: experts do not move while transformers runs"),
        ({"ep_size": 4, "engine": {"dp": 2}}, "engine.dp: 2; with transformers either every rank"),
        ({"engine": {"tp": 2}}, "engine.tp: with transformers ranks share experts; set ep_size: 2"),
        ({"ep_size": 2}, "ep_size: 2 ranks are needed; start the script by torchrun"),
    ],
)
def test_settings_that_are_not_here_are_refused_by_name(settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        distributed_config(EPConfig.load({"device": "cpu", **settings}))


def test_another_transformers_is_refused_by_name(monkeypatch):
    changed = tuple(replace(hook, fingerprint="another") for hook in plug.HOOKS)
    monkeypatch.setattr(plug, "HOOKS", changed)
    monkeypatch.setattr(plug, "_replace_hooks", plug._replace_hooks.__wrapped__)
    with pytest.raises(UnavailableError, match=r"in_model is not the one .* install one of 5.23.0"):
        distributed_config(EPConfig.load({"device": "cpu"}))


def test_models_that_cannot_be_spread_are_refused_by_name(tmp_path):
    asked = distributed_config(EPConfig.load({"device": "cpu"}))
    sizes = {
        name: models.COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM has no experts in transformers' common form"):
        AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=asked)
    with pytest.raises(EPError, match="was not loaded with"):
        spread_experts(AutoModelForCausalLM.from_pretrained(tmp_path))
    quantized = json.loads((tmp_path / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "fp8"}
    }
    with pytest.raises(ConfigError, match="quantized experts are not spread in transformers"):
        SpreadExperts(SimpleNamespace(config=SimpleNamespace(**quantized)), asked.ep, asked.ranks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda module: setattr(module, "has_post_expert_norm", True), "norms each expert's answer"),
        (
            lambda module: module.register_parameter("scale", nn.Parameter(torch.ones(8))),
            "has the weights scale beside",
        ),
    ],
)
def test_experts_of_another_form_are_refused_by_name(change, said):
    config = AutoConfig.for_model("qwen3_moe", **models.COMMON)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    change(model.model.layers[1].mlp.experts)
    with pytest.raises(ConfigError, match=f"Qwen3MoeForCausalLM: model.layers.1.mlp.experts {said}"):
        experts_of(model)


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        (
            Placement.even(2, models.EXPERTS, 2),
            "2 ranks and 2 layers, but ep_size is 2 and the model has 3",
        ),
        (Placement((Layout(((*range(8), 0), (1,)), 8),) * models.LAYERS), "a rank has 9 slots for 8 experts"),
        (Placement.even(models.LAYERS, 16, 2), "it has 16 experts, but MoE layer 0 has 8"),
    ],
)
def test_placements_that_do_not_fit_the_model_are_refused_on_every_rank(
    ranks, saved, tmp_path, placement, said
):
    file = tmp_path / "placement.json"
    file.write_text(placement.to_json())
    settings = {"ep_size": 2, "engine": {"dp": 2}, "placement": {"file": str(file)}}
    for refused in ranks.run(2, models.refusal, str(saved("qwen3_moe")), settings):
        assert said in refused


def test_a_planner_that_fails_on_the_first_rank_ends_all_of_them(ranks, saved, placed, tmp_path, monkeypatch):
    """One of a third party, with an error of its own that the other ranks do not even know."""
    code = "class Slip(Exception): pass\n\ndef plan(task): raise Slip('what a pity')\n"
    (tmp_path / "slipping.py").write_text(code)
    info = tmp_path / "slipping-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slipping\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[epbackend.planners]\nslipping = slipping:plan\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    placement = placed("even", (0, 2)) | {"algorithm": "slipping"}
    settings = {"ep_size": 2, "engine": {"dp": 2}, "placement": placement}
    for refused in ranks.run(2, models.refusal, str(saved("qwen3_moe")), settings):
        assert refused == "placement: rank 0 failed: Slip: what a pity"


def test_a_checkpoint_without_an_expert_is_refused_and_a_spread_model_is_not_saved(saved, tmp_path):
    asked = distributed_config(EPConfig.load({"device": "cpu"}))
    model = AutoModelForCausalLM.from_pretrained(saved("qwen3_moe"), distributed_config=asked)
    with pytest.raises(EPError, match="save_pretrained: this rank has its own experts alone"):
        model.save_pretrained(tmp_path)
    weights = load_file(saved("qwen3_moe") / "model.safetensors")
    del weights["model.layers.2.mlp.experts.7.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(saved("qwen3_moe") / "config.json", tmp_path)
    with pytest.raises(
        ConfigError, match=r"experts.0.up_proj.weight and its like hold 7 experts, but the layer has 8"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=asked)
