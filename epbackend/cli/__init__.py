"""The `epbackend` command: each command is a file, imported when it is called.

`plan`, `compare`, `convert` and `show` need neither torch nor LMDeploy, and none of them pays for what another imports.
"""

import io
import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from epbackend.cli.output import error_console, say
from epbackend.errors import EPError, UnavailableError

COMMANDS = {
    "demo": "Answer prompts with experts in several processes, every token checked.",
    "generate": "Continue a prompt.",
    "chat": "Talk with a model.",
    "serve": "Serve a model by LMDeploy's OpenAI-compatible server.",
    "run": "Run lmdeploy, or a script of yours, with expert parallelism.",
    "top": "Watch the experts of a running engine: load, balance, moves.",
    "record": "Answer prompts and record what the experts did, to plan on.",
    "calibrate": "Measure how fast each rank is, and what its experts take, to plan by.",
    "plan": "Decide where the experts live, from recorded loads.",
    "compare": "All planning algorithms and token splits beside each other.",
    "simulate": "What rebalancing while serving would bring, and cost, on up to hundreds of ranks.",
    "show": "What a placement does to the load of each rank.",
    "convert": "Loads and placements to and from the formats of other programs.",
    "renumber": "Renumber the experts of a checkpoint, so that contiguous blocks of them are balanced.",
    "tune": "Find the best kernel tiles for a model on this CUDA GPU.",
    "doctor": "What this machine can do, and what it lacks.",
    "config": "Check, show and describe configurations.",
}
"""Each is a module of that name, with a function of that name, or with `app` if it has commands of its own."""


DEBUG_VARIABLE = "EPBACKEND_DEBUG"
"""Set: errors come with their traceback."""
RUN_VARIABLE = "EPBACKEND_RUN"
"""Set by `epbackend run`: `engines.lmdeploy.handover` spells it too, as commands that plan import no engine."""
KEYS_VARIABLE = "EPBACKEND_API_KEY"
"""The keys of a server, for it and for those who ask it."""


class Commands(TyperGroup):
    """Loads the command that is called; an error meant for people is one line, and the command exits with its code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name else listed, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ModuleNotFoundError, EOFError) as error:
            if ctx.invoked_subcommand == "run" and RUN_VARIABLE in os.environ:
                raise  # by the program that it runs, which has errors of its own
            if isinstance(error, EOFError):
                # Typer would take it for the end of what a person types, and say no more than "Aborted".
                raise RuntimeError(f"EOFError: {error}") from error
            raise _exit(_not_installed(error, str(ctx.invoked_subcommand))) from error
        except EPError as error:
            raise _exit(error) from error


def _exit(error: Exception) -> Exception:
    """Says what is wrong in a line, and exits; the error itself, where all is to be told."""
    if isinstance(error, ModuleNotFoundError):
        return error
    say(error_console, f"error: {error}", "red")
    return error if os.environ.get(DEBUG_VARIABLE) else typer.Exit(getattr(error, "exit_code", 2))


def _load(name: str) -> Any:
    try:
        module = import_module(f"epbackend.cli.{name}")
    except ModuleNotFoundError as error:
        raise _not_installed(error, name) from error
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    alone = typer.Typer(add_completion=False)
    alone.command(name)(getattr(module, name))
    return typer.main.get_command(alone)


def _not_installed(error: ModuleNotFoundError, command: str) -> Exception:
    """What to install; the error itself, where a module of ours is missing."""
    if error.name is None or error.name.startswith("epbackend"):
        return error
    return UnavailableError(
        f"{error.name} is not installed, which epbackend {command} needs: pip install 'epbackend[cpu]'"
    )


def _listed() -> None:
    """Stands for every command until its module is loaded."""


app = typer.Typer(
    cls=Commands,
    help="Expert parallelism for LMDeploy: CUDA, Ascend and CPU, one config.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Errors with their tracebacks (or {DEBUG_VARIABLE}=1).")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(_listed)


def main() -> None:
    """Runs one command; SIGTERM, or a terminal that closes, unwinds it like Ctrl-C, so that pipelines close.

    An error that nobody foresaw is one line too, and exit code 1; its traceback comes with --debug.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A model says what it likes, also to a terminal that is not UTF-8.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Torch would load torch-npu while it is imported itself, and fail on every device where CANN is missing. Device
    # ascend loads it, and says what it lacks.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        app()
    except Exception as error:
        # A program of the user's, under `epbackend run`, has errors of its own.
        if os.environ.get(DEBUG_VARIABLE) or RUN_VARIABLE in os.environ:
            raise
        said = str(error).strip().splitlines() or ["without a text"]
        say(error_console, f"error: {type(error).__name__}: {said[0]} (epbackend --debug says where)", "red")
        sys.exit(1)


def _terminate(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)
