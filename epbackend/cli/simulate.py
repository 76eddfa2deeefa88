"""`epbackend simulate`: a sequence of loads on any number of ranks, with and without moving experts while serving."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from epbackend.balance.cost import H100, MODELS, USUAL, CostModel, Model, find_model
from epbackend.balance.simulation import LABELS, STEPS, THRESHOLD, Simulation, sequence
from epbackend.balance.simulation import simulate as run
from epbackend.cli.inputs import (
    LoadsArgument,
    RanksOption,
    SlotsOption,
    SpeedOption,
    given_speeds,
    load_windows,
)
from epbackend.cli.output import JsonOption, console, error_console, say, watching
from epbackend.errors import ConfigError
from epbackend.names import SPLITS
from epbackend.placement.speeds import checked_speeds
from epbackend.placement.warmup import warm_up

NODE = 8
"""Ranks of a node, unless given: GPUs that NVLink joins."""


def simulate(
    loads: LoadsArgument,
    ranks: RanksOption,
    slots: SlotsOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Whose experts: {', '.join(MODELS)}. [default: by the number of experts, else priced as {USUAL}'s]"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that each rank brings to a step.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps of a cycle.")] = STEPS,
    cycles: Annotated[
        int,
        typer.Option(max=1000, help="Cycles from each window to the next, the load going over evenly."),
    ] = 1,
    split: Annotated[str, typer.Option(help=f"How replicas share tokens: {', '.join(SPLITS)}.")] = "even",
    node_size: Annotated[
        int | None,
        typer.Option(help="Ranks a node; 0: one node. [default: 8, or 0 where 8 do not divide the ranks]"),
    ] = None,
    rank_speed: SpeedOption = "",
    threshold: Annotated[
        float, typer.Option(help="Least expected gain of a layer, as a share of its time, net of moving.")
    ] = THRESHOLD,
    max_slots: Annotated[int | None, typer.Option(help="Slots that may change in a cycle.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Bytes that may move in a cycle.")] = None,
    plot: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out/simulate.png"),
    as_json: JsonOption = False,
) -> None:
    """Serve LOADS, in their order, by a cost model: no balance, EPLB once, EPLB anew each cycle, and epbackend."""
    from epbackend.cli.pictures import check_plot, save_simulation

    check_plot(plot)
    shape = find_model(model or USUAL)
    windows = load_windows(loads, shape)
    cost = CostModel(
        _of_experts(model, windows.experts),
        H100,
        ranks,
        _node(ranks) if node_size is None else node_size or ranks,
        tokens,
        split,
        checked_speeds(given_speeds(rank_speed), ranks),
    )
    warm_up()  # so that the times are of planning, not of loading machine code
    with watching("simulating") as progress:
        found = run(
            sequence(windows, cycles),
            cost,
            slots=windows.experts if slots is None else slots,
            steps=steps,
            threshold=threshold,
            max_slots=max_slots,
            max_bytes=max_bytes,
            progress=progress,
        )
    if windows.windows == 1:
        say(
            error_console,
            "warning: one window of loads never changes; give several, in their order",
            "yellow",
        )
    picture = save_simulation(found, plot)
    if as_json:
        print(json.dumps({**found.to_dict(), "plot": str(picture)}))
        return
    _print(found)
    say(console, f"picture: {picture}", "")


def _of_experts(name: str | None, experts: int) -> Model:
    """The model of that name, or one with so many experts.

    Raises:
        ConfigError: the named model has other experts than the loads.
    """
    if name is None:
        alike = (model for model in MODELS.values() if model.experts == experts)
        unknown = replace(MODELS[USUAL], name=f"{experts} experts, priced as {USUAL}'s", experts=experts)
        return next(alike, unknown)
    model = find_model(name)
    if model.experts != experts:
        raise ConfigError(
            f"model: {name} has {model.experts} experts, but the loads have {experts}; give loads of that model, or "
            "leave the model out"
        )
    return model


def _node(ranks: int) -> int:
    return NODE if ranks % NODE == 0 else ranks


def _print(found: Simulation) -> None:
    facts = found.to_dict()
    title = (
        f"{found.layers} layers of {facts['model']} on {facts['ranks']} ranks with {facts['slots']} slots, "
        f"{facts['cycles']} cycles of {facts['steps_per_cycle']} steps"
    )
    table = Table(box=SIMPLE, title=title, title_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("experts of a step", no_wrap=True)
    for column in (
        "ms",
        "busiest rank / mean",
        "slots moved",
        "GB in node",
        "GB across",
        "stall ms",
        "delay ms",
    ):
        table.add_column(column, justify="right")
    for name, label in LABELS.items():
        cells = [f"{facts['step_time'][name]:.2f}", f"{facts['imbalance'][name]:.3f}"]
        if name in facts["slots_moved"]:
            links, cycles = facts["bytes_by_link"][name], facts["cycles"]
            cells += [
                f"{facts['slots_moved_share'][name]:.1%}",
                f"{links['node'] / cycles / 1e9:.1f}",
                f"{links['network'] / cycles / 1e9:.1f}",
                f"{facts['stall_ms'][name]:.0f}",
                f"{facts['delay_ms'][name]:.0f}",
            ]
        table.add_row(label, *cells)
    console.print(table)
    memory = facts["memory_bytes_per_rank"]
    lines = (
        "slots, bytes, stall and delay are means of a cycle; times are computed, for a cluster of H100",
        f"planning: {facts['planning_ms_per_layer']:.2f} ms a layer, {facts['planning_ms_per_layer_worst']:.2f} in the "
        "worst cycle, measured",
        f"memory of a rank: {memory['experts'] / 1e9:.1f} GB of experts; a buffer for what it fetches of one layer: "
        f"{memory['staging']['ours'] / 1e9:.2f} GB, {memory['staging']['anew'] / 1e9:.2f} with EPLB anew",
    )
    for line in lines:
        say(console, line, "dim")
