"""One MoE layer of Qwen3-30B's shape on one CPU rank, beside Hugging Face's block and torch._grouped_mm.

Every contestant routes with the same router, gets the same tokens, and takes its turn within each repetition, so that
whatever else the machine does falls on all alike; the figure is the fastest turn. The tokens change with each
repetition, so that no expert's weights wait in a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.report import OURS, PEER, command_line, print_table, save
from epbackend.dispatch.base import DispatchSettings, RankGroup
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

E, D, F, K = 128, 2048, 768, 8
REPETITIONS = {1: 60, 16: 24, 256: 12}
TARGET = {torch.bfloat16: 1.3, torch.float32: 1.6}

Layer = Callable[[Tensor], Tensor]


def contestants(dtype: torch.dtype) -> dict[str, Layer]:
    """hidden_TD -> out_TD, each with the same weights; all but epbackend read them where they are."""
    gate_up_E2FD = (torch.randn(E, 2 * F, D) / D**0.5).to(dtype)
    down_EDF = (torch.randn(E, D, F) / F**0.5).to(dtype)
    router_ED = (torch.randn(E, D) / D**0.5).to(dtype)
    eager, grouped = (
        hugging_face_block(gate_up_E2FD, down_EDF, router_ED, form) for form in ("eager", "grouped_mm")
    )
    ours = ExpertParallelMoE(
        gate_up_E2FD,
        down_EDF,
        slot_map=SlotMap.uniform(E, 1),
        ranks=RankGroup.single(),
        settings=DispatchSettings(),
        top_k=K,
    )
    return {
        "Hugging Face, eager": lambda hidden_TD: eager(hidden_TD[None])[0],
        "Hugging Face, grouped_mm": lambda hidden_TD: grouped(hidden_TD[None])[0],
        "torch._grouped_mm": lambda hidden_TD: grouped_mm_layer(
            hidden_TD, eager.gate, gate_up_E2FD, down_EDF
        ),
        "epbackend": lambda hidden_TD: ours(hidden_TD, *reversed(eager.gate(hidden_TD)[1:])),
    }


def hugging_face_block(
    gate_up_E2FD: Tensor, down_EDF: Tensor, router_ED: Tensor, form: str
) -> Qwen3MoeSparseMoeBlock:
    """Transformers' own block around given weights; `form` is its experts_implementation."""
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True
    )
    config._experts_implementation = form
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    weights = {"experts.gate_up_proj": gate_up_E2FD, "experts.down_proj": down_EDF, "gate.weight": router_ED}
    block.load_state_dict(weights, assign=True)
    return block.eval()


def grouped_mm_layer(hidden_TD: Tensor, router: Layer, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """The shortest way to write the layer with torch's own grouped product."""
    _, weights_TK, ids_TK = router(hidden_TD)
    order_S = ids_TK.flatten().argsort(stable=True)
    ends_E = torch.bincount(ids_TK.flatten(), minlength=E).cumsum(0).to(torch.int32)
    rows_S2F = torch._grouped_mm(hidden_TD[order_S // K], gate_up_E2FD.transpose(1, 2), ends_E)
    gate_SF, up_SF = rows_S2F.chunk(2, dim=-1)
    rows_SD = torch._grouped_mm(functional.silu(gate_SF) * up_SF, down_EDF.transpose(1, 2), ends_E)
    weighted_SD = rows_SD * weights_TK.flatten()[order_S, None]
    return torch.zeros_like(hidden_TD).index_add_(0, order_S // K, weighted_SD)


def measure(layers: dict[str, Layer], tokens: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Milliseconds of each turn."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(REPETITIONS[tokens]):
        hidden_TD = torch.randn(tokens, D).to(dtype)
        for name, layer in layers.items():
            start = time.perf_counter()
            layer(hidden_TD)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def check_agreement(layers: dict[str, Layer], dtype: torch.dtype) -> None:
    """A contestant that computes something else is no contestant."""
    hidden_TD = torch.randn(16, D).to(dtype)
    expected = layers["Hugging Face, eager"](hidden_TD)
    unit = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    for layer in layers.values():
        torch.testing.assert_close(layer(hidden_TD), expected, rtol=unit, atol=unit)


def rows_of(dtype: torch.dtype) -> list[dict]:
    layers = contestants(dtype)
    check_agreement(layers, dtype)
    rows = []
    for tokens in REPETITIONS:
        times = measure(layers, tokens, dtype)
        best_peer = min(min(turns) for name, turns in times.items() if name != "epbackend")
        rows += [
            {
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "layer": name,
                "fastest ms": min(turns),
                "median ms": median(turns),
                "best peer / this": best_peer / min(turns),
                "target": f">= {TARGET[dtype]}" if name == "epbackend" else "",
            }
            for name, turns in times.items()
        ]
    return rows


def picture(rows: list[dict]) -> Figure:
    """Bars of the fastest turn, one panel for each dtype and number of tokens."""
    dtypes, counts = list(dict.fromkeys(row["dtype"] for row in rows)), list(REPETITIONS)
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    figure.suptitle(
        f"One MoE layer, {E} experts, {D} x {F}, top-{K}, one CPU rank: fastest turn (shorter is better)"
    )
    panels = figure.subplots(len(dtypes), len(counts), squeeze=False)
    for dtype, line in zip(dtypes, panels, strict=True):
        for tokens, axes in zip(counts, line, strict=True):
            mine = [row for row in rows if row["dtype"] == dtype and row["tokens"] == tokens]
            names, values = [row["layer"] for row in mine], [row["fastest ms"] for row in mine]
            bars = axes.barh(names, values, color=[OURS if name == "epbackend" else PEER for name in names])
            axes.bar_label(bars, fmt=" %.1f ms")
            axes.set_title(f"{dtype}, T = {tokens}", fontsize=10)
            axes.set_xlim(0, max(values) * 1.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", labelleft=axes is line[0])
    return figure


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    rows = [row for dtype in TARGET for row in rows_of(dtype)]
    print_table("One MoE layer of Qwen3-30B's shape, one rank", rows)
    save("moe_layer", {"shape": {"E": E, "D": D, "F": F, "K": K}, "rows": rows}, picture(rows))


if __name__ == "__main__":
    command_line(__doc__).parse_args()
    main()
