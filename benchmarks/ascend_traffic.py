"""What DeepSeek-V3's MoE layer moves and multiplies on A3 ranks: computed, for want of NPUs to measure on.

    python -m benchmarks.ascend_traffic      # prints the table of docs/ascend.md

Per rank and layer, in bfloat16, and with int8 rows on the way out; with routing that spreads evenly. Sent and received
are equal on average.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cost.shapes import DEEPSEEK_V3

D, F, E, K = DEEPSEEK_V3.D, 2048, DEEPSEEK_V3.E, DEEPSEEK_V3.K
"""Hidden size, expert width, experts, experts of a token."""


def packed(int8: bool) -> int:
    """Bytes of a token: ids, weights, hidden state, of int8 with its scale (epbackend/dispatch/row_format.py)."""
    return 8 * K + (-(-(4 + D) // 8) * 8 if int8 else 2 * D)


def fused_row(int8: bool) -> int:
    """Bytes of a row of the fused dispatch, in the units of its buffer."""
    return -(-((D if int8 else 2 * D) + 64) // 512) * 512


@dataclass(frozen=True)
class Traffic:
    """Of one rank and layer."""

    out_bytes: float
    """Sent before the experts."""
    int8_bytes: float
    """The same with int8 rows."""
    back_bytes: float
    """Sent after them."""
    rows: int
    """Expanded rows that are held at once: valid ones and padding."""


def ranks_of_a_token(ranks: int) -> float:
    """On how many ranks a token's K experts live, on average, without the router's group limit."""
    return DEEPSEEK_V3.reached(ranks, limited=False)


def replicated(ranks: int, tokens: int) -> Traffic:
    """All R * T tokens on every rank; a ring all-reduce of float32 sums: 2 * (R - 1) / R * (R * T) * 4 D."""
    return Traffic(0, 0, 2 * (ranks - 1) * tokens * 4 * D, ranks * tokens * K)


def allgather(ranks: int, tokens: int) -> Traffic:
    """(R - 1) * T * row out by the ring; (R - 1) * T * 4 D back by reduce-scatter of float32 sums."""
    sent = (ranks - 1) * tokens
    return Traffic(sent * packed(False), sent * packed(True), sent * 4 * D, ranks * tokens * K)


def alltoall(ranks: int, tokens: int) -> Traffic:
    """T * m * (R - 1) / R rows out, as many of 2 D bytes back, m being the ranks of a token; T * K rows held."""
    remote = tokens * ranks_of_a_token(ranks) * (ranks - 1) / ranks
    return Traffic(remote * packed(False), remote * packed(True), remote * 2 * D, tokens * K)


def mc2(ranks: int, tokens: int) -> Traffic:
    """T * K * (R - 1) / R rows out, as many of 2 D bytes back; T * R * min(L, K) rows of room."""
    remote = tokens * K * (ranks - 1) / ranks
    room = tokens * ranks * min(E // ranks, K)
    return Traffic(remote * fused_row(False), remote * fused_row(True), remote * 2 * D, room)


def alltoallv_gmm(ranks: int, tokens: int) -> Traffic:
    """T * K * (R - 1) / R rows of 2 D bytes out and back: what epbackend leaves out. Its rows are never int8."""
    remote = tokens * K * (ranks - 1) / ranks
    return Traffic(remote * 2 * D, remote * 2 * D, remote * 2 * D, tokens * K)


PHASES = {
    "decode, 64": (64, (replicated, allgather, alltoall, mc2)),
    "prefill, 4096": (4096, (replicated, allgather, alltoall, alltoallv_gmm)),
}
"""Tokens of a rank, and the dispatchers that take as many."""


def weight_bytes(ranks: int, bytes_each: int) -> int:
    """Read by a step in which every local expert has a row: L * 3 * D * F values."""
    return E // ranks * 3 * D * F * bytes_each


def flops(tokens: int) -> int:
    """T * K rows a rank on average, 2 * 3 * D * F operations each."""
    return tokens * K * 2 * 3 * D * F


def markdown() -> str:
    lines = [
        "| ranks | phase, tokens a rank | dispatcher | MB out (int8) | MB back | rows held, GB "
        "| weights, GB (W8A8) | TFLOP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks in (16, 32):
        for phase, (tokens, dispatchers) in PHASES.items():
            for dispatcher in dispatchers:
                lines.append(_line(ranks, phase, tokens, dispatcher.__name__, dispatcher(ranks, tokens)))
    return "\n".join(lines)


def _line(ranks: int, phase: str, tokens: int, name: str, traffic: Traffic) -> str:
    cells = [
        f"{ranks} | {phase} | {name}",
        f"{traffic.out_bytes / 1e6:.1f} ({traffic.int8_bytes / 1e6:.1f}) | {traffic.back_bytes / 1e6:.1f}",
        f"{traffic.rows * 2 * D / 1e9:.2f}",
        f"{weight_bytes(ranks, 2) / 1e9:.2f} ({weight_bytes(ranks, 1) / 1e9:.2f})",
        f"{flops(tokens) / 1e12:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def chunked(travel: float, chunks: int) -> float:
    """Time of rows that travel in `travel` and are multiplied in 1, a chunk travelling while the last is multiplied."""
    return (travel + 1) / chunks + max(travel, 1) * (chunks - 1) / chunks


def overlap_markdown() -> str:
    """The time of travel and product, where the product alone is 1: for the time that `alltoall`'s rows take."""
    lines = [
        "| `alltoall`'s rows travel for | one chunk | two | four | fused at best, 16 ranks | 32 ranks |",
        "|---|---|---|---|---|---|",
    ]
    for travel in (0.25, 0.5, 1.0, 2.0, 4.0):
        fused = [max(1.0, travel * K / ranks_of_a_token(ranks)) for ranks in (16, 32)]
        times = [chunked(travel, 1), chunked(travel, 2), chunked(travel, 4), *fused]
        lines.append(f"| {travel:g} | " + " | ".join(f"{time:.2f}" for time in times) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), overlap_markdown(), sep="\n\n")
