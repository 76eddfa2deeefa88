"""`epbackend run`: an existing command, LMDeploy's or a script, with expert parallelism."""

from typing import Annotated

import typer

from epbackend.cli.session import takes_config
from epbackend.config import EPConfig

app = typer.Typer(add_completion=False)


@app.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@takes_config
def run(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND...",
            help="lmdeploy serve api_server MODEL --ep 2 ..., lmdeploy chat ..., python script.py, python -m module.",
        ),
    ],
    settings: EPConfig,
) -> None:
    """Run a command that you have with the plug switched on; options of epbackend stand before it.

    The sizes (ep, tp, dp) are those of the command's own engine config.
    """
    from epbackend.engines.lmdeploy import handover

    handover.run(command, settings)
