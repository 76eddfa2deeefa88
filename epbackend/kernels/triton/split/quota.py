"""How many of one source's tokens go to each copy, near ones first.

Sources and copies meet in blocks of one rank, then of a node, then of all ranks. In each block the tokens that its
sources still have lie on one line, and the room that its copies still have on another: a source's quota of a copy is
the overlap of their two intervals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epbackend.kernels.triton.split.table import SplitTable


def own_quota(
    counts_RE: Tensor, shares_XC: Tensor, table: SplitTable, source_rank: int, node_ranks: int
) -> Tensor:
    """quota_XC (int32) of `source_rank`; one program an expert."""
    replicated, copies = shares_XC.shape
    quota_XC = torch.empty_like(shares_XC)
    if replicated:
        _own_quota[(replicated,)](
            counts_RE,
            shares_XC,
            table.expert_X,
            table.ranks_XC,
            quota_XC,
            source_rank,
            node_ranks,
            table.ranks,
            counts_RE.shape[1],
            copies,
            triton.next_power_of_2(copies),
            triton.next_power_of_2(table.ranks),
        )
    return quota_XC


@triton.jit(do_not_specialize=["source_rank", "node_ranks", "ranks"])
def _own_quota(
    counts_RE,
    shares_XC,
    expert_X,
    ranks_XC,
    quota_XC,
    source_rank,
    node_ranks,
    ranks,
    E,
    C,
    CS: tl.constexpr,
    RS: tl.constexpr,
):
    x = tl.program_id(0)
    rank, copy = tl.arange(0, RS), tl.arange(0, CS)
    counts = counts_RE + rank.to(tl.int64) * E + tl.load(expert_X + x)
    tokens = tl.load(counts, mask=rank < ranks, other=0).to(tl.int32)
    copy_rank = tl.load(ranks_XC + x * C + copy, mask=copy < C, other=-1)
    room = tl.load(shares_XC + x * C + copy, mask=copy_rank >= 0, other=0)
    quota = tl.zeros_like(room)
    for step in tl.static_range(3):
        if step == 0:
            block_ranks = 1
        elif step == 1:
            block_ranks = node_ranks
        else:
            block_ranks = ranks
        gained, tokens, room = _meet(tokens, room, copy_rank, source_rank, block_ranks, CS, RS)
        quota += gained
    tl.store(quota_XC + x * C + copy, quota, mask=copy < C)


@triton.jit
def _meet(tokens, room, copy_rank, source_rank, block_ranks, CS: tl.constexpr, RS: tl.constexpr):
    """(what the source gives each copy of its own block, tokens left, room left)."""
    rank = tl.arange(0, RS)
    block = rank // block_ranks
    copy_block = tl.where(copy_rank >= 0, copy_rank // block_ranks, -1)
    first = block * block_ranks
    last = tl.minimum(first + block_ranks, RS) - 1
    sums = tl.cumsum(tokens)
    ends = sums - tl.gather(sums - tokens, first, 0)
    same_CC = copy_block[:, None] == copy_block[None, :]
    copy = tl.arange(0, CS)
    earlier_CC = same_CC & (copy[None, :] <= copy[:, None])
    room_ends = tl.sum(tl.where(earlier_CC, room[None, :], 0), 1)
    source = rank == source_rank
    end = tl.sum(tl.where(source, ends, 0))
    start = end - tl.sum(tl.where(source, tokens, 0))
    overlap = tl.maximum(tl.minimum(room_ends, end) - tl.maximum(room_ends - room, start), 0)
    own = copy_block == source_rank // block_ranks
    room_R = tl.sum(tl.where(copy_block[:, None] == block[None, :], room[:, None], 0), 0)
    met_R = tl.minimum(tl.gather(ends, last, 0), room_R)
    met_C = tl.sum(tl.where(copy_rank[:, None] == rank[None, :], met_R[None, :], 0), 1)
    tokens = tl.minimum(tokens, tl.maximum(ends - met_R, 0))
    left = tl.minimum(room, tl.maximum(room_ends - met_C, 0))
    return tl.where(own, overlap, 0), tokens, left
