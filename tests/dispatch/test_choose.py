"""Which dispatcher is taken, with which reasons, and what cannot be pinned."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from epbackend.device import devices, get_device
from epbackend.dispatch import symmetric
from epbackend.dispatch.base import DispatchSettings, LayerSpec, RankGroup
from epbackend.dispatch.choose import choose, decide, dispatchers
from epbackend.errors import ConfigError


def spec(size: int, token_size: int = 1, top_k: int = 8, **settings) -> LayerSpec:
    ranks = RankGroup(None, 0, size, None, 0, token_size)
    cpu = get_device("cpu")
    return LayerSpec(ranks, cpu, cpu.kernels, DispatchSettings(**settings), slots=4, top_k=top_k)


@pytest.mark.parametrize(
    ("size", "token_size", "level", "name"),
    [
        (1, 1, 1, "replicated"),
        (1, 1, 2, "replicated"),
        (4, 1, 1, "allgather"),
        (4, 2, 1, "allgather"),
        (4, 4, 1, "replicated"),
        (4, 1, 2, "alltoall"),
        (4, 4, 2, "alltoall"),
    ],
)
def test_auto_takes_the_best_that_serves_and_gives_reasons(size, token_size, level, name):
    dispatcher, choice = choose(spec(size, token_size, level=level))
    assert (dispatcher.name, choice.name) == (name, name)
    assert choice.reason
    assert {other for other, _ in choice.passed_over} == {entry.name for entry in dispatchers()} - {name}
    assert all(reason for _, reason in choice.passed_over)


def test_pinned_is_taken_and_says_so():
    _, choice = choose(spec(4, 4, level=1, dispatcher="allgather"))
    assert choice.reason.startswith("pinned")
    assert dict(choice.passed_over)["replicated"] == "usable, but allgather is pinned"


def test_the_next_is_taken_only_where_it_is_named():
    _, choice = choose(spec(4, level=2, dispatcher="mc2, alltoall"))
    assert choice.name == "alltoall"
    assert choice.reason.startswith("pinned")
    assert "Ascend" in dict(choice.passed_over)["mc2"]
    with pytest.raises(ConfigError, match=r"mc2 is pinned but cannot be used: .*Ascend"):
        choose(spec(4, level=2, dispatcher="mc2"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dispatcher": "auto, alltoall"}, "dispatcher: auto, alltoall; write auto alone, or names alone"),
        ({"buffer_scale_factors": ((0, 2.0), (64, 0.5))}, "lengths must descend"),
        ({"buffer_scale_factors": ((64, 0.0),)}, "scales be above 0"),
        ({"overlap_chunks": 0}, "overlap_chunks is 0, and must be a whole number from 1 on"),
        ({"overlap_chunks": 2.5}, "overlap_chunks is 2.5, and must be a whole number"),
        ({"cutoff_min_tokens": 0.5}, "cutoff_min_tokens is 0.5, and must be a whole number"),
        ({"overlap_min_tokens": -1}, "overlap_min_tokens is -1, and must be a whole number from 0 on"),
        ({"buffer_scale_factors": ((0, float("inf")),)}, "scales be above 0 and finite"),
        ({"timeout_s": float("inf")}, "timeout_s is inf, and must be above 0 and finite"),
        ({"timeout_s": -1.0}, "timeout_s is -1.0, and must be above 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DispatchSettings(**settings)


def test_auto_by_name_is_auto():
    assert DispatchSettings(dispatcher=("auto",)) == DispatchSettings(dispatcher="auto") == DispatchSettings()


def test_a_static_call_says_what_it_costs():
    _, choice = choose(spec(4, level=2, static=True))
    assert (choice.name, "every token to every rank" in choice.reason) == ("alltoall", True)


def test_before_any_rank_runs_this_machine_is_judged(monkeypatch):
    """What `epbackend doctor` asks on a machine with two GPUs, for eight ranks."""
    monkeypatch.setattr(symmetric, "not_built", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = replace(spec(8, level=2), device=devices()["cuda"])
    choice = decide(asked)
    assert choice.name == "alltoall"
    assert "taken only where it is named" in dict(choice.passed_over)["symmetric"]
    with pytest.raises(
        ConfigError, match="symmetric is pinned but cannot be used: 8 ranks that store to each other"
    ):
        decide(replace(asked, settings=replace(asked.settings, dispatcher="symmetric")))


def test_the_choice_is_logged_once(caplog):
    caplog.set_level("INFO", logger="epbackend")
    for _ in range(3):
        choose(spec(3, level=1, dispatcher="allgather"))
    (line,) = caplog.messages
    assert "dispatcher allgather (pinned; gather all tokens" in line
    assert "not alltoall: it serves ep_level 2" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dispatcher": "replicated"}, "hold different tokens"),
        ({"dispatcher": "alltoall"}, "it serves ep_level 2, and ep_level is 1"),
        ({"dispatcher": "allgather", "level": 2}, "it serves ep_level 1, and ep_level is 2"),
        (
            {"dispatcher": "nvshmem"},
            "unknown; known are auto, replicated, allgather, mc2, symmetric, alltoall, deepep",
        ),
        (
            {"dispatcher": "replicated,alltoall"},
            "none of .* named can be used: replicated: .* different tokens.*; alltoall: .*; name another",
        ),
        ({"level": 3}, "no dispatcher serves ep_level 3"),
        ({"dispatch_dtype": "int4"}, "dispatch_dtype 'int4' is unknown; it is one of full, int8, fp8"),
        ({"topk_scaling_factor": 0.1}, "smallest factor that works is 0.125"),
    ],
)
def test_settings_that_no_dispatcher_can_serve_raise(settings, message):
    with pytest.raises(ConfigError, match=message):
        choose(spec(4, **settings))


def test_one_rank_cannot_pin_a_dispatcher_that_sends():
    with pytest.raises(ConfigError, match="one rank"):
        choose(spec(1, dispatcher="alltoall", level=2))


def test_dispatch_is_imported_without_triton_and_torch_npu():
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['triton', 'torch_npu', 'numba', 'pydantic']))\n"
        "import epbackend.moe, epbackend.dispatch.choose, epbackend.dispatch.symmetric"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_dispatcher_is_listed():
    assert [(entry.name, entry.level) for entry in dispatchers()] == [
        ("replicated", 1),
        ("allgather", 1),
        ("mc2", 2),
        ("symmetric", 2),
        ("alltoall", 2),
        ("deepep", 2),
    ]
    unavailable = {entry.name for entry in dispatchers() if entry.unavailable}
    assert ("mc2" in unavailable) == bool(devices()["ascend"].unavailable())
    assert unavailable <= {"mc2", "symmetric", "deepep"}
