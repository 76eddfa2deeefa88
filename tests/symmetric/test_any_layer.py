"""Any layer, any routing, on virtual ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.layer_case import Case
from tests.helpers.symmetric_cases import BOUNDED, OPEN, STATIC, run, tight

pytestmark = pytest.mark.cuda


@st.composite
def cases(draw) -> Case:
    size = draw(st.integers(2, 4))
    experts = draw(st.integers(1, 6))
    slots = [*range(experts), *draw(st.lists(st.integers(0, experts - 1), max_size=4))]
    slots += [0] * (-len(slots) % size)
    settings = draw(st.sampled_from([OPEN, BOUNDED, STATIC]))
    tokens = draw(st.lists(st.integers(0, 11), min_size=size, max_size=size))
    if draw(st.booleans()):
        settings = tight(settings, draw(st.floats(0.5, 2)))
    return Case(
        size=size,
        tokens=tuple(tokens[:1] * size if settings.static else tokens),
        settings=settings,
        slots=tuple(draw(st.permutations(slots))),
        top_k=draw(st.integers(1, experts)),
        repeats=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 16)),
    )


@given(case=cases())
def test_any_layer_equals_the_dense_formula(place_of, case):
    run(case, place_of, order=range(case.size)[:: 1 if case.seed % 2 else -1])
