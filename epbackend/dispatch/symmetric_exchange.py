"""What a row is while it travels between peers: itself, or its quantized values and behind them their scales.

One layer call over the peers' memory: counts, rows, results; see `kernels.triton.peer` for the phases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.dispatch.base import Batch, Exchange, LayerSpec
from epbackend.dispatch.row_format import TRANSPORTS
from epbackend.dispatch.symmetric_memory import Geometry, Peers, Room
from epbackend.kernels.triton.quantize import dequantize, quantize
from epbackend.kernels.triton.symmetric import Layout, give_back, lay_out, place, publish_counts, send, settle

ALIGNMENT = 16
"""Bytes: values and scales each begin at a multiple, so that rows move in the widest loads and stores."""

WORD = torch.int32
"""What a quantized row is made of, as far as the copying kernels can see."""


@dataclass(frozen=True)
class Wire:
    """For rows of `width` values of `dtype`."""

    transport: str
    width: int
    dtype: torch.dtype

    @property
    def row(self) -> tuple[int, torch.dtype]:
        """Elements and dtype of a travelling row."""
        if not self._scales:
            return self.width, self.dtype
        return (self._values_bytes + _aligned(4 * self._scales)) // WORD.itemsize, WORD

    def pack(self, hidden_TD: Tensor) -> Tensor:
        """The tokens' rows, ready to travel."""
        if not self._scales:
            return hidden_TD
        rows_TW = torch.empty(len(hidden_TD), self.row[0], dtype=WORD, device=hidden_TD.device)
        quantize(hidden_TD, *self._fields(rows_TW))
        return rows_TW

    def unpack(self, rows_CW: Tensor, counts_L: Tensor) -> Tensor:
        """rows_CD of those that have arrived, as many as the counts tell of."""
        if not self._scales:
            return rows_CW
        rows_CD = torch.empty(len(rows_CW), self.width, dtype=self.dtype, device=rows_CW.device)
        dequantize(*self._fields(rows_CW), rows_CD, counts_L)
        return rows_CD

    @property
    def _scales(self) -> int:
        return TRANSPORTS[self.transport].scales(self.width)

    @property
    def _values_bytes(self) -> int:
        return _aligned(self.width * TRANSPORTS[self.transport].dtype(self.dtype).itemsize)

    def _fields(self, rows_TW: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the values and of the scales."""
        bytes_TB = rows_TW.view(torch.uint8)
        scales = bytes_TB[:, self._values_bytes : self._values_bytes + 4 * self._scales]
        values = bytes_TB[:, : self.width].view(TRANSPORTS[self.transport].dtype(self.dtype))
        return values, scales.view(torch.float32)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Part:
    """The tokens that every rank sends at a time, at most `Room.tokens` each."""

    start: int
    """Of them on this rank, in the call's tokens."""
    layout: Layout
    """Of the first round."""
    row_S: Tensor
    """Where each choice's row lies on its slot's rank."""
    rounds: int
    rows_TW: Tensor
    """The tokens' rows as they travel."""


class SymmetricExchange(Exchange):
    def __init__(
        self,
        spec: LayerSpec,
        peers: Peers,
        room: Room,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> None:
        self._problem, self._peers, self._room = spec, peers, room
        self._hidden_TD, self._weights_TK = hidden_TD, weights_TK
        self._slot_ids_TK = slot_ids_TK.contiguous()
        self._wire = Wire(spec.settings.transport, hidden_TD.shape[1], hidden_TD.dtype)
        self._buffers = peers.buffers(
            Geometry(
                ranks=peers.size,
                slots=spec.slots,
                choices=room.tokens * slot_ids_TK.shape[1],
                rows=room.rows,
                row=self._wire.row,
                result=(hidden_TD.shape[1], hidden_TD.dtype),
            )
        )
        self._out_TD = torch.empty_like(hidden_TD)

    def dispatch(self) -> Iterator[Batch]:
        self.rounds = step = 0
        for part in self._parts():
            self.rounds += part.rounds
            for number in range(part.rounds):
                yield self._receive(part, number, step)
                step += 1
            self._settle(part)

    def combine(self, rows_SD: Tensor, batch: Batch) -> None:
        give_back(rows_SD, batch.counts_L, batch.choice_of_row_S, self._buffers.results)
        self._peers.meet(self._problem.layer)

    def finish(self) -> Tensor:
        return self._out_TD

    def _parts(self) -> Iterator[Part]:
        """As many on every rank, as the one with most tokens needs."""
        start, longest = 0, 1
        while start < longest:
            slot_ids_TK = self._slice(self._slot_ids_TK, start)
            before_BP = publish_counts(
                slot_ids_TK, max(0, len(self._hidden_TD) - start), self._buffers.table, self._peers.rank
            )
            self._peers.meet(self._problem.layer)
            layout = self._lay_out(number=0)
            rounds, longest = self._needs(layout, start)
            row_S = place(slot_ids_TK, before_BP, layout.bases_P)
            yield Part(start, layout, row_S, rounds, self._wire.pack(self._slice(self._hidden_TD, start)))
            start += self._room.tokens

    def _needs(self, layout: Layout, start: int) -> tuple[int, int]:
        """(rounds, most tokens of a rank): from shapes and settings where they tell, else the GPU is asked."""
        static = self._problem.settings.static
        tokens = len(self._hidden_TD) if static else self._room.tokens
        worst = self._room.rounds_of(self._peers.size * tokens * self._slot_ids_TK.shape[1])
        if static or (self._room.bounded and worst == 1):
            return worst, self._room.tokens
        rows_R, tokens_R = zip(*self._peers.read(layout.needs_R2), strict=True)
        return self._room.rounds_of(max(rows_R)), start + max(tokens_R)

    def _receive(self, part: Part, number: int, step: int) -> Batch:
        """Send this rank's rows of one round, and have those that the others sent."""
        buffers, first = self._buffers, number * self._room.rows
        slot_ids_TK = self._slice(self._slot_ids_TK, part.start)
        send(
            part.rows_TW,
            slot_ids_TK,
            part.row_S,
            first,
            buffers.rows,
            buffers.sources,
            self._peers.rank * len(buffers.results.mine),
            self._problem.slots,
        )
        layout = part.layout if number == 0 else self._lay_out(number)
        self._peers.meet(self._problem.layer)
        rows_CD = self._wire.unpack(buffers.rows.mine, layout.counts_L)
        # About as many choices come from all ranks together as this one has itself.
        expected = min(max(0, slot_ids_TK.numel() - first), len(rows_CD))
        return Batch(rows_CD, layout.counts_L, buffers.sources.mine, step, expected)

    def _settle(self, part: Part) -> None:
        settle(
            self._buffers.results.mine,
            self._slice(self._slot_ids_TK, part.start),
            self._slice(self._weights_TK, part.start),
            self._peers.size * self._problem.slots,
            self._slice(self._out_TD, part.start),
        )

    def _lay_out(self, number: int) -> Layout:
        """As one round sees it."""
        window = number * self._room.rows, (number + 1) * self._room.rows
        return lay_out(self._buffers.table.mine, self._peers.rank, self._problem.slots, window)

    def _slice(self, tensor_TX: Tensor, start: int) -> Tensor:
        return tensor_TX[start : start + self._room.tokens]
