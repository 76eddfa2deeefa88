"""Defaults, round trips, the settings of a phase, and warnings of what has no effect."""

import json
import subprocess
import sys
import warnings

import hypothesis
import pytest
import yaml
from hypothesis import given

from epbackend.config import ConfigWarning, EPConfig, PhaseLevels
from epbackend.config.docs import values
from epbackend.dispatch.base import DispatchSettings
from tests.helpers.config_strategies import settings


def load_quietly(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        return EPConfig.load(source)


@hypothesis.settings(max_examples=40)
@given(settings())
def test_valid_settings_load_and_survive_json(mapping):
    config = load_quietly(mapping)
    again = EPConfig.from_json(config.to_json())
    assert again == config
    assert again.to_json() == config.to_json()
    assert again.warnings() == config.warnings()


@hypothesis.settings(max_examples=40)
@given(settings())
def test_what_is_written_is_what_is_set(mapping):
    config = json.loads(load_quietly(mapping).to_json())
    written = {("ep_size" if name == "moe_ep" else name): value for name, value in mapping.items()}
    for section in ("placement", "balance", "engine"):
        assert written.pop(section).items() <= config[section].items()
    assert written.items() <= config.items()


@hypothesis.settings(max_examples=40)
@given(settings())
def test_yaml_and_json_text_mean_the_same(mapping):
    as_yaml = yaml.safe_load(yaml.safe_dump(mapping))
    assert load_quietly(as_yaml) == load_quietly(json.loads(json.dumps(mapping))) == load_quietly(mapping)


@hypothesis.settings(max_examples=40)
@given(settings())
def test_ranks_divide_evenly_and_every_setting_is_listed(mapping):
    config = load_quietly(mapping)
    assert config.attn_tp * config.engine.dp == config.world_size
    assert config.world_size % config.ep_size == 0
    dumped = json.loads(config.to_json())
    sections = [dumped.pop(name) for name in ("placement", "balance", "engine")]
    assert len(values(config)) == len(dumped) + sum(map(len, sections))


def test_defaults_are_those_of_the_data_path():
    config = EPConfig(device="cpu")
    assert config.dispatch_settings("prefill") == config.dispatch_settings("decode") == DispatchSettings()
    assert (config.ep_size, config.world_size, config.attn_tp) == (1, 1, 1)


def test_ep_level_can_differ_between_phases():
    config = EPConfig.load({"ep_size": 2, "ep_level": {"prefill": 2, "decode": 1}})
    assert config.ep_level == PhaseLevels(prefill=2, decode=1)
    assert (config.level("prefill"), config.level("decode")) == (2, 1)
    assert [config.dispatch_settings(phase).level for phase in ("prefill", "decode")] == [2, 1]


def test_dispatch_settings_carry_every_value():
    config = load_quietly(
        {
            "device": "cpu",
            "ep_level": 2,
            "dispatcher": "alltoall",
            "enable_init_routing_cutoff": True,
            "topk_scaling_factor": 0.25,
            "init_routing_cutoff_min_tokens": 7,
            "alltoall_ep_buffer_scale_factors": [[8192, 2], [0, 8.0]],
            "overlap_chunks": 3,
            "overlap_min_tokens": 5,
            "dispatch_dtype": "int8",
            "timeout_s": 9,
        }
    )
    assert config.dispatch_settings("decode") == DispatchSettings(
        level=2,
        dispatcher=("alltoall",),
        topk_scaling_factor=0.25,
        cutoff_min_tokens=7,
        buffer_scale_factors=((8192, 2.0), (0, 8.0)),
        overlap_chunks=3,
        overlap_min_tokens=5,
        dispatch_dtype="int8",
        timeout_s=9.0,
    )


@pytest.mark.parametrize(
    ("settings", "static"),
    [
        ({"device": "cuda"}, True),
        ({"device": "cuda", "engine": {"eager_mode": True}}, False),
        ({"device": "ascend"}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_decode_is_static_where_graphs_are_captured(settings, static):
    config = EPConfig(ep_size=2, **settings)
    assert config.dispatch_settings("decode").static is static
    assert config.dispatch_settings("prefill").static is False


def test_split_can_differ_between_phases():
    both = EPConfig.load({"ep_size": 2, "placement": {"file": "x", "split": "level"}}).placement
    assert (both.split_of("prefill"), both.split_of("decode"), both.given) == ("level", "level", True)
    split = {"prefill": "level", "decode": "nearest"}
    each = EPConfig.load({"ep_size": 2, "placement": {"loads": "x", "split": split}}).placement
    assert (each.split_of("prefill"), each.split_of("decode"), each.loads) == ("level", "nearest", ("x",))
    assert not EPConfig().placement.given


@pytest.mark.parametrize("build", [EPConfig.load, EPConfig.model_validate])
def test_old_name_of_a_setting_works_on_with_a_warning(build):
    with pytest.warns(ConfigWarning, match="^transport is now called dispatch_dtype: rename it") as caught:
        config = build({"ep_size": 2, "ep_level": 2, "transport": "int8"})
    assert len(caught) == 1
    assert config == EPConfig(ep_size=2, ep_level=2, dispatch_dtype="int8")
    assert "transport" not in config.to_json()


CUTOFF = {"enable_init_routing_cutoff": True, "topk_scaling_factor": 0.5}


@pytest.mark.parametrize(
    ("mapping", "name"),
    [
        ({"ep_level": 2, **CUTOFF}, "enable_init_routing_cutoff"),
        ({"init_routing_cutoff_min_tokens": 8}, "init_routing_cutoff_min_tokens"),
        ({"alltoall_ep_buffer_scale_factors": [[0, 8.0]]}, "alltoall_ep_buffer_scale_factors"),
        ({"overlap_chunks": 4}, "overlap_chunks"),
        ({"ep_size": 2, "dispatch_dtype": "int8"}, "dispatch_dtype"),
        ({"device": "cpu", "engine": {"cache_max_entry_count": 0.5}}, "engine.cache_max_entry_count"),
        ({"placement": {"split": "level"}}, "placement.split"),
        ({"balance": {"interval_s": 5.0}}, "balance"),
        ({"ep_size": 2, "balance": {"on": True}, "placement": {"split": "level"}}, "placement.split"),
    ],
)
def test_settings_without_effect_warn_by_name(mapping, name):
    with pytest.warns(ConfigWarning, match=f"^{name} has no effect") as caught:
        EPConfig.load(mapping)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "mapping",
    [
        {},
        {"ep_level": 1, **CUTOFF},
        {"ep_level": {"prefill": 1, "decode": 2}, **CUTOFF, "alltoall_ep_buffer_scale_factors": [[0, 8.0]]},
        {"ep_level": 2, "overlap_chunks": 4},
        {"ep_size": 2, "ep_level": 2, "dispatch_dtype": "fp8"},
        {"ep_size": 2, "engine": {"dp": 2}, "dispatch_dtype": "int8"},
        {"ep_size": 2, "dispatcher": "allgather", "dispatch_dtype": "int8"},
        {"ep_size": 2, "placement": {"loads": ["a.json"], "split": "level"}},
        {"device": "cuda", "engine": {"cache_max_entry_count": 0.5}},
    ],
)
def test_settings_with_effect_do_not_warn(mapping):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EPConfig.load(mapping)


def test_kernel_names_are_those_of_the_devices():
    from epbackend.config.checks import CUDA_KERNELS
    from epbackend.device import devices

    names = {name: set(device.kernel_sets) for name, device in devices().items()}
    assert set(CUDA_KERNELS) == names["cuda"] - names["cpu"]
    assert {"auto"}.union(*names.values()) == set(
        EPConfig.model_json_schema()["properties"]["kernels"]["enum"]
    )


def test_reading_a_config_imports_no_torch():
    script = "import sys; from epbackend.config import EPConfig; EPConfig(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
