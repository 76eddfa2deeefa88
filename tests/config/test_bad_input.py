"""Every contradiction and typing mistake gets an error that names the setting, the value and the remedy."""

import re
import warnings
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epbackend.config import ConfigWarning, EngineSettings, EPConfig
from epbackend.config.mindie import MARKS
from epbackend.errors import ConfigError

PAIRS = "alltoall_ep_buffer_scale_factors"

BAD = [
    # settings, then every piece that the message must hold
    ({"ep_level": 3}, ["ep_level:", "1 ", "2 ", "(got 3)"]),
    ({"ep_level": True}, ["ep_level:", "(got True)"]),
    ({"ep_level": {"prefill": 2}}, ["ep_level.decode:", "missing"]),
    ({"ep_level": {"prefill": 3, "decode": 1}}, ["ep_level.prefill:", "(got 3)"]),
    ({"ep_level": {"prefil": 2, "decode": 1}}, ["ep_level.prefil:", "did you mean 'prefill'?"]),
    ({"ep_size": 0}, ["ep_size:", "greater than or equal to 1", "(got 0)"]),
    ({"ep_size": "2"}, ["ep_size:", "integer", "(got '2')"]),
    ({"ep_size": 2, "moe_ep": 4}, ["moe_ep:", "ep_size", "2", "(got 4)"]),
    ({"moe_ep": 0}, ["ep_size:", "(got 0)"]),
    ({"device": "cud"}, ["device:", "cpu", "did you mean 'cuda'?"]),
    ({"dispatcher": "all2all"}, ["dispatcher:", "alltoall"]),
    ({"timeout_s": 0}, ["timeout_s:", "greater than 0"]),
    ({"timeout_s": float("inf")}, ["timeout_s:", "finite"]),
    ({"epsize": 2}, ["epsize:", "did you mean 'ep_size'?"]),
    ({"tp": 2}, ["tp:", "did you mean 'engine.tp'?"]),
    ({"engine": {"ep_level": 2}}, ["engine.ep_level:", "did you mean 'ep_level'?"]),
    ({"engine": {"sesion_len": 9}}, ["engine.sesion_len:", "did you mean 'session_len'?"]),
    ({"qwertz": 1}, ["qwertz: unknown setting"]),
    ({"engine": None}, ["engine:"]),
    ({"kernels": "tritn"}, ["kernels:", "triton", "(got 'tritn')"]),
    ({"kernels": "triton", "device": "cpu"}, ["kernels:", "device cuda", "auto or reference", "'triton'"]),
    # the cutoff
    ({"enable_init_routing_cutoff": True, "topk_scaling_factor": 1.5}, ["topk_scaling_factor:", "(got 1.5)"]),
    (
        {"enable_init_routing_cutoff": True, "topk_scaling_factor": 0},
        ["topk_scaling_factor:", "greater than 0"],
    ),
    ({"topk_scaling_factor": 0.5}, ["topk_scaling_factor:", "enable_init_routing_cutoff: true", "(got 0.5)"]),
    ({"enable_init_routing_cutoff": True}, ["enable_init_routing_cutoff:", "topk_scaling_factor", "(0, 1]"]),
    # the buffers
    ({PAIRS: [[0, 8.0], [8192, 2.0]]}, [f"{PAIRS}:", "strictly descending", "8192 follows 0"]),
    ({PAIRS: [[8192, 2.0], [8192, 1.0]]}, [f"{PAIRS}:", "strictly descending"]),
    ({PAIRS: [[8192, 0.0]]}, [f"{PAIRS}[0][1]:", "greater than 0"]),
    ({PAIRS: [[-1, 2.0]]}, [f"{PAIRS}[0][0]:", "(got -1)"]),
    ({PAIRS: [[8192]]}, [f"{PAIRS}[0][1]:", "missing"]),
    ({PAIRS: [8192, 2.0]}, [f"{PAIRS}:", "list of [length, scale] pairs"]),
    # pinned dispatchers
    ({"dispatcher": "alltoall"}, ["dispatcher:", "cannot serve prefill: it serves ep_level 2", "'alltoall'"]),
    (
        {"dispatcher": "allgather", "ep_level": {"prefill": 1, "decode": 2}},
        ["dispatcher:", "allgather cannot serve decode"],
    ),
    ({"dispatcher": "replicated", "ep_size": 2, "engine": {"dp": 2}}, ["dispatcher:", "engine.dp is 2"]),
    ({"dispatcher": "alltoal"}, ["dispatcher:", "did you mean 'alltoall'?"]),
    ({"dispatcher": 3}, ["dispatcher:", "names in order of preference"]),
    ({"dispatcher": []}, ["dispatcher:", "names in order of preference"]),
    ({"dispatcher": "allgather, auto"}, ["dispatcher:", "auto alone"]),
    ({"dispatcher": ["allgather", "allgather"]}, ["dispatcher:", "each dispatcher once"]),
    (
        {"dispatcher": "allgather, alltoall"},
        ["dispatcher:", "alltoall cannot serve prefill: it serves ep_level 2, and ep_level is 1"],
    ),
    ({"dispatcher": {"prefill": "alltoall", "decode": "auto"}}, ["dispatcher.prefill:", "'alltoall'"]),
    ({"dispatcher": {"decode": "allgather"}}, ["dispatcher.prefill:", "missing"]),
    (
        {"dispatcher": {"prefill": "mc2", "decode": "mc2"}, "ep_level": 2, "engine": {"max_batch_size": 8}},
        ["dispatcher.prefill:", "mc2 cannot serve prefill", "decode is bounded"],
    ),
    ({"dispatch_dtype": "int4"}, ["dispatch_dtype:", "'full', 'int8' or 'fp8'", "(got 'int4')"]),
    ({"device": "ascend", "dispatch_dtype": "fp8"}, ["dispatch_dtype:", "do not have: write int8 or full"]),
    (
        {"dispatch_dtype": "int8", "transport": "fp8"},
        ["transport: is another name of dispatch_dtype, which says int8: keep one", "(got 'fp8')"],
    ),
    # the placement
    (
        {"placement": {"split": "levl"}},
        ["placement.split:", "even, nearest, level or level_by_node", "(got 'levl')"],
    ),
    ({"placement": {"split": {"prefill": "level"}}}, ["placement.split.decode:", "missing"]),
    (
        {"ep_size": 4, "placement": {"loads": "a", "split": "level_by_node"}},
        ["placement.split: is level_by_node", "set placement.node_size"],
    ),
    (
        {"ep_size": 4, "placement": {"loads": "a", "split": "level_by_node", "node_size": 3}},
        ["placement.node_size:", "must divide ep_size 4"],
    ),
    ({"placement": {"algorithm": "eplp"}}, ["placement.algorithm:", "refined", "did you mean 'eplb'?"]),
    (
        {"ep_size": 2, "placement": {"loads": "a", "algorithm": "incremental"}},
        ["placement.algorithm: moves experts from a placement in use", "use refined, or balance.on"],
    ),
    ({"placement": {"redundant": 3}}, ["placement.redundant:", "did you mean"]),
    ({"placement": {"loads": [3]}}, ["placement.loads:", "list of file names"]),
    ({"ep_size": 2, "placement": {"loads": "a", "budget": -1}}, ["placement.budget:", "(got -1)"]),
    (
        {"ep_size": 2, "placement": {"file": "a", "algorithm": "refined", "loads": ["b"]}},
        ["placement.algorithm:", "placement.loads:", "placement.file is a finished placement", "keep one"],
    ),
    (
        {"ep_size": 2, "placement": {"loads": "a", "budget": 4, "redundant_experts": 2}},
        ["placement.budget:", "placement.redundant_experts", "keep one"],
    ),
    ({"ep_size": 2, "placement": {"redundant_experts": 2}}, ["placement.redundant_experts:", "loads"]),
    ({"placement": {"file": "a"}}, ["placement:", "set ep_size"]),
    ({"ep_size": 4, "placement": {"file": "a", "node_size": 3}}, ["placement.node_size:", "ep_size 4"]),
    # balance
    ({"balance": {"on": True}}, ["balance.on:", "set ep_size"]),
    (
        {"ep_size": 2, "balance": {"on": True}, "placement": {"file": "a"}},
        ["balance.on:", "placement.file is a finished placement", "placement.loads"],
    ),
    (
        {"ep_size": 2, "balance": {"on": True}, "placement": {"loads": "a", "budget": 4}},
        ["placement.budget:", "placement.redundant_experts"],
    ),
    (
        {"ep_size": 2, "balance": {"on": True, "redundant_experts": 2}, "placement": {"loads": "a"}},
        ["balance.redundant_experts:", "placement.redundant_experts"],
    ),
    ({"balance": {"window_steps": 0}}, ["balance.window_steps:", "greater than or equal to 1"]),
    ({"balance": {"phases": "decoding"}}, ["balance.phases:", "'both', 'prefill' or 'decode'"]),
    ({"balance": {"interval_s": 0}}, ["balance.interval_s:", "greater than 0"]),
    ({"balance": {"threshold": 1.1}}, ["balance.threshold:", "less than 1"]),
    ({"balance": {"max_slots": 0}}, ["balance.max_slots:", "greater than or equal to 1"]),
    ({"balance": {"cheksum": "all"}}, ["balance.cheksum:", "did you mean 'checksum'?"]),
    ({"balance": {"enabled": True}}, ["balance.enabled:"]),
    # the engine
    ({"engine": {"block_size": 48}}, ["engine.block_size:", "power of two", "(got 48)"]),
    ({"engine": {"dtype": "fp8"}}, ["engine.dtype:", "bfloat16", "(got 'fp8')"]),
    (
        {"engine": {"cache_gb": 1.0, "cache_blocks": 64}},
        ["engine.cache_blocks:", "engine.cache_gb", "keep one"],
    ),
    ({"engine": {"cache_max_entry_count": 1.0}}, ["engine.cache_max_entry_count:", "less than 1"]),
    ({"engine": {"extra": {"ep": 2}}}, ["engine.extra:", "use ep_size"]),
    # ranks that LMDeploy cannot arrange
    ({"ep_size": 2, "engine": {"tp": 2, "dp": 2}}, ["engine.tp:", "must be 1 with dp 2", "(got 2)"]),
    ({"ep_size": 2, "engine": {"tp": 4}}, ["engine.tp:", "1 or 2", "(got 4)"]),
    ({"ep_size": 2, "engine": {"dp": 4}}, ["engine.dp:", "divide ep_size 2", "(got 4)"]),
    ({"engine": {"dp": 2}}, ["engine.dp:", "ep_size 1", "(got 2)"]),
    ({"ep_size": 4, "engine": {"dp": 2, "executor": "mp"}}, ["engine.executor:", "Ray", "(got 'mp')"]),
    ({"ep_size": 2, "engine": {"executor": "uni"}}, ["engine.executor:", "one rank", "(got 'uni')"]),
]


@pytest.mark.parametrize(("settings", "pieces"), BAD, ids=[str(settings)[:60] for settings, _ in BAD])
def test_error_names_setting_value_and_remedy(settings, pieces):
    with pytest.raises(ConfigError) as caught:
        EPConfig.load(settings)
    for piece in pieces:
        assert piece in str(caught.value)


def test_direct_construction_gives_the_same_error():
    with pytest.raises(ConfigError, match="ep_level"):
        EPConfig(ep_level=3)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        EPConfig.load({"ep_levl": 2, "ep_size": 0, "engine": {"tp": 0}})
    assert "3 problems" in str(caught.value)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "ep_size",
        "engine.tp",
        "ep_levl",
    ]


def test_contradictions_are_listed_together_too():
    with pytest.raises(ConfigError, match="3 problems"):
        EPConfig.load({"topk_scaling_factor": 0.5, "dispatcher": "alltoall", "engine": {"dp": 3}})


def test_the_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        EPConfig().ep_size = 2  # type: ignore[misc]


def test_long_values_are_cut_in_messages():
    with pytest.raises(ConfigError) as caught:
        EPConfig.load({"device": "x" * 10_000})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["1.5", 1e99, None, [], {}])
def test_any_wrong_type_names_its_field(value):
    with pytest.raises(ConfigError, match=re.escape("ep_size:")):
        EPConfig.load({"ep_size": value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TOP = [*EPConfig.model_fields, "moe_ep", *MARKS]
ENGINE = st.dictionaries(st.sampled_from([*EngineSettings.model_fields]), JSON, max_size=3)


@given(st.dictionaries(st.sampled_from(TOP), JSON | ENGINE, max_size=4))
def test_whatever_is_written_loads_or_is_refused_in_words(mapping):
    with warnings.catch_warnings(), suppress(ConfigError):
        warnings.simplefilter("ignore", ConfigWarning)
        assert isinstance(EPConfig.load(mapping), EPConfig)
