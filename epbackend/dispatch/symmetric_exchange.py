"""One layer call over the peers' memory: counts, rows, results; see `kernels.triton.symmetric` for the phases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from epbackend.dispatch.base import Batch, Exchange, LayerSpec
from epbackend.dispatch.row_format import RowFormat
from epbackend.dispatch.symmetric_memory import ExchangeCapacity, Geometry, Peers
from epbackend.kernels.triton.quantize import dequantize, quantize
from epbackend.kernels.triton.symmetric import (
    RecvOffsets,
    combine_reduce,
    combine_send,
    dispatch,
    exchange_counts,
    recv_offsets,
    rows_at_receivers,
)

ALIGNMENT = 16
"""Bytes: values and scales each begin at a multiple, so that rows move in the widest loads and stores."""

WORD = torch.int32
"""What a quantized row is made of, as far as the copying kernels can see."""


@dataclass(frozen=True)
class Part:
    """The tokens that every rank sends at a time, at most `ExchangeCapacity.tokens` each."""

    start: int
    """Of them on this rank, in the call's tokens."""
    offsets: RecvOffsets
    """Of the first round."""
    row_S: Tensor
    """Where each choice's row lies on its slot's rank."""
    rounds: int
    rows_TX: Tensor
    """The tokens' rows as they travel."""


class SymmetricExchange(Exchange):
    def __init__(
        self,
        spec: LayerSpec,
        peers: Peers,
        capacity: ExchangeCapacity,
        hidden_TD: Tensor,
        slot_ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> None:
        self._spec, self._peers, self._capacity = spec, peers, capacity
        self._hidden_TD, self._weights_TK = hidden_TD, weights_TK
        self._slot_ids_TK = slot_ids_TK.contiguous()
        width, dtype = hidden_TD.shape[1], hidden_TD.dtype
        self._format = RowFormat(width, dtype, spec.settings.dispatch_dtype, alignment=ALIGNMENT)
        row = (self._format.bytes // WORD.itemsize, WORD) if self._format.quantized else (width, dtype)
        self._buffers = peers.buffers(
            Geometry(
                ranks=peers.size,
                slots=spec.slots,
                choices=capacity.tokens * slot_ids_TK.shape[1],
                rows=capacity.rows,
                row=row,
                result=(width, dtype),
            )
        )
        self._out_TD = torch.empty_like(hidden_TD)

    def dispatch(self) -> Iterator[Batch]:
        self.rounds = 0
        for part in self._parts():
            self.rounds += part.rounds
            for number in range(part.rounds):
                yield self._receive(part, number)
            self._combine_reduce(part)

    def combine(self, rows_SD: Tensor) -> None:
        combine_send(rows_SD, self._counts_L, self._buffers.choice_of_row.local, self._buffers.results)
        self._peers.barrier(self._spec.layer)

    def finish(self) -> Tensor:
        return self._out_TD

    def _parts(self) -> Iterator[Part]:
        """On every rank as many as the rank with most tokens needs."""
        start, longest = 0, 1
        while start < longest:
            slot_ids_TK = self._slice(self._slot_ids_TK, start)
            before_BP = exchange_counts(
                slot_ids_TK, max(0, len(self._hidden_TD) - start), self._buffers.table, self._peers.rank
            )
            self._peers.barrier(self._spec.layer)
            offsets = self._offsets(number=0)
            rounds, longest = self._needs(offsets, start)
            row_S = rows_at_receivers(slot_ids_TK, before_BP, offsets.bases_P)
            yield Part(start, offsets, row_S, rounds, self._encoded(self._slice(self._hidden_TD, start)))
            start += self._capacity.tokens

    def _needs(self, offsets: RecvOffsets, start: int) -> tuple[int, int]:
        """(rounds, most tokens of a rank): from shapes and settings where they suffice, else the GPU is asked."""
        static = self._spec.settings.static
        tokens = len(self._hidden_TD) if static else self._capacity.tokens
        worst = self._capacity.rounds_of(self._peers.size * tokens * self._slot_ids_TK.shape[1])
        if static or (self._capacity.bounded and worst == 1):
            return worst, self._capacity.tokens
        rows_R, tokens_R = zip(*self._peers.read(offsets.needs_R2), strict=True)
        return self._capacity.rounds_of(max(rows_R)), start + max(tokens_R)

    def _receive(self, part: Part, number: int) -> Batch:
        """Send this rank's rows of one round, and receive those that the others sent."""
        buffers, first_row = self._buffers, number * self._capacity.rows
        slot_ids_TK = self._slice(self._slot_ids_TK, part.start)
        dispatch(
            hidden_TD=part.rows_TX,
            slot_ids_TK=slot_ids_TK,
            row_S=part.row_S,
            first_row=first_row,
            rows=buffers.rows,
            choice_of_row=buffers.choice_of_row,
            first_choice=self._peers.rank * len(buffers.results.local),
            slots=self._spec.slots,
        )
        self._counts_L = (part.offsets if number == 0 else self._offsets(number)).counts_L
        self._peers.barrier(self._spec.layer)
        rows_CD = self._decoded(buffers.rows.local)
        # About as many choices come from all ranks together as this one has itself.
        expected = min(max(0, slot_ids_TK.numel() - first_row), len(rows_CD))
        return Batch(rows_CD, self._counts_L, expected)

    def _combine_reduce(self, part: Part) -> None:
        combine_reduce(
            self._buffers.results.local,
            self._slice(self._slot_ids_TK, part.start),
            self._slice(self._weights_TK, part.start),
            self._peers.size * self._spec.slots,
            self._slice(self._out_TD, part.start),
        )

    def _offsets(self, number: int) -> RecvOffsets:
        """As one round sees them."""
        window = number * self._capacity.rows, (number + 1) * self._capacity.rows
        return recv_offsets(self._buffers.table.local, self._peers.rank, self._spec.slots, window)

    def _encoded(self, hidden_TD: Tensor) -> Tensor:
        """The tokens' rows, ready to travel: themselves, or their quantized values and scales."""
        if not self._format.quantized:
            return hidden_TD
        bytes_TB = hidden_TD.new_empty(len(hidden_TD), self._format.bytes, dtype=torch.uint8)
        fields = self._format.fields(bytes_TB)
        quantize(hidden_TD, fields.values_TD, fields.scales_TX)
        return bytes_TB.view(WORD)

    def _decoded(self, rows_CX: Tensor) -> Tensor:
        """rows_CD of those that have arrived, as many as the counts say."""
        if not self._format.quantized:
            return rows_CX
        fields = self._format.fields(rows_CX.view(torch.uint8))
        rows_CD = torch.empty(
            len(rows_CX), self._format.hidden_size, dtype=self._format.dtype, device=rows_CX.device
        )
        dequantize(fields.values_TD, fields.scales_TX, rows_CD, self._counts_L)
        return rows_CD

    def _slice(self, tensor_TX: Tensor, start: int) -> Tensor:
        return tensor_TX[start : start + self._capacity.tokens]
