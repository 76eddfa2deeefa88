"""One expert-parallel MoE layer without any serving engine.

    torchrun --nproc-per-node 2 examples/layer_torchrun.py

Each rank holds half of the experts and tokens of its own; the layer's output is checked against all experts at once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.functional import silu

from epbackend import ExpertParallelMoE
from epbackend.device import get_device
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.replica_split import SlotMap

EXPERTS, HIDDEN, WIDTH, TOP_K = 16, 64, 32, 4


def main() -> None:
    dist.init_process_group(get_device("cpu").collective_backend)  # faster than "gloo", which serves as well
    ranks = RankGroup.of(dist.group.WORLD)
    slot_map = SlotMap.uniform(EXPERTS, ranks.size)
    mine = slot_map.local_experts(ranks.rank)

    torch.manual_seed(0)  # the same weights on every rank, as a checkpoint would give them
    gate_up_E2FD = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5
    down_EDF = torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5
    router_ED = torch.randn(EXPERTS, HIDDEN)

    layer = ExpertParallelMoE(
        (gate_up_E2FD[expert] for expert in mine),  # any iterable: a generator may read them from disk
        (down_EDF[expert] for expert in mine),
        slot_map=slot_map,
        ranks=ranks,
        settings=DispatchSettings(level=2),
        top_k=TOP_K,
    )

    torch.manual_seed(1 + ranks.rank)  # each rank has tokens of its own, and its own number of them
    hidden_TD = torch.randn(10 + ranks.rank, HIDDEN)
    weights_TK, ids_TK = (hidden_TD @ router_ED.T).softmax(-1).topk(TOP_K)
    out_TD = layer(hidden_TD, ids_TK, weights_TK)

    gate_TEF, up_TEF = torch.einsum("td,efd->tef", hidden_TD, gate_up_E2FD).chunk(2, dim=-1)
    answers_TED = torch.einsum("tef,edf->ted", silu(gate_TEF) * up_TEF, down_EDF)
    chosen_TKD = answers_TED.gather(1, ids_TK[:, :, None].expand(-1, -1, HIDDEN))
    torch.testing.assert_close(out_TD, (chosen_TKD * weights_TK[:, :, None]).sum(1))

    choice = layer.dispatchers["prefill"]
    computed = int(layer.load.tokens_E.sum())
    print(
        f"rank {ranks.rank}: {len(hidden_TD)} tokens right, {choice.name} ({choice.reason}), {computed} rows computed"
    )
    layer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
