"""The `level` token split on the device: from the counts of all ranks to a slot for every choice, nothing read back.

Integer for integer what `epbackend.placement.split` computes on the CPU, so that ranks of either kind agree. Sources
are the R ranks that hold tokens; X counts the experts with copies on several ranks, C their copies, one a rank.
`level_quota` also knows sources of several ranks, which hold the same tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from epbackend.kernels.triton.split.assign import assign
from epbackend.kernels.triton.split.level import level_shares
from epbackend.kernels.triton.split.quota import own_quota
from epbackend.kernels.triton.split.table import SplitTable
from epbackend.placement.layout import Layout

__all__ = ["SplitTable", "level_quota", "level_split"]


def level_quota(
    counts_GE: Tensor, layout: Layout, by_source: Layout, source: int, node_sources: int
) -> Tensor:
    """See `epbackend.kernels.Kernels.level_quota`; the sum of the counts is below 2^31."""
    of_ranks, of_sources = _tables(layout, by_source, counts_GE.device)
    counts_GE = counts_GE.contiguous()
    shares_XC = level_shares(counts_GE.sum(0), of_ranks)
    quota_XC = own_quota(counts_GE, shares_XC, of_sources, source, node_sources or by_source.ranks)
    quota_P = counts_GE.new_zeros(layout.slots + 1)  # rows of XC that end early fall on the last place, -1
    quota_P[of_ranks.slot_E] = counts_GE[source]
    quota_P[of_ranks.slots_XC] = quota_XC.long()
    return quota_P[:-1]


@cache
def _tables(layout: Layout, by_source: Layout, device: torch.device) -> tuple[SplitTable, SplitTable]:
    """The slots' table with their ranks, and the same with their sources in the place of ranks."""
    table = SplitTable.of(layout.slot_to_expert_P.tolist(), layout.rank_of_slot_P.tolist(), device)
    source_of_slot_P = torch.from_numpy(by_source.rank_of_slot_P.copy()).int().to(device)
    sources_XC = torch.where(table.slots_XC >= 0, source_of_slot_P[table.slots_XC], -1)
    return table, replace(table, ranks=by_source.ranks, ranks_XC=sources_XC)


def level_split(
    topk_ids_TK: Tensor, counts_RE: Tensor, table: SplitTable, source_rank: int, node_size: int = 0
) -> Tensor:
    """slot_ids_TK (int64) of `source_rank`'s choices, logical ids in [0, E).

    `counts_RE` (int64) are the choices of every source, all-gathered; their sum is below 2^31. `node_size` is the ranks
    of a node, which share tokens among themselves first; 0: all ranks are one node.
    """
    shares_XC = level_shares(counts_RE.sum(0), table)
    quota_XC = own_quota(counts_RE, shares_XC, table, source_rank, node_size or table.ranks)
    return assign(topk_ids_TK, quota_XC, table)
