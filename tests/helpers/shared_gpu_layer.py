"""A whole MoE layer on ranks that share one device, beside the dense formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap
from tests.helpers import peer_group
from tests.helpers.dense import dense_moe
from tests.helpers.shared_gpu import share_devices


@dataclass(frozen=True)
class Shape:
    experts: int
    hidden: int
    width: int
    top_k: int
    tokens: int
    dtype: torch.dtype


QWEN3_30B = Shape(128, 2048, 768, 8, 32, torch.bfloat16)
SMALL = Shape(8, 16, 12, 3, 10, torch.float32)


def prepare(rank: int) -> None:
    """First in each rank's process."""
    peer_group.register()
    share_devices()


def layer_equals_dense(
    groups: dict[int, RankGroup], device: str, dispatcher: str, level: int, token_size: int, static: bool
) -> str:
    """Run one call, fail unless this rank's tokens get what the formula gives them; the dispatcher that ran it."""
    ranks = groups[token_size]
    place = torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(ranks.rank)
        place = torch.device("cuda", torch.cuda.current_device())
    shape = QWEN3_30B if device == "cuda" else SMALL
    draw = torch.Generator(place).manual_seed(7)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=draw, device=place)

    gate_up = (drawn(shape.experts, 2 * shape.width, shape.hidden) / shape.hidden**0.5).to(shape.dtype)
    down = (drawn(shape.experts, shape.hidden, shape.width) / shape.width**0.5).to(shape.dtype)
    hidden = drawn(ranks.sources, shape.tokens, shape.hidden)[ranks.source].to(shape.dtype)
    ids = drawn(ranks.sources, shape.tokens, shape.experts)[ranks.source].topk(shape.top_k).indices
    weights = drawn(ranks.sources, shape.tokens, shape.top_k)[ranks.source].softmax(-1)
    slot_map = SlotMap.uniform(experts=shape.experts, ranks=ranks.size)
    mine = list(slot_map.local_experts(ranks.rank))
    layer = ExpertParallelMoE(
        gate_up[mine],
        down[mine],
        slot_map=slot_map,
        ranks=ranks,
        settings=DispatchSettings(
            level=level, dispatcher=dispatcher, static=static, max_tokens=shape.tokens, timeout_s=60
        ),
        top_k=shape.top_k,
        device=device,
    )
    out = layer(hidden, ids, weights, phase="decode")
    expected = dense_moe(hidden, ids, weights, gate_up, down)
    close = 3e-2 if shape.dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=close, atol=close)
    return layer.dispatchers["decode"].name
