"""Ranks that hold the same tokens share the work: each sends its slice of them, then all gather the finished rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from epbackend.dispatch.base import Batch, Dispatcher, Exchange, padded
from epbackend.dispatch.collectives import Collectives


class Sliced(Dispatcher):
    """Another dispatcher, under its name, on this rank's slice of its token group's tokens."""

    def __init__(self, inner: Dispatcher) -> None:
        super().__init__(inner.spec)
        self.name, self.level, self.summary = inner.name, inner.level, inner.summary
        self._inner = inner

    def begin(self, hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor) -> Exchange:
        ranks, tokens = self.spec.ranks, len(hidden_TD)
        width = -(-tokens // ranks.token_size)
        first = ranks.token_rank * width
        mine = [tensor[first : first + width] for tensor in (hidden_TD, slot_ids_TK, weights_TK)]
        if self.spec.settings.static:
            hidden, ids, weights = mine  # shorter, or empty, on the last ranks
            mine = [padded(hidden, width), padded(ids, width, -1), padded(weights, width)]
        inner = self._inner.begin(*mine)
        return _SlicedExchange(inner, Collectives.among_same_tokens(self.spec), tokens, width)


class _SlicedExchange(Exchange):
    def __init__(self, inner: Exchange, collectives: Collectives, tokens: int, width: int) -> None:
        self._inner, self._collectives = inner, collectives
        self._tokens, self._width = tokens, width

    def dispatch(self) -> Iterator[Batch]:
        yield from self._inner.dispatch()
        self.passes, self.rounds = self._inner.passes, self._inner.rounds

    def combine(self, rows_SD: Tensor) -> None:
        self._inner.combine(rows_SD)

    def finish(self) -> Tensor:
        part_TD = self._inner.finish()
        if not self._tokens:
            return part_TD
        return self._collectives.all_gather(padded(part_TD, self._width))[: self._tokens]
