"""The benchmarks' contestants compute the same thing, so that their times can be compared."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.cuda.cases import Case
from benchmarks.cuda.contestants import contestants
from benchmarks.cuda.layer import Layers
from epbackend.kernels.triton.tiles import chip_of
from epbackend.kernels.triton.tuning import LARGEST_ERROR, ExpertShape

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("form", ["half", "fp8", "int8"])
def test_contestants_compute_the_reference(place, form):
    if form == "fp8" and not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")
    case = Case(ExpertShape("tiny", slots=3, D=256, F=128, top_k=2), form, tokens=9)
    found = contestants(case, place)
    assert len(found) == {"half": 4, "fp8": 3, "int8": 2}[form]
    for who in found:
        assert who.error() < LARGEST_ERROR[form], who.name


def test_layers_follow_each_other(place, monkeypatch):
    """In both phases, with rows copied and gathered; LMDeploy's kernels want a GPU."""
    monkeypatch.setattr("benchmarks.cuda.layer.DECODED", 3)
    monkeypatch.setattr("benchmarks.cuda.layer.LAYERS", 2)
    layers = Layers(None, ExpertShape("tiny", slots=4, D=64, F=32, top_k=2), place)
    for tokens in (3, 4):
        with torch.inference_mode():
            out_TD, gathered_TD = (call() for call in layers.calls(tokens).values())
        assert out_TD.shape == (tokens, 64)
        assert out_TD.isfinite().all()
        assert torch.equal(out_TD, gathered_TD)
