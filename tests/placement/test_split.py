"""Splits of the sources' own tokens: nothing lost, near replicas first, remainders going round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epbackend.errors import ConfigError
from epbackend.placement import replica_split_reference as reference
from epbackend.placement.placement import Layout
from epbackend.placement.replica_split import (
    assign,
    even_shares,
    expected_shares,
    level_shares,
    nearest_quota,
    own_quota,
)
from tests.helpers.placement_strategies import layouts


def expert_sums(shares_P: np.ndarray, layout: Layout) -> list[int]:
    return (
        np.bincount(layout.slot_to_expert_P, weights=shares_P, minlength=layout.experts).astype(int).tolist()
    )


@st.composite
def problems(draw):
    """A layout, the counts of all its sources, and ranks a node that divide the ranks (or 0)."""
    layout = draw(layouts())
    most = draw(st.sampled_from([1, 5, 300]))
    counts_RE = np.random.default_rng(draw(st.integers(0, 2**32))).integers(
        0, most + 1, (layout.ranks, layout.experts)
    )
    nodes = [size for size in range(1, layout.ranks + 1) if layout.ranks % size == 0]
    return layout, counts_RE, draw(st.sampled_from([0, *nodes]))


@given(problems())
def test_even_shares_differ_by_one_at_most_and_lose_nothing(problem):
    layout, counts_RE, _ = problem
    for offset, counts_E in enumerate(counts_RE):
        shares_P = even_shares(counts_E, layout, offset)
        assert expert_sums(shares_P, layout) == counts_E.tolist()
        for expert in range(layout.experts):
            own = shares_P[layout.slot_to_expert_P == expert]
            assert own.max() - own.min() <= 1


def test_remainders_go_round_robin_over_experts_and_sources():
    layout = Layout(((0, 1, 2, 3), (0, 1, 2, 3)), 4)
    one_each = np.ones(4, np.int64)
    assert even_shares(one_each, layout).reshape(2, 4).sum(axis=1).tolist() == [2, 2]  # over the experts
    by_source = [even_shares(one_each, layout, offset) for offset in range(2)]
    assert sum(by_source).tolist() == [1] * 8  # over the sources


@given(problems())
def test_nearest_uses_the_nearest_replicas_alone(problem):
    layout, counts_RE, node_size = problem
    node_ranks = node_size or layout.ranks
    for source, counts_E in enumerate(counts_RE):
        quota_P = nearest_quota(counts_E, layout, source, node_size)
        assert expert_sums(quota_P, layout) == counts_E.tolist()
        rank_P = layout.rank_of_slot_P
        distance_P = np.where(
            rank_P == source, 0, np.where(rank_P // node_ranks == source // node_ranks, 1, 2)
        )
        for expert in range(layout.experts):
            here = layout.slot_to_expert_P == expert
            assert not quota_P[here & (distance_P > distance_P[here].min())].any()


@given(problems())
def test_own_quotas_conserve_both_sides(problem):
    layout, counts_RE, node_size = problem
    shares_P = level_shares(counts_RE.sum(axis=0), layout)
    quota_RP = [own_quota(counts_RE, shares_P, layout, source, node_size) for source in range(layout.ranks)]
    assert sum(quota_RP).tolist() == shares_P.tolist()
    for source, quota_P in enumerate(quota_RP):
        assert quota_P.min() >= 0
        assert expert_sums(quota_P, layout) == counts_RE[source].tolist()
        assert (
            quota_P.tolist() == reference.own_quota(counts_RE, shares_P, layout, source, node_size).tolist()
        )


@given(problems())
def test_own_quotas_travel_as_little_as_the_shares_allow(problem):
    layout, counts_RE, node_size = problem
    shares_P = level_shares(counts_RE.sum(axis=0), layout)
    quota_RP = np.array(
        [own_quota(counts_RE, shares_P, layout, source, node_size) for source in range(layout.ranks)]
    )
    for block in (1, node_size or layout.ranks):
        blocks = np.arange(layout.ranks) // block
        near_RP = blocks[:, None] == blocks[layout.rank_of_slot_P]
        for expert in range(layout.experts):
            here = layout.slot_to_expert_P == expert
            possible = sum(
                min(
                    counts_RE[blocks == b, expert].sum(),
                    shares_P[here & (blocks[layout.rank_of_slot_P] == b)].sum(),
                )
                for b in np.unique(blocks)
            )
            assert (quota_RP * near_RP)[:, here].sum() == possible


@given(problems(), st.randoms(use_true_random=False))
def test_assignment_meets_its_quotas(problem, shuffler):
    layout, counts_RE, node_size = problem
    for source, counts_E in enumerate(counts_RE):
        ids = np.repeat(np.arange(layout.experts), counts_E).tolist()
        shuffler.shuffle(ids)
        topk_ids_TK = np.array(ids, dtype=np.int64).reshape(-1, 1)
        for quota_P in (
            even_shares(counts_E, layout, source),
            nearest_quota(counts_E, layout, source, node_size),
        ):
            slot_ids_TK = assign(topk_ids_TK, quota_P, layout)
            assert slot_ids_TK.shape == topk_ids_TK.shape
            assert layout.slot_to_expert_P[slot_ids_TK].tolist() == topk_ids_TK.tolist()
            assert np.bincount(slot_ids_TK.ravel(), minlength=layout.slots).tolist() == quota_P.tolist()


def test_chunks_are_about_as_balanced_as_the_batch():
    layout = Layout(((0,), (0,)), 1)
    for tokens in (64, 100, 1000, 4096):
        slot_ids = assign(np.zeros((tokens, 1), np.int64), even_shares(np.array([tokens]), layout), layout)
        first = int((slot_ids[: tokens // 4] == 0).sum())
        assert abs(first - tokens / 8) <= tokens / 32 + 1


def test_quotas_of_other_ids_are_refused():
    layout = Layout.even(2, 2, 4)
    with pytest.raises(ConfigError, match=r"expert 1, which 3 choices name"):
        assign(np.array([[0, 1], [1, 1]]), np.array([1, 1, 0, 1]), layout)


@given(problems())
def test_expected_shares_of_nearest_are_the_mean_over_the_sources(problem):
    layout, _, node_size = problem
    many = 10**6
    counts_E = np.full(layout.experts, many)
    mean_P = np.mean([nearest_quota(counts_E, layout, r, node_size) for r in range(layout.ranks)], axis=0)
    (shares_P,) = expected_shares("nearest", counts_E[None], layout, node_size)
    assert np.allclose(shares_P, mean_P, atol=2)


def test_level_splits_counts_in_whole_tokens_and_loads_without_rounding():
    layout = Layout(((0,), (0,)), 1)
    assert expected_shares("level", np.array([[3]]), layout).tolist() == [[2, 1]]
    assert np.allclose(
        expected_shares("level", np.array([[3.0], [0.0], [1e-9]]), layout), [[1.5, 1.5], [0, 0], [5e-10] * 2]
    )


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'level'"):
        expected_shares("levl", np.ones((1, 2)), Layout.even(2, 2))
