"""The benchmark's contestants compute the same thing, so that their times can be compared."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.cuda.cases import Case, Experts
from benchmarks.cuda.contestants import contestants
from epbackend.kernels.triton.tiles import chip_of
from epbackend.kernels.triton.tuning import LARGEST_ERROR

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("form", ["half", "fp8", "int8"])
def test_contestants_compute_the_reference(place, form):
    if form == "fp8" and not chip_of(place).fp8:
        pytest.skip("this chip has no float8 matrix units")
    case = Case(Experts("tiny", slots=3, D=256, F=128, top_k=2), form, tokens=9)
    found = contestants(case, place)
    assert len(found) == (4 if form == "half" else 2)
    for who in found:
        assert who.error() < LARGEST_ERROR[form], who.name
