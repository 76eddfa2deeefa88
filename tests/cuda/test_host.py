"""Launches into a driver that does nothing: how many a layer call makes, and which kernel is kept for what."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from benchmarks.cuda.cases import gathering
from benchmarks.cuda.host import calls, launches, stubbed_gpu
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.triton.expert_mlp import swiglu
from epbackend.kernels.triton.tuning import ExpertShape
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(knobs.runtime.interpret, reason="the interpreter compiles nothing"),
]


@pytest.mark.parametrize(("tokens", "most"), [(4, 6), (300, 9)], ids=["decode", "prefill"])
def test_a_layer_call_takes_few_launches(tokens, most):
    """Those of docs/cuda.md: weights are renormalized, and the load is counted, in kernels that run anyway."""
    with stubbed_gpu() as stub, torch.inference_mode():
        by = calls(ExpertShape("small", slots=16, D=64, F=32, top_k=8), tokens, None)
        found = {who: launches(call, stub) for who, call in by.items()}
    # Many rows are copied by a launch of their own, unless the first product reads them where the tokens lie.
    assert {who: sum(each.values()) for who, each in found.items()} == {
        "epbackend": most,
        "gathered": most - (tokens == 300),
    }
    assert not [name for each in found.values() for name in each if name.startswith("torch")]


FORMS = {
    "bfloat16": lambda matrices: matrices.bfloat16(),
    "float32": lambda matrices: matrices,
    "int8": Int8Weights.of,
    "fp8": Fp8Blocks.of,
}


@pytest.mark.parametrize(
    ("form", "gather"),
    [("bfloat16", False), ("bfloat16", True), ("float32", True), ("int8", False), ("fp8", False)],
)
def test_a_second_call_loads_no_kernel(form, gather):
    """A load in the middle of a capture would end it, and LMDeploy makes one call before each."""
    slots, width, inner, top_k, tokens = 4, 256, 128, 2, 8
    loaded = []
    with stubbed_gpu() as stub, torch.inference_mode(), gathering() if gather else nullcontext():
        load = stub.utils.load_binary
        with mock.patch.object(
            stub.utils, "load_binary", lambda name, *rest: (loaded.append(name), load(name, *rest))[1]
        ):
            layer = ExpertParallelMoE(
                FORMS[form](torch.randn(slots, 2 * inner, width)),
                FORMS[form](torch.randn(slots, width, inner)),
                slot_map=SlotMap.uniform(slots, 1),
                ranks=RankGroup.single(),
                settings=DispatchSettings(),
                top_k=top_k,
                device="cuda",
            )
            hidden_TD = torch.randn(tokens, width).to(torch.float32 if form == "float32" else torch.bfloat16)
            ids_TK, weights_TK = torch.randint(slots, (tokens, top_k)), torch.rand(tokens, top_k)
            layer(hidden_TD, ids_TK, weights_TK, phase="decode")
            first = len(loaded)
            layer(hidden_TD, ids_TK, weights_TK, phase="decode")
    assert loaded[first:] == []


def test_a_kernel_is_kept_for_its_kind_of_arguments():
    """By dtype and alignment, as Triton tells them apart."""
    rows = torch.zeros(4, 32)
    given = []
    with stubbed_gpu() as stub, mock.patch.object(stub.utils, "launch", lambda *said: given.append(said)):
        for each in (rows, rows, rows[1:, 1:17], rows.bfloat16()):
            swiglu(each)
    arguments = [said[-1] for said in given]
    assert [each[0].dtype for each in arguments] == [torch.float32] * 3 + [torch.bfloat16]
    assert [each[2] for each in arguments] == [32, 32, 32, 32]
    assert [said[:3] for said in given] == [(4, 1, 1), (4, 1, 1), (3, 1, 1), (4, 1, 1)]
