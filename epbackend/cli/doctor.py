"""`epbackend doctor`: what this machine can do, and what it lacks for the rest."""

import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from epbackend.cli.output import JsonOption, console, error_console, json_stdout, read_config, say
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
    "dlinfer-ascend": "device ascend in LMDeploy: pip install --no-deps dlinfer-ascend==0.2.7",
}


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="Say which dispatchers this configuration would get here.")
    ] = None,
    ep_size: Annotated[int | None, typer.Option(min=1, help="The same for so many ranks.")] = None,
    level: Annotated[
        Literal["1", "2"] | None, typer.Option(help="Their ep_level. [default: 1]", show_default=False)
    ] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Their engine.dp. [default: 1]")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Of the model. [default: 128]")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Of the model: experts of a token. [default: 8]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Report every device, dispatcher, engine and package: usable, or why not and what to install."""
    asked = {"--level": level, "--dp": dp} if ep_size is None else {}
    if config is None and ep_size is None:
        asked |= {"--experts": experts, "--top-k": top_k}
    if without := [option for option, value in asked.items() if value is not None]:
        said = "a configuration says it itself" if config else "give --ep-size too"
        raise typer.BadParameter(f"{without[0]}: is for the dispatchers of so many ranks; {said}")
    deployment = _deployment(config, ep_size, int(level or 1), dp or 1)
    experts, top_k = experts or 128, top_k or 8
    if as_json:
        with json_stdout() as print_json:
            found = dict(examine())
            print_json({**found, "choices": _decisions(deployment, experts, top_k)} if deployment else found)
    else:
        found = {}
        for part, finding in _announced(examine()):
            found[part] = finding
            _show(part, finding)
        if deployment:
            _show_decisions(_decisions(deployment, experts, top_k))
    if not any(device["usable"] for device in found["devices"].values()):
        raise typer.Exit(1)


def _deployment(config: Path | None, ep_size: int | None, level: int, dp: int) -> "EPConfig | None":
    """The configuration to choose dispatchers for, if one was asked for."""
    if config is not None and ep_size is not None:
        raise typer.BadParameter("give a configuration or --ep-size, not both")
    if config is not None:
        settings, remarks = read_config(config)
        for remark in remarks:
            say(error_console, f"warning: {remark}", "yellow")
        return settings
    if ep_size is None:
        return None
    from epbackend.config import EPConfig  # needs pydantic, which the rest does not

    return EPConfig.load({"ep_size": ep_size, "ep_level": level, "engine": {"dp": dp}})


def _decisions(config: "EPConfig", experts: int, top_k: int) -> dict[str, dict[str, Any]]:
    """For each phase a `Decision` as a mapping, or {"problem": why there is none}. No rank is started."""
    return {phase: _decision(config, phase, experts, top_k) for phase in PHASES}


def _decision(config: "EPConfig", phase: Phase, experts: int, top_k: int) -> dict[str, Any]:
    from epbackend.device import get_device
    from epbackend.dispatch.base import LayerSpec, RankGroup
    from epbackend.dispatch.choose import decide

    ranks = RankGroup(None, 0, config.ep_size, None, 0, config.attn_tp if config.ep_size > 1 else 1)
    try:
        device = get_device(config.device)
        kernels = device.kernel_set(config.kernels)
        slots = -(-experts // config.ep_size)
        decision = decide(LayerSpec(ranks, device, kernels, config.dispatch_settings(phase), slots, top_k))
    except EPError as error:
        return {"problem": str(error)}
    return asdict(decision)


def examine() -> Iterator[tuple[str, Any]]:
    """The findings, part by part, the quick ones first; a `reason` is None where all is well."""
    yield "python", platform.python_version()
    yield "machine", f"{platform.system()} {platform.machine()}"
    yield "packages", {name: _version(name) for name in NEEDED_FOR}
    from epbackend.device import devices  # imports torch

    yield (
        "devices",
        {
            name: {
                **_finding(device.unavailable()),
                "no_collectives": device.no_collectives(),
                "kernels": ["auto", *device.kernel_sets],
            }
            for name, device in devices().items()
        },
    )
    from epbackend.kernels.cpu import choice

    yield "processor", choice.report()
    from epbackend.dispatch.choose import dispatchers

    yield (
        "dispatchers",
        {
            each.name: {**_finding(each.unavailable), "ep_level": each.level, "summary": each.summary}
            for each in dispatchers()
        },
    )
    if _version("dlinfer-ascend"):
        yield "dlinfer", _dlinfer()
    yield "engine", _finding(_engine_trouble())


def _announced(parts: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The parts; while one is looked for, the terminal shows that."""
    while True:
        with error_console.status("looking"):
            part = next(parts, None)
        if part is None:
            return
        yield part


def _finding(reason: str | None) -> dict[str, Any]:
    return {"usable": reason is None, "reason": reason}


def _dlinfer() -> list[dict[str, Any]]:
    """What LMDeploy asks of the dlinfer that is there in vain, whether the plug bridges that, and what follows."""
    from epbackend.engines.lmdeploy.devices import dlinfer_package

    return [
        {"lacks": gap.name, "bridged": gap.bridged, "follows": gap.follows}
        for name, gap in dlinfer_package.GAPS.items()
        if dlinfer_package.lacks(name)
    ]


def _engine_trouble() -> str | None:
    """Why the plug would refuse this LMDeploy; None if every hook is where it must be."""
    from epbackend.device import devices
    from epbackend.engines.lmdeploy.patching import check_version

    try:
        check_version()
        # Imported late: the table imports LMDeploy, whose release has to be checked first.
        from epbackend.engines.lmdeploy.devices import dlinfer_package
        from epbackend.engines.lmdeploy.patches import every_patch, needed

        executor = "ray" if _version("ray") else "mp"
        for name, device in devices().items():
            if name == "ascend":
                if device.unavailable():
                    continue  # its hooks cannot be imported
                dlinfer_package.load()
            for patch in needed(name, ep_size=2, executor=executor):
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


def _show(part: str, found: Any) -> None:
    """One part, as soon as it is known; the columns of all parts are alike."""
    table = Table("", "", "", show_header=False, box=None, pad_edge=False)
    table.columns[0].min_width, table.columns[1].min_width = 22, 10
    if isinstance(found, str):
        table.add_row(part, found)
    elif part == "packages":
        for name, version_found in found.items():
            shown = version_found or "[yellow]missing[/yellow]"
            table.add_row(f"package {name}", shown, escape(f"for {NEEDED_FOR[name]}"))
    elif part == "dlinfer":
        for gap in found:
            mark = "[green]bridged[/green]" if gap["bridged"] else "[yellow]no[/yellow]"
            table.add_row("dlinfer lacks", mark, escape(f"{gap['lacks']}: {gap['follows']}"))
    elif part == "devices":
        for name, device in found.items():
            alone = f"; one rank only: {device['no_collectives']}" if device["no_collectives"] else ""
            table.add_row(
                f"device {name}", *_verdict(device, f"kernels {', '.join(device['kernels'])}{alone}")
            )
    elif part == "processor":
        _show_processor(table, found)
    elif part == "dispatchers":
        for name, dispatcher in found.items():
            table.add_row(f"dispatcher {name}", *_verdict(dispatcher, dispatcher["summary"]))
    else:
        table.add_row("engine LMDeploy", *_verdict(found, "every hook is in place"))
    console.print(table)


def _show_processor(table: Table, found: dict[str, Any]) -> None:
    """How experts are multiplied on the CPU, and why so."""
    onednn = ", ".join(found["onednn"]) or "nothing"
    threads = f"{found['threads']} threads" + (
        f" on {found['cores']} cores: set OMP_NUM_THREADS={found['cores']}"
        if found["threads"] > found["cores"]
        else ""
    )
    table.add_row("processor", threads, escape(f"{found['processor']}; oneDNN takes {onednn}"))
    if found["forced"]:
        table.add_row("experts' product", escape(found["forced"]), "EPBACKEND_CPU_PRODUCT is set")
        return
    for name, entry in found["measured"].items():
        few, many = (
            ", ".join(f"{product} {times[rows]:.0f}" for product, times in entry["us"].items())
            for rows in ("1", "64")
        )
        remark = f"measured on {entry['date']}, us a matrix with 1 row: {few}; with 64: {many}"
        table.add_row(f"experts in {name}", escape(entry["product"]), remark)
    if not found["measured"]:
        table.add_row("experts' product", "", "measured when the first experts are packed")


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
