"""`epbackend doctor`: what this machine can do, and what it lacks for the rest."""

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from epbackend.cli.output import JsonOption, console, json_stdout, read_config, say
from epbackend.device import devices, get_device
from epbackend.dispatch.base import LayerSpec, RankGroup
from epbackend.dispatch.choose import decide, dispatchers
from epbackend.engines.lmdeploy.patching import check_version
from epbackend.errors import EPError
from epbackend.names import PHASES, Phase

if TYPE_CHECKING:
    from epbackend.config import EPConfig

NEEDED_FOR = {
    "torch": "everything",
    "transformers": "models and tokenizers",
    "lmdeploy": "the engine",
    "ray": "engine.dp > 1: pip install 'epbackend[serve]'",
    "fastapi": "epbackend serve: pip install 'epbackend[serve]'",
    "triton": "device cuda: pip install 'epbackend[cuda]'",
    "torch-npu": "device ascend: pip install 'epbackend[ascend]'",
}


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="Say which dispatchers this configuration would get here.")
    ] = None,
    ep_size: Annotated[int | None, typer.Option(min=1, help="The same for so many ranks.")] = None,
    level: Annotated[Literal["1", "2"], typer.Option(help="Their ep_level.")] = "1",
    dp: Annotated[int, typer.Option(min=1, help="Their engine.dp.")] = 1,
    experts: Annotated[int, typer.Option(min=1, help="Of the model.")] = 128,
    top_k: Annotated[int, typer.Option(min=1, help="Of the model: experts of a token.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Report every device, dispatcher, engine and package: usable, or why not and what to install."""
    deployment = _deployment(config, ep_size, int(level), dp)
    chosen = _decisions(deployment, experts, top_k) if deployment else None
    if as_json:
        with json_stdout() as print_json:
            findings = examine()
            print_json(findings if chosen is None else {**findings, "choices": chosen})
    else:
        findings = examine()
        _show(findings)
        if chosen is not None:
            _show_decisions(chosen)
    if not any(device["usable"] for device in findings["devices"].values()):
        raise typer.Exit(1)


def _deployment(config: Path | None, ep_size: int | None, level: int, dp: int) -> "EPConfig | None":
    """The configuration to choose dispatchers for, if one was asked for."""
    if config is not None and ep_size is not None:
        raise typer.BadParameter("give a configuration or --ep-size, not both")
    if config is not None:
        return read_config(config)[0]
    if ep_size is None:
        return None
    from epbackend.config import EPConfig  # needs pydantic, which the rest does not

    return EPConfig.load({"ep_size": ep_size, "ep_level": level, "engine": {"dp": dp}})


def _decisions(config: "EPConfig", experts: int, top_k: int) -> dict[str, dict[str, Any]]:
    """For each phase a `Decision` as a mapping, or {"problem": why there is none}. No rank is started."""
    return {phase: _decision(config, phase, experts, top_k) for phase in PHASES}


def _decision(config: "EPConfig", phase: Phase, experts: int, top_k: int) -> dict[str, Any]:
    ranks = RankGroup(None, 0, config.ep_size, None, 0, config.attn_tp if config.ep_size > 1 else 1)
    try:
        device = get_device(config.device)
        kernels = device.kernel_set(config.kernels)
        slots = -(-experts // config.ep_size)
        decision = decide(LayerSpec(ranks, device, kernels, config.dispatch_settings(phase), slots, top_k))
    except EPError as error:
        return {"problem": str(error)}
    return asdict(decision)


def examine() -> dict[str, Any]:
    """The findings as one object; a `reason` is None where all is well."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": {
            name: {
                **_finding(device.unavailable()),
                "no_collectives": device.no_collectives(),
                "kernels": ["auto", *device.kernel_sets],
            }
            for name, device in devices().items()
        },
        "dispatchers": {
            each.name: {**_finding(each.unavailable), "ep_level": each.level, "summary": each.summary}
            for each in dispatchers()
        },
        "engine": _finding(_engine_trouble()),
        "packages": {name: _version(name) for name in NEEDED_FOR},
    }


def _finding(reason: str | None) -> dict[str, Any]:
    return {"usable": reason is None, "reason": reason}


def _engine_trouble() -> str | None:
    """Why the plug would refuse this LMDeploy; None if every hook is where it must be."""
    try:
        check_version()
        # Imported late: the table imports LMDeploy, whose release has to be checked first.
        from epbackend.engines.lmdeploy.patches import every_patch, needed

        executor = "ray" if _version("ray") else "mp"
        for device in devices():
            for patch in needed(device, ep_size=2, executor=executor):
                patch.check()
        for patch in every_patch():
            if patch.when == "server":
                patch.check()
    except EPError as error:
        return str(error)
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _show(findings: dict[str, Any]) -> None:
    console.print(f"Python {findings['python']}, {findings['machine']}", highlight=False)
    table = Table("", "", "", show_header=False, box=None, pad_edge=False)
    for name, device in findings["devices"].items():
        remark = f"kernels {', '.join(device['kernels'])}"
        alone = f"; one rank only: {device['no_collectives']}" if device["no_collectives"] else ""
        table.add_row(f"device {name}", *_verdict(device, remark + alone))
    for name, dispatcher in findings["dispatchers"].items():
        table.add_row(f"dispatcher {name}", *_verdict(dispatcher, dispatcher["summary"]))
    table.add_row("engine LMDeploy", *_verdict(findings["engine"], "every hook is in place"))
    for name, found in findings["packages"].items():
        table.add_row(
            f"package {name}", found or "[yellow]missing[/yellow]", escape(f"for {NEEDED_FOR[name]}")
        )
    console.print(table)


def _show_decisions(chosen: dict[str, dict[str, Any]]) -> None:
    for phase, decision in chosen.items():
        if "problem" in decision:
            say(console, f"{phase}: {decision['problem']}", "yellow")
            continue
        say(console, f"{phase}: {decision['name']} ({decision['reason']})", "green")
        for name, reason in decision["passed_over"]:
            say(console, f"  not {name}: {reason}", "")


def _verdict(finding: dict[str, Any], remark: str) -> tuple[str, str]:
    if finding["usable"]:
        return "[green]usable[/green]", remark
    return "[yellow]no[/yellow]", escape(finding["reason"])
