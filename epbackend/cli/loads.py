"""What the experts did: facts for programs, a table for people, a heat map for slides."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from epbackend.cli.output import console
from epbackend.config import EPConfig
from epbackend.device import get_device

if TYPE_CHECKING:
    from epbackend.engines.lmdeploy import LoadReport


def facts(config: EPConfig, load: "LoadReport") -> dict[str, Any]:
    """The part of every `--json` answer that tells of devices, ranks and experts."""
    names = {phase: choice["name"] for phase, choice in load.dispatchers.items()}  # empty for a dense model
    distinct = set(names.values())
    return {
        "device": get_device(config.device).name,
        "ep_size": config.ep_size,
        "ep_level": config.model_dump()["ep_level"],
        "dispatcher": names if len(distinct) > 1 else next(iter(distinct), None),
        "expert_tokens_per_rank": load.tokens_per_rank,
        "passes": load.passes,
        "rounds": load.rounds,
    }


def print_load(load: "LoadReport") -> None:
    """Which dispatcher served and why, and the load of each rank."""
    for reason, phases in _choices(load).items():
        console.print(f"dispatcher ({', '.join(phases)}): {reason}", highlight=False)
    table = Table(
        "rank", "expert tokens", "share", "busiest expert", title="load of the ranks", title_justify="left"
    )
    total = max(1, load.tokens_RLE.sum())
    for rank, tokens_LE in enumerate(load.tokens_RLE):
        layer, expert = np.unravel_index(tokens_LE.argmax(), tokens_LE.shape) if tokens_LE.size else (0, 0)
        tokens, most = tokens_LE.sum(), tokens_LE.max(initial=0)
        busiest = f"{expert} of layer {load.layers[layer]} ({most:,})" if most else "none"
        table.add_row(str(rank), f"{tokens:,}", f"{tokens / total:.1%}", busiest)
    console.print(table)


def _choices(load: "LoadReport") -> dict[str, list[str]]:
    """What to say of the dispatchers -> the phases it is true of."""
    said: dict[str, list[str]] = {}
    for phase, choice in load.dispatchers.items():
        others = "".join(f"\n  not {name}: {reason}" for name, reason in choice["passed_over"])
        said.setdefault(f"{choice['name']}: {choice['reason']}{others}", []).append(phase)
    return said


def save_heat_map(load: "LoadReport", path: Path, *, title: str) -> Path:
    """A PNG: tokens of each expert in each layer, relative to the layer's mean; lines divide the ranks."""
    from matplotlib.figure import Figure

    tokens_LE = load.tokens_RLE.sum(axis=0)
    relative_LE = tokens_LE / np.maximum(tokens_LE.mean(axis=1, keepdims=True), 1e-9)
    layers, experts = relative_LE.shape
    figure = Figure(figsize=(max(6.0, 0.3 * experts), max(2.6, 0.5 * layers + 1.4)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(relative_LE, aspect="auto", cmap="magma", vmin=0)
    ranks = len(load.tokens_RLE)
    for rank in range(1, ranks):
        axes.axvline(rank * experts / ranks - 0.5, color="white", linewidth=2)
    axes.set_yticks(range(layers), [str(layer) for layer in load.layers])
    axes.set(xlabel="expert (white lines: ranks)", ylabel="layer", title=f"{title}: load of each expert")
    figure.colorbar(image, label="tokens / mean of the layer")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
