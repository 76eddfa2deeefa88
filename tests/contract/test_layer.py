"""The layer equals the dense formula, however rows travel."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epbackend.dispatch.base import DispatchSettings
from tests.helpers.layer_case import (
    REPLICAS,
    SHUFFLED,
    SPLITS,
    UNEVEN,
    UNEVEN_CUTS,
    Case,
    Seen,
    assert_each_choice_computed_once,
    layer_equals_dense,
    relu_product,
    uneven,
)

LEVEL_1 = DispatchSettings(level=1)
LEVEL_2 = DispatchSettings(level=2)
PASSES = DispatchSettings(level=1, topk_scaling_factor=0.34, cutoff_min_tokens=1)
ROUNDS = DispatchSettings(level=2, buffer_scale_factors=((20, 0.2), (0, 0.3)))
CHUNKS = DispatchSettings(level=2, overlap_chunks=3, overlap_min_tokens=1)
WAYS = {"level1": LEVEL_1, "level2": LEVEL_2, "passes": PASSES, "rounds": ROUNDS, "chunks": CHUNKS}


@pytest.fixture
def run(ranks, device):
    """Run a case on its ranks, on the device under test, and check that every choice was computed once."""

    def run(case: Case) -> list[Seen]:
        seen = ranks.run(case.size, layer_equals_dense, replace(case, device=device.name))
        assert_each_choice_computed_once(seen, case.token_size)
        return seen

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("size", "token_size"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize(
    "slots", [tuple(range(8)), REPLICAS, SHUFFLED], ids=["uniform", "replicas", "shuffled"]
)
def test_every_way_on_uneven_and_empty_ranks(run, way, size, token_size, slots):
    case = Case(size, uneven(size // token_size), WAYS[way], token_size, slots)
    expected = "replicated" if size == 1 or (token_size == size and case.settings.level == 1) else None
    names = {seen.dispatcher for seen in run(case)}
    assert names == {expected or ("allgather" if case.settings.level == 1 else "alltoall")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("size", "token_size"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_every_way_in_a_static_call(run, way, size, token_size):
    """Equally many tokens everywhere, which the ranks that share them cannot always share equally."""
    settings = replace(WAYS[way], static=True)
    for tokens in (7, 1, 0):
        run(Case(size, (tokens,) * (size // token_size), settings, token_size, UNEVEN, UNEVEN_CUTS[size]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("size", "token_size"), [(1, 1), (2, 1), (4, 2)])
def test_rows_that_are_no_tokens_are_neither_computed_nor_counted(run, way, static, size, token_size):
    """What fills a batch up; also on ranks that have nothing else."""
    settings = replace(WAYS[way], static=static)
    for split, padding in (("even", 3), ("level", 7)):
        tokens = (7,) * (size // token_size)
        run(Case(size, tokens, settings, token_size, UNEVEN, UNEVEN_CUTS[size], split, padding=padding))


@pytest.mark.parametrize("way", ["level1", "level2", "chunks"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("size", "token_size"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_every_split_on_ranks_with_unequal_slots(run, way, split, size, token_size):
    """Ranks that hold the same tokens agree, or a choice would be computed twice or not at all."""
    tokens = uneven(size // token_size)
    node_size = 2 if size == 4 else 0
    run(Case(size, tokens, WAYS[way], token_size, UNEVEN, UNEVEN_CUTS[size], split, node_size, bias=True))


@pytest.mark.parametrize("size", [2, 4])
def test_alltoall_holds_no_more_rows_than_it_computes(run, size):
    """On every device: also where kernels would return a row for each choice of the tokens that arrive."""
    seen = run(Case(size, uneven(size), LEVEL_2, slots=REPLICAS))
    assert all(rank.most_rows <= sum(rank.tokens_E) for rank in seen)


@pytest.mark.parametrize("token_size", [1, 2, 4])
def test_level_levels_the_ranks(run, token_size):
    """Every rank can take every expert, so that none needs to take more than its part, rounded up."""
    everywhere = tuple(range(4)) * 4
    case = Case(4, (40, 3, 0, 11)[: 4 // token_size], LEVEL_2, token_size, everywhere, split="level")
    loads = [sum(seen.tokens_E) for seen in run(case)]
    assert max(loads) == -(-sum(loads) // 4)


def test_near_replicas_keep_tokens_at_home(run):
    """Every expert is on every rank: with `nearest` each rank computes what its own tokens chose."""
    case = Case(2, (9, 30), LEVEL_2, slots=(0, 1, 2, 3) * 2, split="nearest")
    for seen in run(case):
        assert seen.tokens_E == seen.chosen_E


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("token_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_with_bias_and_own_activation(run, way, token_size, dtype):
    case = Case(2, (9,) * (2 // token_size), WAYS[way], token_size, dtype=dtype, bias=True)
    run(case)
    run(replace(case, activation=relu_product))


@pytest.mark.parametrize("way", ["level1", "level2", "chunks"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dispatch_dtype", ["int8", "fp8"])
def test_quantized_rows(run, device, way, static, dtype, dispatch_dtype):
    """Beside the dense formula for the rows as they arrive; test_row_format.py has how near these are to the tokens."""
    if (device.name, dispatch_dtype) == ("ascend", "fp8"):
        pytest.skip("Ascend A2 and A3 have no float8")
    settings = replace(WAYS[way], static=static, dispatch_dtype=dispatch_dtype)
    run(Case(2, (9, 9), settings, dtype=dtype, hidden=200, bias=True))
    run(Case(4, (6, 6), settings, token_size=2, dtype=dtype, hidden=200))


@pytest.mark.parametrize("way", WAYS)
def test_no_token_anywhere_is_served(run, way):
    run(Case(4, (0, 0, 0, 0), WAYS[way]))
    run(Case(4, (0,), WAYS[way], token_size=4))


@pytest.mark.parametrize("way", WAYS)
def test_a_token_may_choose_an_expert_twice(run, way):
    run(Case(2, (6, 13), WAYS[way], repeats=True, top_k=5, slots=REPLICAS))


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_pinned_beside_shared_tokens(run, dispatcher):
    level = {"allgather": 1, "alltoall": 2}[dispatcher]
    seen = run(Case(4, (10,), DispatchSettings(level=level, dispatcher=dispatcher), token_size=4))
    assert {rank.dispatcher for rank in seen} == {dispatcher}


@pytest.mark.parametrize("token_size", [1, 2])
def test_cutoff_keeps_its_bound_and_loses_nothing(run, token_size):
    settings = DispatchSettings(level=1, topk_scaling_factor=0.25, cutoff_min_tokens=1)
    seen = run(Case(2, (40, 24)[: 2 // token_size], settings, token_size, top_k=8))
    tokens = 40 if token_size == 2 else 64
    bound = tokens * 2  # of the 8 choices, int(8 * 0.25) fit
    assert max(rank.most_rows for rank in seen) <= bound
    assert max(rank.passes for rank in seen) > 1
    assert all(rank.passes == rank.batches for rank in seen)


def test_cutoff_floor_keeps_short_batches_in_one_pass(run):
    settings = DispatchSettings(level=1, topk_scaling_factor=0.25, cutoff_min_tokens=65536)
    assert {rank.passes for rank in run(Case(2, (40, 24), settings, top_k=8))} == {1}


def test_rounds_keep_within_the_buffers(run):
    settings = DispatchSettings(level=2, buffer_scale_factors=((30, 0.25), (0, 0.5)))
    seen = run(Case(2, (40, 20), settings, top_k=8))
    # Each token goes to both ranks: rank 0 sends 40 rows, 40 * 8 * 0.25 / 2 = 40 a round; rank 1 sends 20, 40 a round.
    assert {rank.rounds for rank in seen} == {1}
    tighter = replace(settings, buffer_scale_factors=((30, 0.05), (0, 0.02)))
    seen = run(Case(2, (40, 20), tighter, top_k=8))
    assert {rank.rounds for rank in seen} == {max(40 // 8, 20 // 2)}
    assert max(rank.most_rows for rank in seen) <= (8 + 2) * 8


def test_chunks_are_not_rounds(run):
    seen = run(Case(2, (40, 0), CHUNKS))
    assert {(rank.rounds, rank.batches) for rank in seen} == {(1, 3)}


@st.composite
def cases(draw) -> Case:
    size = draw(st.sampled_from([1, 2, 4]))
    token_size = draw(st.sampled_from([n for n in (1, 2, 4) if n <= size]))
    experts = draw(st.integers(1, 9))
    extra = draw(st.lists(st.integers(0, experts - 1), max_size=6))
    slots = [*range(experts), *extra]
    slots += [0] * max(0, size - len(slots))
    cuts = sorted(
        draw(st.sets(st.integers(1, len(slots) - 1), min_size=size - 1, max_size=size - 1))
        if size > 1
        else ()
    )
    slots_R = tuple(last - first for first, last in pairwise([0, *cuts, len(slots)]))
    groups = size // token_size
    level = draw(st.sampled_from([1, 2]))
    static = draw(st.booleans())
    tokens = draw(st.lists(st.integers(0, 30), min_size=groups, max_size=groups))
    top_k = draw(st.integers(1, experts))
    # below 1 / top_k nothing would fit, which is an error of its own
    factors = st.none() | st.floats(1.01 / top_k, 1) if top_k > 1 else st.none()
    lengths = sorted(draw(st.sets(st.integers(0, 25), max_size=3)), reverse=True)
    return Case(
        size=size,
        tokens=tuple(tokens[:1] * groups if static else tokens),
        settings=DispatchSettings(
            level=level,
            topk_scaling_factor=draw(factors) if level == 1 else None,
            cutoff_min_tokens=draw(st.integers(1, 20)),
            buffer_scale_factors=tuple((length, draw(st.floats(0.01, 2))) for length in lengths),
            overlap_chunks=draw(st.integers(1, 4)),
            overlap_min_tokens=draw(st.integers(0, 20)),
            static=static,
        ),
        token_size=token_size,
        slots=tuple(draw(st.permutations(slots))),
        slots_R=slots_R,
        split=draw(st.sampled_from(SPLITS)),
        node_size=draw(st.sampled_from([n for n in (0, 1, 2) if not n or size % n == 0])),
        top_k=top_k,
        repeats=draw(st.booleans()),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 16)),
    )


@given(case=cases())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layer_equals_the_dense_formula(run, case):
    run(case)
