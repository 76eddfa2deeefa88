"""The `epbackend` command: each command is a file, imported when it is called.

`plan`, `compare`, `convert` and `show` need neither torch nor LMDeploy, and none of them pays for what another imports.
"""

import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from epbackend.cli.output import error_console, say
from epbackend.errors import EPError, UnavailableError

COMMANDS = {
    "demo": "Answer prompts with experts in several processes, every token checked.",
    "generate": "Continue a prompt.",
    "chat": "Talk with a model.",
    "serve": "Serve a model by LMDeploy's OpenAI-compatible server.",
    "record": "Answer prompts and record what the experts did, to plan on.",
    "plan": "Decide where the experts live, from recorded loads.",
    "compare": "All planning algorithms and token splits beside each other.",
    "simulate": "What rebalancing while serving would bring, and cost, on up to hundreds of ranks.",
    "show": "What a placement does to the load of each rank.",
    "convert": "Loads and placements to and from the formats of other programs.",
    "tune": "Find the best kernel tiles for a model on this CUDA GPU.",
    "doctor": "What this machine can do, and what it lacks.",
    "config": "Check, show and describe configurations.",
}
"""Each is a module of that name, with a function of that name, or with `app` if it has commands of its own."""


class Commands(TyperGroup):
    """Loads the command that is called; prints errors meant for people without a traceback, and exits with 2."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name else listed, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EPError as error:
            say(error_console, f"error: {error}", "red")
            raise typer.Exit(2) from error


def _load(name: str) -> Any:
    try:
        module = import_module(f"epbackend.cli.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("epbackend"):
            raise
        raise UnavailableError(
            f"{error.name} is not installed, which epbackend {name} needs: pip install 'epbackend[cpu]'"
        ) from error
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    alone = typer.Typer(add_completion=False)
    alone.command(name)(getattr(module, name))
    return typer.main.get_command(alone)


def _listed() -> None:
    """Stands for every command until its module is loaded."""


app = typer.Typer(
    cls=Commands,
    help="Expert parallelism for LMDeploy: CUDA, Ascend and CPU, one config.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(_listed)


def main() -> None:
    """Runs one command; SIGTERM unwinds it like Ctrl-C, so that pipelines close and worker processes end."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)
