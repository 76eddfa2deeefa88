"""Our experts in transformers beside its own expert parallelism: tokens/s and balance where the router is skewed.

`python -m benchmarks.transformers_engine`: two ranks of one thread, one random Qwen3-MoE model in float32 whose
router prefers the first quarter of the experts. All contestants are loaded into the same processes, and answer the same
batch in turn, round after round; a figure is the median of its rounds. Attention is cut among the ranks, which is the
only way that transformers has for expert parallelism without FSDP.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.local_ranks import run_on_ranks
from benchmarks.report import OURS, PEER, command_line, print_table, save
from epbackend.config import EPConfig
from epbackend.dispatch.base import RankGroup
from epbackend.engines.transformers import distributed_config, spread_experts
from epbackend.placement import Loads
from epbackend.placement.formats import write

RANKS, ROUNDS = 2, 15
LAYERS, EXPERTS, TOP_K = 4, 32, 4
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 16
REDUNDANT = 8
PREFERENCE = 1.6
"""How much larger the router's rows of the preferred experts are."""
MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.05,
}
BUILT_IN = ("all_to_all", "all_reduce")


def save_model(folder: str) -> None:
    """The checkpoint that all contestants load."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **MODEL), dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[: EXPERTS // 4] *= PREFERENCE
    model.save_pretrained(folder)


def ours(folder: str, **settings: Any) -> Any:
    """The model with our experts."""
    config = EPConfig.load({"device": "cpu", "ep_size": RANKS, **settings})
    return _load(folder, distributed_config(config))


def built_in(folder: str, name: str) -> Any:
    """The model with transformers' own expert parallelism."""
    return _load(folder, DistributedConfig(tp_size=RANKS, ep_size=RANKS, ep_implementation=name))


def contest(ranks: RankGroup, folder: str) -> dict[str, dict[str, Any]]:
    """On one rank: every contestant's figures."""
    disable_progress_bar()
    set_verbosity_error()
    models = {f"transformers {name}": built_in(folder, name) for name in BUILT_IN}
    models |= {f"ours, ep_level {level}": ours(folder, ep_level=level) for level in (1, 2)}
    batch = torch.randint(
        0, MODEL["vocab_size"], (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)
    )
    loads = Path(folder) / "loads.json"
    expected = _answer(models["ours, ep_level 2"], batch)
    load = spread_experts(models["ours, ep_level 2"]).load()
    if ranks.rank == 0:
        write(Loads.of(load.loads_YE(LAYERS, RANKS), ["benchmark"]), loads, "sglang")
    dist.barrier()
    placement = {"loads": [str(loads)], "redundant_experts": REDUNDANT, "split": "level"}
    for level in (1, 2):
        models[f"ours, ep_level {level}, {REDUNDANT} copies, level"] = ours(
            folder, ep_level=level, placement=placement
        )
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(ROUNDS + 1):  # the first warms up
        for name, model in models.items():
            dist.barrier()
            seconds[name].append(_timed(model, batch, expected))
    figures = {}
    for name, model in models.items():
        prefill, decode = (statistics.median(column) for column in zip(*seconds[name][1:], strict=True))
        figures[name] = {
            "prefill": PROMPTS * PROMPT_TOKENS / prefill,
            "decode": PROMPTS * (NEW_TOKENS - 1) / decode,
        }
        if name.startswith("ours"):
            figures[name]["imbalance"] = float(np.mean(spread_experts(model).load().step_imbalance_Y))
            spread_experts(model).close()
    for name in BUILT_IN:  # contiguous blocks of experts, as ours without a placement
        figures[f"transformers {name}"]["imbalance"] = figures["ours, ep_level 1"]["imbalance"]
    return figures


def _load(folder: str, asked: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=asked)


def _answer(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )


def _timed(model: Any, batch: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Seconds of the first step, which reads the prompts, and of the further steps, a token of each answer."""
    ends: list[float] = []
    hook = model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    start = time.perf_counter()
    done = _answer(model, batch)
    hook.remove()
    if not torch.equal(done, expected):
        raise SystemExit("a contestant answered other tokens than the others")
    return ends[0] - start, ends[-1] - ends[0]


def draw(figures: dict[str, dict[str, Any]]) -> Figure:
    """Tokens/s of each contestant, for prompts and for answers."""
    picture = Figure(figsize=(9, 3.2))
    names = list(figures)
    for axes, phase in zip(picture.subplots(1, 2, sharey=True), ("prefill", "decode"), strict=True):
        colors = [OURS if name.startswith("ours") else PEER for name in names]
        axes.barh(names[::-1], [figures[name][phase] for name in names[::-1]], color=colors[::-1])
        axes.set_xlabel(f"{phase}, tokens/s")
    return picture


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        figures = run_on_ranks(RANKS, partial(contest, folder=folder))[0]
    rows = [
        {
            "experts by": name,
            **{f"{each} tokens/s": figures[name][each] for each in ("prefill", "decode")},
            "busiest rank": figures[name]["imbalance"],
        }
        for name in figures
    ]
    print_table(f"transformers {transformers.__version__}, {RANKS} ranks, router skewed", rows)
    save(
        "transformers",
        {"transformers": transformers.__version__, "rounds": ROUNDS, "contestants": figures},
        draw(figures),
    )


if __name__ == "__main__":
    command_line(__doc__).parse_args()
    main()
