"""What the experts did: facts for programs, a table for people, a heat map for slides."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from epbackend.cli.output import console
from epbackend.config import EPConfig
from epbackend.device import get_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from epbackend.engines.lmdeploy import LoadReport

MOST_LABELS = 64
"""Numbers that a picture can show."""


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
        **imbalance(load),
    }


def imbalance(load: "LoadReport") -> dict[str, float]:
    """The busiest rank's tokens over the ranks' mean, of the run and step by step: in all layers, in the worst."""
    found = {"imbalance": load.imbalance_L, "step_imbalance": load.step_imbalance_L}
    return {
        f"{name}_{what}": round(float(number(ratio_Y)), 4) if ratio_Y.size else 1.0
        for name, ratio_Y in found.items()
        for what, number in (("mean", np.mean), ("worst", np.max))
    }


def print_load(load: "LoadReport") -> None:
    """Which dispatcher served and why, and the load of each rank."""
    for reason, phases in _choices(load).items():
        console.print(f"dispatcher ({', '.join(phases)}): {reason}", highlight=False)
    table = Table(
        "rank", "expert tokens", "share", "busiest expert", title="load of the ranks", title_justify="left"
    )
    total = max(1, load.tokens_RLE.sum())
    for rank, tokens_YE in enumerate(load.tokens_RLE):
        layer, expert = np.unravel_index(tokens_YE.argmax(), tokens_YE.shape) if tokens_YE.size else (0, 0)
        tokens, most = tokens_YE.sum(), tokens_YE.max(initial=0)
        busiest = f"{expert} of layer {load.layers[layer]} ({most:,})" if most else "none"
        table.add_row(str(rank), f"{tokens:,}", f"{tokens / total:.1%}", busiest)
    console.print(table)
    console.print(f"busiest rank of a layer: {imbalance_in_words(load)}", highlight=False)


def imbalance_in_words(load: "LoadReport") -> str:
    """The imbalance for people."""
    found = imbalance(load)
    step, worst, run = (
        found[name] for name in ("step_imbalance_mean", "step_imbalance_worst", "imbalance_mean")
    )
    return f"{step:.3f} times the mean of a step ({worst:.3f} in the worst layer), {run:.3f} of the run"


def _choices(load: "LoadReport") -> dict[str, list[str]]:
    """What to say of the dispatchers -> the phases it is true of."""
    said: dict[str, list[str]] = {}
    for phase, choice in load.dispatchers.items():
        others = "".join(f"\n  not {name}: {reason}" for name, reason in choice["passed_over"])
        said.setdefault(f"{choice['name']}: {choice['reason']}{others}", []).append(phase)
    return said


def save_heat_map(load: "LoadReport", path: Path, *, title: str) -> Path:
    """A PNG: tokens of each expert and of each rank in each layer, relative to the layer's means."""
    from matplotlib.figure import Figure

    experts_YE, ranks_YR = load.tokens_RLE.sum(axis=0), load.tokens_RLE.sum(axis=2).T
    layers, experts = experts_YE.shape
    width = max(6.0, 0.3 * experts)
    figure = Figure(figsize=(width + 3, max(2.6, 0.5 * layers + 1.4)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(width, 3))
    shown = {"expert": experts_YE, "rank": ranks_YR}
    highest = max(_relative(tokens).max(initial=1.0) for tokens in shown.values())
    for axes, (what, tokens) in zip(panels, shown.items(), strict=True):
        image = axes.imshow(_relative(tokens), aspect="auto", cmap="magma", vmin=0, vmax=highest)
        axes.set_xlabel(what)
    panels[0].set_yticks(range(layers), [str(layer) for layer in load.layers])
    panels[0].set_ylabel("layer")
    panels[1].set_xticks(range(ranks_YR.shape[1]))
    if ranks_YR.size <= MOST_LABELS:
        for (layer, rank), ratio in np.ndenumerate(_relative(ranks_YR)):
            panels[1].text(rank, layer, f"{ratio:.2f}", color="white", ha="center", va="center")
    figure.suptitle(f"{title}: load of each expert and rank")
    figure.colorbar(image, ax=panels.tolist(), label="tokens / mean of the layer")
    return _save(figure, path)


def save_comparison(loads: "dict[str, LoadReport]", path: Path, *, title: str) -> Path:
    """A PNG: how far the busiest rank is above the mean, step by step, for several runs of the same model."""
    from matplotlib.figure import Figure

    layers = next(iter(loads.values())).layers
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(loads)
    for index, (name, load) in enumerate(loads.items()):
        places = np.arange(len(layers)) + (index - (len(loads) - 1) / 2) * width
        label = f"{name}: {load.step_imbalance_L.mean():.2f} times the mean"
        bars = axes.bar(places, 100 * (load.step_imbalance_L - 1), width, label=label, color=f"C{1 - index}")
        axes.bar_label(bars, fmt="%.0f%%", padding=2)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set(xlabel="layer", ylabel="busiest rank of a step, above the mean (%)", title=title)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _save(figure, path)


def _relative(tokens_YX: np.ndarray) -> np.ndarray:
    return tokens_YX / np.maximum(tokens_YX.mean(axis=1, keepdims=True), 1e-9)


def _save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
