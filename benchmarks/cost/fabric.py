"""What carries the rows: speeds and latencies, each with its source, of an H100 in `epbackend.balance.cost`."""

from __future__ import annotations

from dataclasses import dataclass

from epbackend.balance.cost import H100 as GPU

NODE = 8
"""GPUs that NVLink joins."""

MEMORY = GPU.memory_bytes_s

LAUNCH_US = 2.0
"""Of one kernel in a CUDA graph, its ramp up and down included: an assumption."""

HOST_READ_US = 20.0
"""A wait for the GPU, a copy to the host, and the first launch after it: an assumption."""

BARRIER_US = 5.0
"""Of symmetric memory: a flag stored to every peer and a wait for theirs: an assumption."""

ALL_TO_ALL_US = {"node": 20.0, "network": 35.0}
"""NCCL's grouped sends and receives, before the first byte: an assumption."""

DEEPEP_US = {"node": 35.0, "network": 45.0}
"""A dispatch or combine kernel of DeepEP beyond its bytes: what is left of the low-latency figures that DeepEP
publishes (docs/legacy.md there), so these figures are no test of it."""


def ring_us(ranks: int) -> float:
    """Latency of NCCL's ring all-gather or reduce-scatter.

    NCCL's own model (src/graph/tuning.cc, ring, LL128): 10 us, 1.9 for each step inside a node, 4.0 for each across.
    """
    across = -(-ranks // NODE) - 1
    return 10.0 + 1.9 * (ranks - 1 - across) + 4.0 * across


@dataclass(frozen=True)
class Fabric:
    """Bytes / s that one GPU can send while it receives as many."""

    nvlink: float
    network: float


H100 = Fabric(GPU.node_bytes_s, GPU.network_bytes_s)
H800 = Fabric(nvlink=160e9, network=48e9)
