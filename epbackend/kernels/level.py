"""The split `level` by the compiled form of the host, for devices that have no kernel of their own for it."""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.placement.layout import Layout
from epbackend.placement.split import level_shares, own_quota


def level_quota_on_host(
    counts_GE: Tensor, layout: Layout, by_source: Layout, source: int, node_sources: int
) -> Tensor:
    """`Kernels.level_quota`. The counts come to the host: that waits for their device; no graph can hold it."""
    counts = counts_GE.cpu().contiguous().numpy()
    shares_P = level_shares(counts.sum(axis=0), layout)
    quota_P = own_quota(counts, shares_P, by_source, source, node_sources)
    return torch.from_numpy(quota_P).to(counts_GE.device)
