"""`ep_level` 2: each token travels once to each rank that holds an expert of its, and the partial sums come back.

One small all-gather of the counts tells every rank all splits and the number of steps, so that all agree. A step moves
an equal part of every rank's rows to every peer: as many steps as the receive buffers ask for (rounds, see
`buffer_rows`), or as the overlap asks for (chunks) if that is more. While one step is multiplied the next one travels,
and results of the one before travel back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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

    def rows(self, source: int, target: int, step: int) -> range:
        """Which of the rows from `source` to `target` travel in `step`: as many in each, give or take one."""
        count = self.counts_RR[source][target]
        return range(count * step // self.steps, count * (step + 1) // self.steps)


class _AllToAllExchange(Exchange):
    def __init__(self, problem: Problem, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> None:
        self._problem, self._collectives = problem, Collectives.of(problem)
        self._hidden_TD, self._top_k = hidden_TD, slot_ids_TK.shape[1]
        self._bytes_TB = pack(hidden_TD, slot_ids_TK, weights_TK)
        self._sums_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
        wanted_RT = _wanted(slot_ids_TK, problem.slots, problem.ranks.size)
        # M rows to send, sorted by peer, then by token
        self._peer_M, self._token_M = wanted_RT.nonzero(as_tuple=True)
        mine = [len(hidden_TD), *wanted_RT.sum(1).tolist()]
        table = self._collectives.all_gather_ints(mine, hidden_TD.device)
        tokens_R, counts_RR = [row[0] for row in table], [row[1:] for row in table]
        self._plan = Plan.of(counts_RR, tokens_R, self._top_k, problem.settings)
        self.rounds = self._plan.rounds
        self._returning: tuple[Tensor, Pending] | None = None

    def dispatch(self) -> Iterator[Batch]:
        sent_in_turn = (self._send(step) for step in range(self._plan.steps))
        for step, arriving in enumerate(_one_ahead(sent_in_turn)):
            rows = unpack(arriving.wait(), self._hidden_TD.shape[1], self._top_k, self._hidden_TD.dtype)
            self._local = LocalRows(self._problem, *rows)
            yield replace(self._local.batch(0), step=step)

    def combine(self, rows_SD: Tensor, batch: Batch) -> None:
        self._local.add(rows_SD, batch)
        self._collect()
        sums_ND = self._local.sums_ND.to(self._hidden_TD.dtype)
        send_R, receive_R = self._splits(batch.step)
        self._returning = self._sent(batch.step), self._collectives.all_to_all(sums_ND, receive_R, send_R)

    def finish(self) -> Tensor:
        self._collect()
        return self._sums_TD.to(self._hidden_TD.dtype)

    def _send(self, step: int) -> Pending:
        rows_MB = self._bytes_TB[self._token_M[self._sent(step)]]
        return self._collectives.all_to_all(rows_MB, *self._splits(step))

    def _collect(self) -> None:
        """Add the partial sums that are on their way back, if any, peer by peer for each token."""
        if self._returning is None:
            return
        (sent_M, pending), self._returning = self._returning, None
        peers = self._problem.ranks.size
        source_M = self._token_M[sent_M] * peers + self._peer_M[sent_M]
        ones_TR = self._sums_TD.new_ones(len(self._sums_TD), peers)
        self._problem.kernels.unpermute(pending.wait(), source_M, ones_TR, self._sums_TD)

    def _splits(self, step: int) -> tuple[list[int], list[int]]:
        """Rows to send to each rank, and to receive from each, in `step`."""
        me, peers = self._problem.ranks.rank, range(self._problem.ranks.size)
        send_R = [len(self._plan.rows(me, peer, step)) for peer in peers]
        return send_R, [len(self._plan.rows(peer, me, step)) for peer in peers]

    def _sent(self, step: int) -> Tensor:
        """Which of the M rows travel in `step`."""
        me, first, parts = self._problem.ranks.rank, 0, []
        for peer, count in enumerate(self._plan.counts_RR[me]):
            rows = self._plan.rows(me, peer, step)
            parts.append(torch.arange(first + rows.start, first + rows.stop, device=self._token_M.device))
            first += count
        return torch.cat(parts)


def _one_ahead(pendings: Iterator[Pending]) -> Iterator[Pending]:
    """Each of them in turn, the following one being under way already."""
    following = next(pendings, None)
    while following is not None:
        current, following = following, next(pendings, None)
        yield current


def _wanted(slot_ids_TK: Tensor, slots: int, ranks: int) -> Tensor:
    """wanted_RT (bool): whether the token chose a slot of the rank."""
    wanted_TR = slot_ids_TK.new_zeros(len(slot_ids_TK), ranks, dtype=torch.bool)
    return wanted_TR.scatter_(1, slot_ids_TK // slots, True).t()
