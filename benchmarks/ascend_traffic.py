"""What DeepSeek-V3's MoE layer moves and multiplies on A3 ranks: computed, for want of NPUs to measure on.

    python -m benchmarks.ascend_traffic      # prints the table of docs/ascend.md

Per rank and layer, in bfloat16, with routing that spreads evenly. Sent and received are equal on average.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cost.shapes import DEEPSEEK_V3

D, F, E, K = DEEPSEEK_V3.D, 2048, DEEPSEEK_V3.E, DEEPSEEK_V3.K
"""Hidden size, expert width, experts, experts of a token."""

ROW_BYTES = DEEPSEEK_V3.packed_row(2)
"""A packed token: ids, weights, hidden state (epbackend/dispatch/rowbytes.py)."""

FUSED_ROW_BYTES = -(-(2 * D + 64) // 512) * 512
"""A row of the fused dispatch as its buffer holds it."""

PHASES = {"decode": 64, "prefill": 4096}
"""Tokens of a rank."""


@dataclass(frozen=True)
class Traffic:
    """Of one rank and layer."""

    out_bytes: float
    """Sent before the experts."""
    back_bytes: float
    """Sent after them."""
    rows: int
    """Expanded rows that are held at once: valid ones and padding."""


def ranks_of_a_token(ranks: int) -> float:
    """On how many ranks a token's K experts live, on average, without the router's group limit."""
    return DEEPSEEK_V3.reached(ranks, limited=False)


def replicated(ranks: int, tokens: int) -> Traffic:
    """All R * T tokens on every rank; a ring all-reduce of float32 sums: 2 * (R - 1) / R * (R * T) * 4 D."""
    return Traffic(0, 2 * (ranks - 1) * tokens * 4 * D, ranks * tokens * K)


def allgather(ranks: int, tokens: int) -> Traffic:
    """(R - 1) * T * row out by the ring; (R - 1) * T * 4 D back by reduce-scatter of float32 sums."""
    return Traffic((ranks - 1) * tokens * ROW_BYTES, (ranks - 1) * tokens * 4 * D, ranks * tokens * K)


def alltoall(ranks: int, tokens: int) -> Traffic:
    """T * m * (R - 1) / R rows out, as many of 2 D bytes back, m being the ranks of a token.

    Each token that arrives has room for K rows.
    """
    arriving = tokens * ranks_of_a_token(ranks)
    remote = arriving * (ranks - 1) / ranks
    return Traffic(remote * ROW_BYTES, remote * 2 * D, round(arriving) * K)


def mc2(ranks: int, tokens: int) -> Traffic:
    """T * K * (R - 1) / R rows out, as many of 2 D bytes back; T * R * min(L, K) rows of room."""
    remote = tokens * K * (ranks - 1) / ranks
    return Traffic(remote * FUSED_ROW_BYTES, remote * 2 * D, tokens * ranks * min(E // ranks, K))


DISPATCHERS = (replicated, allgather, alltoall, mc2)
MC2_TOKENS = 512


def weight_bytes(ranks: int, bytes_each: int) -> int:
    """Read by a step in which every local expert has a row: L * 3 * D * F values."""
    return E // ranks * 3 * D * F * bytes_each


def flops(tokens: int) -> int:
    """T * K rows a rank on average, 2 * 3 * D * F operations each."""
    return tokens * K * 2 * 3 * D * F


def markdown() -> str:
    lines = [
        "| ranks | phase, tokens a rank | dispatcher | MB out | MB back | rows held, GB | weights, GB (W8A8) | TFLOP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks in (16, 32):
        for phase, tokens in PHASES.items():
            for dispatcher in DISPATCHERS:
                if dispatcher is mc2 and tokens > MC2_TOKENS:
                    continue
                lines.append(_line(ranks, phase, tokens, dispatcher.__name__, dispatcher(ranks, tokens)))
    return "\n".join(lines)


def _line(ranks: int, phase: str, tokens: int, name: str, traffic: Traffic) -> str:
    cells = [
        f"{ranks} | {phase}, {tokens} | {name}",
        f"{traffic.out_bytes / 1e6:.1f} | {traffic.back_bytes / 1e6:.1f}",
        f"{traffic.rows * 2 * D / 1e9:.2f}",
        f"{weight_bytes(ranks, 2) / 1e9:.2f} ({weight_bytes(ranks, 1) / 1e9:.2f})",
        f"{flops(tokens) / 1e12:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(markdown())
