"""The fused dispatcher equals the dense reference, like the others, within its own limits."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.dispatch.context import GroupContext
from epbackend.dispatch.mc2 import FusedCommunicator
from tests.helpers.layer_case import (
    REPLICAS,
    SHUFFLED,
    SPLITS,
    UNEVEN,
    UNEVEN_CUTS,
    Case,
    assert_each_choice_computed_once,
    layer_equals_dense,
    relu_product,
    uneven,
)
from tests.helpers.quantized_layer import INT8, layer_is_near

MC2 = DispatchSettings(level=2, dispatcher="mc2", max_tokens=16)
HIDDEN = 1024  # the least that A3 takes

pytestmark = pytest.mark.ascend


@pytest.fixture
def run(ranks, npu):
    """Run a case on its ranks by mc2, and check that every choice was computed once."""

    def run(case: Case) -> None:
        seen = ranks.run(case.size, layer_equals_dense, replace(case, device="ascend", hidden=HIDDEN))
        assert {rank.dispatcher for rank in seen} == {"mc2"}
        assert_each_choice_computed_once(seen, case.token_size)

    return run


@pytest.mark.parametrize(("size", "token_size"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize(
    "slots", [tuple(range(8)), REPLICAS, SHUFFLED], ids=["uniform", "replicas", "shuffled"]
)
def test_replicas_on_uneven_and_empty_ranks(run, size, token_size, slots):
    run(Case(size, uneven(size // token_size), MC2, token_size, slots, dtype=torch.bfloat16))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("size", "token_size"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_every_split_on_ranks_with_unequal_slots(run, split, size, token_size):
    """The operators know ranks with equal numbers of experts alone: those that a rank lacks get no token."""
    tokens, node_size = uneven(size // token_size), 2 if size == 4 else 0
    slots_R = UNEVEN_CUTS[size]
    run(
        Case(
            size, tokens, MC2, token_size, UNEVEN, slots_R, split, node_size, dtype=torch.bfloat16, bias=True
        )
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, relu_product], ids=["swiglu", "own"])
def test_dtypes_bias_and_activation(run, dtype, activation):
    run(Case(2, (9, 4), MC2, dtype=dtype, bias=True, activation=activation))


def communicators(groups: dict[int, RankGroup]) -> tuple[list[int], bool]:
    """How many communicators two layers make on one context, twice; whether none is left when that is closed."""
    case = Case(2, (4, 4), MC2, dtype=torch.bfloat16, device="ascend", hidden=HIDDEN)
    made, held = [], []
    for _ in range(2):
        with GroupContext() as context:
            for seed in (0, 1):
                layer_equals_dense(groups, replace(case, seed=seed), context)
            backends = [
                each._backend for each in context._made.values() if isinstance(each, FusedCommunicator)
            ]
            made.append(len(backends))
            held += [weakref.ref(backend) for backend in backends]
            del backends
    gc.collect()
    return made, all(ref() is None for ref in held)


def test_layers_share_a_communicator_that_their_context_closes(ranks, npu):
    assert ranks.run(2, communicators) == [([1, 1], True)] * 2


def test_no_token_anywhere(run):
    run(Case(4, (0, 0, 0, 0), MC2, dtype=torch.bfloat16))


def bfloat16(weights_EXX: torch.Tensor, place: torch.device) -> torch.Tensor:
    return weights_EXX.bfloat16().to(place)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dispatch_dtype", ["full", "int8"])
@pytest.mark.parametrize("form", [INT8, replace(INT8, quantize=bfloat16)], ids=["W8A8", "bfloat16"])
def test_int8_experts_and_int8_rows(ranks, npu, size, dispatch_dtype, form):
    settings = replace(MC2, dispatch_dtype=dispatch_dtype)
    ranks.run(size, layer_is_near, settings, REPLICAS, "ascend", replace(form, hidden=HIDDEN))


@st.composite
def cases(draw) -> Case:
    size = draw(st.sampled_from([2, 4]))
    token_size = draw(st.sampled_from([n for n in (1, 2, 4) if n <= size]))
    experts = draw(st.integers(1, 9))
    slots = [*range(experts), *draw(st.lists(st.integers(0, experts - 1), max_size=6))]
    slots += [0] * max(0, size - len(slots))
    cuts = sorted(draw(st.sets(st.integers(1, len(slots) - 1), min_size=size - 1, max_size=size - 1)))
    slots_R = tuple(end - first for first, end in pairwise([0, *cuts, len(slots)]))
    most = draw(st.integers(1, 20))
    groups = size // token_size
    return Case(
        size=size,
        tokens=tuple(draw(st.lists(st.integers(0, most), min_size=groups, max_size=groups))),
        settings=replace(MC2, max_tokens=most),
        token_size=token_size,
        slots=tuple(draw(st.permutations(slots))),
        slots_R=slots_R,
        split=draw(st.sampled_from(SPLITS)),
        top_k=draw(st.integers(1, experts)),
        dtype=torch.bfloat16,
        seed=draw(st.integers(0, 1 << 16)),
    )


@given(case=cases())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layer(run, case):
    run(case)
