"""`epbackend config`: check a configuration, show every setting, print the JSON schema."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from epbackend.cli.output import console, read_config, say
from epbackend.config import EPConfig
from epbackend.config.docs import json_schema, settings, values

app = typer.Typer(no_args_is_help=True, help="Check, show and describe configurations.")

File = Annotated[Path, typer.Argument(metavar="FILE", help="YAML, JSON, or a MindIE config.json.")]
OptionalFile = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Unset: the defaults.")]


@app.command()
def check(file: File) -> None:
    """Check FILE: every problem at once, and what has no effect."""
    config, remarks = read_config(file)
    _warn(remarks)
    say(console, f"{file}: OK: {_summary(config)}", "green")


@app.command()
def show(
    file: OptionalFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Show every setting with its value, and which ones FILE changes."""
    config, remarks = read_config(file) if file else (EPConfig(), [])
    if as_json:
        print(json.dumps({"settings": _entries(config), "warnings": remarks}, indent=2))
        return
    console.print(_table(config, title=str(file) if file else "defaults"))
    _warn(remarks)


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration file, for editors that check YAML or JSON as you type."""
    print(json.dumps(json_schema(), indent=2))


def _entries(config: EPConfig) -> dict[str, dict[str, Any]]:
    """Everything about every setting, by name."""
    chosen = values(config)
    return {
        setting.name: {
            "value": chosen[setting.name],
            "default": setting.default,
            "is_default": chosen[setting.name] == setting.default,
            "accepts": setting.accepts,
            "description": setting.description,
        }
        for setting in settings()
    }


def _table(config: EPConfig, title: str) -> Table:
    table = Table(box=SIMPLE, title=title)
    table.add_column("setting", no_wrap=True)
    table.add_column("value")
    table.add_column("")
    table.add_column("meaning", ratio=1)
    for name, entry in _entries(config).items():
        mark, style = ("default", "dim") if entry["is_default"] else ("set", None)
        first_sentence = entry["description"].partition(". ")[0].removesuffix(".")
        table.add_row(name, escape(_as_yaml(entry["value"])), mark, escape(first_sentence), style=style)
    return table


def _as_yaml(value: Any) -> str:
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value)


def _summary(config: EPConfig) -> str:
    prefill, decode = config.level("prefill"), config.level("decode")
    level = str(prefill) if prefill == decode else f"{prefill} for prefill and {decode} for decode"
    groups = f"{config.engine.dp} attention group{'s' * (config.engine.dp > 1)} of {config.attn_tp}"
    source = config.placement.file or ", ".join(config.placement.loads)
    placed = f", experts placed by {source}" if source else ""
    return f"device {config.device}, ep_size {config.ep_size}, ep_level {level}, {groups}{placed}"


def _warn(remarks: list[str]) -> None:
    for remark in remarks:
        say(console, f"warning: {remark}", "yellow")
