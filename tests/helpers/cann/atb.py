"""Operators of the Ascend Transformer Boost library (NNAL), as torch sees them.

ATB is C++ without a documented binary interface, so these are emulated one step higher than the aclnn operators: in
place of op-plugin's `atb::` kernels, behind the checks of the vendor's schema. A tensor is a host view of device bytes;
one that ATB wants on the host stays as it is.

Limits are those for A2 and A3 on CANN 9.0's pages: SelfAttention (ascendtb_01_0265 and 0268), PagedAttention (0198).
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


MOST_SIZE, LARGE_SIZE, LARGE_BLOCK = 576, 256, 128
"""The largest head; blocks hold at most so many tokens where a head is larger than the second."""


def check_heads(query: Tensor, num_heads: int, num_kv_heads: int, sizes: tuple[int, int]) -> None:
    """Of the keys' and the values' sizes."""
    require(query.dtype in FLOATS, f"query is {query.dtype}, must be float16 or bfloat16")
    require(
        query.shape[1:] == (num_heads, sizes[0]),
        f"query {tuple(query.shape)} is not [T, {num_heads}, {sizes[0]}]",
    )
    require(all(0 < size <= MOST_SIZE for size in sizes), f"heads of {sizes} are not in 1 to {MOST_SIZE}")
    require(num_heads % num_kv_heads == 0, f"{num_heads} heads beside {num_kv_heads} of keys")


@atb
def _npu_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    """Requests of `seq_len` rows, one behind the other, each beside itself."""
    check_heads(query, num_heads, num_kv_heads, (key.shape[2], value.shape[2]))
    require(key.shape[1] == value.shape[1] == num_kv_heads, "heads of key and value are not num_kv_heads")
    require(
        query.dtype == key.dtype == value.dtype == mask.dtype,
        "query, key, value and mask must be of one type",
    )
    require(
        all(each.is_contiguous() for each in (query, key, value, mask, out)), "a tensor is not contiguous"
    )
    require(seq_len.dtype == torch.int32, f"seq_len is {seq_len.dtype}, must be int32")
    lengths = seq_len.tolist()
    require(len(query) == len(key) == len(value) == sum(lengths), "rows are not the sum of seq_len")
    longest = max(lengths)
    require(mask.shape == (longest, longest), f"mask {tuple(mask.shape)} is not [{longest}, {longest}]")
    hidden = 1.0 if mask.dtype == torch.bfloat16 else -torch.inf
    require(
        torch.equal(mask, torch.full_like(mask, hidden).triu(1)),
        f"a mask that is not {hidden} above its diagonal, and zero below, is not emulated",
    )
    parts = zip(*(each.split(lengths) for each in (query, key, value)), strict=True)
    out.copy_(torch.cat([attend(*each, scale_value, causal=True) for each in parts]))


@atb
def _npu_paged_attention_mla(
    query: Tensor,
    key_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    mla_vheadsize: int,
    out: Tensor,
) -> None:
    """One query a request, whose values are the first `mla_vheadsize` columns of its keys."""
    size = key_cache.shape[3]
    check_heads(query, num_heads, num_kv_heads, (size, mla_vheadsize))
    require(key_cache.shape[2] == num_kv_heads, "heads of the cache are not num_kv_heads")
    require(mla_vheadsize <= size, f"values of {mla_vheadsize} in rows of {size}")
    block = key_cache.shape[1]
    require(block % 16 == 0, f"blocks of {block} are not multiples of 16")
    require(
        size <= LARGE_SIZE or block <= LARGE_BLOCK,
        f"blocks of {block} are above {LARGE_BLOCK} for heads of {size}",
    )
    require(query.dtype == key_cache.dtype, f"query is {query.dtype}, the cache {key_cache.dtype}")
    require(
        all(each.is_contiguous() for each in (query, key_cache, out)),
        "query, cache and out must be contiguous",
    )
    require(block_table.dtype == context_lens.dtype == torch.int32, "block_table and context_lens are int32")
    require(len(block_table) == len(context_lens) == len(query), "one block list and length a query")
    for request, length in enumerate(context_lens.tolist()):
        require(
            -(-length // block) <= block_table.shape[1], f"{length} keys in {block_table.shape[1]} blocks"
        )
        keys = cached(key_cache, block_table[request], length)
        values = keys[..., :mla_vheadsize]
        out[request] = attend(query[request : request + 1], keys, values, scale_value, causal=False)[0]


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
