"""A dispatcher that serves decode only can be pinned: prefill goes its own way."""

from __future__ import annotations

import pytest

from epbackend import EPConfig
from epbackend.errors import ConfigError

ENGINE = {"max_batch_size": 64}


@pytest.mark.parametrize("level", [2, {"prefill": 1, "decode": 2}], ids=["one level", "mixed"])
def test_pinned_for_decode(level):
    config = EPConfig(device="ascend", ep_size=16, ep_level=level, dispatcher="mc2", engine=ENGINE)
    decode, prefill = config.dispatch_settings("decode"), config.dispatch_settings("prefill")
    assert (decode.dispatcher, decode.max_tokens) == ("mc2", 64)
    assert (prefill.dispatcher, prefill.max_tokens) == ("auto", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ep_level": 2}, "is sized by engine.max_batch_size, which is not set"),
        (
            {"ep_level": {"prefill": 2, "decode": 1}, "engine": ENGINE},
            "serves ep_level 2, but ep_level of decode is 1",
        ),
    ],
)
def test_what_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        EPConfig(device="ascend", ep_size=16, dispatcher="mc2", **settings)
