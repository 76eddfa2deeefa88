"""The `epbackend` command."""

import signal
import sys
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from epbackend.cli import chat, config, demo, doctor, generate, serve
from epbackend.cli.output import error_console, say
from epbackend.errors import EPError


class Commands(TyperGroup):
    """Prints errors meant for people without a traceback, and exits with 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EPError as error:
            say(error_console, f"error: {error}", "red")
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    help="Expert parallelism for LMDeploy: CUDA, Ascend and CPU, one config.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(doctor.doctor)
app.add_typer(config.app, name="config")


def main() -> None:
    """Runs one command; SIGTERM unwinds it like Ctrl-C, so that pipelines close and worker processes end."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)
