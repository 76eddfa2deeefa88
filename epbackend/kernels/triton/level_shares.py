"""How many tokens each replica of an expert takes in the splits `level` and `level_by_node`, on the device.

    level_shares   the fullest rank is as empty as can be: sweeps fill each replicated expert's tokens onto its ranks
                   (water-filling), and before every second sweep loads move along a tree of ranks
    by_node_shares from those: tokens stay on their own node as far as the slowest rank allows

`epbackend/placement/replica_split_reference.py` says the same in plain Python. Both are parts of the kernel in
`level_split.py`.

Shapes: E experts, X replicated experts (on several ranks), C replicas of an expert, R ranks, J unreplicated experts of
a rank, G sources. XS, CS, RS and JS are powers of two that hold X, C, R and J.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

GAP_BITS = tl.constexpr(10)
MOST_SWEEPS = tl.constexpr(64)
"""When to stop, as in the reference: the fullest rank is within 1 / 2^GAP_BITS of the mean of the ranks that it can
share with, or so many sweeps are done."""

BY_NODE_BITS = tl.constexpr(6)
BY_NODE_SWEEPS = tl.constexpr(16)
"""Of `level_by_node`, as in the reference."""
NO_LIMIT = tl.constexpr(2**31 - 1)
"""Tokens: as many as any rank can have."""

ORDER_BITS = tl.constexpr(24)
"""Times in 2^-24 of a token for a weight of 1: quotients of whole numbers by weights up to 2^12 keep their order."""


class Singles(NamedTuple):
    """The experts that are on one rank alone; rows of single_RJ end in -1."""

    single_RJ: Any
    R: Any
    J: Any


class Replicated(NamedTuple):
    """The experts that are on several ranks; rows of ranks_XC and of sources_XC end in -1."""

    expert_X: Any
    ranks_XC: Any
    sources_XC: Any
    X: Any
    C: Any


class Tree(NamedTuple):
    """The ranks to which tokens of the fullest one for its weight, the root, can move; -1 or 0 for others."""

    size: Any
    total: Any
    """Their load."""
    order: Any
    """[RS]: when a rank joined; the root is 0, and ranks outside are -1."""
    joined: Any
    """[RS]: by which of the X experts it did."""
    from_replica: Any
    """[RS]: that expert's replica on its parent in the tree."""
    to_replica: Any
    """[RS]: that expert's replica on itself."""


@triton.jit
def level_shares(
    tokens,
    singles,
    replicated,
    weight_R,
    RS: tl.constexpr,
    JS: tl.constexpr,
    XS: tl.constexpr,
    CS: tl.constexpr,
):
    """(shares [XS, CS], zero where a row has no replica; loads [RS]); `tokens` has a lane for each expert.

    Where weight_R is None all ranks have weight 1, and weights are no part of the program.

    Every step follows from the one before. Loads of all ranks and shares of all replicas stay in registers.
    """
    loads = _single_loads(tokens, singles, RS, JS)
    nth = tl.arange(0, XS)
    tokens_X = tl.gather(tokens, tl.load(replicated.expert_X + nth, mask=nth < replicated.X, other=0), 0)
    tokens_X = tl.where(nth < replicated.X, tokens_X, 0)
    each_rank = tl.arange(0, RS)
    each, replica = nth[:, None], tl.arange(0, CS)[None, :]
    here = (each < replicated.X) & (replica < replicated.C)
    rank = tl.load(replicated.ranks_XC + each * replicated.C + replica, mask=here, other=-1)
    here = here & (rank >= 0)
    if weight_R is None:
        weights = None
        weight = here.to(tl.int32)
    else:
        weights = tl.load(weight_R + each_rank, mask=each_rank < singles.R, other=1)
        weight = tl.load(weight_R + rank, mask=here, other=0)
    of = tl.maximum(tl.sum(weight, 1), 1)[:, None]
    shares = tl.where(here, _part(tokens_X[:, None], weight, of, weights), 0)
    left = tokens_X - tl.sum(shares, 1)
    shares += (here & (replica < left[:, None])).to(tl.int32)
    for x in range(0, replicated.X):
        loads += _sum_by_rank(_row(shares, x), _ranks(replicated, x, CS), each_rank)
    sweep = tl.zeros((), tl.int32)
    going = sweep == 0
    while going:
        tree = _grow_tree(loads, weights, shares, replicated)
        most = tl.sum(tl.where(tree.order == 0, loads, 0))
        going = most - (most >> GAP_BITS) > _bound(tree, weights)
        if going:
            if sweep % 2 == 1:
                loads, shares = _level_tree(loads, weights, shares, replicated, tree)
            loads, shares = _sweep(loads, weights, shares, tokens_X, replicated)
        sweep += 1
        going = going & (sweep < MOST_SWEEPS)
    return shares, loads


@triton.jit
def by_node_shares(
    level, loads, tokens, counts_GE, stride, singles, replicated, weight_R, node, G, JS: tl.constexpr
):
    """shares [XS, CS] of `level_by_node`, from the shares and the loads of `level`; `node` is in sources."""
    XS: tl.constexpr = level.shape[0]
    CS: tl.constexpr = level.shape[1]
    RS: tl.constexpr = loads.shape[0]
    nth, each_rank = tl.arange(0, XS), tl.arange(0, RS)
    expert = tl.load(replicated.expert_X + nth, mask=nth < replicated.X, other=0)
    tokens_X = tl.where(nth < replicated.X, tl.gather(tokens, expert, 0), 0)
    home = _home(expert, counts_GE, stride, replicated, node, G, CS)
    weights = None if weight_R is None else tl.load(weight_R + each_rank, mask=each_rank < singles.R, other=1)
    most = _most_loads(loads, weights)
    loads = _single_loads(tokens, singles, RS, JS)
    loads, shares = _sweep_nodes(loads, weights, None, tl.zeros_like(level), tokens_X, home, replicated, node)
    sweep = tl.zeros((), tl.int32)
    going = tl.max((loads > most).to(tl.int32)) > 0
    while going:
        if sweep % 2 == 1:
            tree = _grow_tree(loads, weights, shares, replicated)
            loads, shares = _level_tree(loads, weights, shares, replicated, tree)
        loads, shares = _sweep_nodes(loads, weights, most, shares, tokens_X, home, replicated, node)
        sweep += 1
        going = (tl.max((loads > most).to(tl.int32)) > 0) & (sweep < BY_NODE_SWEEPS)
    kept, kept_by_level = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for x in range(0, replicated.X):
        same, at_home = _same_node(replicated, x, node, CS), _row(home, x)
        kept += _kept(_row(shares, x), at_home, same)
        kept_by_level += _kept(_row(level, x), at_home, same)
    above = tl.max((loads > most).to(tl.int32))
    return tl.where((above == 0) & (kept >= kept_by_level), shares, level)


@triton.jit
def _sweep_nodes(loads, weights, most, shares, tokens_X, home, replicated, node):
    """`_sweep` with `_fill_nodes`; `most` is None where ranks have no limit."""
    CS: tl.constexpr = shares.shape[1]
    nth, each_rank = tl.arange(0, shares.shape[0]), tl.arange(0, loads.shape[0])
    for x in range(0, replicated.X):
        rank = _ranks(replicated, x, CS)
        at = tl.maximum(rank, 0)
        loads -= _sum_by_rank(_row(shares, x), rank, each_rank)
        filled = _fill_nodes(
            tl.sum(tl.where(nth == x, tokens_X, 0)),
            _row(home, x),
            tl.gather(loads, at, 0),
            None if weights is None else tl.gather(weights, at, 0),
            None if most is None else tl.gather(most, at, 0),
            _same_node(replicated, x, node, CS),
            rank >= 0,
        )
        loads += _sum_by_rank(filled, rank, each_rank)
        shares = tl.where(nth[:, None] == x, filled[None, :], shares)
    return loads, shares


@triton.jit
def _home(expert, counts_GE, stride, replicated, node, G, CS: tl.constexpr):
    """[XS, CS]: tokens of the expert on each replica's node."""
    XS: tl.constexpr = expert.shape[0]
    x, replica = tl.arange(0, XS)[:, None], tl.arange(0, CS)[None, :]
    here = (x < replicated.X) & (replica < replicated.C)
    holder = tl.load(replicated.sources_XC + x * replicated.C + replica, mask=here, other=-1)
    home = tl.zeros((XS, CS), tl.int32)
    for nth in range(0, node):
        source = holder // node * node + nth
        counts = counts_GE + source.to(tl.int64) * stride + expert[:, None]
        home += tl.load(counts, mask=(holder >= 0) & (source < G), other=0).to(tl.int32)
    return home


@triton.jit
def _most_loads(loads, weights):
    """What each rank may have, by the time of the slowest one with these loads and BY_NODE_BITS."""
    RS: tl.constexpr = loads.shape[0]
    each_rank = tl.arange(0, RS)
    time = loads if weights is None else (loads.to(tl.int64) << ORDER_BITS) // weights
    root = each_rank == tl.min(tl.where(time == tl.max(time), each_rank, RS))
    most = tl.sum(tl.where(root, loads, 0)).to(tl.int64) + tl.zeros((RS,), tl.int64)
    most += most >> BY_NODE_BITS
    if weights is not None:
        most = most * weights // tl.sum(tl.where(root, weights, 0))
    return tl.where(most < NO_LIMIT, most, NO_LIMIT).to(tl.int32)


@triton.jit
def _same_node(replicated, x, node, CS: tl.constexpr):
    """[CS, CS]: whether two replicas of an expert are on one node."""
    replica = tl.arange(0, CS)
    place = replicated.sources_XC + x * replicated.C + replica
    holder = tl.load(place, mask=replica < replicated.C, other=-1)
    of = tl.where(holder >= 0, holder // node, -1)
    return (of[:, None] == of[None, :]) & (holder >= 0)[:, None]


@triton.jit
def _fill_nodes(tokens, home, load, weight, most, same, here):
    """What each rank gets of an expert's tokens: those at `home` there, up to `most`, and the rest by water-filling.

    Without a limit `most` is None and never a block of one large number: gathered, that is a shuffled constant, which
    ptxas 12.8 gets wrong (docs/cuda.md).
    """
    under = here
    before = tl.zeros((), tl.int32) - 1
    count = tl.sum(under.to(tl.int32))
    while count != before:
        before = count
        total, of = _node_sums(home, load, weight, under, same)
        under = here & (load <= _part(total, weight, of, weight))
        count = tl.sum(under.to(tl.int32))
    total, of = _node_sums(home, load, weight, under, same)
    filled = tl.where(under, _part(total, weight, of, weight) - load, 0)
    left = home - tl.sum(tl.where(same, filled[None, :], 0), 1)
    replica = tl.arange(0, home.shape[0])
    earlier = replica[None, :] < replica[:, None]
    nth = tl.sum((same & earlier & under[None, :]).to(tl.int32), 1)
    filled += (under & (nth < left)).to(tl.int32)
    kept = filled if most is None else tl.minimum(filled, tl.maximum(most - load, 0))
    kept = tl.where(here, kept, 0)
    return kept + _fill(tokens - tl.sum(kept), load + kept, weight, here)


@triton.jit
def _node_sums(home, load, weight, under, same):
    """`_sums` for each replica, of the ranks of its node."""
    counted = same & under[None, :]
    total = home + tl.sum(tl.where(counted, load[None, :], 0), 1)
    of = tl.sum(tl.where(counted, 1 if weight is None else weight[None, :], 0), 1)
    return total, tl.maximum(of, 1)


@triton.jit
def _kept(shares, home, same):
    """Tokens of an expert that can stay on their node."""
    replica = tl.arange(0, home.shape[0])
    earlier = replica[None, :] < replica[:, None]
    first = tl.sum((same & earlier).to(tl.int32), 1) == 0
    of_node = tl.sum(tl.where(same, shares[None, :], 0), 1)
    return tl.sum(tl.where(first, tl.minimum(home, of_node), 0))


@triton.jit
def _single_loads(tokens, singles, RS: tl.constexpr, JS: tl.constexpr):
    """Tokens of each rank's unreplicated experts; -1 in lanes past the ranks, which are then never the fullest."""
    flat = tl.arange(0, RS * JS)
    rank, place = flat // JS, flat % JS
    here = (rank < singles.R) & (place < singles.J)
    expert = tl.load(singles.single_RJ + rank * singles.J + place, mask=here, other=-1)
    of_single = tl.where(expert >= 0, tl.gather(tokens, tl.maximum(expert, 0), 0), 0)
    loads = tl.sum(tl.reshape(of_single, (RS, JS)), 1)
    return tl.where(tl.arange(0, RS) < singles.R, loads, -1)


@triton.jit
def _ranks(replicated, x, CS: tl.constexpr):
    """The ranks of one expert's replicas, -1 past them."""
    replica = tl.arange(0, CS)
    place = replicated.ranks_XC + x * replicated.C + replica
    return tl.load(place, mask=replica < replicated.C, other=-1)


@triton.jit
def _row(shares, x):
    """shares[x]."""
    return tl.sum(tl.where(tl.arange(0, shares.shape[0])[:, None] == x, shares, 0), 0)


@triton.jit
def _sum_by_rank(values, rank, each_rank):
    """For every rank the sum of the values that are on it."""
    return tl.sum(tl.where(rank[:, None] == each_rank[None, :], values[:, None], 0), 0)


@triton.jit
def _sweep(loads, weights, shares, tokens_X, replicated):
    """Fill the tokens of every replicated expert onto its ranks again, one expert after the other."""
    XS: tl.constexpr = shares.shape[0]
    each_rank = tl.arange(0, loads.shape[0])
    for x in range(0, replicated.X):
        rank = _ranks(replicated, x, shares.shape[1])
        loads -= _sum_by_rank(_row(shares, x), rank, each_rank)
        tokens = tl.sum(tl.where(tl.arange(0, XS) == x, tokens_X, 0))
        weight = None if weights is None else tl.gather(weights, tl.maximum(rank, 0), 0)
        filled = _fill(tokens, tl.gather(loads, tl.maximum(rank, 0), 0), weight, rank >= 0)
        loads += _sum_by_rank(filled, rank, each_rank)
        shares = tl.where(tl.arange(0, XS)[:, None] == x, filled[None, :], shares)
    return loads, shares


@triton.jit
def _part(total, weight, of, weights):
    """A rank's part of a total, rounded down: its weight over `of`, that of all; 1 over `of` where weights is None."""
    part = total // of
    if weights is not None:
        # The rest is less than `of`, so that 64 bits hold its product, and the quotient needs 32.
        part = part * weight + ((total - part * of).to(tl.int64) * weight // of).to(tl.int32)
    return part


@triton.jit
def _fill(tokens, load, weight, here):
    """Water-filling: what each rank gets of `tokens`, given its `load`; `weight` is None where all have the same.

    The ranks under the water level end up equally full for their weight; the remainder goes to the first of them, one
    token each.
    """
    under = here
    before = tl.zeros((), tl.int32)
    count = tl.sum(under.to(tl.int32))
    total, of = _sums(tokens, load, weight, under)
    while count != before:
        before = count
        under = here & (load <= _part(total, weight, of, weight))
        count = tl.sum(under.to(tl.int32))
        total, of = _sums(tokens, load, weight, under)
    filled = tl.where(under, _part(total, weight, of, weight) - load, 0)
    nth = tl.cumsum(under.to(tl.int32)) - 1
    return filled + (under & (nth < tokens - tl.sum(filled))).to(tl.int32)


@triton.jit
def _sums(tokens, load, weight, under):
    """What the ranks under the water share, and their weight."""
    total = tokens + tl.sum(tl.where(under, load, 0))
    return total, tl.sum(under.to(tl.int32)) if weight is None else tl.sum(tl.where(under, weight, 0))


@triton.jit
def _grow_tree(loads, weights, shares, replicated):
    """The tree whose root is the fullest rank for its weight."""
    CS: tl.constexpr = shares.shape[1]
    RS: tl.constexpr = loads.shape[0]
    each_rank, replica = tl.arange(0, RS), tl.arange(0, CS)
    time = loads
    if weights is not None:
        time = (loads.to(tl.int64) << ORDER_BITS) // weights
    root = tl.min(tl.where(time == tl.max(time), each_rank, RS))
    total = tl.sum(tl.where(each_rank == root, loads, 0))
    order = tl.where(each_rank == root, 0, -1)
    joined, from_replica, to_replica = tl.zeros_like(order), tl.zeros_like(order), tl.zeros_like(order)
    grown = tl.zeros((), tl.int32)
    size = grown + 1
    while size > grown:
        grown = size
        for x in range(0, replicated.X):
            rank = _ranks(replicated, x, CS)
            inside = tl.gather(order, tl.maximum(rank, 0), 0) >= 0
            gives = (rank >= 0) & inside & (_row(shares, x) > 0)
            first_giving = tl.min(tl.where(gives, replica, CS))
            joins = ((rank >= 0) & (inside == 0) & (first_giving < CS)).to(tl.int32)
            place = size + tl.cumsum(joins) - joins
            new = _sum_by_rank(joins, rank, each_rank) > 0
            order = tl.where(new, _sum_by_rank(place * joins, rank, each_rank), order)
            joined = tl.where(new, x, joined)
            from_replica = tl.where(new, first_giving, from_replica)
            to_replica = tl.where(new, _sum_by_rank(replica * joins, rank, each_rank), to_replica)
            total += tl.sum(tl.where(new, loads, 0))
            size += tl.sum(joins)
    return Tree(size, total, order, joined, from_replica, to_replica)


@triton.jit
def _tree_weight(tree, weights):
    """The weight of the tree's ranks."""
    return tree.size if weights is None else tl.sum(tl.where(tree.order >= 0, weights, 0))


@triton.jit
def _bound(tree, weights):
    """The root's part of the tree's load, rounded up."""
    of = _tree_weight(tree, weights)
    if weights is None:
        bound = (tree.total + of - 1) // of
    else:
        weight = tl.sum(tl.where(tree.order == 0, weights, 0))
        level = tree.total // of
        bound = level * weight + (((tree.total - level * of).to(tl.int64) * weight + of - 1) // of).to(
            tl.int32
        )
    return bound


@triton.jit
def _level_tree(loads, weights, shares, replicated, tree):
    """Move loads along the tree, from its leaves to the root, as far as the shares along its edges allow."""
    XS: tl.constexpr = shares.shape[0]
    CS: tl.constexpr = shares.shape[1]
    RS: tl.constexpr = loads.shape[0]
    each, replica, each_rank = tl.arange(0, XS)[:, None], tl.arange(0, CS)[None, :], tl.arange(0, RS)
    parts = tl.where(tree.order >= 0, _part(tree.total, weights, _tree_weight(tree, weights), weights), 0)
    left = tree.total - tl.sum(parts)
    for step in range(1, tree.size):
        index = tree.size - step
        here = tree.order == index
        x = tl.sum(tl.where(here, tree.joined, 0))
        gives, takes = (
            tl.sum(tl.where(here, tree.from_replica, 0)),
            tl.sum(tl.where(here, tree.to_replica, 0)),
        )
        given = (each == x) & (replica == gives)
        taken = (each == x) & (replica == takes)
        surplus = tl.sum(tl.where(here, loads - parts, 0)) - (index < left).to(tl.int32)
        surplus = tl.minimum(surplus, tl.sum(tl.sum(tl.where(taken, shares, 0), 1)))
        surplus = tl.maximum(surplus, -tl.sum(tl.sum(tl.where(given, shares, 0), 1)))
        shares += tl.where(given, surplus, 0) - tl.where(taken, surplus, 0)
        parent = tl.load(replicated.ranks_XC + x * replicated.C + gives)
        loads += tl.where(each_rank == parent, surplus, 0) - tl.where(here, surplus, 0)
    return loads, shares
