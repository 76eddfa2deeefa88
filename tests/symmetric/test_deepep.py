"""`deepep` against a stand-in that keeps to DeepEP's documented interface: call-checked, not run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.dispatch.context import GroupContext
from epbackend.errors import ConfigError
from epbackend.kernels.triton.padded import compact, spread
from tests.helpers import deep_ep_stand_in
from tests.helpers.layer_case import Case, Seen, layer_equals_dense

pytestmark = pytest.mark.cuda
NORMAL = DispatchSettings(level=2, dispatcher="deepep")
LOW_LATENCY = replace(NORMAL, max_tokens=9)


def layers(groups: dict[int, RankGroup], cases: list[Case]) -> list[Seen]:
    deep_ep_stand_in.install()
    with GroupContext() as context:
        return [layer_equals_dense(groups, case, context) for case in cases]


@pytest.mark.skipif(not knobs.runtime.interpret, reason="the stand-in is for CPUs")
@pytest.mark.parametrize(("size", "token_size"), [(2, 1), (4, 2)])
def test_both_modes_in_turn(ranks, size, token_size):
    slots, slots_R = (0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 3, 5, 0), {2: (9, 4), 4: (5, 1, 4, 3)}[size]
    bfloat16 = {"dtype": torch.bfloat16, "hidden": 16, "device": "cuda"}
    decode = Case(size, (6, 0), LOW_LATENCY, token_size, slots, slots_R, split="nearest", **bfloat16)
    prefill = replace(decode, tokens=(11, 3), settings=NORMAL)
    for seen in ranks.run(size, layers, [decode, prefill, replace(decode, tokens=(2, 9))]):
        assert [layer.dispatcher for layer in seen] == ["deepep"] * 3


def a_layer_that_comes_late(groups: dict[int, RankGroup]) -> str:
    deep_ep_stand_in.install()
    with GroupContext() as context:
        first = Case(2, (6, 0), NORMAL, dtype=torch.bfloat16, hidden=16, device="cuda")
        layer_equals_dense(groups, first, context)
        with pytest.raises(ConfigError) as raised:
            layer_equals_dense(groups, replace(first, settings=LOW_LATENCY), context)
    return str(raised.value)


@pytest.mark.skipif(not knobs.runtime.interpret, reason="the stand-in is for CPUs")
def test_a_layer_for_which_the_buffer_is_too_small_is_refused(ranks):
    for said in ranks.run(2, a_layer_that_comes_late):
        assert "a layer made after the first call needs a larger one (9 tokens" in said


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [4, 4, 4]])
def test_padded_rows_are_packed_and_spread(place_of, counts):
    padded_LCD = torch.randn(3, 4, 1100, device=place_of)
    counts_L = torch.tensor(counts, dtype=torch.int32, device=place_of)
    rows_SD = torch.full((12, 1100), torch.nan, device=place_of)
    compact(padded_LCD, counts_L, rows_SD)
    expected = torch.cat([slot[:count] for slot, count in zip(padded_LCD, counts, strict=True)])
    assert torch.equal(rows_SD[: sum(counts)], expected)
    assert rows_SD[sum(counts) :].isnan().all()
    back_LCD = torch.zeros_like(padded_LCD)
    spread(rows_SD, counts_L, back_LCD)
    valid = torch.arange(4, device=place_of) < counts_L[:, None]
    assert torch.equal(back_LCD, torch.where(valid[:, :, None], padded_LCD, 0.0))
