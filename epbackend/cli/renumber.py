"""`epbackend renumber`: a checkpoint in which contiguous blocks of experts are a planned placement, for any engine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from epbackend import renumber as renumbering
from epbackend.cli.inputs import SpeedOption, given_speeds
from epbackend.cli.output import JsonOption, console, error_console, say, watching
from epbackend.errors import ConfigError
from epbackend.placement.formats import read_loads
from epbackend.placement.warmup import warm_up

LEAST_GAIN = 0.05
"""Below it, --force is asked for: a copy of a checkpoint is not made for nothing."""


def renumber(
    model: Annotated[str, typer.Argument(help="Path of a MoE checkpoint in safetensors.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    loads: Annotated[
        list[Path] | None,
        typer.Option(help="Recorded loads (epbackend record). Repeat it for several windows."),
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks, each with a contiguous block of experts.")] = None,
    nodes: Annotated[int, typer.Option(help="Nodes of equally many ranks, balanced too.")] = 1,
    rank_speed: SpeedOption = "",
    undo: Annotated[
        bool, typer.Option("--undo", help="Give the experts of a renumbered MODEL their old numbers back.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help=f"Write even where less than {LEAST_GAIN:.0%} is gained.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL with its experts renumbered: the same function, and a balanced block for each rank."""
    if undo:
        if loads or ranks or rank_speed or nodes != 1 or force:
            raise ConfigError(
                "undo: needs neither --loads nor --ranks, --nodes, --rank-speed or --force; leave them out"
            )
        plan = renumbering.plan_undoing(model)
    else:
        if not loads or ranks is None:
            raise ConfigError("loads: give recorded loads and the ranks to plan for: --loads FILE --ranks N")
        recorded = read_loads(loads)
        warm_up()
        with watching("planning") as progress:
            plan = renumbering.plan_renumbering(
                model,
                recorded,
                ranks=ranks,
                nodes=nodes,
                rank_speed=given_speeds(rank_speed),
                progress=progress,
            )
    if not as_json:
        _print_plan(plan)
    if not undo and max(plan.gain, plan.node_gain) < LEAST_GAIN and not force:
        raise ConfigError(_too_little(plan))
    with watching("writing") as progress:
        written = renumbering.write(plan, out, progress)
    if written.left_out:
        say(
            error_console,
            f"warning: left out, since experts have their old numbers in it: {', '.join(written.left_out)}",
            "yellow",
        )
    if as_json:
        print(json.dumps(_result(plan, written, out)))
    else:
        say(
            console,
            f"{out}: {written.bytes / 1e9:.3f} GB in {written.seconds:.2f} s, {written.files} weight files written, "
            f"{written.linked} linked",
            "green",
        )


def _result(plan: renumbering.Plan, written: renumbering.Written, out: Path) -> dict[str, Any]:
    result: dict[str, Any] = {
        "out": str(out),
        "layers_changed": len(plan.changed),
        "experts": plan.checkpoint.experts,
        "groups": plan.checkpoint.groups,
        "bytes": written.bytes,
        "seconds": round(written.seconds, 4),
        "files": written.files,
        "linked": written.linked,
        "left_out": list(written.left_out),
        "numbering": plan.record.name if plan.record else None,
    }
    for name, judged in (
        ("imbalance_before", plan.before),
        ("imbalance_after", plan.after),
        ("node_imbalance_before", plan.nodes_before),
        ("node_imbalance_after", plan.nodes_after),
    ):
        result[name] = judged and round(judged.imbalance_mean, 4)
        result[f"{name}_worst"] = judged and round(judged.imbalance_worst, 4)
    return result


def _print_plan(plan: renumbering.Plan) -> None:
    checkpoint = plan.checkpoint
    groups = f" in {checkpoint.groups} groups" if checkpoint.groups > 1 else ""
    say(
        console,
        f"{checkpoint.path}: {checkpoint.experts} experts{groups}, {len(plan.changed)} of {checkpoint.layers} layers "
        "are renumbered",
        "bold",
    )
    for what, before, after in (
        ("rank", plan.before, plan.after),
        ("node", plan.nodes_before, plan.nodes_after),
    ):
        if before is None or after is None:
            continue
        table = Table(f"busiest {what}, over the mean", box=SIMPLE)
        for column in ("as it is", "renumbered"):
            table.add_column(column, justify="right")
        both = (before, after)
        table.add_row(f"mean of {before.layers} layers", *(f"{each.imbalance_mean:.4f}" for each in both))
        table.add_row("worst layer", *(f"{each.imbalance_worst:.4f}" for each in both))
        console.print(table)


def _too_little(plan: renumbering.Plan) -> str:
    said = f"gain: the busiest rank would have {plan.gain:.1%} less to do"
    if plan.nodes_before:
        said += f", the busiest node {plan.node_gain:.1%}"
    groups = plan.checkpoint.groups
    why = (
        f", since experts stay in the {groups} groups of the router (a rank that is a group cannot change)"
        if groups > 1
        else ""
    )
    return f"{said}{why}; nothing was written: --force writes it all the same"
