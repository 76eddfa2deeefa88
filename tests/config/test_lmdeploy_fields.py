"""`engine.extra` and the engine's names agree with the LMDeploy that is installed."""

import dataclasses

import pytest

from epbackend.config import EngineSettings, EPConfig
from epbackend.config import lmdeploy_fields as ours
from epbackend.engines.lmdeploy.lmdeploy_config import block_size
from epbackend.errors import ConfigError

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def theirs():
    messages = pytest.importorskip("lmdeploy.messages")
    return {field.name: field.default for field in dataclasses.fields(messages.PytorchEngineConfig)}


def test_fields_read_from_source_are_the_real_ones(theirs):
    assert ours._engine_fields("PytorchEngineConfig") == theirs.keys()


def test_fields_that_we_set_exist_on_both_sides(theirs):
    assert ours.FIELDS_SET_BY_US.keys() <= theirs.keys()
    known = {*EPConfig.model_fields, *(f"engine.{name}" for name in EngineSettings.model_fields)}
    assert set(ours.FIELDS_SET_BY_US.values()) <= known


@pytest.mark.parametrize(
    "name",
    ["tp", "dp", "dtype", "cache_max_entry_count", "max_prefill_token_num", "eager_mode"],
)
def test_defaults_are_lmdeploys(theirs, name):
    assert getattr(EngineSettings(), name) == theirs[name]


def test_a_block_of_the_cache_is_lmdeploys_unless_it_is_set(theirs):
    assert block_size(EPConfig(device="cpu")) == theirs["block_size"]
    assert block_size(EPConfig(device="cpu", engine={"block_size": 256})) == 256


def test_extra_passes_known_fields_and_refuses_others(theirs):
    assert EPConfig(engine={"extra": {"prefill_interval": 4}}).engine.extra == {"prefill_interval": 4}
    with pytest.raises(ConfigError, match=r"no field 'prefil_interval', did you mean 'prefill_interval'"):
        EPConfig(engine={"extra": {"prefil_interval": 4}})


def test_extra_is_not_checked_where_lmdeploy_is_not_installed(monkeypatch):
    monkeypatch.setattr(ours, "_engine_fields", lambda config: None)
    assert EngineSettings(extra={"anything": 1}).extra == {"anything": 1}
