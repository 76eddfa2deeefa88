"""Whole layers on virtual ranks equal the dense formula: the dispatcher's own code, on a CPU or on one GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.dispatch import symmetric_memory
from epbackend.dispatch.base import RankGroup
from epbackend.dispatch.context import GroupContext
from epbackend.errors import ConfigError
from tests.helpers.layer_case import REPLICAS, Case, layer_equals_dense
from tests.helpers.symmetric_cases import BOUNDED, OPEN, STATIC, run, tight
from tests.helpers.virtual_ranks import run_virtual

pytestmark = pytest.mark.cuda

WAYS = {
    "open": OPEN,
    "bounded": BOUNDED,
    "open, tight": tight(OPEN, 0.01),
    "bounded, tight": tight(BOUNDED, 0.5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [(0, 4, 9), (0, 0)])
def test_uneven_and_empty_ranks_equal_the_dense_formula(place_of, tokens, way):
    run(Case(len(tokens), tokens, WAYS[way], slots=REPLICAS), place_of)


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        pytest.param(BOUNDED, (0, 1, 2), id="bounded-in order"),
        pytest.param(BOUNDED, (2, 0, 1), id="bounded-in another"),
        pytest.param(tight(OPEN, 0.4), (0, 1, 2), id="tight-in order"),
        pytest.param(tight(OPEN, 0.4), (2, 0, 1), id="tight-in another", marks=pytest.mark.slow),
    ],
)
def test_one_layer_after_the_other_in_the_same_buffers(place_of, order, settings):
    """A rank that is ahead overwrites nothing that another has yet to read, with calls of no token between others."""
    cases = [
        Case(3, tokens, settings, slots=REPLICAS, seed=seed, device="cuda")
        for seed, tokens in enumerate([(4, 0, 9), (0, 0, 0), (0, 7, 2), (0, 0, 0)])
    ]

    def layers(ranks: RankGroup) -> None:
        with GroupContext() as context:
            for case in cases:
                layer_equals_dense({1: ranks}, case, context)

    run_virtual(3, layers, place_of, order)


def test_calls_longer_than_the_window_go_in_parts(place_of, monkeypatch):
    monkeypatch.setattr(symmetric_memory, "OPEN_TOKENS", 4)
    assert {rank.batches for rank in run(Case(2, (11, 3), tight(OPEN, 2.0)), place_of)} == {3}


def test_rounds_are_as_few_as_the_rows_need(place_of):
    # Each of the 18 tokens chooses all 4 slots, 2 of each rank: 36 rows for a rank, int(11 * 4 * 0.5) = 22 a round.
    case = Case(2, (9, 9), tight(BOUNDED, 0.5), slots=(0, 1, 2, 3), top_k=4)
    assert {rank.rounds for rank in run(case, place_of)} == {-(-36 // 22)}


@pytest.mark.parametrize(
    ("scale", "rounds"), [(None, 1), (1.0, 2), pytest.param(0.4, 6, marks=pytest.mark.slow)]
)
def test_static_rounds_depend_on_shapes_alone(place_of, scale, rounds):
    settings = STATIC if scale is None else tight(STATIC, scale)
    assert {rank.rounds for rank in run(Case(2, (11, 11), settings), place_of)} == {rounds}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_16_bit_dtypes_with_bias(place_of, dtype):
    run(Case(2, (9, 4), BOUNDED, dtype=dtype, bias=True, hidden=16), place_of)


@pytest.mark.parametrize("dispatch_dtype", ["int8", "fp8"])
def test_rows_that_travel_quantized(place_of, dispatch_dtype):
    """Restored on arrival to what `row_format.py` says, over more than one block of scales, in several rounds."""
    run(
        Case(
            3,
            (9, 0, 4),
            tight(replace(BOUNDED, dispatch_dtype=dispatch_dtype), 0.5),
            slots=REPLICAS,
            hidden=150,
        ),
        place_of,
    )


def test_ranks_with_unequal_slots_and_repeated_choices(place_of):
    uneven = (0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 3, 5, 0)
    run(
        Case(3, (6, 11, 0), BOUNDED, slots=uneven, slots_R=(6, 1, 6), split="nearest", repeats=True, top_k=5),
        place_of,
    )


def test_more_tokens_than_the_phase_may_have_raise(place_of):
    with pytest.raises(
        ConfigError, match=r"12 tokens in a call that may have 11; raise engine.max_batch_size"
    ):
        run(Case(2, (12, 1), BOUNDED), place_of)
