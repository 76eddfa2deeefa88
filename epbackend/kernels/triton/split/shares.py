"""How many of its tokens each copy takes, so that the fullest rank is as empty as can be.

One program: every step follows from the one before. Loads of all ranks and shares of all copies stay in registers.
`epbackend/placement/split/reference.py` says in words and plain Python what happens here: replicated experts pour their
tokens anew on the ranks of their copies, in sweeps; before every second sweep loads are carried along a tree of ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

GAP_BITS = tl.constexpr(10)
MOST_SWEEPS = tl.constexpr(64)
"""As in the reference."""


@triton.jit
def level_shares(
    tokens,
    single_RJ,
    expert_X,
    ranks_XC,
    R,
    J,
    X,
    C,
    RS: tl.constexpr,
    JS: tl.constexpr,
    XS: tl.constexpr,
    CS: tl.constexpr,
):
    """shares [XS, CS], zero where a row has no copy. `tokens` has a lane for each expert; RS, JS, XS and CS are powers
    of two that hold the ranks, the experts on one rank alone, the replicated ones and their copies."""
    loads = _single_loads(tokens, single_RJ, R, J, RS, JS)
    nth = tl.arange(0, XS)
    tokens_X = tl.gather(tokens, tl.load(expert_X + nth, mask=nth < X, other=0), 0)
    tokens_X = tl.where(nth < X, tokens_X, 0)
    each_rank = tl.arange(0, RS)
    each, copy = nth[:, None], tl.arange(0, CS)[None, :]
    here = (each < X) & (copy < C)
    here = here & (tl.load(ranks_XC + each * C + copy, mask=here, other=-1) >= 0)
    copies = tl.maximum(tl.sum(here.to(tl.int32), 1), 1)
    more = (copy < (tokens_X % copies)[:, None]).to(tl.int32)
    shares = tl.where(here, (tokens_X // copies)[:, None] + more, 0)
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
            loads, shares = _sweep(loads, shares, tokens_X, ranks_XC, X, C, XS, CS, RS)
        sweep += 1
        going = going & (sweep < MOST_SWEEPS)
    return shares


@triton.jit
def _single_loads(tokens, single_RJ, R, J, RS: tl.constexpr, JS: tl.constexpr):
    """Tokens of each rank's own experts; -1 in lanes past the ranks, so that they are never the fullest."""
    flat = tl.arange(0, RS * JS)
    rank, place = flat // JS, flat % JS
    expert = tl.load(single_RJ + rank * J + place, mask=(rank < R) & (place < J), other=-1)
    of_single = tl.where(expert >= 0, tl.gather(tokens, tl.maximum(expert, 0), 0), 0)
    loads = tl.sum(tl.reshape(of_single, (RS, JS)), 1)
    return tl.where(tl.arange(0, RS) < R, loads, -1)


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
def _sweep(loads, shares, tokens_X, ranks_XC, X, C, XS: tl.constexpr, CS: tl.constexpr, RS: tl.constexpr):
    """Pour every replicated expert anew."""
    each_rank = tl.arange(0, RS)
    for x in range(0, X):
        rank = _ranks(ranks_XC, x, C, CS)
        loads -= _spread(_row(shares, x, XS), rank, each_rank)
        tokens = tl.sum(tl.where(tl.arange(0, XS) == x, tokens_X, 0))
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
