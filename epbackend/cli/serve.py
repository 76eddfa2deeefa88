"""`epbackend serve`: LMDeploy's OpenAI-compatible server with expert parallelism."""

import gc
from pathlib import Path
from typing import Annotated

import typer

from epbackend.cli.output import error_console
from epbackend.cli.session import ConfigOption, ModelArgument, load_config
from epbackend.engines import lmdeploy


def serve(
    model: ModelArgument,
    config: ConfigOption = None,
    host: Annotated[
        str, typer.Option(help="Address to bind; the default is reached from this machine only.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 23333,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the experts' loads there, now and then and at the end, to plan on."
        ),
    ] = None,
    restart: Annotated[
        int, typer.Option(min=0, metavar="N", help="Start again so often after a failure of the engine.")
    ] = 0,
    drain_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="After SIGTERM, requests may finish for so long; a second one ends at once."
        ),
    ] = 30.0,
) -> None:
    """Serve a model at http://HOST:PORT/v1; with dp > 1 one engine a data-parallel rank, behind one address."""
    settings = load_config(config)
    error_console.print(
        f"serving {model} at http://{host}:{port}/v1 ({settings.world_size} ranks)", highlight=False
    )
    try:
        lmdeploy.serve(
            model, settings, host=host, port=port, record=record, restart=restart, drain_seconds=drain_seconds
        )
    finally:
        # At its end Python would collect garbage among all that is left, for seconds; a supervisor waits for it.
        gc.freeze()
