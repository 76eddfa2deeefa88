"""Communicators for operators that communicate by themselves: no other traffic may use theirs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from epbackend.kernels.npu import ops


@cache
def own_communicator(group: dist.ProcessGroup, buffer_mb: int) -> str:
    """The name of a new HCCL communicator among the ranks of `group`, with a buffer of `buffer_mb`.

    All its ranks call this together. Every later call returns the same one.
    """
    return _backend(group, buffer_mb).get_hccl_comm_name(dist.get_rank(group))


@cache
def _backend(group: dist.ProcessGroup, buffer_mb: int) -> Any:
    """The backend alone, without a process group around it.

    dist.new_group would want every rank of the world; its use_local_synchronization does not, but names the group by
    how many groups each rank is in, and ranks need not agree about that.
    """
    name = f"epbackend_fused_{group.group_name}_{buffer_mb}"
    store = dist.PrefixStore(name, c10d._get_process_group_store(group))
    return ops.hccl_backend(store, name, dist.get_process_group_ranks(group), dist.get_rank(group), buffer_mb)
