"""Paged attention against plain attention over the whole sequence, whatever pages and batches it is cut into."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmdeploy.pytorch.backends.attention import PagedAttentionBuildSpec

from epbackend.engines.lmdeploy.devices.cpu_attention import (
    PADDED_TOKENS,
    PagedAttention,
    group_by_length,
    plan_attention,
)
from epbackend.errors import UnavailableError

BLOCK = 4


@dataclass(frozen=True)
class Form:
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    latent: bool
    window: int | None = None
    causal: bool = True
    sinks: bool = False

    def spec(self, **changes) -> PagedAttentionBuildSpec:
        values = {
            "num_heads": self.heads,
            "head_dim": self.dim,
            "scale": None,
            "num_kv_heads": self.kv_heads,
            "v_head_dim": self.v_dim,
            "alibi": False,
            "sliding_window": self.window,
            "logit_softcapping": 0.0,
            "causal": self.causal,
            "use_flash_mla": False,
            "mla_index_topk": None,
            "learnable_sink": self.sinks,
            "block_sparse_size": 1,
        }
        return PagedAttentionBuildSpec(**(values | changes))


FORMS = [
    Form(4, 4, 8, 8, latent=False),
    Form(4, 2, 8, 8, latent=False),
    Form(4, 1, 12, 8, latent=True),
    Form(4, 2, 8, 8, latent=False, window=5),
    Form(4, 2, 8, 8, latent=False, sinks=True),
    Form(4, 2, 8, 8, latent=False, window=5, sinks=True),
]
SINKS = torch.tensor([-1.0, 0.0, 1.0, 3.0])
"""A score of each head that takes its share of the attention, and gives nothing."""


def plain_attention(query_THD, keys_SGD, values_SGE, form: Form):
    """The last T positions of a sequence of S, one by one."""
    T, S = len(query_THD), len(keys_SGD)
    out = torch.empty(T, form.heads, form.v_dim)
    for t in range(T):
        position = S - T + t
        first = max(0, position + 1 - form.window) if form.window else 0
        for head in range(form.heads):
            group = head // (form.heads // form.kv_heads)
            scores = keys_SGD[first : position + 1, group] @ query_THD[t, head] / form.dim**0.5
            weights = torch.cat([scores, SINKS[head, None]] if form.sinks else [scores]).softmax(0)
            out[t, head] = weights[: len(scores)] @ values_SGE[first : position + 1, group]
    return out


@settings(max_examples=60)
@given(
    form=st.sampled_from(FORMS),
    lengths=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 9)), min_size=1, max_size=4),
    decoding=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_attention_over_a_paged_cache_equals_plain_attention(form, lengths, decoding, seed):
    """Each sequence: `old` tokens in the cache already (an earlier chunk, a cached prefix), `new` ones now."""
    draw = torch.Generator().manual_seed(seed)
    if decoding:
        lengths = [(old, 1) for old, _ in lengths]
    totals = [old + new for old, new in lengths]
    pages = torch.randperm(sum(-(-total // BLOCK) for total in totals), generator=draw)
    blocks = [-(-total // BLOCK) for total in totals]
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, part in enumerate(pages.split(blocks)):
        tables[row, : len(part)] = part

    # Pages are views into a pool, with other things between them; unwritten places must not matter.
    pool = torch.full((len(pages), 2, BLOCK, form.kv_heads, max(form.dim, form.v_dim)), float("nan"))
    pool[:] = 1e4
    k_cache = pool[:, 0, ..., : form.dim]
    v_cache = k_cache[..., : form.v_dim] if form.latent else pool[:, 1, ..., : form.v_dim]
    attention = PagedAttention(form.spec())

    sequences = []
    for old, new in lengths:
        keys = torch.randn(old + new, form.kv_heads, form.dim, generator=draw)
        values = (
            keys[..., : form.v_dim]
            if form.latent
            else torch.randn(old + new, form.kv_heads, form.v_dim, generator=draw)
        )
        sequences.append((torch.randn(old + new, form.heads, form.dim, generator=draw), keys, values))

    def step(cut):
        """Runs the part of each sequence between its two positions."""
        part = [(row, a, b) for row, (a, b) in enumerate(cut) if b > a]
        if not part:
            return None
        rows = [row for row, _, _ in part]
        q, k, v = (torch.cat([sequences[row][i][a:b] for row, a, b in part]) for i in range(3))
        new = torch.tensor([b - a for _, a, b in part])
        context = SimpleNamespace(
            kv_caches=[(k_cache, v_cache)],
            block_offsets=tables[rows],
            q_seqlens=new,
            kv_seqlens=torch.tensor([b for _, _, b in part]),
            q_start_loc=new.cumsum(0) - new,
            is_decoding=decoding,
            kv_quant_policy=0,
        )
        sinks = SINKS if form.sinks else None
        return attention.forward(q, k, v, k_cache, v_cache, plan_attention(context), learnable_sink=sinks)

    step([(0, old) for old, _ in lengths])
    out = step([(old, old + new) for old, new in lengths])

    expected = torch.cat(
        [plain_attention(q[old:], k, v, form) for (q, k, v), (old, _) in zip(sequences, lengths, strict=True)]
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@given(st.dictionaries(st.integers(0, 500), st.integers(1, 60000), max_size=80))
def test_groups_hold_every_sequence_once_and_little_padding(lengths):
    groups = group_by_length(lengths)
    assert sorted(index for group in groups for index in group) == sorted(lengths)
    for group in groups:
        longest = lengths[group[0]]
        assert all(lengths[index] <= longest <= 2 * lengths[index] + 64 for index in group)
        assert len(group) == 1 or longest * len(group) <= PADDED_TOKENS


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"alibi": True}, "ALiBi"),
        ({"logit_softcapping": 30.0}, "soft-capping"),
        ({"mla_index_topk": 64}, "sparse index"),
        ({"block_sparse_size": 4}, "block-sparse"),
    ],
)
def test_forms_of_attention_that_the_cpu_lacks_are_refused_by_name(changes, named):
    with pytest.raises(UnavailableError, match=f"cpu.*{named}"):
        PagedAttention(FORMS[0].spec(**changes))
