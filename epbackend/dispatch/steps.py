"""How many steps the rows of an all-to-all take, and which rows travel in each: agreed before the first row travels.

A step moves an equal part of every rank's rows to every peer: as many steps as the receive buffers ask for (rounds), or
as the overlap asks for (chunks) if that is more.
"""

from __future__ import annotations

from dataclasses import dataclass

from epbackend.dispatch.settings import DispatchSettings


def peer_share(tokens: int, top_k: int, ranks: int, settings: DispatchSettings) -> int | None:
    """Rows that a rank with `tokens` tokens may send to one peer in one round; None: no limit.

    MindIE's buffer of int(tokens * top_k * scale) rows, split equally among the peers.
    """
    if not settings.buffer_scale_factors:
        return None
    scale = next((scale for length, scale in settings.buffer_scale_factors if length <= tokens), float(ranks))
    return max(1, -(-int(tokens * top_k * scale) // ranks))


@dataclass(frozen=True)
class Plan:
    """What all ranks know before the first row travels."""

    counts_RR: list[list[int]]
    """Rows from each rank (first index) to each rank."""
    rounds: int
    steps: int

    @classmethod
    def of(
        cls, counts_RR: list[list[int]], tokens_R: list[int], top_k: int, settings: DispatchSettings
    ) -> Plan:
        rounds = 1
        for tokens, counts_R in zip(tokens_R, counts_RR, strict=True):
            share = peer_share(tokens, top_k, len(tokens_R), settings)
            rounds = max(rounds, -(-max(counts_R) // share) if share else 1)
        chunks = settings.overlap_chunks if max(tokens_R) >= settings.overlap_min_tokens else 1
        steps = max(rounds, chunks) if any(map(any, counts_RR)) else 0
        return cls(counts_RR, rounds, steps)

    @classmethod
    def worst(cls, tokens: int, ranks: int, top_k: int, settings: DispatchSettings) -> Plan:
        """Where each of the ranks sends each of its `tokens` tokens to each of them."""
        return cls.of([[tokens] * ranks] * ranks, [tokens] * ranks, top_k, settings)

    def rows(self, source: int, target: int, step: int) -> range:
        """Which of the rows from `source` to `target` travel in `step`: as many in each, give or take one."""
        count = self.counts_RR[source][target]
        return range(count * step // self.steps, count * (step + 1) // self.steps)

    def sent(self, source: int, step: int) -> slice:
        """Where the rows of `step` are among all that `source` sends, sorted by step."""
        first, last = (
            sum(count * end // self.steps for count in self.counts_RR[source]) for end in (step, step + 1)
        )
        return slice(first, last)
