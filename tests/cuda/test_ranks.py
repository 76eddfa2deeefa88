"""Several ranks on the GPUs that there are, joined by gloo: one is enough, and the interpreter does too.

No time is taken from it: ranks on one GPU take turns.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from epbackend.dispatch.base import DispatchSettings
from tests.helpers.layer_case import Case, layer_equals_dense

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
        seen = ranks.run(case.size, layer_equals_dense, replace(case, device="cuda", hidden=128))
        (name,) = {each.dispatcher for each in seen}
        return name

    return run


@pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])
@pytest.mark.parametrize(
    ("way", "dispatch_dtype"),
    [("allgather", "full"), ("alltoall", "int8"), ("chunks", "full"), ("chunks", "fp8")],
)
def test_two_ranks(run, way, static, dispatch_dtype):
    settings = replace(WAYS[way], static=static, dispatch_dtype=dispatch_dtype)
    case = Case(2, (9, 9) if static else (9, 2), settings, dtype=torch.bfloat16)
    assert run(case) == settings.dispatcher


def test_ranks_that_hold_the_same_tokens(run):
    static = DispatchSettings(level=1, static=True, topk_scaling_factor=0.5, cutoff_min_tokens=1)
    assert run(Case(2, (9,), static, token_size=2, dtype=torch.bfloat16)) == "replicated"
