"""One byte row a token: its choices, their weights and its hidden state, so that one collective moves all three.

Layout of a row: K int32 slot ids, K float32 weights, D hidden values. The row is padded to 8 bytes, which keeps every
field aligned, so that unpacking makes views and copies nothing but the ids.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_bytes(hidden_size: int, top_k: int, dtype: torch.dtype) -> int:
    """Bytes of one packed token."""
    return 8 * top_k + -(-hidden_size * dtype.itemsize // 8) * 8


def pack(hidden_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor, tokens: int | None = None) -> Tensor:
    """bytes_TB (uint8); with `tokens` padded to so many rows, the padding choosing no slot (id -1)."""
    (count, hidden_size), top_k = hidden_TD.shape, slot_ids_TK.shape[1]
    width = row_bytes(hidden_size, top_k, hidden_TD.dtype)
    bytes_TB = hidden_TD.new_empty(count if tokens is None else tokens, width, dtype=torch.uint8)
    ids, weights, hidden = _fields(bytes_TB, hidden_size, top_k, hidden_TD.dtype)
    ids[:count], weights[:count], hidden[:count] = slot_ids_TK, weights_TK, hidden_TD
    ids[count:] = -1
    return bytes_TB


def unpack(
    bytes_TB: Tensor, hidden_size: int, top_k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden_TD, slot_ids_TK, weights_TK) of packed rows; hidden and weights are views of the bytes."""
    ids, weights, hidden = _fields(bytes_TB, hidden_size, top_k, dtype)
    return hidden, ids.long(), weights


def _fields(
    bytes_TB: Tensor, hidden_size: int, top_k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    ids = bytes_TB[:, : 4 * top_k].view(torch.int32)
    weights = bytes_TB[:, 4 * top_k : 8 * top_k].view(torch.float32)
    hidden = bytes_TB[:, 8 * top_k : 8 * top_k + hidden_size * dtype.itemsize].view(dtype)
    return ids, weights, hidden
