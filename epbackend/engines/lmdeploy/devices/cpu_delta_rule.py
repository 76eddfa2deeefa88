"""Linear attention on the CPU: the gated delta rule and the short convolution before it (Qwen3-Next, Qwen3.5).

Each sequence keeps two states between steps, in a slot of LMDeploy's state cache: its last inputs of the convolution,
and the matrix that the rule writes to. A slot below 0 belongs to no sequence (an idle engine's dummy batch); it is not
written. The rule itself is transformers' own in torch. Of LMDeploy's operators these have the method that it calls.

Letters of its own: B sequences, U channels of the convolution, W its width, S inputs of a sequence, H heads of keys,
V heads of values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from lmdeploy.pytorch.backends.gated_delta_rule import GatedDeltaMeta, GatedDeltaMetaImpl
from torch import Tensor, nn
from torch.nn.functional import conv1d, silu, softplus


class DeltaMeta(GatedDeltaMetaImpl):
    """LMDeploy's own metadata of a step."""

    forward = staticmethod(GatedDeltaMeta)


class CausalConv:
    """A convolution of each channel with the W inputs that end at a token."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_state: Tensor,
        gated_delta_meta: GatedDeltaMeta,
        activation: str,
    ) -> Tensor:
        """x [1, T, U], weight [U, 1, W], conv_state [slots, U, W] -> [1, T, U]; the states move on."""
        slots_B = gated_delta_meta.origin_state_ids
        before_BUW = conv_state[slots_B.clamp_min(0)].to(x.dtype)
        if gated_delta_meta.is_decoding:
            inputs_BUW = torch.cat([before_BUW[..., 1:], x[0, :, :, None]], dim=-1)
            _write(conv_state, slots_B, inputs_BUW)
            out = conv1d(inputs_BUW, weight, bias, groups=weight.shape[0])[None, ..., 0]
        else:
            before_BUW[gated_delta_meta.is_init] = 0
            out, last_BUW = torch.empty_like(x), torch.empty_like(before_BUW)
            for sequence, rows in enumerate(_sequences(gated_delta_meta)):
                inputs_US = torch.cat([before_BUW[sequence], x[0, rows].T], dim=1)
                out[0, rows] = conv1d(inputs_US[:, 1:], weight, bias, groups=weight.shape[0]).T
                last_BUW[sequence] = inputs_US[:, -weight.shape[-1] :]
            _write(conv_state, slots_B, last_BUW)
        return silu(out) if activation == "silu" else out


class DeltaRule:
    """The rule over a step's sequences; the cache holds its matrices transposed, [slots, V, of values, of keys]."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        b: Tensor,
        a: Tensor,
        dt_bias: Tensor,
        a_log_exp: Tensor,
        recurrent_state: Tensor,
        gated_delta_meta: GatedDeltaMeta,
        kv_ratio: int,
        use_qk_l2norm_in_kernel: bool,
    ) -> Tensor:
        """query and key [1, T, H, size], value [1, T, V, size], b and a [1, T, V] -> [1, T, V, size of values]."""
        # Imported here: most models need none of it. Around both, transformers looks for kernels of GPUs.
        from transformers.models.qwen3_next import modeling_qwen3_next as theirs

        chunk_rule = theirs.torch_chunk_gated_delta_rule.__wrapped__
        recurrent_rule = theirs.torch_recurrent_gated_delta_rule.__wrapped__
        beta = b.reshape(1, -1, value.shape[2]).sigmoid()
        decay = a_log_exp * softplus(a.reshape(1, -1, value.shape[2]).float() + dt_bias)
        slots_B = gated_delta_meta.origin_state_ids
        states = recurrent_state[slots_B.clamp_min(0)].transpose(-1, -2).float()
        if gated_delta_meta.is_decoding:
            # One token of each sequence: tokens are the batch.
            one = [each.transpose(0, 1) for each in (query, key, value, decay, beta)]
            out, states = recurrent_rule(*one, states, True, use_qk_l2norm_in_kernel)
            out = out.transpose(0, 1)
        else:
            states[gated_delta_meta.is_init] = 0
            out = torch.empty_like(value)
            for sequence, rows in enumerate(_sequences(gated_delta_meta)):
                parts = [each[:, rows] for each in (query, key, value, decay, beta)]
                out[:, rows], states[sequence : sequence + 1] = chunk_rule(
                    *parts,
                    initial_state=states[sequence : sequence + 1],
                    output_final_state=True,
                    use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                )
        _write(recurrent_state, slots_B, states.transpose(-1, -2))
        return out


class GatedRMSNorm(nn.Module):
    """A norm whose result is gated, in the place of flash-linear-attention's."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, activation: str = "silu", **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, **options))
        self.eps = eps

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        """Both [..., size]."""
        normed = nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.eps)
        return (self.weight * normed.to(hidden.dtype) * silu(gate.float())).to(hidden.dtype)


def _sequences(meta: GatedDeltaMeta) -> Iterator[slice]:
    """The rows of each sequence."""
    starts = meta.cu_seqlens.tolist()
    return itertools.starmap(slice, itertools.pairwise(starts))


def _write(states: Tensor, slots_B: Tensor, new: Tensor) -> None:
    kept_B = slots_B >= 0
    states[slots_B[kept_B]] = new[kept_B].to(states.dtype)
