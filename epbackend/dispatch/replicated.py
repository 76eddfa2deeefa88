"""Every rank already holds all tokens: no row travels, the ranks' partial sums are added up.

The right one under attention tensor parallelism (dp = 1), and for a single rank, where nothing is left to add.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from epbackend.dispatch.base import Batch, Dispatcher, Exchange, Problem
from epbackend.dispatch.collectives import Collectives
from epbackend.dispatch.passes import LocalRows, row_bound


class Replicated(Dispatcher):
    name = "replicated"
    level = 1
    summary = "every rank holds all tokens: local experts, then all-reduce"

    @classmethod
    def unsupported(cls, problem: Problem) -> str | None:
        ranks = problem.ranks
        if ranks.size == 1:
            return None
        if problem.settings.level != cls.level:
            return f"serves ep_level 1, and ep_level is {problem.settings.level}"
        if ranks.token_size != ranks.size:
            return f"the ranks hold different tokens (each token is on {ranks.token_size} of {ranks.size} ranks)"
        return None

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        return _ReplicatedExchange(self.problem, hidden_TD, slot_ids_TK, weights_TK)


class _ReplicatedExchange(Exchange):
    def __init__(self, problem: Problem, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> None:
        bound = row_bound(*slot_ids_TK.shape, problem.settings)
        self._local = LocalRows(problem, hidden_TD, slot_ids_TK, weights_TK, bound)
        self._problem, self._dtype = problem, hidden_TD.dtype

    def dispatch(self) -> Iterator[Batch]:
        yield from self._local.batches()
        self.passes = self._local.passes

    def combine(self, rows_SD: Tensor, batch: Batch) -> None:
        self._local.add(rows_SD, batch)

    def finish(self) -> Tensor:
        out_TD = self._local.out_ND
        if self._problem.ranks.size > 1 and out_TD.shape[0]:
            Collectives.of(self._problem).all_reduce(out_TD)
        return out_TD.to(self._dtype)
