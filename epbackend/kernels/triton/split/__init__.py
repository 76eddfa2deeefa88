"""The `level` token split on the device: from the counts of all ranks to a slot for every choice, nothing read back.

Integer for integer what `epbackend.placement.split` computes on the CPU, so that ranks of either kind agree. Sources
are the R ranks that hold tokens; X counts the experts with copies on several ranks, C their copies, one a rank.
"""

from __future__ import annotations

from torch import Tensor

from epbackend.kernels.triton.split.assign import assign
from epbackend.kernels.triton.split.level import level_shares
from epbackend.kernels.triton.split.quota import own_quota
from epbackend.kernels.triton.split.table import SplitTable

__all__ = ["SplitTable", "level_split"]


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
