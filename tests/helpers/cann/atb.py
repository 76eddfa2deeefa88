"""Operators of the Ascend Transformer Boost library (NNAL), as torch sees them.

ATB is C++ without a documented binary interface, so these are emulated one step higher than the aclnn operators: in
place of op-plugin's `atb::` kernels, behind the checks of the vendor's schema. A tensor is a host view of device bytes;
one that ATB wants on the host stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.helpers.cann.attention import FLOATS, attend, cached
from tests.helpers.cann.registry import require

OPERATORS: dict[str, Callable[..., Any]] = {}

ON_THE_HOST = {"context_lens", "seq_len"}
"""Arguments that ATB reads while it plans."""


def atb(emulate: Callable[..., None]) -> Callable[..., None]:
    OPERATORS[f"atb::{emulate.__name__}"] = emulate
    return emulate


@atb
def _npu_reshape_and_cache(key, value, key_cache, value_cache, slot_indices) -> None:
    """Row t of key goes to slot_indices[t], the block times its size plus the place in it."""
    require(len(slot_indices) > 0, "slot_indices is empty")
    require(slot_indices.dtype == torch.int32, f"slot_indices is {slot_indices.dtype}, must be int32")
    slots = slot_indices.long()
    for rows, cache in ((key, key_cache), (value, value_cache)):
        require(rows.is_contiguous() and cache.is_contiguous(), "rows and cache must be contiguous")
        require(rows.dtype == cache.dtype, f"rows of {rows.dtype} do not fit a cache of {cache.dtype}")
        require(rows.shape[1:] == cache.shape[2:], f"rows {tuple(rows.shape)}, cache {tuple(cache.shape)}")
        flat = cache.flatten(0, 1)
        require(bool(((slots >= -1) & (slots < len(flat))).all()), "a slot is outside the cache")
        flat[slots[slots >= 0]] = rows[slots >= 0]


@atb
def _npu_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    workspace: Tensor | None = None,
) -> None:
    """One query a request, beside the first `context_lens` rows of its cache."""
    require(query.dtype in FLOATS and query.dtype == key_cache.dtype, f"query is {query.dtype}")
    require(query.is_contiguous() and out.is_contiguous(), "query and out must be contiguous")
    require(query.shape[1] == num_heads and key_cache.shape[2] == num_kv_heads, "heads")
    require(query.shape[2] % 16 == 0, f"heads of {query.shape[2]} are not multiples of 16")
    require(block_table.dtype == context_lens.dtype == torch.int32, "block_table and context_lens are int32")
    require(len(block_table) == len(context_lens) == len(query), "one block list and length a query")
    for request, length in enumerate(context_lens.tolist()):
        keys, values = (cached(each, block_table[request], length) for each in (key_cache, value_cache))
        out[request] = attend(query[request : request + 1], keys, values, scale_value, causal=False)[0]
