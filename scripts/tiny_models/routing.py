"""Which experts a model uses: loads per layer, how uneven they are, and how far two topics lie apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The router of each MoE layer, first layer first."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(".gate") and hasattr(module, "top_k")
    ]


@contextmanager
def counted_loads(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """While open, the yielded list holds for each MoE layer the tokens sent to each expert (loads_E) so far."""
    loads = [torch.zeros(router.num_experts, dtype=torch.int64) for router in routers(model)]

    def hook(loads_E: torch.Tensor):
        def add(router, inputs, output):
            loads_E.add_(torch.bincount(output[2].reshape(-1), minlength=router.num_experts))

        return add

    handles = [
        router.register_forward_hook(hook(loads_E))
        for router, loads_E in zip(routers(model), loads, strict=True)
    ]
    try:
        yield loads
    finally:
        for handle in handles:
            handle.remove()


def measure(model: PreTrainedModel, windows_BT: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(loss in nats per token, loads_LE) of the model on windows of token ids."""
    losses = []
    with torch.inference_mode(), counted_loads(model) as loads:
        for batch_BT in windows_BT.split(16):
            losses.append(model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss * len(batch_BT))
    return float(sum(losses)) / len(windows_BT), torch.stack(loads)


def skew(loads_LE: torch.Tensor) -> list[float]:
    """Load of the busiest expert over the mean load, per layer; 1 is even."""
    return (loads_LE.max(dim=1).values * loads_LE.shape[1] / loads_LE.sum(dim=1)).tolist()


def shift(loads_LE: torch.Tensor, other_LE: torch.Tensor) -> list[float]:
    """Total-variation distance of two load distributions, per layer; 0 is the same routing, 1 is disjoint experts."""
    shares_LE, others_LE = (x / x.sum(dim=1, keepdim=True) for x in (loads_LE, other_LE))
    return ((shares_LE - others_LE).abs().sum(dim=1) / 2).tolist()
