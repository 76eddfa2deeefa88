"""The table of names agrees with what it names, and packages add to it by entry point."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from epbackend import EPConfig, ExpertParallelMoE
from epbackend.device import Device, devices
from epbackend.dispatch import choose
from epbackend.dispatch.base import RankGroup
from epbackend.errors import ConfigError, UnavailableError
from epbackend.names import DEVICES, DISPATCHER_FACTS, DISPATCHERS, PLANNERS, DispatcherFacts
from epbackend.replica_split import SlotMap
from tests.helpers.dense import dense_moe, tolerance


@pytest.mark.parametrize("name", DEVICES.built_in)
def test_built_in_device_has_its_name(name):
    assert isinstance(devices()[name], Device)
    assert devices()[name].name == name


@pytest.mark.parametrize("name", DISPATCHERS.built_in)
def test_facts_of_a_built_in_dispatcher_are_those_of_its_class(name):
    found = DISPATCHERS.load(name)
    assert found.name == name
    assert DispatcherFacts.of(found) == DISPATCHER_FACTS[name]


@pytest.mark.parametrize("name", PLANNERS.built_in)
def test_built_in_planner_loads(name):
    assert callable(PLANNERS.load(name))


def test_the_table_imports_neither_torch_nor_pydantic():
    script = "import sys, epbackend.names; print([name in sys.modules for name in ('torch', 'pydantic')])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[False, False]"


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """An installed package that adds dispatchers: two that serve, one that does not load, one with a taken name."""
    (tmp_path / "other_package.py").write_text(
        textwrap.dedent("""
            from epbackend.dispatch.alltoall import AllToAll
            from epbackend.dispatch.replicated import Replicated

            class Mine(Replicated):
                name = "mine"
                summary = "the way of another package"

            class Level2(AllToAll):
                name = "mine2"
        """)
    )
    info = tmp_path / "other_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        textwrap.dedent("""
            [epbackend.dispatchers]
            mine = other_package:Mine
            mine2 = other_package:Level2
            broken = other_package_that_is_gone:Broken
            alltoall = other_package:Mine
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    choose._classes.cache_clear()
    yield
    choose._classes.cache_clear()


@pytest.mark.usefixtures("other_package")
class TestOtherPackage:
    def test_dispatcher_is_chosen_by_name_and_serves_a_layer(self):
        config = EPConfig(device="cpu", dispatcher="mine")
        torch.manual_seed(0)
        gate_up_E2FD, down_EDF = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
        hidden_TD, ids_TK, weights_TK = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
        layer = ExpertParallelMoE(
            gate_up_E2FD,
            down_EDF,
            slot_map=SlotMap.uniform(4, 1),
            ranks=RankGroup.single(),
            settings={phase: config.dispatch_settings(phase) for phase in ("prefill", "decode")},
            top_k=2,
        )
        assert layer.dispatchers["prefill"].name == "mine"
        assert layer.dispatchers["prefill"].reason == "pinned; the way of another package"
        expected_TD = dense_moe(hidden_TD, ids_TK, weights_TK, gate_up_E2FD, down_EDF)
        out_TD = layer(hidden_TD, ids_TK, weights_TK)
        torch.testing.assert_close(out_TD.double(), expected_TD, **tolerance(torch.float32))

    def test_dispatcher_that_cannot_serve_its_phase_raises_early(self):
        with pytest.raises(
            ConfigError, match="mine2 cannot serve prefill: it serves ep_level 2, and ep_level is 1"
        ):
            EPConfig(ep_size=2, dispatcher="mine2")

    def test_package_that_does_not_load_is_named(self):
        reason = "dispatcher 'broken' of other_package_that_is_gone:Broken does not load: No module named"
        with pytest.raises(UnavailableError, match=reason):
            DISPATCHERS.load("broken")
        with pytest.raises(ConfigError, match=f"dispatcher: {reason}"):
            EPConfig(ep_size=2, dispatcher="broken")
        (listed,) = [each for each in choose.dispatchers() if each.name == "broken"]
        assert reason in str(listed.unavailable)

    def test_built_in_names_cannot_be_taken(self):
        assert DISPATCHERS.names().count("alltoall") == 1
        assert DISPATCHERS.load("alltoall").__module__ == "epbackend.dispatch.alltoall"

    def test_built_in_ones_are_preferred(self):
        assert DISPATCHERS.names() == (*DISPATCHERS.built_in, "broken", "mine", "mine2")

    def test_mistyped_name_is_corrected(self):
        with pytest.raises(ConfigError, match="did you mean 'broken'"):
            EPConfig(dispatcher="broke")
