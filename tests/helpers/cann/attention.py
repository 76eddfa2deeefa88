"""Attention over keys and values in one piece, or in the blocks of a cache.

Limits are those of op-plugin 7.2.0, docs/context/torch_npu-npu_fused_infer_attention_score.md, for A2 and A3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.cann.registry import aclnn, require

CAUSAL = 2048
"""Sides of the mask of sparse_mode 3, whatever the lengths are."""

FLOATS = (torch.float16, torch.bfloat16)
NOT_EMULATED = (
    *("pse_shift", "dequant_scale1", "quant_scale1", "dequant_scale2", "quant_scale2", "quant_offset2"),
    *("antiquant_scale", "antiquant_offset", "query_padding_size", "kv_padding_size"),
    *("key_antiquant_scale", "key_antiquant_offset", "value_antiquant_scale", "value_antiquant_offset"),
    *("key_shared_prefix", "value_shared_prefix", "actual_shared_prefix_len"),
    *("query_rope", "key_rope", "key_rope_antiquant_scale", "softmax_lse_flag"),
)


def attend(query_SND: Tensor, key_SND: Tensor, value_SND: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(scale * Q K^T) V in float32; the last query is beside the last key."""
    repeat = query_SND.shape[1] // key_SND.shape[1]
    query_NSD = query_SND.float().transpose(0, 1)
    key_NSD, value_NSD = (
        each.float().repeat_interleave(repeat, 1).transpose(0, 1) for each in (key_SND, value_SND)
    )
    scores = query_NSD @ key_NSD.transpose(1, 2) * scale
    if causal:
        queries, keys = scores.shape[1:]
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(2) @ value_NSD).transpose(0, 1)


def cached(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` rows of a request, whose cache is in these blocks of [blocks, block size, ...]."""
    size = cache.shape[1]
    taken = blocks[: -(-length // size)].long()
    require(bool(((taken >= 0) & (taken < len(cache))).all()), "a block is outside the cache")
    return cache[taken].flatten(0, 1)[:length]


@aclnn(
    "query:T key:L value:L pse_shift:T atten_mask:T actual_seq_lengths:I actual_seq_lengths_kv:I dequant_scale1:T "
    "quant_scale1:T dequant_scale2:T quant_scale2:T quant_offset2:T antiquant_scale:T antiquant_offset:T "
    "block_table:T query_padding_size:T kv_padding_size:T key_antiquant_scale:T key_antiquant_offset:T "
    "value_antiquant_scale:T value_antiquant_offset:T key_shared_prefix:T value_shared_prefix:T "
    "actual_shared_prefix_len:I query_rope:T key_rope:T key_rope_antiquant_scale:T num_heads:i scale:d pre_tokens:i "
    "next_tokens:i input_layout:s num_key_value_heads:i sparse_mode:i inner_precise:i block_size:i antiquant_mode:i "
    "softmax_lse_flag:b key_antiquant_mode:i value_antiquant_mode:i",
    "out:T softmax_lse:T",
)
def aclnnFusedInferAttentionScoreV3(
    query,
    key,
    value,
    atten_mask,
    actual_seq_lengths,
    actual_seq_lengths_kv,
    block_table,
    num_heads,
    scale,
    input_layout,
    num_key_value_heads,
    sparse_mode,
    inner_precise,
    block_size,
    out,
    **rest,
) -> None:
    for name in NOT_EMULATED:
        given = rest[name]
        require(given is None or given is False or given == [], f"{name} is not emulated")
    require(input_layout == "BSH", f"input_layout {input_layout} is not emulated")
    require(len(key) == len(value) == 1, "lists of keys are not emulated")
    (key,), (value,) = key, value
    require(query.dtype in FLOATS, f"query is {query.dtype}, must be float16 or bfloat16")
    require(query.dtype == key.dtype == value.dtype, "query, key and value must be of one type")
    require(key.shape == value.shape, "key and value must be of one shape")
    require(all(each.is_contiguous() for each in (query, key, value)), "a tensor is not contiguous")
    batch, queries, width = query.shape
    heads_kv = num_key_value_heads or num_heads
    require(num_heads % heads_kv == 0 and num_heads // heads_kv <= 64, "num_heads / num_key_value_heads")
    size = width // num_heads
    require(size * num_heads == width and key.shape[2] == size * heads_kv, "H is not heads * D")
    require(num_heads <= 256 and size <= 512 and size % 16 == 0, f"{num_heads} heads of {size}")
    require(inner_precise in (0, 1), "inner_precise above 1 is not emulated")
    require(not actual_seq_lengths or actual_seq_lengths == [queries] * batch, "padded queries")
    causal = queries > 1 and sparse_mode == 3
    if queries > 1:
        require(sparse_mode in (0, 3), f"sparse_mode {sparse_mode} is not emulated")
        require(sparse_mode == 3 or atten_mask is None, "a mask of sparse_mode 0 is not emulated")
    if causal:
        require(
            atten_mask is not None and atten_mask.shape == (CAUSAL, CAUSAL),
            f"sparse_mode 3 needs atten_mask [{CAUSAL}, {CAUSAL}]",
        )
        require(
            atten_mask.dtype in (torch.bool, torch.int8, torch.uint8), f"atten_mask is {atten_mask.dtype}"
        )
        require(
            torch.equal(atten_mask.bool(), torch.ones(CAUSAL, CAUSAL, dtype=torch.bool).triu(1)),
            "atten_mask is not zero on and below its diagonal, and one above",
        )
    if block_table is None:
        require(len(key) == batch, "key must have the batch of query")
        lengths = actual_seq_lengths_kv or [key.shape[1]] * batch
    else:
        require(
            block_table.dtype == torch.int32 and block_table.shape[0] == batch, "block_table is int32 [B, -]"
        )
        least = 128 if queries > 1 else 16
        require(
            least <= block_size <= 512 and block_size % least == 0,
            f"block_size {block_size} is not a multiple of {least} up to 512",
        )
        require(key.shape[1] == block_size, "the cache's blocks are not of block_size")
        require(heads_kv * size <= 65535, "a row of the cache has more than 65535 values")
        require(len(actual_seq_lengths_kv) == batch, "a cache in blocks needs actual_seq_lengths_kv")
        lengths = actual_seq_lengths_kv
    for request in range(batch):
        length = lengths[request]
        require(length >= queries, f"{queries} queries beside {length} keys")
        if block_table is None:
            keys, values = key[request, :length], value[request, :length]
        else:
            keys, values = (cached(each, block_table[request], length) for each in (key, value))
        rows = attend(
            query[request].view(queries, num_heads, size),
            keys.reshape(length, heads_kv, size),
            values.reshape(length, heads_kv, size),
            scale,
            causal,
        )
        out[request] = rows.reshape(queries, width)
