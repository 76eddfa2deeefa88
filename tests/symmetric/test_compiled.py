"""Every kernel compiles for the chips it is meant for, moves rows 16 bytes at a time, and spills nothing.

No GPU is needed: Triton brings ptxas along.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from epbackend.kernels.triton import padded
from epbackend.kernels.triton import symmetric as symmetric_kernels
from epbackend.kernels.triton.compile_info import resources
from epbackend.kernels.triton.symmetric import (
    SymmetricTensor,
    barrier,
    combine_reduce,
    combine_send,
    dispatch,
    exchange_counts,
    recv_offsets,
    rows_at_receivers,
)
from epbackend.kernels.triton.tiles import A100, B200, H100, L40S
from tests.helpers.compiled import compiling

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(knobs.runtime.interpret, reason="the interpreter compiles nothing"),
]
SHAPES = {"DeepSeek-V3": (8, 32, 8, 7168), "Qwen3-30B": (2, 64, 8, 2048), "NVL72": (72, 4, 8, 7168)}
"""Ranks, slots of each, top_k, hidden size."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("chip", [H100, B200], ids=lambda chip: chip.name)
def test_padded_rows_compile(monkeypatch, chip):
    monkeypatch.setattr(padded, "chip_of", lambda device: chip)
    padded_LCD, counts_L, rows_SD = meta(32, 1024, 7168), meta(32, dtype=torch.int32), meta(8192, 7168)
    with compiling(chip) as compiled:
        padded.compact(padded_LCD, counts_L, rows_SD)
        padded.spread(rows_SD, counts_L, padded_LCD)
    for kernel in compiled:
        assert resources(kernel).spilled == 0
        assert "st.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chip", [A100, L40S, H100, B200], ids=lambda chip: chip.name)
def test_the_phases_compile_without_spills(monkeypatch, chip, shape):
    (ranks, slots, top_k, width), tokens, rank = SHAPES[shape], 128, 1
    monkeypatch.setattr(symmetric_kernels, "chip_of", lambda device: chip)

    def symmetric_tensor(*shape: int, dtype: torch.dtype = torch.int64) -> SymmetricTensor:
        return SymmetricTensor(meta(*shape, dtype=dtype), meta(ranks, dtype=torch.int64))

    choices, capacity = tokens * top_k, ranks * tokens * top_k
    rows, results = (
        symmetric_tensor(capacity, width, dtype=torch.bfloat16),
        symmetric_tensor(choices, width, dtype=torch.bfloat16),
    )
    table, choice_of_row = (
        symmetric_tensor(ranks, ranks * slots + 1, dtype=torch.int32),
        symmetric_tensor(capacity),
    )
    ids_TK = meta(tokens, top_k, dtype=torch.int64)
    with compiling(chip) as compiled:
        before_BP = exchange_counts(ids_TK, tokens, table, rank)
        offsets = recv_offsets(table.local, rank, slots, (0, capacity))
        row_S = rows_at_receivers(ids_TK, before_BP, offsets.bases_P)
        dispatch(meta(tokens, width), ids_TK, row_S, 0, rows, choice_of_row, rank * choices, slots)
        combine_send(rows.local, offsets.counts_L, choice_of_row.local, results)
        combine_reduce(
            results.local,
            ids_TK,
            meta(tokens, top_k, dtype=torch.float32),
            ranks * slots,
            meta(tokens, width),
        )
        barrier(
            symmetric_tensor(ranks), meta(1, dtype=torch.int64), meta(2, dtype=torch.int64), rank, 0, 120.0
        )
    text_of = {kernel.metadata.name: kernel.asm["ptx"] for kernel in compiled}
    assert all(resources(kernel).spilled == 0 for kernel in compiled)
    for name in ("_dispatch", "_combine_send", "_combine_reduce"):
        assert "ld.global.v4.b32" in text_of[name]
        assert "st.global.v4.b32" in text_of[name]
    assert "atom.global.sys.release" in text_of["_barrier"]
    assert "atom.global.sys.acquire" in text_of["_barrier"]
    assert "trap;" in text_of["_barrier"]
