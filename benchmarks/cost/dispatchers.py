"""Bytes, launches and waits of each dispatcher in one layer call of one GPU, as formulas.

Routing is even, so a GPU sends as much as it receives. NVLink and network carry at the same time. Decode is captured in
a CUDA graph: shapes are static and nothing is read back. Prefill has exact sizes. Launches are counted in the code of
the dispatcher, by hand. What overlaps with the experts' products is not taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cost.fabric import (
    ALL_TO_ALL_US,
    BARRIER_US,
    DEEPEP_US,
    HOST_READ_US,
    LAUNCH_US,
    MEMORY,
    NODE,
    Fabric,
    ring_us,
)
from benchmarks.cost.shapes import Model

SYMMETRIC_PART = 2048
"""Tokens of a rank that `symmetric` sends at a time (epbackend/dispatch/symmetric_memory.py: OPEN_TOKENS)."""


@dataclass(frozen=True)
class Case:
    """One layer call."""

    model: Model
    ranks: int
    tokens: int
    """Of each rank."""
    static: bool
    """Decode, captured in a graph."""
    bytes_each: int = 2
    """Of a hidden value on its way to the experts: 2 is bfloat16, 1 is fp8 or int8. Results go back unquantized."""

    @property
    def nodes(self) -> int:
        return -(-self.ranks // NODE)

    @property
    def reach(self) -> str:
        return "node" if self.nodes == 1 else "network"

    @property
    def packed(self) -> int:
        return self.model.packed_row(self.bytes_each)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends."""

    nvlink: float
    network: float = 0.0

    def us(self, fabric: Fabric) -> float:
        return max(self.nvlink / fabric.nvlink, self.network / fabric.network) * 1e6


@dataclass(frozen=True)
class Cost:
    """Of one layer call beside the experts' products, which are the same for all."""

    out: Traffic
    back: Traffic
    memory: float
    """Bytes read and written in the GPU's own memory."""
    launches: int
    waits: str
    """Collectives, barriers and reads by the host, in words."""
    latency_us: float
    """Of these."""

    def us(self, fabric: Fabric) -> float:
        moved = self.out.us(fabric) + self.back.us(fabric) + self.memory / MEMORY * 1e6
        return moved + self.latency_us + self.launches * LAUNCH_US


def ring(case: Case, block: float) -> Traffic:
    """All-gather or reduce-scatter of a block from each rank: R - 1 blocks pass each GPU.

    Of NCCL's rings one hop in eight leaves the node, each ring by another GPU.
    """
    passed = (case.ranks - 1) * block
    return Traffic(passed) if case.nodes == 1 else Traffic(passed * (NODE - 1) / NODE, passed / NODE)


def direct(case: Case, total: float) -> Traffic:
    """Bytes spread evenly over all ranks, each sent straight to its rank: what stays on the GPU is not sent."""
    return Traffic(
        total * (min(case.ranks, NODE) - 1) / case.ranks,
        total * (case.ranks - min(case.ranks, NODE)) / case.ranks,
    )


def _expanded(case: Case) -> float:
    """Memory traffic of T * K rows, written where they are sorted by expert and read for the weighted sum."""
    return case.tokens * case.model.K * 2 * case.model.D * 3


def _restored(case: Case, rows: float) -> tuple[int, float]:
    """Launches and bytes written that bring rows back to bfloat16 where they came in 8 bits."""
    return (1, rows * 2 * case.model.D) if case.bytes_each == 1 else (0, 0.0)


def replicated(case: Case) -> Cost:
    """Every rank holds all R * T tokens. Back: all-reduce of their float32 sums."""
    all_sums = case.ranks * case.tokens * 4 * case.model.D
    half = ring(case, case.tokens * 4 * case.model.D)
    both = Traffic(2 * half.nvlink, 2 * half.network)
    return Cost(Traffic(0), both, 3 * all_sums + _expanded(case), 6, "1 all-reduce", 2 * ring_us(case.ranks))


def allgather(case: Case) -> Cost:
    """Out: all-gather of T packed rows. Back: reduce-scatter of float32 sums."""
    rows, sums = case.tokens * case.packed, case.tokens * 4 * case.model.D
    launches, restored = _restored(case, case.ranks * case.tokens)
    memory = 2 * rows + case.ranks * (rows + 2 * sums) + restored + _expanded(case)
    sizes = 0.0 if case.static else ring_us(case.ranks) + HOST_READ_US
    waits = "2 collectives" if case.static else "3 collectives, 1 read"
    return Cost(
        ring(case, rows), ring(case, sums), memory, 10 + launches, waits, 2 * ring_us(case.ranks) + sizes
    )


def alltoall(case: Case) -> Cost:
    """Out: a packed row to each of the m(R) ranks of a token. Back: as many partial sums in bfloat16.

    Static, no rank can be told what comes: all tokens go to all ranks by all-gather, and a sum of each comes back.
    """
    rows = case.tokens * (case.ranks if case.static else case.model.reached(case.ranks))
    out, back = rows * case.packed, rows * 2 * case.model.D
    launches, restored = _restored(case, rows)
    memory = 3 * out + 3 * back + rows * 4 * case.model.D * 2 + restored + _expanded(case)
    hop = ALL_TO_ALL_US[case.reach]
    if case.static:
        traffic, latency = ring(case, case.tokens * case.packed), ring_us(case.ranks) + hop
        return Cost(traffic, direct(case, back), memory, 12 + launches, "2 collectives", latency)
    latency = ring_us(case.ranks) + HOST_READ_US + 2 * hop
    return Cost(
        direct(case, out), direct(case, back), memory, 16 + launches, "3 collectives, 1 read", latency
    )


def symmetric(case: Case) -> Cost:
    """One node. Out: a row for each of K choices, stored where its expert reads it. Back: as many.

    Calls that nothing bounds go in parts of SYMMETRIC_PART tokens.
    """
    choices, parts = case.tokens * case.model.K, 1 if case.static else -(-case.tokens // SYMMETRIC_PART)
    out, back = choices * (case.model.row(case.bytes_each) + 8), choices * 2 * case.model.D
    more, restored = _restored(case, choices)
    launches = parts * (8 + 2 * more)  # to quantize them is one more too, which the others do as they pack
    latency = parts * (3 * BARRIER_US + (0.0 if case.static else HOST_READ_US))
    waits = "3 barriers" if case.static else f"{3 * parts} barriers, {parts} reads"
    return Cost(direct(case, out), direct(case, back), out + 2 * back + restored, launches, waits, latency)


def deepep(case: Case) -> Cost:
    """Decode, low-latency: a row for each of K choices. Prefill, normal: one to each node, then one to each rank there.

    The normal kernels move a rank's own rows in the same way as the others', so they count as sent.
    """
    model, latency = case.model, 2 * DEEPEP_US[case.reach]
    if case.static:
        choices = case.tokens * model.K
        out, back = choices * (model.row(case.bytes_each) + 16), choices * 2 * model.D
        return Cost(direct(case, out), direct(case, back), out + back, 4, "2 kernels that wait", latency)
    return Cost(
        _forwarded(case, case.packed),
        _forwarded(case, 2 * model.D),
        _expanded(case),
        4,
        "2 kernels that wait, 1 read",
        latency + HOST_READ_US,
    )


def _forwarded(case: Case, row: int) -> Traffic:
    """A row for each node of a token by the network, and for each rank of a token by NVLink."""
    across = case.model.reached(case.nodes) * (case.nodes - 1) / case.nodes
    return Traffic(case.tokens * case.model.reached(case.ranks) * row, case.tokens * across * row)


DISPATCHERS: dict[str, Callable[[Case], Cost]] = {
    each.__name__: each for each in (replicated, allgather, alltoall, symmetric, deepep)
}


IN_FULL = ("replicated", "deepep")
"""Those whose rows our dispatchers send in full; DeepEP itself can send fp8."""


def serves(name: str, case: Case) -> bool:
    """Whether the dispatcher can run the case when each rank holds tokens of its own."""
    return name != "replicated" and (name != "symmetric" or case.nodes == 1)
