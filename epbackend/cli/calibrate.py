"""`epbackend calibrate`: how fast the ranks of a configuration are, and what their experts take."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from epbackend.cli.output import JsonOption, console, json_if
from epbackend.cli.session import ModelArgument, running, takes_config
from epbackend.config import EPConfig
from epbackend.device import get_device
from epbackend.errors import ConfigError, UnavailableError
from epbackend.files import check_target, replace_file
from epbackend.placement.objectives import DEFAULT_BATCH

if TYPE_CHECKING:
    from epbackend.balance.calibration import Calibration

ROUNDS = 9
"""Samples of each point, of which the median counts."""


@takes_config
def calibrate(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option(help="JSON for speeds and times: plan takes it as --rank-speed and as --objective."),
    ],
    settings: EPConfig,
    tokens: Annotated[
        str,
        typer.Option(metavar="TOKENS", help="Tokens on a rank that are timed, each choice counted, rising."),
    ] = "1,16,64,256,1024",
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="Choices of a batch over all ranks, for which an objective takes the times."
        ),
    ] = DEFAULT_BATCH,
    as_json: JsonOption = False,
) -> None:
    """Start the ranks of a configuration, time one layer's experts on each, and write down how fast they are."""
    rows_X = given_tokens(tokens)
    _check(settings, out)
    with json_if(as_json) as print_json:
        found = _run(model, settings, rows_X)
        facts = found.to_dict(batch)
        replace_file(out, f"{json.dumps(facts)}\n".encode())
        if print_json:
            print_json({"out": str(out), **facts})
        else:
            _tell(found, out)


def given_tokens(text: str) -> tuple[int, ...]:
    """What `--tokens` says.

    >>> given_tokens("1,64,1024")
    (1, 64, 1024)

    Raises:
        ConfigError: it is no rising list of two whole numbers or more.
    """
    numbers = tuple(map(int, text.split(","))) if re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})+", text) else ()
    if not numbers or list(numbers) != sorted(set(numbers)):
        raise ConfigError(
            f"tokens: {text!r} must be two whole numbers or more, each above the one before, as 1,64,1024"
        )
    return numbers


def _check(config: EPConfig, out: Path) -> None:
    """Raises ConfigError or UnavailableError for what can be known to fail before any rank is started."""
    if config.ep_size == 1:
        raise ConfigError(
            "ep_size: 1, but calibrate compares ranks that share the experts; set ep_size to 2 or more"
        )
    if get_device(config.device).emulated:
        raise UnavailableError(
            f"device: {config.device} is emulated here, so that no times can be measured; use cpu, or a machine that "
            "has it"
        )
    check_target("out", out)


def _run(model: str, config: EPConfig, rows_X: tuple[int, ...]) -> "Calibration":
    from epbackend.engines.lmdeploy.load.calibration import calibrating

    with calibrating(config.ep_size, rows_X, ROUNDS) as calibration, running(model, config):
        return calibration()


def _tell(found: "Calibration", out: Path) -> None:
    table = Table("speed of", box=SIMPLE, title=f"experts of layer {found.layer}")
    for rank in range(len(found.rank_speed)):
        table.add_column(f"rank {rank}", justify="right")
    table.add_row("", *(f"{speed:.3f}" for speed in found.rank_speed))
    console.print(table)
    times = Table("us at speed 1", box=SIMPLE)
    for experts in found.experts_A:
        times.add_column(f"{experts} expert{'s' * (experts > 1)}", justify="right")
    for rows, times_A in zip(found.rows_X, found.microseconds_XA, strict=True):
        times.add_row(f"{rows} token{'s' * (rows > 1)}", *(f"{each:.0f}" for each in times_A))
    console.print(times)
    console.print(f"speeds and times: {out}", highlight=False)
