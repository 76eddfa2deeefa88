"""What one call of a MoE layer asks of the NPU: its aclnn operators and collectives in order, and its host waits.

python -m tests.helpers.ascend_call_log      # prints the lists that docs/ascend.md shows
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.kernels.int8 import Int8Matrix
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

RANKS, TOKENS, D, F, E, K = 2, 8, 1024, 128, 8, 2
LAYERS = {
    "replicated": (DispatchSettings(level=1, dispatcher="replicated"), RANKS),
    "allgather": (DispatchSettings(level=1, dispatcher="allgather"), 1),
    "alltoall": (DispatchSettings(level=2, dispatcher="alltoall"), 1),
    "mc2": (DispatchSettings(level=2, dispatcher="mc2", max_tokens=TOKENS), 1),
    "mc2, int8 rows": (
        DispatchSettings(level=2, dispatcher="mc2", max_tokens=TOKENS, dispatch_dtype="int8"),
        1,
    ),
}
"""The settings of each way, and how many ranks hold the same tokens."""

SHOWN = [
    *((dispatcher, False) for dispatcher in ("replicated", "allgather", "alltoall", "mc2")),
    ("mc2", True),
    ("mc2, int8 rows", True),
]

LEFT_OUT = ("aclnnInplaceCopy", "aclnnInplaceZero", "aclnnInplaceFillScalar", "aclnnInplaceOne")
"""Replicas and fills, which plain torch makes as it sees fit."""


def layer_calls(groups: dict[int, RankGroup], dispatcher: str, int8: bool) -> tuple[list[str], list[str]]:
    """(calls, host waits) of a layer's second call; the first may set up a communicator."""
    from tests.helpers.cann import aten, registry

    settings, token_size = LAYERS[dispatcher]
    ranks = groups[token_size]
    place = get_device("ascend").torch_device(ranks.rank)
    slot_map = SlotMap.uniform(E, ranks.size)
    slots = slot_map.slots_per_rank
    gate_up, down = torch.randn(slots, 2 * F, D).bfloat16(), torch.randn(slots, D, F).bfloat16()
    layer = ExpertParallelMoE(
        _matrices(gate_up, int8, place),
        _matrices(down, int8, place),
        slot_map=slot_map,
        ranks=ranks,
        settings=settings,
        top_k=K,
        device="ascend",
    )
    draw = torch.Generator().manual_seed(0)
    ids = torch.rand(TOKENS, E, generator=draw).argsort(1)[:, :K]
    on_place = [each.to(place) for each in (torch.randn(TOKENS, D).bfloat16(), ids, torch.rand(TOKENS, K))]
    layer(*on_place)
    registry.calls.clear()
    aten.host_waits.clear()
    layer(*on_place)
    return [_line(*call) for call in registry.calls if call[0] not in LEFT_OUT], list(aten.host_waits)


def _matrices(weights: torch.Tensor, int8: bool, place: torch.device) -> list[Any]:
    if not int8:
        return list(weights.to(place))
    matrices = [Int8Matrix.of(weight) for weight in weights]
    return [Int8Matrix(each.values_NK.to(place), each.scale_N.to(place)) for each in matrices]


def _line(name: str, arguments: dict[str, Any]) -> str:
    """One call as the docs show it: the operator, and its tensors."""
    tensors = []
    for argument, value in arguments.items():
        shapes = [each for each in (value if isinstance(value, list) else [value]) if str(each).endswith("]")]
        tensors += [f"{argument} {shape}".strip() for shape in shapes]
    return f"{name}: {', '.join(tensors)}"


def markdown(run: Any) -> str:
    """The section of docs/ascend.md; `run` is `RankPool.run`."""
    parts = []
    for dispatcher, int8 in SHOWN:
        calls, waits = run(RANKS, layer_calls, dispatcher, int8)[0]
        title = f"{dispatcher}, {'W8A8' if int8 else 'bfloat16'}; waits of the host: {len(waits)}"
        parts.append("\n".join([f"**{title}**", "", "```", *calls, "```"]))
    return "\n\n".join(parts)


def main() -> None:
    from tests.helpers import ascend
    from tests.helpers.ranks import RankPool

    pool = RankPool("hccl", partial(ascend.start, "A3"))
    try:
        print(markdown(pool.run))
    finally:
        pool.close()


if __name__ == "__main__":
    main()
