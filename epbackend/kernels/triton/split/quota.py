"""How many of one source's tokens go to each copy, near ones first.

Sources and copies meet in blocks of one source, then of a node, then of all. In each block the tokens that its sources
still have lie on one line, and the room that its copies still have on another: a source's quota of a copy is the
overlap of their two intervals.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def take(values, index, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a block with SIZE values, by flat indices: Triton 3.7 cannot gather from all shapes of two
    dimensions."""
    flat = tl.gather(tl.reshape(values, (SIZE,)), tl.reshape(index, (ROWS * COLUMNS,)), 0)
    return tl.reshape(flat, (ROWS, COLUMNS))


@triton.jit
def own_quota(
    shares,
    counts_GE,
    stride,
    expert_X,
    sources_XC,
    source,
    node,
    G,
    X,
    C,
    XS: tl.constexpr,
    CS: tl.constexpr,
    GS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """quota [XS, CS] of `source`, from the shares [XS, CS] of all; CHUNK experts at a time."""
    each = tl.arange(0, XS)[:, None]
    copy, sources = tl.arange(0, CS)[None, :], tl.arange(0, GS)[None, :]
    quota = tl.zeros_like(shares)
    for start in range(0, X, CHUNK):
        x = (start + tl.arange(0, CHUNK))[:, None]
        expert = tl.load(expert_X + x, mask=x < X, other=0)
        counts = counts_GE + sources.to(tl.int64) * stride + expert
        tokens = tl.load(counts, mask=(x < X) & (sources < G), other=0).to(tl.int32)
        holder = tl.load(sources_XC + x * C + copy, mask=(x < X) & (copy < C), other=-1)
        room = take(shares, tl.minimum(x, XS - 1) * CS + copy, XS * CS, CHUNK, CS)
        room = tl.where(x < X, room, 0)
        part = tl.zeros_like(room)
        for step in tl.static_range(3):
            if step == 0:
                block = 1
            elif step == 1:
                block = node
            else:
                block = G
            gained, tokens, room = _meet(tokens, room, holder, source, block, CS, GS, CHUNK)
            part += gained
        mine = (each >= start) & (each < start + CHUNK)
        row = tl.minimum(tl.maximum(each - start, 0), CHUNK - 1)
        quota = tl.where(mine, take(part, row * CS + copy, CHUNK * CS, XS, CS), quota)
    return quota


@triton.jit
def _meet(tokens, room, holder, source, block, CS: tl.constexpr, GS: tl.constexpr, CHUNK: tl.constexpr):
    """(what the source gives each copy of its own block, tokens left, room left), for some experts [.., GS], [.., CS].

    `holder` is the source of each copy, -1 past them; `block` how many sources a block has.
    """
    sources, copy = tl.arange(0, GS)[None, :], tl.arange(0, CS)
    block_G = sources // block
    block_C = tl.where(holder >= 0, holder // block, -1)
    start_of_x = tl.arange(0, CHUNK)[:, None] * GS
    first = block_G * block
    last = tl.minimum(first + block, GS) - 1
    sums = tl.cumsum(tokens, 1)
    ends = sums - take(sums - tokens, start_of_x + first, CHUNK * GS, CHUNK, GS)
    same = block_C[:, :, None] == block_C[:, None, :]
    earlier = same & (copy[None, None, :] <= copy[None, :, None])
    room_ends = tl.sum(tl.where(earlier, room[:, None, :], 0), 2)
    here = sources == source
    end = tl.sum(tl.where(here, ends, 0), 1)[:, None]
    start = end - tl.sum(tl.where(here, tokens, 0), 1)[:, None]
    overlap = tl.maximum(tl.minimum(room_ends, end) - tl.maximum(room_ends - room, start), 0)
    inside = block_C[:, :, None] == block_G[:, None, :]
    room_G = tl.sum(tl.where(inside, room[:, :, None], 0), 1)
    met_G = tl.minimum(take(ends, start_of_x + last, CHUNK * GS, CHUNK, GS), room_G)
    at = holder[:, :, None] == sources[:, None, :]
    met_C = tl.sum(tl.where(at, met_G[:, None, :], 0), 2)
    tokens = tl.minimum(tokens, tl.maximum(ends - met_G, 0))
    left = tl.minimum(room, tl.maximum(room_ends - met_C, 0))
    return tl.where(block_C == source // block, overlap, 0), tokens, left
