"""Paged attention on the CPU, for grouped-query attention and for DeepSeek's latent attention (MLA).

The caches are strided views [pages, block, heads, dim] into one pool, so keys are written by (page, slot) and read by
page. Latent attention keeps one head whose values are the first `v_head_size` numbers of its keys. All layers of a step
share its plan: where new keys go, which pages each sequence reads, and which sequences are attended in one call.

Letters of its own: B sequences, P pages of a sequence, S positions of its keys, H heads of queries, G heads of keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lmdeploy.pytorch.backends.attention import AttentionImpl, AttentionMetadata, PagedAttentionBuildSpec
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from epbackend.errors import UnavailableError

PADDED_TOKENS = 32768
"""Cache tokens that one batched decoding call may read, padding included: bounds its copy of keys and values."""


SINK_MASK = 1 << 24
"""Values of a mask with sinks at once: each head has its own."""


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of similar length with one new token each, attended in one call."""

    rows_B: Tensor
    """Row of each sequence's query."""
    pages_BP: Tensor
    """Pages of each sequence, as many as the longest one has; the padding repeats valid pages and is masked."""
    length_B: Tensor

    def mask_BS(self, width: int, window: int | None) -> Tensor:
        """True where the query may see the key at that position of its padded cache."""
        position = torch.arange(width, dtype=torch.int64, device="cpu")
        visible_BS = position < self.length_B[:, None]
        return visible_BS if window is None else visible_BS & (position >= self.length_B[:, None] - window)


@dataclass(frozen=True)
class Sequence:
    """A sequence with several new tokens, attended alone."""

    rows: slice
    pages_P: Tensor
    length: int
    """Tokens in the cache, the new ones included."""


@dataclass
class AttentionPlan(AttentionMetadata):
    """LMDeploy's attention metadata with the step's plan."""

    page_T: Tensor = None  # type: ignore[assignment]  # LMDeploy's dataclass has defaults, so ours must
    slot_T: Tensor = None  # type: ignore[assignment]
    decoding: list[DecodeGroup] = field(default_factory=list)
    prefilling: list[Sequence] = field(default_factory=list)


class PagedAttention(AttentionImpl[AttentionPlan]):
    """Attention of one layer over the paged cache.

    Raises:
        UnavailableError: the model needs a form of attention that the CPU does not have (named in the message).
    """

    def __init__(self, spec: PagedAttentionBuildSpec) -> None:
        if missing := _unsupported(spec):
            raise UnavailableError(
                f"device: cpu has no paged attention with {missing}, which this model needs; "
                "serve it on a GPU (device: cuda)"
            )
        super().__init__(
            num_heads=spec.num_heads,
            head_size=spec.head_dim,
            scale=spec.scale,
            num_kv_heads=spec.num_kv_heads,
            v_head_size=spec.v_head_dim,
            causal=spec.causal,
        )
        window = spec.sliding_window
        left = window[0] if isinstance(window, tuple | list) else window
        self.window = left if left is not None and left > 0 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        attn_metadata: AttentionPlan,
        k_scales_zeros: Tensor | None = None,
        v_scales_zeros: Tensor | None = None,
        learnable_sink: Tensor | None = None,
        nsa_indices: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Writes key and value [T, kv heads, dim] to the cache, then attends: query [T, H, dim] -> [T, H, v dim]."""
        plan = attn_metadata
        values_in_keys = v_cache.data_ptr() == k_cache.data_ptr()
        k_cache[plan.page_T, plan.slot_T] = key.reshape(-1, *k_cache.shape[2:]).to(k_cache.dtype)
        if not values_in_keys:
            v_cache[plan.page_T, plan.slot_T] = value.reshape(-1, *v_cache.shape[2:]).to(v_cache.dtype)

        out = query.new_empty(*query.shape[:-1], self.v_head_size)
        for group in plan.decoding:
            # In a decoding step each sequence has one query: they are batched.
            keys, values = _read(k_cache, v_cache, group.pages_BP, values_in_keys, query.dtype)
            out[group.rows_B] = self._decode(query[group.rows_B], keys, values, group, learnable_sink)
        for sequence in plan.prefilling:
            keys, values = _read(k_cache, v_cache, sequence.pages_P[None], values_in_keys, query.dtype)
            keys, values = keys[0, : sequence.length], values[0, : sequence.length]
            if learnable_sink is None:
                out[sequence.rows] = self._prefill(query[sequence.rows], keys, values)
            else:
                out[sequence.rows] = self._prefill_with_sink(
                    query[sequence.rows], keys, values, learnable_sink
                )
        return out

    def _decode(
        self,
        query_BHD: Tensor,
        keys_BSGD: Tensor,
        values_BSGD: Tensor,
        group: DecodeGroup,
        sink_H: Tensor | None,
    ) -> Tensor:
        """One query a sequence: the query heads that share a key head take the place of query positions."""
        batch, heads, dim = query_BHD.shape
        shared = query_BHD.view(batch, self.num_kv_heads, heads // self.num_kv_heads, dim)
        mask = group.mask_BS(keys_BSGD.shape[1], self.window)[:, None, None]
        if sink_H is not None:
            keys_BSGD, values_BSGD = _with_nothing(keys_BSGD), _with_nothing(values_BSGD)
            mask = _with_sink(mask, sink_H.view(1, *shared.shape[1:3], 1), query_BHD.dtype)
        attended = scaled_dot_product_attention(
            shared,
            keys_BSGD.transpose(1, 2),
            values_BSGD.transpose(1, 2),
            attn_mask=mask,
            scale=self.scale,
        )
        return attended.reshape(batch, heads, -1)[..., : self.v_head_size]

    def _prefill(self, query_THD: Tensor, keys_SGD: Tensor, values_SGD: Tensor) -> Tensor:
        """The new positions of one sequence against all of it: [T, H, v dim]."""
        new, length = len(query_THD), len(keys_SGD)
        whole = new == length and self.window is None
        attended = scaled_dot_product_attention(
            query_THD.transpose(0, 1)[None],
            keys_SGD.transpose(0, 1)[None],
            values_SGD.transpose(0, 1)[None],
            attn_mask=None if whole or not self.causal else _causal_mask(new, length, self.window),
            is_causal=whole and self.causal,
            scale=self.scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return attended[0].transpose(0, 1)[..., : self.v_head_size]

    def _prefill_with_sink(
        self, query_THD: Tensor, keys_SGD: Tensor, values_SGD: Tensor, sink_H: Tensor
    ) -> Tensor:
        """As `_prefill`, a part of the positions after the other: each head has a mask of its own."""
        new, length = len(query_THD), len(keys_SGD)
        mask_TS = _causal_mask(new, length, self.window)
        keys_GSD = _with_nothing(keys_SGD[None])[0].transpose(0, 1)
        values_GSD = _with_nothing(values_SGD[None])[0].transpose(0, 1)
        parts = []
        for rows in torch.arange(new, dtype=torch.int64, device="cpu").split(
            max(1, SINK_MASK // (self.num_heads * length))
        ):
            attended_HTD = scaled_dot_product_attention(
                query_THD[rows].transpose(0, 1)[None],
                keys_GSD[None],
                values_GSD[None],
                attn_mask=_with_sink(mask_TS[rows][None], sink_H.view(-1, 1, 1), query_THD.dtype)[None],
                scale=self.scale,
                enable_gqa=self.num_kv_heads != self.num_heads,
            )[0]
            parts.append(attended_HTD.transpose(0, 1)[..., : self.v_head_size])
        return torch.cat(parts)


def plan_attention(context: Any) -> AttentionPlan:
    """The plan of a step from LMDeploy's StepContext."""
    block = context.kv_caches[0][0].shape[1]
    pages = context.block_offsets.long()
    new_B, length_B = context.q_seqlens.long(), context.kv_seqlens.long()
    sequence_T = torch.repeat_interleave(torch.arange(len(new_B), dtype=torch.int64, device="cpu"), new_B)
    start_B = torch.cumsum(new_B, 0) - new_B
    position_T = (
        torch.arange(len(sequence_T), dtype=torch.int64, device="cpu")
        - start_B[sequence_T]
        + (length_B - new_B)[sequence_T]
    )

    alone = (new_B > 1).nonzero().flatten().tolist()
    lengths, news, starts = length_B.tolist(), new_B.tolist(), start_B.tolist()
    return AttentionPlan(
        is_decoding=context.is_decoding,
        block_offsets=context.block_offsets,
        q_start_loc=context.q_start_loc,
        q_seqlens=context.q_seqlens,
        kv_seqlens=context.kv_seqlens,
        cu_seqlens_q=torch.nn.functional.pad(torch.cumsum(context.q_seqlens, 0), (1, 0)),
        quant_policy=context.kv_quant_policy,
        page_T=pages[sequence_T, position_T // block],
        slot_T=position_T % block,
        decoding=[
            DecodeGroup(start_B[group], pages[group, : _blocks(lengths[group[0]], block)], length_B[group])
            for group in group_by_length({i: lengths[i] for i in range(len(news)) if news[i] == 1})
        ],
        prefilling=[
            Sequence(
                slice(starts[i], starts[i] + news[i]), pages[i, : _blocks(lengths[i], block)], lengths[i]
            )
            for i in alone
        ],
    )


def group_by_length(lengths: dict[int, int]) -> list[list[int]]:
    """Sequences (index -> length) in groups for one padded call each, the longest first in its group.

    A group ends where padding would cost more than the call saves, that is below half of its longest length, or where
    it would exceed PADDED_TOKENS.

    >>> group_by_length({0: 10, 1: 900, 2: 800})
    [[1, 2], [0]]
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(lengths, key=lambda i: -lengths[i]):
        fits = (
            groups and longest <= 2 * lengths[index] + 64 and longest * (len(groups[-1]) + 1) <= PADDED_TOKENS
        )
        if fits:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = lengths[index]
    return groups


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)


def _read(
    k_cache: Tensor, v_cache: Tensor, pages_BP: Tensor, values_in_keys: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of each sequence, its pages joined: [B, pages * block, kv heads, dim] both.

    Values that lie in the keys stay there, their whole width: torch's fast path wants keys and values of one width,
    and the caller cuts the result.
    """
    keys = k_cache[pages_BP].flatten(1, 2).to(dtype)
    return keys, keys if values_in_keys else v_cache[pages_BP].flatten(1, 2).to(dtype)


def _causal_mask(new: int, length: int, window: int | None) -> Tensor:
    """True where the query (one of the last `new` positions) may see the key: [new, length]."""
    position = torch.arange(length, dtype=torch.int64, device="cpu")
    distance = position[length - new :, None] - position[None]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _with_nothing(cached_BSGD: Tensor) -> Tensor:
    """One more position of zeros: a key whose score is the mask alone, and a value that adds nothing."""
    return torch.nn.functional.pad(cached_BSGD, (0, 0, 0, 0, 0, 1))


def _with_sink(visible: Tensor, sink: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores [..., S + 1]: minus infinity where a key is not visible, the sink at the last."""
    mask = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))
    lead = torch.broadcast_shapes(visible.shape[:-1], sink.shape[:-1])
    return torch.cat([mask.expand(*lead, -1), sink.to(dtype).expand(*lead, -1)], dim=-1)


def _unsupported(spec: PagedAttentionBuildSpec) -> str | None:
    """What the CPU lacks of the form of attention asked for."""
    lacking = {
        "ALiBi": spec.alibi,
        "logit soft-capping": bool(spec.logit_softcapping),
        "a sparse index (DeepSeek sparse attention)": spec.mla_index_topk is not None,
        "block-sparse masks": spec.block_sparse_size > 1,
    }
    return ", ".join(name for name, asked in lacking.items() if asked) or None
