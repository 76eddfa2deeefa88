"""Which dispatchers a configuration asks for in each phase, and which of them cannot serve."""

from __future__ import annotations

import json

import pytest

from epbackend import EPConfig
from epbackend.config import PhaseLevels
from epbackend.errors import ConfigError

BOUNDED = {"max_batch_size": 64}


@pytest.mark.parametrize(
    ("dispatcher", "level", "prefill", "decode"),
    [
        ("auto", 2, (), ()),
        ("allgather", 1, ("allgather",), ("allgather",)),
        (["alltoall", "allgather"], {"prefill": 2, "decode": 1}, ("alltoall",), ("allgather",)),
        ("replicated,allgather", 1, ("replicated", "allgather"), ("replicated", "allgather")),
        ({"prefill": "alltoall", "decode": "auto"}, 2, ("alltoall",), ()),
        ({"prefill": ["auto"], "decode": ["mc2", "alltoall"]}, 2, (), ("mc2", "alltoall")),
        ("mc2, alltoall", 2, ("alltoall",), ("mc2", "alltoall")),
    ],
)
def test_each_phase_gets_the_named_dispatchers_that_can_serve_it(dispatcher, level, prefill, decode):
    config = EPConfig(ep_size=4, ep_level=level, dispatcher=dispatcher, engine=BOUNDED)
    assert (config.dispatcher_of("prefill"), config.dispatcher_of("decode")) == (prefill, decode)
    assert config.dispatch_settings("decode").dispatcher == decode
    assert EPConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("given", "held", "written"),
    [
        ("auto", (), "auto"),
        ("alltoall", ("alltoall",), "alltoall"),
        ("symmetric,alltoall", ("symmetric", "alltoall"), "symmetric, alltoall"),
        (["symmetric", "alltoall"], ("symmetric", "alltoall"), "symmetric, alltoall"),
        (("alltoall",), ("alltoall",), "alltoall"),
        ((), (), "auto"),
    ],
)
def test_names_are_held_as_a_tuple_and_written_as_text(given, held, written):
    config = EPConfig(ep_size=2, ep_level=2, dispatcher=given)
    assert config.dispatcher == held
    assert json.loads(config.to_json())["dispatcher"] == written


@pytest.mark.parametrize("level", [2, {"prefill": 1, "decode": 2}], ids=["one level", "mixed"])
def test_decode_only_dispatcher_leaves_prefill_to_auto(level):
    config = EPConfig(device="ascend", ep_size=16, ep_level=level, dispatcher="mc2", engine=BOUNDED)
    decode, prefill = config.dispatch_settings("decode"), config.dispatch_settings("prefill")
    assert (decode.dispatcher, decode.max_tokens) == (("mc2",), 64)
    assert (prefill.dispatcher, prefill.max_tokens) == ((), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ep_level": 2}, r"mc2 cannot serve decode: nothing bounds .* by engine\.max_batch_size"),
        (
            {"ep_level": PhaseLevels(prefill=2, decode=1), "engine": BOUNDED},
            "mc2 cannot serve decode: it serves ep_level 2, and ep_level is 1",
        ),
    ],
)
def test_decode_only_dispatcher_that_cannot_serve_decode_raises(settings, message):
    with pytest.raises(ConfigError, match=message):
        EPConfig(device="ascend", ep_size=16, dispatcher="mc2", **settings)
