"""DeepEP's buffer: one a process group, for both of its modes, since a process cannot have two."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from epbackend.errors import ConfigError


class Link:
    """What all layers of a process group want of DeepEP, and its buffer once the first of them runs."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._reserved: tuple[int, int] | None = None
        self._buffer: Any = None
        self._hidden = 0

    def reserve(self, tokens: int, slots: int) -> None:
        """The low-latency mode will be used with up to `tokens` tokens of a rank and `slots` slots in all."""
        before = self._reserved or (0, 0)
        self._reserved = max(tokens, before[0]), max(slots, before[1])

    def open(self, hidden: int) -> Any:
        """The `deep_ep.Buffer`, made when all ranks first ask for it together; ConfigError for a second hidden size."""
        if self._buffer is None:
            self._buffer, self._hidden = self._make(hidden), hidden
        if hidden != self._hidden:
            raise ConfigError(
                f"deepep has a buffer for rows of {self._hidden} values, and cannot have a second one for {hidden}; "
                "take another dispatcher"
            )
        return self._buffer

    def clean(self) -> None:
        """Make the buffer fit for the low-latency mode again: the normal one leaves its rows there.

        After the normal call and not before the next low-latency one, which may be replayed from a CUDA graph.
        """
        if self._reserved is not None:
            tokens, slots = self._reserved
            self._buffer.clean_low_latency_buffer(tokens, self._hidden, slots)

    def _make(self, hidden: int) -> Any:
        from deep_ep import Buffer

        assert self._group is not None
        ranks = dist.get_world_size(self._group)
        row_bytes = hidden * torch.bfloat16.itemsize
        configs = Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)
        nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
        network = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
        if self._reserved is None:
            return Buffer(self._group, nvlink, network)
        tokens, slots = self._reserved
        network = max(network, Buffer.get_low_latency_rdma_size_hint(tokens, hidden, ranks, slots))
        return Buffer(
            self._group, nvlink, network, low_latency_mode=True, num_qps_per_rank=max(1, slots // ranks)
        )


@cache
def link_of(group: dist.ProcessGroup | None) -> Link:
    """The one of a process group."""
    return Link(group)
