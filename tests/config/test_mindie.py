"""MindIE's own config.json loads as it stands; the rest is named, contradictions are refused."""

import json
import re
import warnings
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epbackend.config import ConfigWarning, EPConfig, PhaseLevels
from epbackend.config.mindie import SIZE_KEYS, MindIEKeyError, parallel_sizes
from epbackend.config.overrides import Override, assignment
from epbackend.errors import ConfigError

FACTORS = [[1048576, 1.32], [524288, 1.4], [262144, 1.53], [131072, 1.8], [32768, 3.0], [8192, 5.2], [0, 8.0]]
ALLTOALL = {"ep_level": 2, "alltoall_ep_buffer_scale_factors": FACTORS}
ALLGATHER = {"ep_level": 1, "enable_init_routing_cutoff": True, "topk_scaling_factor": 0.25}


def whole(model=(), family=(), schedule=(), backend=()):
    """MindIE's nesting around the settings of one model."""
    return {
        "ServerConfig": {"port": 1025},
        "BackendConfig": {
            "ModelDeployConfig": {
                "maxSeqLen": 2560,
                "ModelConfig": [
                    {"worldSize": 8, "moe_ep": 8, "models": {"deepseekv2": dict(family)}, **dict(model)},
                ],
            },
            "ScheduleConfig": {"maxBatchSize": 200, **dict(schedule)},
            **dict(backend),
        },
    }


def load(content):
    """The config and the warnings about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConfigWarning)
        config = EPConfig.load(content)
    return config, [str(warning.message) for warning in caught]


def test_documented_alltoall_example_loads():
    config, _ = load(whole(family=ALLTOALL))
    assert (config.device, config.ep_size, config.ep_level) == ("ascend", 8, 2)
    assert config.alltoall_ep_buffer_scale_factors == tuple((length, scale) for length, scale in FACTORS)
    assert (config.world_size, config.attn_tp, config.engine.session_len) == (8, 8, 2560)


def test_documented_allgather_example_with_cutoff_loads():
    config, _ = load(whole(family=ALLGATHER))
    assert (config.ep_level, config.enable_init_routing_cutoff, config.topk_scaling_factor) == (1, True, 0.25)
    assert config.dispatch_settings("prefill").cutoff_min_tokens == 65536


def test_engine_settings_have_counterparts():
    config, _ = load(
        whole(
            model={"npuMemSize": 20, "plugin_params": '{"plugin_type": "prefix_cache"}'},
            schedule={"cacheBlockSize": 128, "maxBatchSize": 50, "maxPrefillTokens": 4096},
        )
    )
    engine = config.engine
    assert (engine.cache_gb, engine.block_size, engine.max_batch_size) == (20.0, 128, 50)
    assert (engine.max_prefill_token_num, engine.enable_prefix_caching) == (4096, True)


def test_automatic_npu_memory_stays_automatic():
    assert load(whole(model={"npuMemSize": -1}))[0].engine.cache_gb is None


def test_everything_ignored_is_named():
    content = whole(
        model={
            "trustRemoteCode": False,
            "modelWeightPath": "/data/R1",
            "plugin_params": '{"plugin_type": "mtp"}',
        },
        family={**ALLTOALL, "mlp_full_tp": True, "h3p": {"enable_gating_dp": True}, "eplb": {"levle": 1}},
        schedule={"maxIterTimes": 512},
        backend={"npuDeviceIds": [[0]]},
    )
    content["BackendConfig"]["ModelDeployConfig"]["truncation"] = False
    text = "\n".join(load(content)[1])
    for key in (
        "ServerConfig",
        "trustRemoteCode",
        "/data/R1",
        "mtp",
        "levle, did you mean 'level'?",
        "mlp_full_tp is ignored: LMDeploy decides",
        "h3p is ignored",
        "maxIterTimes",
        "npuDeviceIds",
        "truncation",
    ):
        assert key in text
    for used in ("maxSeqLen", "worldSize", "moe_ep", "ep_level", "maxBatchSize"):
        assert used not in text


def test_a_mistyped_expert_parallel_key_is_pointed_at():
    _, notes = load(whole(family={"ep_levle": 2}))
    assert any("ep_levle, did you mean 'ep_level'?" in note for note in notes)


def test_mixed_level_3_is_a_level_for_each_phase():
    config, notes = load(whole(family={"ep_level": 3}))
    assert config.ep_level == PhaseLevels(prefill=2, decode=1)
    assert any("ep_level 3" in note for note in notes)


@pytest.mark.parametrize(
    ("eplb", "file", "note"),
    [
        ({"level": 0, "expert_map_file": "map.json"}, None, "expert_map_file has no effect: eplb.level is 0"),
        ({"level": 1, "expert_map_file": "map.json"}, "map.json", ""),
        (
            {"level": 1, "expert_map_file": "map.json", "num_redundant_experts": 32},
            "map.json",
            "num_redundant_experts is not read: eplb.expert_map_file says it",
        ),
        (
            {"level": 2, "expert_map_file": "map.json"},
            "map.json",
            "dynamic.*where eplb.expert_map_file has them",
        ),
        ({"level": 2, "aggregate_threshold": 128}, None, "aggregate_threshold"),
        ({"level": 3}, None, "forces a balance that the router did not choose"),
    ],
)
def test_eplb_levels_are_what_mindie_means_by_them(eplb, file, note):
    config, notes = load(whole(family={**ALLTOALL, "eplb": eplb}))
    assert config.placement.file == file
    assert re.search(note, "\n".join(notes))


@pytest.mark.parametrize(
    ("eplb", "said"),
    [
        ({"level": 1}, "eplb.expert_map_file: is needed by eplb.level 1"),
        ({"level": 4}, r"eplb.level: must be 0 \(off\)"),
    ],
)
def test_eplb_that_cannot_be_is_refused(eplb, said):
    with pytest.raises(ConfigError, match=said):
        load(whole(family={**ALLTOALL, "eplb": eplb}))


def test_fused_operators_can_be_switched_off():
    assert load(whole(family=ALLTOALL))[0].dispatcher_of("decode") == ()
    config, _ = load(whole(family={**ALLTOALL, "enable_dispatch_combine_v2": False}))
    assert (config.dispatcher_of("prefill"), config.dispatcher_of("decode")) == ((), ("alltoall",))


def test_settings_of_all_families_are_under_those_of_the_one():
    content = whole(family={"ep_level": 1})
    model = content["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
    model["models"]["llm"] = {"ep_level": 2, "communication_backend": {"prefill": "hccl"}}
    config, notes = load(content)
    assert config.ep_level == 1
    assert any("communication_backend is ignored: collectives are HCCL's" in note for note in notes)


@pytest.mark.parametrize(
    "of_ep", [{"eplb": {"level": 1, "expert_map_file": "m.json"}}, {"enable_dispatch_combine_v2": False}]
)
def test_of_several_families_the_one_that_sets_expert_parallelism_is_meant(of_ep):
    content = whole(family=of_ep)
    families = content["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["models"]
    families["another"] = {}
    config, _ = load(content)
    assert config.placement is not None or config.dispatcher_of("decode") == ("alltoall",)
    families["another"] = {"ep_level": 2}
    with pytest.raises(ConfigError, match="sets expert parallelism for several families"):
        load(content)


def test_options_of_the_command_line_go_over_the_file():
    overrides = [Override("device", "cpu", "--device"), assignment("ep_size=2"), assignment("engine.dp=1")]
    config = EPConfig.load(whole(family=ALLTOALL), overrides)
    assert (config.device, config.ep_size, config.engine.tp, config.world_size) == ("cpu", 2, 1, 2)


def test_factor_that_is_switched_off_is_dropped_with_a_note():
    config, notes = load(whole(family={"enable_init_routing_cutoff": False, "topk_scaling_factor": 1.0}))
    assert config.topk_scaling_factor is None
    assert any("topk_scaling_factor 1.0 has no effect" in note for note in notes)


def test_documentation_fragments_load_without_the_outer_sections():
    content = whole(family=ALLTOALL)["BackendConfig"]
    deploy = content["ModelDeployConfig"]
    model = deploy["ModelConfig"][0]
    configs = [load(part)[0] for part in ({"ModelDeployConfig": deploy}, deploy, model)]
    assert {config.ep_size for config in configs} == {8}
    assert {config.dispatch_settings("prefill") for config in configs} == {
        load(whole(family=ALLTOALL))[0].dispatch_settings("prefill")
    }


def test_the_family_block_alone_has_our_names():
    config = EPConfig.load({"moe_ep": 8, **ALLTOALL})
    assert config.dispatch_settings("prefill") == load(whole(family=ALLTOALL))[0].dispatch_settings("prefill")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # MindIE's keys, then (ep_size, tp, dp, ranks, ranks of an attention group)
        ({"worldSize": 8, "moe_ep": 8}, (8, 1, 1, 8, 8)),
        ({"worldSize": 8, "moe_ep": 8, "tp": 8, "moe_tp": 1, "dp": -1}, (8, 1, 1, 8, 8)),
        ({"worldSize": 8, "moe_ep": 8, "dp": 8, "tp": 1}, (8, 1, 8, 8, 1)),
        ({"worldSize": 16, "moe_ep": 16, "dp": 2, "tp": 8, "cp": 1, "sp": 8}, (16, 1, 2, 16, 8)),
        ({"worldSize": 16, "dp": 2, "moe_tp": 1}, (16, 1, 2, 16, 8)),
        ({"worldSize": 4, "moe_ep": -1}, (1, 4, 1, 4, 4)),
        ({"worldSize": 4, "moe_ep": 1, "moe_tp": 4}, (1, 4, 1, 4, 4)),
    ],
)
def test_parallel_sizes(sizes, expected):
    config, _ = load({"moe_ep": -1, **sizes})
    assert (config.ep_size, config.engine.tp, config.engine.dp, config.world_size, config.attn_tp) == expected


SIZE = st.sampled_from([-1, 1, 2, 3, 4, 8])


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(SIZE_KEYS, SIZE)), st.booleans())
def test_any_sizes_are_refused_or_keep_mindies_products(model, several_nodes):
    with suppress(MindIEKeyError):
        sizes = parallel_sizes(model, several_nodes)
        asked = {key: value for key, value in model.items() if value != -1}
        assert asked.get("dp", 1) == sizes.dp
        assert asked.get("moe_ep", sizes.ep) == sizes.ep
        if sizes.ep > 1 or sizes.dp == 1:  # other sizes are refused by EPConfig, as anyone's would be
            config = EPConfig(ep_size=sizes.ep, engine={"tp": sizes.tp, "dp": sizes.dp})
            assert asked.get("tp", config.attn_tp) == config.attn_tp
            assert several_nodes or asked.get("worldSize", config.world_size) == config.world_size


def test_over_several_nodes_world_size_counts_one_node():
    config, notes = load(
        whole(
            model={"worldSize": 8, "tp": 16, "dp": 1, "moe_ep": 16}, backend={"multiNodesInferEnabled": True}
        )
    )
    assert (config.ep_size, config.world_size, config.engine.executor) == (16, 16, "ray")
    assert any("multiNodesInferEnabled" in note for note in notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (whole(model={"moe_ep": 4}), r"moe_tp: .* \(got 2\)"),
        (
            whole(model={"moe_ep": 4, "moe_tp": 4}),
            r"moe_ep: moe_ep \* moe_tp must be 8.*moe_tp is 4 \(got 4\)",
        ),
        (
            whole(model={"dp": 2, "tp": 8}),
            r"dp: dp \* tp must be 8, the number of ranks, and tp is 8 \(got 2\)",
        ),
        (whole(model={"dp": 3}), r"dp: dp \* tp must be 8"),
        (whole(model={"cp": 2}), r"cp: context parallelism has no counterpart.*\(got 2\)"),
        (whole(model={"pp": 2}), r"pp: pipeline parallelism"),
        (whole(model={"worldSize": "8"}), r"worldSize: must be a whole number.*\(got '8'\)"),
        (whole(model={"worldSize": 0}), r"worldSize: .*\(got 0\)"),
        (whole(model={"npuMemSize": 0}), r"engine\.cache_gb \(from ModelConfig\.npuMemSize\): .*\(got 0\)"),
        (whole(model={"plugin_params": "prefix_cache"}), r"plugin_params: must be a JSON object"),
        (whole(model={"models": []}), r"models: must be an object"),
        (
            whole(model={"models": {"deepseekv2": ALLTOALL, "qwen_moe": {"ep_level": 1}}}),
            r"models: .*keep the one",
        ),
        (whole(model={"moe_ep": 1, "dp": 2}), r"engine\.dp \(from ModelConfig\.dp\): must divide ep_size 1"),
        (
            whole(schedule={"cacheBlockSize": 48}),
            r"engine\.block_size \(from ScheduleConfig\.cacheBlockSize\)",
        ),
        (whole(family={"ep_level": 4}), r"ep_level: .*\(got 4\)"),
        (whole(family={"topk_scaling_factor": 0.5}), r"topk_scaling_factor: needs its switch"),
        (
            whole(family={**ALLTOALL, "alltoall_ep_buffer_scale_factors": FACTORS[::-1]}),
            "strictly descending",
        ),
        (
            whole(model={"moe_ep": -1}, backend={"multiNodesInferEnabled": True}),
            r"worldSize: counts one node",
        ),
        ({"BackendConfig": {}}, r"ModelConfig: must be a list of one model"),
        ({"BackendConfig": {"ModelDeployConfig": {"ModelConfig": [{}, {}]}}}, r"must be a list of one model"),
        ({"BackendConfig": 3}, r"BackendConfig: must be an object"),
    ],
)
def test_contradictions_are_refused_in_mindies_names(content, message):
    with pytest.raises(ConfigError, match=message):
        load(content)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(whole(model={"cp": 2})))
    with pytest.raises(ConfigError, match=r"config\.json: 1 problem"):
        EPConfig.load(path)
