"""Sizes that all ranks agree on before a row travels: cutoff bounds, buffer shares, steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epbackend.dispatch.alltoall import ExchangePlan, peer_share
from epbackend.dispatch.base import DispatchSettings
from epbackend.dispatch.local_experts import expected_rows, kept_choices, row_bound
from epbackend.errors import ConfigError

MINDIE_TABLE = (
    (1048576, 1.32),
    (524288, 1.4),
    (262144, 1.53),
    (131072, 1.8),
    (32768, 3.0),
    (8192, 5.2),
    (0, 8.0),
)


@pytest.mark.parametrize(
    ("tokens", "factor", "expected"),
    [
        (100, None, 800),
        (100, 1.0, 800),
        (100, 0.25, 800),  # 65536 tokens' worth is more than there is
        (65536, 0.25, 65536 * 2),
        (200_000, 0.25, 200_000 * 2),
        (65536, 0.3, 65536 * 2),  # int(8 * 0.3) == 2
    ],
)
def test_row_bound_is_mindies(tokens, factor, expected):
    assert row_bound(tokens, 8, DispatchSettings(topk_scaling_factor=factor)) == expected


@given(st.integers(1, 64))
def test_the_smallest_factor_named_works(top_k):
    with pytest.raises(ConfigError, match="topk_scaling_factor") as caught:
        kept_choices(top_k, 0.99 / top_k)
    smallest = float(str(caught.value).split()[-1])
    assert kept_choices(top_k, smallest) == 1


@pytest.mark.parametrize(
    ("tokens", "scale"),
    [(2_000_000, 1.32), (1048576, 1.32), (1048575, 1.4), (8192, 5.2), (8191, 8.0), (0, 8.0)],
)
def test_buffer_table_is_a_step_lookup(tokens, scale):
    share = peer_share(tokens, 8, 16, DispatchSettings(level=2, buffer_scale_factors=MINDIE_TABLE))
    assert share == max(1, -(-int(tokens * 8 * scale) // 16))


def test_no_entry_short_enough_is_the_worst_case():
    settings = DispatchSettings(level=2, buffer_scale_factors=((100, 0.1),))
    assert peer_share(99, 8, 4, settings) == 99 * 8
    assert peer_share(100, 8, 4, settings) == 20
    assert peer_share(5, 8, 4, DispatchSettings(level=2)) is None


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 50), min_size=n, max_size=n), min_size=n, max_size=n)
    ),
    st.floats(0.001, 2),
    st.integers(1, 5),
)
def test_steps_move_every_row_once_within_its_share(counts_RR, scale, chunks):
    tokens_R = [max(counts_R) for counts_R in counts_RR]
    settings = DispatchSettings(
        level=2, buffer_scale_factors=((0, scale),), overlap_chunks=chunks, overlap_min_tokens=10
    )
    plan = ExchangePlan.of(counts_RR, tokens_R, 4, settings)
    assert plan.rounds <= max(plan.steps, 1)
    for sender, counts_R in enumerate(counts_RR):
        share = peer_share(tokens_R[sender], 4, len(tokens_R), settings)
        for receiver, count in enumerate(counts_R):
            parts = [plan.rows(sender, receiver, step) for step in range(plan.steps)]
            assert [row for part in parts for row in part] == list(range(count))
            assert all(len(part) <= share for part in parts)


@pytest.mark.parametrize(("ranks", "top_k"), [(1, 8), (8, 8), (32, 6), (4, 1)])
def test_expected_rows_are_those_of_drawn_choices(ranks, top_k):
    """Ten thousand tokens whose choices fall on any rank alike."""
    here_TK = torch.randint(ranks, (10_000, top_k), generator=torch.Generator().manual_seed(0)) == 0
    chosen = int(here_TK.any(1).sum())
    rows = int(here_TK.sum())
    assert expected_rows(10_000, top_k, ranks, chosen=False) == pytest.approx(rows, rel=0.05)
    assert expected_rows(chosen, top_k, ranks, chosen=True) == pytest.approx(rows, rel=0.05)
