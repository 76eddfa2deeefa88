"""Hypothesis strategies of layouts, placements and loads."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from epbackend.placement import Layout, Placement


@st.composite
def layouts(draw, experts: int | None = None, ranks: int | None = None):
    """Layouts with replicas anywhere, and any number of slots a rank."""
    experts = experts or draw(st.integers(1, 8))
    ranks = ranks or draw(st.integers(1, 4))
    held = draw(st.lists(st.integers(0, experts - 1), min_size=max(0, ranks - experts), max_size=8))
    order = draw(st.permutations([*range(experts), *held]))
    cuts = draw(
        st.lists(st.integers(1, len(order) - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True)
        if ranks > 1
        else st.just([])
    )
    bounds = [0, *sorted(cuts), len(order)]
    return Layout(tuple(tuple(order[a:b]) for a, b in pairwise(bounds)), experts)


@st.composite
def placements(draw, layers: int | None = None):
    """Placements whose layers differ in slots."""
    experts, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    layers = layers or draw(st.integers(1, 3))
    return Placement(tuple(draw(layouts(experts, ranks)) for _ in range(layers)))


def skewed(layers: int, experts: int, seed: int = 0) -> np.ndarray:
    """Tokens [layers, experts] of which a few experts have most."""
    return np.floor(np.random.default_rng(seed).lognormal(5.0, 1.0, (layers, experts)))
