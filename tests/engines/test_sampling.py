"""Seeds mean the same draw anywhere; many seeds draw by the probabilities."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from epbackend.engines.lmdeploy.devices.cpu import SeededMultinomial, uniform

ANY_SEED = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.tuples(ANY_SEED, st.integers(0, 2**31)), min_size=1, max_size=20))
def test_uniform_depends_on_its_own_seed_and_offset_only(pairs):
    seeds, offsets = (torch.tensor(column) for column in zip(*pairs, strict=True))
    together = uniform(seeds, offsets)
    alone = torch.cat([uniform(seeds[i : i + 1], offsets[i : i + 1]) for i in range(len(pairs))])
    assert torch.equal(together, alone)
    assert ((together >= 0) & (together < 1)).all()


def test_draws_follow_the_probabilities_and_never_take_an_impossible_token():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    seeds = torch.arange(20000)
    drawn = SeededMultinomial().forward(probabilities.repeat(20000, 1), seeds, torch.zeros_like(seeds))
    frequency = torch.bincount(drawn, minlength=6) / 20000
    assert frequency[[0, 2, 5]].sum() == 0
    torch.testing.assert_close(frequency, probabilities, atol=0.02, rtol=0)


def test_sampled_columns_become_token_ids():
    ids = torch.tensor([[40, 41, 42], [50, 51, 52]])
    certain = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    drawn = SeededMultinomial().forward(certain, torch.tensor([1, 2]), torch.tensor([3, 4]), ids)
    assert drawn.tolist() == [41, 52]
