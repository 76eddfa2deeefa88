"""One MoE layer of Qwen3-30B's shape on one CPU rank, beside Hugging Face's block and torch._grouped_mm.

Every contestant routes with the same router, gets the same tokens, and takes its turn within each repetition, so that
whatever else the machine does falls on all alike; the figure is the fastest turn. The tokens change with each
repetition, so that no expert's weights wait in a cache. The floor is the time in which this processor, in the same run,
reads the weights of all experts that so many tokens choose on average.

It writes one file of results for each model of processor.
"""

from __future__ import annotations

import re
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
from epbackend.kernels.cpu.choice import choose, processor
from epbackend.kernels.fp8 import Fp8Blocks
from epbackend.kernels.int8 import Int8Weights
from epbackend.kernels.weight_formats import Experts
from epbackend.moe import ExpertParallelMoE
from epbackend.replica_split import SlotMap

E, D, F, K = 128, 2048, 768, 8
REPETITIONS = {1: 60, 16: 24, 256: 12}
TARGET = {torch.bfloat16: {1: 1.0, 16: 1.3, 256: 1.3}, torch.float32: {1: 1.0, 16: 1.5, 256: 1.5}}

Layer = Callable[[Tensor], Tensor]


def contestants(dtype: torch.dtype) -> dict[str, Layer]:
    """hidden_TD -> out_TD, each with the same weights; all but epbackend read them where they are."""
    gate_up_E2FD = (torch.randn(E, 2 * F, D) / D**0.5).to(dtype)
    down_EDF = (torch.randn(E, D, F) / F**0.5).to(dtype)
    router_ED = (torch.randn(E, D) / D**0.5).to(dtype)
    eager, grouped = (
        hugging_face_block(gate_up_E2FD, down_EDF, router_ED, form) for form in ("eager", "grouped_mm")
    )
    ours = our_layer(gate_up_E2FD, down_EDF)
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


def bandwidth() -> dict[str, float]:
    """GB/s of reading (a sum), and of copying (reading and writing)."""
    values = torch.ones(64_000_000)
    copied = torch.empty_like(values)
    seconds: dict[str, list[float]] = {"read": [], "copy": []}
    for _ in range(7):
        for name, work in (("read", values.sum), ("copy", lambda: copied.copy_(values))):
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {
        "read": values.nbytes / min(seconds["read"]) / 1e9,
        "copy": 2 * values.nbytes / min(seconds["copy"]) / 1e9,
    }


def floor_ms(tokens: int, dtype: torch.dtype, read: float) -> float:
    """Milliseconds to read the experts that so many tokens choose, each K of E at random, at `read` GB/s."""
    chosen = E * (1 - (1 - K / E) ** tokens)
    return chosen * 3 * D * F * dtype.itemsize / read / 1e6


def rows_of(dtype: torch.dtype, read: float) -> list[dict]:
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
                "target": f">= {TARGET[dtype][tokens]}" if name == "epbackend" else "",
                "floor ms": floor_ms(tokens, dtype, read),
                "this / floor": min(turns) / floor_ms(tokens, dtype, read),
            }
            for name, turns in times.items()
        ]
    return rows


def format_rows() -> list[dict]:
    """Our layer with bfloat16 rows and experts in each format, in turns; nothing else multiplies the quantized ones."""
    gate_up_E2FD, down_EDF = torch.randn(E, 2 * F, D) / D**0.5, torch.randn(E, D, F) / F**0.5
    formats: dict[str, Callable[[Tensor], Experts]] = {
        "bfloat16": lambda weights: weights.bfloat16(),
        "int8 (W8A8)": Int8Weights.of,
        "float8 (128 x 128)": Fp8Blocks.of,
    }
    layers = {name: our_layer(of(gate_up_E2FD), of(down_EDF)) for name, of in formats.items()}
    rows = []
    for tokens in REPETITIONS:
        turns: dict[str, list[float]] = {name: [] for name in layers}
        for _ in range(max(5, REPETITIONS[tokens] // 3)):
            hidden_TD = torch.randn(tokens, D).bfloat16()
            ids_TK = torch.rand(tokens, E).topk(K).indices
            for name, layer in layers.items():
                start = time.perf_counter()
                layer(hidden_TD, ids_TK, torch.full((tokens, K), 1 / K))
                turns[name].append(1e3 * (time.perf_counter() - start))
        rows += [
            {
                "tokens": tokens,
                "experts in": name,
                "fastest ms": min(each),
                "median ms": median(each),
                "bfloat16 / this": min(turns["bfloat16"]) / min(each),
            }
            for name, each in turns.items()
        ]
    return rows


def our_layer(gate_up_E2FD: Experts, down_EDF: Experts) -> ExpertParallelMoE:
    return ExpertParallelMoE(
        gate_up_E2FD,
        down_EDF,
        slot_map=SlotMap.uniform(E, 1),
        ranks=RankGroup.single(),
        settings=DispatchSettings(),
        top_k=K,
    )


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
    memory = bandwidth()
    rows = [row for dtype in TARGET for row in rows_of(dtype, memory["read"])]
    products = {str(dtype): str(choose(dtype)) for dtype in TARGET}
    print_table(f"One MoE layer of Qwen3-30B's shape, one rank, {processor()}", rows)
    print(f"memory in GB/s: {memory}; experts' products: {products}")
    formats = format_rows()
    print_table("The same layer of epbackend with quantized experts", formats)
    figures = {
        "processor": processor(),
        "GB/s": memory,
        "products": products,
        "rows": rows,
        "formats": formats,
    }
    model = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    save(f"moe_layer-{model}", {"shape": {"E": E, "D": D, "F": F, "K": K}, **figures}, picture(rows))


if __name__ == "__main__":
    command_line(__doc__).parse_args()
    main()
