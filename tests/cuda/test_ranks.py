"""Several ranks on the GPUs that there are, joined by gloo: one is enough, and the interpreter does too.

No time is taken from it: ranks on one GPU take turns.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.dispatch.base import DispatchSettings
from epbackend.kernels.triton.tiles import chip_of
from tests.helpers.layer_case import (
    REPLICAS,
    SPLITS,
    UNEVEN,
    UNEVEN_CUTS,
    Case,
    assert_each_choice_computed_once,
    layer_equals_dense,
    relu_product,
)
from tests.helpers.quantized_layer import FP8, layer_is_near

pytestmark = pytest.mark.cuda
WAYS = {
    "allgather": DispatchSettings(level=1, dispatcher="allgather"),
    "alltoall": DispatchSettings(level=2, dispatcher="alltoall"),
    "chunks": DispatchSettings(level=2, dispatcher="alltoall", overlap_chunks=3, overlap_min_tokens=1),
}


@pytest.fixture
def run(cuda, ranks):
    """Run a case with the Triton kernels beside the dense formula, and return the dispatcher that it took."""

    def run(case: Case) -> str:
        seen = ranks.run(case.size, layer_equals_dense, replace(case, device="cuda"))
        assert_each_choice_computed_once(seen, case.token_size)
        (name,) = {each.dispatcher for each in seen}
        return name

    return run


@pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])
@pytest.mark.parametrize(
    ("way", "dispatch_dtype"),
    [("allgather", "full"), ("alltoall", "int8"), ("chunks", "full"), ("chunks", "fp8")],
)
def test_two_ranks_equal_the_dense_formula(run, way, static, dispatch_dtype):
    settings = replace(WAYS[way], static=static, dispatch_dtype=dispatch_dtype)
    case = Case(2, (9, 9) if static else (9, 2), settings, dtype=torch.bfloat16, hidden=128)
    assert (run(case),) == settings.dispatcher


def test_ranks_with_the_same_tokens_take_replicated(run):
    static = DispatchSettings(level=1, static=True, topk_scaling_factor=0.5, cutoff_min_tokens=1)
    assert run(Case(2, (9,), static, token_size=2, dtype=torch.bfloat16, hidden=128)) == "replicated"


@pytest.mark.parametrize("activation", [None, relu_product], ids=["swiglu", "own"])
@pytest.mark.parametrize("token_size", [1, 2])
def test_bias_and_activation_of_odd_sizes_in_float16(run, token_size, activation):
    tokens = (9,) * (2 // token_size)
    level_1 = DispatchSettings(level=1)
    run(Case(2, tokens, level_1, token_size, dtype=torch.float16, bias=True, activation=activation))


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_on_ranks_with_unequal_slots(run, split):
    run(Case(2, (7, 0), DispatchSettings(level=1), 1, UNEVEN, UNEVEN_CUTS[2], split, bias=True))


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_float8_experts(place, ranks, size, level):
    if not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")
    ranks.run(size, layer_is_near, DispatchSettings(level=level), REPLICAS, "cuda", FP8)
