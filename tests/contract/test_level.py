"""The split `level` of every device beside the plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epbackend.placement.layout import Layout
from epbackend.placement.split import reference

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st


@given(
    counts=st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=2, max_size=2),
    source=st.integers(0, 1),
    node_sources=st.integers(0, 1),
)
def test_level_quota_is_the_plain_one_to_the_last_token(device, counts, source, node_sources):
    """Two sources of two ranks each; expert 0 is everywhere, 3 twice, and on one rank twice."""
    layout = Layout(((0, 1), (0, 3, 3), (2, 0), (3, 0, 1)), experts=4)
    by_source = Layout(((0, 1, 0, 3, 3), (2, 0, 3, 0, 1)), experts=4)
    counts_GE = torch.tensor(counts, device=device.torch_device(0))
    found = device.kernels.level_quota(counts_GE, layout, by_source, source, node_sources)
    plain = np.array(counts)
    shares_P = reference.level_shares(plain.sum(axis=0), layout)
    assert found.tolist() == reference.own_quota(plain, shares_P, by_source, source, node_sources).tolist()
