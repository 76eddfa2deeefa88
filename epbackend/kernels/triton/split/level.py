"""How many of its tokens each copy takes, so that the fullest rank is as empty as can be.

One program: every step follows from the one before. Loads of all ranks and shares of all copies stay in registers.
`epbackend/placement/split/reference.py` says in words and plain Python what happens here: replicated experts pour their
tokens anew on the ranks of their copies, in sweeps; before every second sweep loads are carried along a tree of ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.split.table import SplitTable

GAP_BITS = tl.constexpr(10)
MOST_SWEEPS = tl.constexpr(64)
"""As in the reference."""

SINGLES = 32
"""Experts on one rank that are added up at a time."""


def level_shares(tokens_E: Tensor, table: SplitTable) -> Tensor:
    """shares_XC (int32), zero where a row has no copy; sums over an expert's copies are its tokens."""
    replicated, copies = table.ranks_XC.shape
    shares_XC = torch.zeros(replicated, copies, dtype=torch.int32, device=tokens_E.device)
    if replicated:
        _level_shares[(1,)](
            tokens_E,
            table.rank_E,
            table.expert_X,
            table.ranks_XC,
            shares_XC,
            len(table.rank_E),
            table.ranks,
            replicated,
            copies,
            triton.next_power_of_2(replicated),
            triton.next_power_of_2(copies),
            triton.next_power_of_2(table.ranks),
            SINGLES,
        )
    return shares_XC


@triton.jit
def _level_shares(
    tokens_E,
    rank_E,
    expert_X,
    ranks_XC,
    shares_XC,
    experts,
    ranks,
    X,
    C,
    XS: tl.constexpr,
    CS: tl.constexpr,
    RS: tl.constexpr,
    SINGLES: tl.constexpr,
):
    """XS, CS and RS are powers of two that hold X, C and the ranks."""
    each_rank = tl.arange(0, RS)
    loads = tl.where(each_rank < ranks, 0, -1)  # lanes past the ranks are never the fullest
    for start in range(0, experts, SINGLES):
        expert = start + tl.arange(0, SINGLES)
        rank = tl.load(rank_E + expert, mask=expert < experts, other=-1)
        tokens = tl.load(tokens_E + expert, mask=rank >= 0, other=0).to(tl.int32)
        loads += _spread(tokens, rank, each_rank)
    each = tl.arange(0, XS)[:, None]
    copy = tl.arange(0, CS)[None, :]
    here = (each < X) & (copy < C)
    here = here & (tl.load(ranks_XC + each * C + copy, mask=here, other=-1) >= 0)
    expert = tl.load(expert_X + each, mask=each < X, other=0)
    tokens = tl.load(tokens_E + expert, mask=each < X, other=0).to(tl.int32)
    copies = tl.maximum(tl.sum(here.to(tl.int32), 1)[:, None], 1)
    shares = tl.where(here, tokens // copies + (copy < tokens % copies).to(tl.int32), 0)
    for x in range(0, X):
        loads += _spread(_row(shares, x, XS), _ranks(ranks_XC, x, C, CS), each_rank)
    sweep = tl.zeros((), tl.int32)
    going = sweep == 0
    while going:
        size, total, order, joined, giver, taker = _grow_tree(loads, shares, ranks_XC, X, C, XS, CS, RS)
        most = tl.max(loads)
        going = most - (most >> GAP_BITS) > (total + size - 1) // size
        if going:
            if sweep % 2 == 1:
                loads, shares = _carry(
                    loads, shares, ranks_XC, C, size, total, order, joined, giver, taker, XS, CS, RS
                )
            loads, shares = _sweep(loads, shares, tokens_E, expert_X, ranks_XC, X, C, XS, CS, RS)
        sweep += 1
        going = going & (sweep < MOST_SWEEPS)
    tl.store(shares_XC + each * C + copy, shares, mask=here)


@triton.jit
def _ranks(ranks_XC, x, C, CS: tl.constexpr):
    """The ranks of one expert's copies, -1 past them."""
    copy = tl.arange(0, CS)
    return tl.load(ranks_XC + x * C + copy, mask=copy < C, other=-1)


@triton.jit
def _row(shares, x, XS: tl.constexpr):
    """shares[x]."""
    return tl.sum(tl.where(tl.arange(0, XS)[:, None] == x, shares, 0), 0)


@triton.jit
def _spread(values, rank, each_rank):
    """For every rank the sum of the values that are on it."""
    return tl.sum(tl.where(rank[:, None] == each_rank[None, :], values[:, None], 0), 0)


@triton.jit
def _sweep(
    loads, shares, tokens_E, expert_X, ranks_XC, X, C, XS: tl.constexpr, CS: tl.constexpr, RS: tl.constexpr
):
    """Pour every replicated expert anew."""
    each_rank = tl.arange(0, RS)
    for x in range(0, X):
        rank = _ranks(ranks_XC, x, C, CS)
        loads -= _spread(_row(shares, x, XS), rank, each_rank)
        tokens = tl.load(tokens_E + tl.load(expert_X + x)).to(tl.int32)
        poured = _pour(tokens, tl.gather(loads, tl.maximum(rank, 0), 0), rank >= 0)
        loads += _spread(poured, rank, each_rank)
        shares = tl.where(tl.arange(0, XS)[:, None] == x, poured[None, :], shares)
    return loads, shares


@triton.jit
def _pour(tokens, load, here):
    """Tokens poured on ranks that carry `load`: those under the water end level, the first ones get what is left."""
    under = here
    before = tl.zeros((), tl.int32)
    count = tl.sum(under.to(tl.int32))
    total = tokens + tl.sum(tl.where(under, load, 0))
    while count != before:
        before = count
        under = here & (load <= total // count)
        count = tl.sum(under.to(tl.int32))
        total = tokens + tl.sum(tl.where(under, load, 0))
    level = total // count
    nth = tl.cumsum(under.to(tl.int32)) - 1
    return tl.where(under, level - load + (nth < total - level * count).to(tl.int32), 0)


@triton.jit
def _grow_tree(loads, shares, ranks_XC, X, C, XS: tl.constexpr, CS: tl.constexpr, RS: tl.constexpr):
    """The ranks to which tokens of the fullest rank can get, and their number and load.

    Of each rank: `order` of joining, or -1; the expert that `joined` it, its copy nearer to the root (`giver`), and its
    copy there (`taker`).
    """
    each_rank, copy = tl.arange(0, RS), tl.arange(0, CS)
    total = tl.max(loads)
    root = tl.min(tl.where(loads == total, each_rank, RS))
    order = tl.where(each_rank == root, 0, -1)
    joined, giver, taker = tl.zeros_like(order), tl.zeros_like(order), tl.zeros_like(order)
    grown = tl.zeros((), tl.int32)
    size = grown + 1
    while size > grown:
        grown = size
        for x in range(0, X):
            rank = _ranks(ranks_XC, x, C, CS)
            inside = tl.gather(order, tl.maximum(rank, 0), 0) >= 0
            gives = (rank >= 0) & inside & (_row(shares, x, XS) > 0)
            first_giver = tl.min(tl.where(gives, copy, CS))
            joins = ((rank >= 0) & (inside == 0) & (first_giver < CS)).to(tl.int32)
            place = size + tl.cumsum(joins) - joins
            new = _spread(joins, rank, each_rank) > 0
            order = tl.where(new, _spread(place * joins, rank, each_rank), order)
            joined = tl.where(new, x, joined)
            giver = tl.where(new, first_giver, giver)
            taker = tl.where(new, _spread(copy * joins, rank, each_rank), taker)
            total += tl.sum(tl.where(new, loads, 0))
            size += tl.sum(joins)
    return size, total, order, joined, giver, taker


@triton.jit
def _carry(
    loads,
    shares,
    ranks_XC,
    C,
    size,
    total,
    order,
    joined,
    giver,
    taker,
    XS: tl.constexpr,
    CS: tl.constexpr,
    RS: tl.constexpr,
):
    """Level the tree from its leaves to the root, as far as the shares along its branches go."""
    each, copy, each_rank = tl.arange(0, XS)[:, None], tl.arange(0, CS)[None, :], tl.arange(0, RS)
    mean = total // size
    for step in range(1, size):
        index = size - step
        here = order == index
        x = tl.sum(tl.where(here, joined, 0))
        from_copy, to_copy = tl.sum(tl.where(here, giver, 0)), tl.sum(tl.where(here, taker, 0))
        given = (each == x) & (copy == from_copy)
        taken = (each == x) & (copy == to_copy)
        surplus = tl.sum(tl.where(here, loads, 0)) - mean - (index < total - mean * size).to(tl.int32)
        surplus = tl.minimum(surplus, tl.sum(tl.sum(tl.where(taken, shares, 0), 1)))
        surplus = tl.maximum(surplus, -tl.sum(tl.sum(tl.where(given, shares, 0), 1)))
        shares += tl.where(given, surplus, 0) - tl.where(taken, surplus, 0)
        parent = tl.load(ranks_XC + x * C + from_copy)
        loads += tl.where(each_rank == parent, surplus, 0) - tl.where(here, surplus, 0)
    return loads, shares
