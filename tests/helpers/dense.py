"""The MoE layer as its formula says, in float64: what every way of computing it must equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(rows_S2F: Tensor) -> Tensor:
    gate, up = rows_S2F.chunk(2, dim=-1)
    return silu(gate) * up


def dense_moe(
    hidden_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_up_bias_E2F: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """out_TD (float64): every expert computes every token, and each choice takes its expert's answer."""
    gate_up = torch.einsum("td,efd->tef", hidden_TD.double(), gate_up_E2FD.double())
    if gate_up_bias_E2F is not None:
        gate_up = gate_up + gate_up_bias_E2F.double()
    answers_TED = torch.einsum("tef,edf->ted", activation(gate_up), down_EDF.double())
    if down_bias_ED is not None:
        answers_TED = answers_TED + down_bias_ED.double()
    chosen_TKD = answers_TED.gather(1, topk_ids_TK[:, :, None].expand(-1, -1, hidden_TD.shape[1]))
    return (chosen_TKD * topk_weights_TK[:, :, None].double()).sum(1)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """How far a sum of a few products of order 1 may be off when rows are rounded to `dtype` on the way."""
    unit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    return {"rtol": unit, "atol": unit}
