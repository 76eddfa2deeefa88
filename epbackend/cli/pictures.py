"""Pictures of loads and placements: one message each, legible on a slide, safe for colour-blind eyes.

E experts, R ranks, P slots of all ranks, Y layers.
"""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from epbackend.cli.inputs import algorithm_in_words, slots_in_words
from epbackend.errors import ConfigError
from epbackend.files import check_target, replace_file
from epbackend.placement.loads import Loads
from epbackend.placement.placement import Placement
from epbackend.placement.score import Terms, mean_busiest_Y

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from epbackend.balance.simulation import Simulation
    from epbackend.engines.load_report import LoadReport
    from epbackend.placement.compare import ScoreTable
    from epbackend.placement.visits import Visits

LABEL, TITLE = 13, 17
"""Sizes of the letters, in points."""
MOST_NUMBERS = 64
"""Numbers that a heat map has room for."""
LEAST_CELL = 4
"""Points of the smallest cell of a heat map that has room for a line around it."""
MARKS = {
    "even": ("#0072B2", "o"),
    "nearest": ("#E69F00", "s"),
    "level": ("#009E73", "D"),
    "level_by_node": ("#CC79A7", "^"),
}
"""Of the splits: colours of Okabe and Ito, which colour-blind eyes tell apart."""
LEAST_PERCENT = 1e-3
"""Where the logarithmic axis ends: it has no zero."""


def check_plot(path: Path, option: str = "plot") -> None:
    """Raises ConfigError where no picture could be written there, before what it shows is computed."""
    from matplotlib.figure import Figure

    check_target(option, path)
    if path.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise ConfigError(f"{option}: {path} is no picture's name; name a .png, .svg or .pdf")


def save_load(load: LoadReport, path: Path, *, title: str) -> Path:
    """What a run did: tokens of each expert and of each rank in each layer, over the layer's means."""
    experts_YE, ranks_YR = load.tokens_RYE.sum(axis=0), load.tokens_RYE.sum(axis=2).T
    layers, experts = experts_YE.shape
    width = max(6.0, 0.3 * experts)
    figure = _figure(width + 3, max(2.6, 0.5 * layers + 1.4))
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(width, 3))
    shown = {"expert": _over_mean(experts_YE), "rank": _over_mean(ranks_YR)}
    highest = max(ratio_YX.max(initial=1.0) for ratio_YX in shown.values())
    for axes, (what, ratio_YX) in zip(panels, shown.items(), strict=True):
        image = axes.imshow(ratio_YX, aspect="auto", cmap="magma", vmin=0, vmax=highest)
        axes.set_xlabel(what)
    panels[0].set_yticks(range(layers), [str(layer) for layer in load.layers])
    panels[0].set_ylabel("layer")
    panels[1].set_xticks(range(ranks_YR.shape[1]))
    if ranks_YR.size <= MOST_NUMBERS:
        for (layer, rank), ratio in np.ndenumerate(shown["rank"]):
            colour = "black" if ratio > 0.6 * highest else "white"
            panels[1].text(rank, layer, f"{ratio:.2f}", color=colour, ha="center", va="center")
    figure.suptitle(f"{title}: load of each expert and rank")
    figure.colorbar(image, ax=panels.tolist(), label="tokens / mean of the layer")
    return _save(figure, path)


def save_imbalance(loads: dict[str, LoadReport], path: Path, *, title: str) -> Path:
    """How far the busiest rank is above the mean in a step, layer by layer, in several runs of the same model."""
    layers = next(iter(loads.values())).layers
    figure = _figure(8, 4.5)
    axes = figure.add_subplot()
    width = 0.8 / len(loads)
    for index, (name, load) in enumerate(loads.items()):
        places = np.arange(len(layers)) + (index - (len(loads) - 1) / 2) * width
        label = f"{name}: {load.step_imbalance_Y.mean():.2f} times the mean"
        bars = axes.bar(places, 100 * (load.step_imbalance_Y - 1), width, label=label, color=f"C{1 - index}")
        axes.bar_label(bars, fmt="%.0f%%", padding=2)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set(xlabel="layer", ylabel="busiest rank of a step, above the mean (%)", title=title)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _save(figure, path)


def save_rounds(imbalance: dict[str, list[float]], shift: int, path: Path, *, title: str) -> Path:
    """How far the busiest rank is above the mean, round by round, in several runs; the topic shifts after `shift`."""
    figure = _figure(8, 4.5)
    axes = figure.add_subplot()
    for index, (name, ratios) in enumerate(imbalance.items()):
        above = 100 * (np.array(ratios) - 1)
        axes.plot(range(1, len(above) + 1), above, marker="o", label=name, color=f"C{1 - index}")
    axes.axvline(shift + 0.5, color="0.5", linestyle="--")
    axes.annotate("the topic shifts", (shift + 0.6, 0.97), xycoords=("data", "axes fraction"), va="top")
    axes.set(xlabel="round", ylabel="busiest rank, above the mean (%)", title=title, ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _save(figure, path)


def _over_mean(tokens_YX: np.ndarray) -> np.ndarray:
    """Every row over its mean; zeros stay zeros."""
    return tokens_YX / np.maximum(tokens_YX.mean(axis=1, keepdims=True), np.finfo(float).tiny)


def save_before_after(before: Placement, after: Placement, loads: Loads, path: Path, terms: Terms) -> Path:
    """The load of each rank in each layer with experts, under two placements, on one scale of colours.

    Yellow is the mean. Colours are finest near it: else what a plan leaves would be one yellow field.
    Colours are means over the windows, and so are the busiest ranks, each of its window.
    """
    from matplotlib.colors import FuncNorm

    layers = list(loads.loaded_layers)
    ratios_YWR = [terms.ratios_YWR(each, loads) for each in (before, after)]
    loads_YR = [np.stack([each_WR.mean(axis=0) for each_WR in each]) for each in ratios_YWR]
    busiest = [mean_busiest_Y(each) for each in ratios_YWR]
    # Symmetric about the mean, so that red is above it, blue below.
    furthest = max(1.05, float(np.quantile(busiest[0], 0.9)))
    norm = FuncNorm((_depth, _ratio), 1 / furthest, furthest)

    figure = _figure(13.3, 6.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, placement, each_YR, worst_Y in zip(panels, (before, after), loads_YR, busiest, strict=True):
        image = axes.imshow(each_YR, aspect="auto", interpolation="nearest", cmap="RdYlBu_r", norm=norm)
        _cell_lines(axes, figure, *each_YR.shape)
        found = f"busiest rank {_times(worst_Y.mean())} the mean, {_times(worst_Y.max())} in the worst layer"
        axes.set_title(f"{_name(placement)}\n{found}", fontsize=LABEL)
        axes.set_xlabel("rank", fontsize=LABEL)
        _few_ticks(axes, layers)
    panels[0].set_ylabel("layer", fontsize=LABEL)
    _colour_bar(figure, image, panels, furthest)
    was, now = (_times(worst_Y.mean()) for worst_Y in busiest)
    return _save_slide(figure, f"Busiest of {after.ranks} ranks: from {was} to {now} the mean load", path)


def save_traffic(named: dict[str, Visits], path: Path) -> Path:
    """How many tokens of each node visit each other node, under two placements, on one scale of colours."""
    nodes = len(next(iter(named.values())).nodes_MM)
    figure = _figure(13.3, 6.4)
    panels = figure.subplots(1, len(named), sharey=True)
    for axes, (name, visits) in zip(panels, named.items(), strict=True):
        shown_MM = np.where(np.eye(nodes, dtype=bool), np.nan, 100 * visits.nodes_MM)
        image = axes.imshow(shown_MM, cmap="cividis", vmin=0, vmax=100)
        for (source, node), percent in np.ndenumerate(shown_MM):
            if source != node and nodes**2 <= MOST_NUMBERS:
                colour = "black" if percent > 55 else "white"
                axes.text(
                    node, source, f"{percent:.0f}", color=colour, ha="center", va="center", fontsize=LABEL
                )
        axes.set_title(
            f"{name}\na token visits {visits.other_nodes:.2f} other nodes, {visits.ranks:.2f} ranks",
            fontsize=LABEL,
        )
        axes.set_xlabel("to node", fontsize=LABEL)
        axes.set_xticks(range(nodes))
        axes.set_yticks(range(nodes))
        axes.tick_params(labelsize=LABEL - 1)
    panels[0].set_ylabel("tokens of node", fontsize=LABEL)
    bar = figure.colorbar(image, ax=panels.tolist())
    bar.set_label("tokens that go there (%)", fontsize=LABEL)
    was, now = (visits.other_nodes for visits in named.values())
    return _save_slide(
        figure, f"Nodes that a token visits besides its own: from {was:.2f} to {now:.2f}", path
    )


def _depth(ratio: np.ndarray) -> np.ndarray:
    """How deep the colour of a ratio to the mean is: a ratio of 1.005 is a fifth as deep as one of 2."""
    return np.cbrt(np.log(np.maximum(ratio, np.finfo(float).tiny)))


def _ratio(depth: np.ndarray) -> np.ndarray:
    """The inverse of `_depth`."""
    return np.exp(np.asarray(depth) ** 3)


def save_score_table(table: ScoreTable, path: Path) -> Path:
    """How far the busiest rank is above the mean: algorithms one below the other, splits by colour and mark."""
    algorithms = list(dict.fromkeys(row.score.algorithm for row in table.rows))
    views = {
        "recorded loads": lambda row: row.score.imbalance_mean,
        "single batches, heavy noise": lambda row: row.noise_over_dispersed,
        "placed on the first window,\njudged on the others": lambda row: row.drift,
    }
    shown = {name: view for name, view in views.items() if all(view(row) is not None for row in table.rows)}
    figure = _figure(13.3, 1.9 + 0.62 * len(algorithms))
    visited = {row.score.algorithm: row.visits for row in table.rows if row.visits is not None}
    panels = figure.subplots(1, len(shown) + bool(visited), sharey=True, squeeze=False)[0]
    for axes in panels[1 : len(shown)]:
        axes.sharex(panels[0])
    for axes, (name, view) in zip(panels, shown.items(), strict=False):
        axes.set_title(name, fontsize=LABEL)
        for place, (split, (colour, mark)) in enumerate(MARKS.items()):
            rows = [row for row in table.rows if row.score.split == split]
            if not rows:
                continue
            above = [max(100 * (view(row) - 1), LEAST_PERCENT) for row in rows]
            height = [
                algorithms.index(row.score.algorithm) + 0.22 * (place - (len(MARKS) - 1) / 2) for row in rows
            ]
            axes.scatter(
                above, height, s=95, color=colour, marker=mark, label=split, edgecolor="white", zorder=3
            )
    for axes in panels[: len(shown)]:  # only now do they know the axis that they share
        _dress(axes, len(algorithms))
    if visited:
        _draw_visits(panels[-1], visited, algorithms)
    panels[0].set_yticks(range(len(algorithms)), algorithms, fontsize=LABEL)
    handles, labels = panels[0].get_legend_handles_labels()
    names = [f"{label} split" for label in labels]
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=LABEL, frameon=False)
    scores = [row.score for row in table.rows]
    best = min(scores, key=lambda found: round(found.imbalance_mean, 3))
    was, now = (_percent(100 * (found.imbalance_mean - 1)) for found in (scores[0], best))
    return _save_slide(
        figure,
        f"Busiest of {best.ranks} ranks above the mean: {was} {scores[0].algorithm}, {now} {best.algorithm}",
        path,
    )


def _draw_visits(axes: Axes, visits: dict[str, Visits], algorithms: list[str]) -> None:
    """A bar for each algorithm: how many nodes besides its own a token visits, or ranks where there is one node."""
    nodes = len(next(iter(visits.values())).nodes_MM) > 1
    axes.set_title(f"{'other nodes' if nodes else 'ranks'} that a token visits", fontsize=LABEL)
    lengths = [found.other_nodes if nodes else found.ranks for found in visits.values()]
    bars = axes.barh([algorithms.index(name) for name in visits], lengths, 0.6, color=MARKS["nearest"][0])
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=LABEL - 1)
    axes.margins(x=0.2)
    axes.tick_params(labelsize=LABEL - 1, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def save_simulation(found: Simulation, path: Path) -> Path:
    """The experts' time of a step in each cycle, one line a way to balance; and the bytes that two of them move."""
    from epbackend.balance.simulation import LABELS

    colours = dict(zip(LABELS, ("0.6", "#E69F00", "#D55E00", "#0072B2"), strict=True))
    figure = _figure(13.3, 5.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for name, outcome in found.outcomes.items():
        step_ms = outcome.step_ms_W
        label = f"{LABELS[name]}: {step_ms.mean():.1f} ms"
        cycles = range(1, len(step_ms) + 1)
        left.plot(cycles, step_ms, color=colours[name], marker="o", lw=2.5, label=label)
    left.set_xlabel("cycle", fontsize=LABEL)
    left.set_ylabel("experts' layers of a step (ms)", fontsize=LABEL)
    left.set_ylim(bottom=0)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=LABEL, frameon=False)
    links = {"within_bytes": ("in the node", 0.45), "across_bytes": ("between nodes", 1.0)}
    for place, name in enumerate(("anew", "ours")):
        below = 0.0
        for field, (_, alpha) in links.items():
            gigabytes = found.outcomes[name].total(field) / len(found.names) / 1e9
            right.bar(place, gigabytes, 0.6, bottom=below, color=colours[name], alpha=alpha)
            below += gigabytes
        right.text(place, below, f"{below:,.0f} GB\n", ha="center", va="center", fontsize=LABEL)
    right.set_xticks((0, 1), (LABELS["anew"], LABELS["ours"]), fontsize=LABEL)
    right.set_title("moved a cycle (pale: in the node)", fontsize=LABEL)
    right.margins(y=0.12)
    for axes in (left, right):
        axes.tick_params(labelsize=LABEL - 1)
        axes.spines[["top", "right"]].set_visible(False)
    once, ours = (found.outcomes[name].step_ms_W.mean() for name in ("once", "ours"))
    size = f"{found.cost.ranks} ranks, {found.slots} slots"
    return _save_slide(
        figure, f"{size}: the experts of a step take {ours:.1f} ms, {once:.1f} with EPLB once", path
    )


def _cell_lines(axes: Axes, figure: Figure, layers: int, ranks: int) -> None:
    """White lines between the cells of half the figure, where cells are large enough for them."""
    width, height = figure.get_size_inches() * 72  # points
    if min(0.4 * width / ranks, 0.75 * height / layers) < LEAST_CELL:
        return
    axes.hlines(np.arange(layers - 1) + 0.5, -0.5, ranks - 0.5, color="white", linewidth=0.6)
    axes.vlines(np.arange(ranks - 1) + 0.5, -0.5, layers - 0.5, color="white", linewidth=0.6)


def _dress(axes: Axes, rows: int) -> None:
    """A logarithmic axis in percent, and bands behind the rows."""
    for row in range(0, rows, 2):
        axes.axhspan(row - 0.5, row + 0.5, color="0.965", zorder=0)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xscale("log")
    least, most = axes.get_xlim()
    axes.set_xticks([tick for tick in _ticks(wide=most > 300 * least) if least <= tick <= most])
    axes.xaxis.set_major_formatter(lambda percent, _: f"{percent:g}%")
    axes.minorticks_off()
    axes.grid(axis="x", color="0.88", zorder=1)
    axes.tick_params(labelsize=LABEL - 1, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _ticks(*, wide: bool) -> list[float]:
    """Decades, and what lies between them if there are few."""
    return [step * 10.0**decade for decade in range(-3, 5) for step in ((1,) if wide else (1, 2, 5))]


def _colour_bar(figure: Figure, image: AxesImage, panels: np.ndarray, furthest: float) -> None:
    bar = figure.colorbar(image, ax=panels.tolist(), pad=0.01, extend="both")
    ticks = [1 / furthest, 1, furthest]
    bar.set_ticks(ticks, labels=[f"{tick:.2f}×" for tick in ticks], fontsize=LABEL - 1)
    bar.minorticks_off()
    bar.set_label("tokens of the rank / mean of the layer", fontsize=LABEL)


def _few_ticks(axes: Axes, layers: list[int]) -> None:
    """At most about ten names of layers."""
    step = max(1, len(layers) // 10)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.tick_params(labelsize=LABEL - 2)


def _name(placement: Placement) -> str:
    """A placement in a few words."""
    slots = "no replicas" if placement.slots == placement.experts else slots_in_words(placement)
    return f"{algorithm_in_words(placement)}, {slots}"


def _times(ratio: float) -> str:
    """A ratio with the digits that matter: 2.31×, 1.0004×."""
    return f"{ratio:.2f}×" if ratio >= 1.1 else f"{ratio:.4f}×"


def _percent(value: float) -> str:
    """Two digits that matter, and no exponent: 102%, 0.026%."""
    digits = max(0, 1 - math.floor(math.log10(max(value, LEAST_PERCENT))))
    return f"{value:.{digits}f}%"


def _figure(width: float, height: float) -> Figure:
    """An empty one of so many inches, in which nothing overlaps."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save_slide(figure: Figure, message: str, path: Path) -> Path:
    """Writes the picture under its message, in finer dots."""
    figure.suptitle(message, fontsize=TITLE, fontweight="bold")
    return _save(figure, path, dpi=150)


def _save(figure: Figure, path: Path, dpi: int = 120) -> Path:
    """Writes the picture, in the format of the file's name.

    Raises:
        ConfigError: the file cannot be written, or no such format is known.
    """
    content = BytesIO()
    try:
        figure.savefig(content, dpi=dpi, format=path.suffix[1:].lower())
    except ValueError as error:
        raise ConfigError(f"plot: {path} cannot be written: {error}; name a .png, .svg or .pdf") from None
    replace_file(path, content.getvalue())
    return path
