"""What each rank gets from the collectives of torch.distributed, to hold one backend against another."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def collectives(groups: Any, backend: str) -> list[Tensor]:
    """Those that LMDeploy and epbackend call, on all four ranks."""
    mine, peers = groups[1], range(groups[1].size)
    group = dist.new_group(peers, backend=backend)
    x = torch.arange(8.0).view(4, 2) + 100 * mine.rank
    gathered, scattered, equal, top = x.new_empty(16, 2), x.new_empty(1, 2), torch.empty_like(x), x.clone()
    listed, root, total = [torch.empty_like(x) for _ in peers], x.clone(), x.clone()
    dist.all_reduce(total, group=group)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    dist.broadcast(root, src=2, group=group)
    dist.all_gather_into_tensor(gathered, x, group=group)
    dist.all_gather(listed, x, group=group)
    dist.reduce_scatter_tensor(scattered, x, group=group)
    dist.all_to_all_single(equal, x, group=group)
    dist.barrier(group=group)
    # rank r sends (r + p) % 3 rows to rank p
    sends, receives = [(mine.rank + p) % 3 for p in peers], [(p + mine.rank) % 3 for p in peers]
    sent = torch.arange(float(sum(sends))) + 10 * mine.rank
    uneven = sent.new_empty(sum(receives))
    dist.all_to_all_single(uneven, sent, receives, sends, group=group)
    return [total, top, root, gathered, torch.stack(listed), scattered, equal, uneven]


def rarer_collectives(groups: Any, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """The others, and a large tensor; on all four ranks."""
    mine, peers = groups[1], range(groups[1].size)
    group = dist.new_group(peers, backend=backend)
    x = (torch.arange(12).view(3, 4) % 5 + mine.rank).to(dtype)
    large = (torch.arange(70_001) % 7 + mine.rank).to(dtype)
    summed, least, product = x.clone(), x.clone(), x.clone()
    dist.all_reduce(large, group=group)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(product, dist.ReduceOp.PRODUCT, group=group)
    dist.reduce(summed, dst=3, group=group)
    parts = [torch.empty_like(x) for _ in peers] if mine.rank == 2 else None
    dist.gather(x, parts, dst=2, group=group)
    part = torch.empty_like(x)
    dist.scatter(part, [x + peer for peer in peers] if mine.rank == 1 else None, src=1, group=group)
    scattered = torch.empty_like(x)
    dist.reduce_scatter(scattered, [x + peer for peer in peers], group=group)
    turned = torch.empty_like(x)
    sending = dist.isend(x, (mine.rank + 1) % len(peers), group=group, tag=7)
    dist.recv(turned, (mine.rank - 1) % len(peers), group=group, tag=7)
    sending.wait()
    words: list[Any] = [None] * len(peers)
    dist.all_gather_object(words, f"rank {mine.rank}", group=group)
    assert words == [f"rank {peer}" for peer in peers]
    # gloo leaves rubbish in what is reduced elsewhere
    reduced = summed if mine.rank == 3 else torch.zeros_like(x)
    return [large, least, product, reduced, part, scattered, turned, *(parts or [])]
