"""`ep_level` 2: each token travels once to each rank that holds an expert of its, and the partial sums come back.

One small all-gather of the counts tells every rank all splits and the number of steps, so that all agree. A step moves
an equal part of every rank's rows to every peer: as many steps as the receive buffers ask for (rounds, see
`buffer_rows`), or as the overlap asks for (chunks) if that is more. While one step is multiplied the next one travels,
and results of the one before travel back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.dispatch.base import Batch, Dispatcher, Exchange, Problem
from epbackend.dispatch.collectives import Collectives, Pending
from epbackend.dispatch.passes import LocalRows
from epbackend.dispatch.rowbytes import pack, unpack
from epbackend.dispatch.settings import DispatchSettings


class AllToAll(Dispatcher):
    name = "alltoall"
    level = 2
    summary = "send each token once to each rank that needs it, in overlapped steps"

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        if problem.settings.level != cls.level:
            return f"serves ep_level 2, and ep_level is {problem.settings.level}"
        if problem.ranks.size == 1:
            return "there is one rank, so no row travels"
        return None

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        return _AllToAllExchange(self.problem, hidden_TD, slot_ids_TK, weights_TK)


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
    def of(cls, counts_RR: list[list[int]], tokens_R: list[int], top_k: int, settings: DispatchSettings) -> Plan:
        shares_R = [peer_share(tokens, top_k, len(tokens_R), settings) for tokens in tokens_R]
        needed = [-(-max(counts_R) // share) for counts_R, share in zip(counts_RR, shares_R, strict=True) if share]
        rounds = max([1, *needed])
        chunks = settings.overlap_chunks if max(tokens_R) >= settings.overlap_min_tokens else 1
        steps = max(rounds, chunks) if any(map(any, counts_RR)) else 0
        return cls(counts_RR, rounds, steps)

    def rows(self, source: int, target: int, step: int) -> tuple[int, int]:
        """The range, among the rows from `source` to `target`, that travels in `step`."""
        count = self.counts_RR[source][target]
        return count * step // self.steps, count * (step + 1) // self.steps


class _AllToAllExchange(Exchange):
    def __init__(self, problem: Problem, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> None:
        self._problem, self._collectives = problem, Collectives.of(problem)
        self._hidden_TD, self._top_k = hidden_TD, slot_ids_TK.shape[1]
        self._out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
        self._bytes_TB = pack(hidden_TD, slot_ids_TK, weights_TK)
        wanted_RT = _wanted(slot_ids_TK, problem.slots, problem.ranks.size)
        self._peer_M, self._token_M = wanted_RT.nonzero(as_tuple=True)  # sorted by peer, then by token
        mine = torch.cat([wanted_RT.sum(1), self._token_M.new_tensor([len(hidden_TD)])])
        table = self._collectives.all_gather(mine.unsqueeze(0)).tolist()
        counts_RR, tokens_R = [row[:-1] for row in table], [row[-1] for row in table]
        self._plan = Plan.of(counts_RR, tokens_R, self._top_k, problem.settings)
        self.rounds = self._plan.rounds
        self._coming_back: tuple[int, Pending] | None = None

    def dispatch(self) -> Iterator[Batch]:
        steps = self._plan.steps
        travelling = self._send(0) if steps else None
        for step in range(steps):
            received = travelling
            travelling = self._send(step + 1) if step + 1 < steps else None
            tokens = unpack(received.wait(), self._hidden_TD.shape[1], self._top_k, self._hidden_TD.dtype)
            self._local = LocalRows(self._problem, *tokens)
            yield from self._local.batches(step)

    def combine(self, rows_SD: Tensor, batch: Batch) -> None:
        self._local.add(rows_SD, batch)
        sums_MD = self._local.out_ND.to(self._hidden_TD.dtype)
        self._receive_results()
        send_R, receive_R = self._splits(batch.step)
        self._coming_back = batch.step, self._collectives.all_to_all(sums_MD, receive_R, send_R)

    def finish(self) -> Tensor:
        self._receive_results()
        return self._out_TD.to(self._hidden_TD.dtype)

    def _send(self, step: int) -> Pending:
        send_R, receive_R = self._splits(step)
        return self._collectives.all_to_all(self._bytes_TB[self._token_M[self._sent(step)]], send_R, receive_R)

    def _receive_results(self) -> None:
        """Add the partial sums of the step before; one source index a (token, peer) keeps the order fixed."""
        if self._coming_back is None:
            return
        step, pending = self._coming_back
        self._coming_back = None
        peers = self._problem.ranks.size
        sent = self._sent(step)
        source_M = self._token_M[sent] * peers + self._peer_M[sent]
        ones_TR = self._out_TD.new_ones(len(self._out_TD), peers)
        self._problem.kernels.unpermute(pending.wait(), source_M, ones_TR, self._out_TD)

    def _splits(self, step: int) -> tuple[list[int], list[int]]:
        """Rows to send to each rank and to receive from each rank in `step`."""
        me, size = self._problem.ranks.rank, self._problem.ranks.size
        ranges = [(self._plan.rows(me, peer, step), self._plan.rows(peer, me, step)) for peer in range(size)]
        return [b - a for (a, b), _ in ranges], [b - a for _, (a, b) in ranges]

    def _sent(self, step: int) -> Tensor:
        """Positions, among this rank's rows sorted by peer, of those that it sends in `step`."""
        me, parts, base = self._problem.ranks.rank, [], 0
        for peer, count in enumerate(self._plan.counts_RR[me]):
            first, last = self._plan.rows(me, peer, step)
            parts.append(torch.arange(base + first, base + last, device=self._token_M.device))
            base += count
        return torch.cat(parts)


def _wanted(slot_ids_TK: Tensor, slots: int, ranks: int) -> Tensor:
    """wanted_RT (bool): which ranks hold a slot that the token chose."""
    none = slot_ids_TK < 0
    rank_TK = torch.where(none, ranks, slot_ids_TK // slots)
    wanted_TR = slot_ids_TK.new_zeros(len(slot_ids_TK), ranks + 1, dtype=torch.bool)
    return wanted_TR.scatter_(1, rank_TK, True)[:, :ranks].t()
