"""What the fused operators of Ascend cannot take is refused before the call, by the name of the setting."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from epbackend.dispatch import mc2
from epbackend.dispatch.base import DispatchSettings, LayerSpec, RankGroup
from epbackend.dispatch.choose import choose
from epbackend.dispatch.context import GroupContext
from epbackend.dispatch.mc2 import Mc2, broken, buffer_mb
from epbackend.errors import ConfigError


def spec(
    chip: str | None = "A3",
    size=16,
    slots=16,
    top_k=8,
    tokens: int | None = 64,
    hidden: int | None = None,
    cann: str | None = None,
    **settings,
) -> LayerSpec:
    device = mock.Mock(chip=chip, release=cann)
    group = RankGroup(mock.Mock(), 0, size, None, 0, 1)
    settings = DispatchSettings(**{"level": 2, "max_tokens": tokens, **settings})
    return LayerSpec(group, device, mock.Mock(), settings, slots, top_k, hidden)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chip": None}, "needs an Ascend NPU"),
        ({"chip": "Ascend310P3"}, "for A2 and A3, and this chip is Ascend310P3"),
        ({"chip": "A2", "size": 12}, "ep_size must be 2 to 8, 16, 32, 64, 128 or 256, and is 12"),
        ({"size": 769, "slots": 1}, "ep_size must be 2 to 768, and is 769"),
        ({"size": 1}, "there is one rank"),
        (
            {"chip": "A2", "slots": 25, "cann": "8.5.0"},
            "with CANN 8.5.0 a rank may hold 24 experts, and holds 25: raise ep_size or take CANN 9.0",
        ),
        ({"chip": "A2", "slots": 25}, "with CANN of an unknown release a rank may hold 24 experts"),
        ({"size": 64, "slots": 17}, "1024 experts with their replicas, and there are 1088"),
        ({"top_k": 17}, "may choose 16 experts, and this model's chooses 17"),
        ({"chip": "A2", "top_k": 17}, "may choose 16 experts"),
        ({"tokens": None}, "decode is bounded by engine.max_batch_size"),
        ({"tokens": 513}, "may send 512 tokens, and engine.max_batch_size allows 513"),
        ({"chip": "A2", "tokens": 257}, "may send 256 tokens, and engine.max_batch_size allows 257"),
        ({"hidden": 512}, "hidden size must be 1024 to 8192, and this model's is 512"),
        ({"level": 1}, "serves ep_level 2, and ep_level is 1"),
        ({"dispatch_dtype": "fp8"}, "in full or in int8, and dispatch_dtype is fp8"),
    ],
)
def test_a_spec_outside_the_limits_is_refused(changes, message):
    given = spec(**changes, dispatcher="mc2")
    with pytest.raises(ConfigError, match=f"dispatcher mc2 is pinned but cannot be used: .*{message}"):
        choose(given)


@pytest.mark.parametrize(
    ("chip", "hidden_TD", "message"),
    [
        (
            "A3",
            torch.empty(65, 7168).bfloat16(),
            "65 tokens in a call that may have 64; raise engine.max_batch_size",
        ),
        ("A3", torch.empty(4, 512).bfloat16(), "hidden size must be 1024 to 8192, and this model's is 512"),
        ("A2", torch.empty(4, 1000).bfloat16(), "a multiple of 32 up to 7168, and this model's is 1000"),
        ("A3", torch.empty(4, 1024), "not float32; set engine.dtype: bfloat16, or dispatcher: alltoall"),
    ],
)
def test_a_call_outside_the_limits_raises(chip, hidden_TD, message):
    ids, weights = torch.zeros(len(hidden_TD), 8), torch.zeros(len(hidden_TD), 8)
    with pytest.raises(ConfigError, match=message):
        Mc2(spec(chip)).begin(hidden_TD, ids, weights)


def test_it_is_preferred_where_it_serves():
    _, choice = choose(spec())
    assert choice.name == "mc2"
    assert dict(choice.passed_over)["alltoall"] == "usable, but mc2 is preferred"


def test_few_ranks_of_a2_take_it_by_name_alone():
    few = spec("A2", size=8)
    _, choice = choose(few)
    assert choice.name == "alltoall"
    assert "on A2 it is for 16 ranks and more" in dict(choice.passed_over)["mc2"]
    assert Mc2.unsupported(spec("A2", size=8, dispatcher="mc2")) is None
    assert choose(spec("A2", size=16))[1].name == "mc2"


@pytest.mark.parametrize(("dispatch_dtype", "form"), [("full", ""), ("int8", ", in int8")])
def test_the_reason_names_chip_and_sizes(dispatch_dtype, form):
    reason = Mc2.reason(spec(dispatch_dtype=dispatch_dtype))
    assert reason.endswith(f"A3 takes 512 tokens a rank, and 64 are sent{form}")


def test_ranks_with_the_same_tokens_send_a_slice_each():
    shared = spec(tokens=1024)
    assert "512 tokens" in str(Mc2.unsupported(shared))
    ranks = RankGroup(mock.Mock(), 0, 16, mock.Mock(), 0, 2)
    assert Mc2.unsupported(replace(shared, ranks=ranks)) is None


@pytest.mark.parametrize("chip", ["A2", "A3"])
def test_the_limits_themselves_are_allowed(chip):
    ranks, slots, top_k, tokens = {"A2": (256, 4, 16, 256), "A3": (512, 2, 16, 512)}[chip]
    assert broken(chip, ranks, slots, top_k, tokens) is None


@pytest.mark.parametrize("cann", ["9.0.0", "9.1.RC1", "10.0.0"])
def test_newer_cann_takes_more_experts_on_a_rank_of_a2(cann):
    assert Mc2.unsupported(spec("A2", slots=25, cann=cann)) is None


def test_buffers_have_the_documented_size():
    assert buffer_mb("A3", ranks=2, slots=4, top_k=2, tokens=1, hidden=1024) == 200  # HCCL's own is enough
    assert buffer_mb("A2", ranks=16, slots=16, top_k=8, tokens=128, hidden=7168) == 452
    assert buffer_mb("A3", ranks=32, slots=8, top_k=8, tokens=64, hidden=7168) == 480


def test_layers_of_different_sizes_share_what_the_largest_needs():
    """The operators' document wants the same group in all layers of a model."""
    context = GroupContext()
    group = RankGroup(mock.Mock(), 0, 32, None, 0, 1)
    small, large = (replace(spec(slots=slots, tokens=64), ranks=group, context=context) for slots in (8, 12))
    layers = [Mc2(small), Mc2(large)]
    made = []
    with mock.patch.object(
        mc2, "FusedCommunicator", lambda group, buffer: made.append(buffer) or mock.Mock()
    ):
        for layer in layers:
            layer.begin(torch.empty(1, 7168).bfloat16(), torch.zeros(1, 8), torch.zeros(1, 8))
        assert set(made) == {buffer_mb("A3", ranks=32, slots=12, top_k=8, tokens=64, hidden=7168)}
        late = Mc2(replace(small, slots=16))
        with pytest.raises(ConfigError, match=r"made after the first call.*make all layers first"):
            late.begin(torch.empty(1, 7168).bfloat16(), torch.zeros(1, 8), torch.zeros(1, 8))
