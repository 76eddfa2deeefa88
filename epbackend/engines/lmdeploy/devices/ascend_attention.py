"""Attention on Ascend for LMDeploy 0.18.0 above a dlinfer that belongs to an older one.

LMDeploy hands over the lengths of all requests on the host, and a causal mask for `sparse_mode` 3. dlinfer 0.2.7 takes
other arguments: its prefill wants a mask of the batch's own size, its prefill beside a cache one query a request.

MLA comes absorbed: queries and the one head of keys are [latent, rotary] (512 + 64 in DeepSeek-V3), values the latent
part of the same rows. `npu_fused_infer_attention_score` takes that for 1 to 16 queries and 32, 64 or 128 heads alone,
ATB's two operators, which are dlinfer's own, for any number.
Letters: T tokens, N heads, D size of a head, B blocks, S places of a block, R requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from epbackend.errors import ConfigError


def prefill_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    attn_output: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_offsets: Tensor,
    q_seqlens: Tensor,
    kv_seqlens: Tensor,
    max_q_seq_len: int,
    max_kv_seq_len: int,
    block_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_size_v: int,
    attn_mask: Sequence[Tensor | None],
    softmax_scale: float | None,
    is_prefill_no_cache: bool | None,
    *,
    cu_seqlens_q_cpu: Tensor,
    kv_seqlens_cpu: Tensor,
    **_: Any,
) -> Tensor:
    """LMDeploy's `prefill_attention`: [T, N, D] into `attn_output`, each token beside those before it.

    One call a request, in the layout BSH: the packed one (TND) is documented for such heads in newer releases alone.
    """
    if query_states.shape[-1] != head_size_v and is_prefill_no_cache:
        return _latent_prefill(
            query_states, key_states, value_states, attn_output, cu_seqlens_q_cpu.diff(), softmax_scale
        )
    if query_states.shape[-1] != head_size_v:
        return _latent_prefill_beside_cache(
            query_states,
            key_cache,
            value_cache,
            attn_output,
            block_offsets,
            cu_seqlens_q_cpu.diff(),
            kv_seqlens_cpu,
            softmax_scale,
        )
    ends = cu_seqlens_q_cpu.tolist()
    for request, (first, end) in enumerate(pairwise(ends)):
        rows = slice(first, end)
        if is_prefill_no_cache:
            keys, values, blocks = _flat(key_states[rows]), _flat(value_states[rows]), {}
        else:
            keys, values = key_cache.flatten(2), value_cache.flatten(2)
            blocks = {
                "block_table": block_offsets[request : request + 1],
                "block_size": block_size,
                "actual_seq_lengths_kv": [int(kv_seqlens_cpu[request])],
            }
        alone = end - first == 1
        out_1TH, _ = torch.ops.npu.npu_fused_infer_attention_score(
            query=_flat(query_states[rows]),
            key=keys,
            value=values,
            atten_mask=None if alone else attn_mask[0],
            num_heads=num_q_heads,
            num_key_value_heads=num_kv_heads,
            scale=softmax_scale or query_states.shape[-1] ** -0.5,
            input_layout="BSH",
            sparse_mode=0 if alone else 3,
            **blocks,
        )
        attn_output[rows] = out_1TH.view_as(attn_output[rows])
    return attn_output


def paged_token_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    attn_output: Tensor,
    actual_q_seqlens_cpu: Tensor,
    kv_seqlens_cpu: Tensor,
    max_kv_seq_len: int,
    block_offsets: Tensor,
    block_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_size_v: int,
    softmax_scale: float | None,
    kv_scales: Tensor | None,
    kv_zeros: Tensor | None,
    quant_bits: int | None,
) -> Tensor:
    """LMDeploy's `paged_token_attention`, by dlinfer's older `paged_decode_attention`: one token of each request."""
    from dlinfer import ops

    if len(q) != len(block_offsets):
        raise ConfigError(
            "several tokens of a request in one decode step need a newer dlinfer: no speculation"
        )
    return ops.paged_decode_attention(
        q,
        k_cache,
        v_cache,
        block_offsets,
        block_size,
        kv_seqlens_cpu,
        max_kv_seq_len,
        num_q_heads,
        num_kv_heads,
        softmax_scale=softmax_scale,
        alibi_slopes=None,
        attn_output=attn_output,
        kv_scales=kv_scales,
        kv_zeros=kv_zeros,
        quant_bits=quant_bits,
    )


def _latent_prefill(
    query_TND: Tensor,
    key_T1D: Tensor,
    value_T1D: Tensor,
    out_TND: Tensor,
    lengths_R: Tensor,
    softmax_scale: float | None,
) -> Tensor:
    """Of MLA, each token beside those before it in its own request: one call for all."""
    from dlinfer import ops

    longest = int(lengths_R.max())
    return ops.prefill_attention(
        query_TND,
        key_T1D,
        value_T1D,
        key_cache=None,
        value_cache=None,
        q_start_loc=None,
        q_seq_len=lengths_R,
        kv_seq_len=lengths_R,
        max_q_seq_len=longest,
        num_q_heads=query_TND.shape[1],
        num_kv_heads=key_T1D.shape[1],
        attn_mask=[_causal_mask(longest, query_TND.dtype, query_TND.device)],
        softmax_scale=softmax_scale,
        alibi_slopes=None,
        attn_output=out_TND,
    )


def _latent_prefill_beside_cache(
    query_TND: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out_TND: Tensor,
    block_offsets: Tensor,
    counts_R: Tensor,
    lengths_R: Tensor,
    softmax_scale: float | None,
) -> Tensor:
    """Of MLA, each token beside the cache up to itself, as if it were a decode step's: the table has a row a token.

    Slower than a prefill should be, as each token reads the cache by itself. Whole prompts do not come here, but later
    chunks of long ones and prompts whose beginning is cached.
    """
    from dlinfer import ops

    requests_T = torch.arange(len(counts_R), dtype=torch.int64, device=counts_R.device).repeat_interleave(
        counts_R
    )
    places_T = (
        torch.arange(len(requests_T), dtype=torch.int64, device=counts_R.device)
        - (counts_R.cumsum(0) - counts_R)[requests_T]
    )
    seen_T = (lengths_R - counts_R)[requests_T] + places_T + 1
    return ops.paged_decode_attention(
        query_TND,
        key_cache,
        value_cache,
        block_offsets[requests_T.to(block_offsets.device)],
        key_cache.shape[1],
        seen_T.int(),
        int(seen_T.max()),
        query_TND.shape[1],
        key_cache.shape[2],
        softmax_scale=softmax_scale,
        alibi_slopes=None,
        attn_output=out_TND,
        kv_scales=None,
        kv_zeros=None,
        quant_bits=0,
    )


@lru_cache(maxsize=1)
def _causal_mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size] as ATB takes it: above the diagonal minus infinity in float16, and 1 in bfloat16.

    One for all layers of a step.
    """
    hidden = 1.0 if dtype == torch.bfloat16 else -torch.inf
    return torch.full((size, size), hidden, dtype=dtype, device=device).triu(1)


def _flat(rows_TND: Tensor) -> Tensor:
    """[1, T, N * D], in one piece."""
    return rows_TND.flatten(1).contiguous().unsqueeze(0)
