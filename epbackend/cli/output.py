"""What all commands read and print: people read tables on the terminal, programs one JSON object on stdout."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from pathlib import Path

    from epbackend.config import EPConfig
    from epbackend.config.overrides import Override

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else, on stdout.")]

console = Console()
error_console = Console(stderr=True)


def say(where: Console, text: str, style: str) -> None:
    """One line as it is: no markup, no wrapping, so that it can be searched and piped."""
    where.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def read_config(
    source: "Path | Mapping[str, Any]", overrides: "Iterable[Override]" = ()
) -> "tuple[EPConfig, list[str]]":
    """The configuration of a file or mapping, settings of the command line over it; and the warnings about it."""
    from epbackend.config import ConfigWarning, EPConfig  # needs pydantic, which planning has not

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConfigWarning)
        config = EPConfig.load(source, overrides)
    return config, [str(warning.message) for warning in caught if warning.category is ConfigWarning]


@contextmanager
def watching(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal, gone when all is done; yields the function that moves it to (done, total)."""
    from rich.progress import Progress

    with Progress(console=error_console, transient=True, disable=not error_console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def json_stdout() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Keep stdout for one JSON object: whatever else is printed meanwhile, by worker processes too, goes to stderr.

    Yields the function that prints the object.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield lambda answer: _write(stdout, json.dumps(answer) + "\n")
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


@contextmanager
def json_if(asked: bool) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """`json_stdout` where JSON is asked for; where people read, stdout stays as it is, and None is yielded."""
    with json_stdout() if asked else nullcontext() as print_json:
        yield print_json


def _write(descriptor: int, text: str) -> None:
    with os.fdopen(os.dup(descriptor), "w") as file:
        file.write(text)
