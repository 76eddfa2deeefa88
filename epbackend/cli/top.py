"""`epbackend top`: what the experts of a running engine do, as a live view in the terminal."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from epbackend.cli import KEYS_VARIABLE
from epbackend.cli.output import JsonOption, console
from epbackend.errors import ConfigError, UnavailableError

ANSWER_S = 10.0
WIDTH = 6
"""Columns of a cell of the heat map."""
SHADES = ((0.8, "black on deep_sky_blue3"), (1.05, "black on green3"), (1.2, "black on yellow3"))
"""Up to which load over the mean; beyond: too hot."""
TOO_HOT = "white on red3"

Source = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class View:
    """What happened between two looks; where nothing did, since the engine's start."""

    state: dict[str, Any]
    """As `GET /epbackend/status` answers."""
    of_phase: dict[str, np.ndarray]
    """The tokens of each phase, [R, Y]."""
    seconds: float
    steps: int
    idle: bool
    """Whether there was no step between the looks."""

    @classmethod
    def between(cls, before: dict[str, Any], now: dict[str, Any]) -> "View":
        """Of two answers of one engine; one that was restarted in between counts from its start."""
        of_phase = _of_phase(now)
        steps, seconds = now["steps"] - before["steps"], now["at_s"] - before["at_s"]
        if steps > 0 and before["layers"] == now["layers"]:
            of_phase = {phase: tokens_RY - _of_phase(before)[phase] for phase, tokens_RY in of_phase.items()}
        return cls(now, of_phase, seconds, max(steps, 0), idle=steps <= 0)

    @property
    def tokens_RY(self) -> np.ndarray:
        return np.sum(list(self.of_phase.values()), axis=0)

    @property
    def load_RY(self) -> np.ndarray:
        """Each rank's tokens over the ranks' mean; 1 where a layer has none."""
        return _over_mean(self.tokens_RY)

    @property
    def imbalance(self) -> float:
        """Busiest rank over the mean, the mean of the layers."""
        return _imbalance(self.tokens_RY)

    @property
    def phases(self) -> dict[str, dict[str, float]]:
        """Of each phase, its share of the tokens and its imbalance."""
        every = max(1, self.tokens_RY.sum())
        return {
            phase: {
                "share": round(float(tokens_RY.sum() / every), 4),
                "imbalance": round(_imbalance(tokens_RY), 4),
            }
            for phase, tokens_RY in self.of_phase.items()
        }

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through the model: prompts and answers."""
        if self.idle or not self.tokens_RY.size:
            return 0.0
        return float(self.tokens_RY.sum(axis=0).mean() / self.state["top_k"] / self.seconds)

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            **self.state,
            "seconds": round(self.seconds, 3),
            "steps_between": self.steps,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "imbalance": round(self.imbalance, 4),
            "phases": self.phases,
            "load_RY": np.round(self.load_RY, 4).tolist(),
        }


def _of_phase(state: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        phase: np.array(tokens_RY, dtype=np.int64) for phase, tokens_RY in state["tokens_of_phase"].items()
    }


def _over_mean(tokens_RY: np.ndarray) -> np.ndarray:
    mean_Y = tokens_RY.mean(axis=0)
    return np.where(mean_Y > 0, tokens_RY / np.maximum(mean_Y, 1e-9), 1.0)


def _imbalance(tokens_RY: np.ndarray) -> float:
    return float(_over_mean(tokens_RY).max(axis=0).mean()) if tokens_RY.size else 1.0


def top(
    engine: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL|PID]",
            help="A server, as http://127.0.0.1:23333, or a process of this machine that runs an engine. "
            "[default: the engine of this machine]",
        ),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Two looks, then the view once.")] = False,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=KEYS_VARIABLE, show_envvar=True, help="The server's key."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the load of each rank and layer, how balanced it is, and what balancing does."""
    look = server(engine, api_key) if engine and "://" in engine else local_engine(engine)
    before = look()
    if once or as_json:
        time.sleep(interval)
        view = View.between(before, look())
        if as_json:
            print(json.dumps(view.facts()))
        else:
            console.print(drawn(view, console.width, None))
        return
    try:
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                now = look()
                live.update(drawn(View.between(before, now), console.width, console.height), refresh=True)
                before = now
    except KeyboardInterrupt:
        return


def server(url: str, api_key: str | None) -> Source:
    """The state of the server at that URL, over HTTP.

    Calling it raises UnavailableError where it does not answer, and ConfigError where it refuses.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is no URL of a server; write it as http://127.0.0.1:23333")
    key = next(iter((api_key or "").split()), None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(
        f"{url.rstrip('/').removesuffix('/v1')}/epbackend/status", headers=headers
    )

    def look() -> dict[str, Any]:
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            reasons = {
                401: f"it wants an API key: --api-key or {KEYS_VARIABLE}",
                404: "it is no epbackend server",
            }
            said = (
                reasons.get(error.code) or f"HTTP {error.code}: {error.read()[:300].decode(errors='replace')}"
            )
            raise ConfigError(f"{url}: {said}") from None
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{url} does not answer: {getattr(error, 'reason', error)}") from None

    return look


def local_engine(pid: str | None) -> Source:
    """The state of an engine that runs on this machine, from the memory of its load report.

    Raises:
        ConfigError: there are several, and `pid` names none of them; or it is no number.
        UnavailableError: there is none.
    """
    from epbackend.engines.lmdeploy.load.status import local_engines, status

    if pid is not None and not pid.isdecimal():
        raise ConfigError(f"{pid} is neither a URL, as http://127.0.0.1:23333, nor the number of a process")
    engines = local_engines()
    if not engines:
        raise UnavailableError("no engine of epbackend runs here as this user; give the URL of a server")
    if pid is None and len(engines) > 1:
        raise ConfigError(
            f"several engines run here: give one of the processes {', '.join(map(str, engines))}"
        )
    owner = int(pid) if pid else next(iter(engines))
    if owner not in engines:
        raise ConfigError(f"process {owner} runs no engine; one of {', '.join(map(str, engines))} does")

    def look() -> dict[str, Any]:
        if not os.path.exists(f"/proc/{owner}"):
            raise UnavailableError(f"the engine of process {owner} has ended")
        return status(engines[owner])

    return look


def drawn(view: View, width: int, height: int | None) -> RenderableType:
    """The view for a terminal of so many columns and lines (None: any number)."""
    state = view.state
    if not state["layers"]:
        return Text(f"{state['ep_size']} ranks; no step yet")
    head = Table.grid(padding=(0, 2))
    for line in _facts(view):
        head.add_row(*line)
    ranks = max(1, min(state["ep_size"], (width - WIDTH - 4) // WIDTH))
    rows = len(state["layers"]) if height is None else max(1, height - head.row_count - 5)
    return Group(head, Text(), _heat_map(view, ranks, rows))


def _facts(view: View) -> list[tuple[str, str]]:
    state, balance = view.state, view.state["balance"]
    since = "since its start, idle now" if view.idle else f"in the last {view.seconds:.1f} s"
    splits, ways = (" / ".join(dict.fromkeys(state[name].values())) for name in ("split", "dispatchers"))
    lines = [
        (
            "throughput",
            f"{view.tokens_per_second:,.0f} tokens/s, {view.steps / view.seconds:,.1f} steps/s",
        ),
        ("imbalance", f"{view.imbalance:.3f} times the mean, {since}"),
        (
            "phases",
            "; ".join(
                f"{phase} {facts['share']:.0%} of the tokens, {facts['imbalance']:.3f}"
                for phase, facts in view.phases.items()
            ),
        ),
        (
            "steps",
            f"{np.mean(state['step_imbalance_Y']):.3f} times the mean, each of the last thousand by itself",
        ),
        ("ways", f"split {splits}, dispatcher {ways}, {state['ep_size']} ranks, {state['experts']} experts"),
    ]
    if balance is None:
        return [*lines, ("balance", "off: experts stay where they are")]
    before, after = balance["imbalance_before"], balance["imbalance_after"]
    expected = "" if before is None else f" (expected {before:.3f} to {after:.3f})"
    moved = f"{balance['slots_moved']} slots, {balance['bytes_moved'] / 1e6:,.1f} MB"
    lines += [
        ("balance", f"plan {balance['plans']}{expected}, {balance['windows']} windows looked at"),
        ("moves", f"{balance['migrations']} migrations, {moved}, {balance['failed']} failed"),
        ("flip", f"{balance['longest_flip_ms']:.1f} ms at most"),
        ("planner", f"{balance['planner_age_s']:,.0f} s old, {balance['planner_restarts']} restarts"),
    ]
    if balance["rank_speed"]:
        lines.append(("speeds", ", ".join(f"{speed:.2f}" for speed in balance["rank_speed"])))
    return [*lines, ("last error", balance["last_error"])] if balance["last_error"] else lines


def _heat_map(view: View, ranks: int, rows: int) -> Table:
    """Load over the mean, layers down and ranks across; where there is no room, of the worst of neighbours."""
    layers = np.array(view.state["layers"])
    columns = np.array_split(np.arange(view.state["ep_size"]), ranks)
    lines = np.array_split(np.arange(len(layers)), min(rows, len(layers)))
    table = Table(box=None, padding=0, title="load of a rank over the ranks' mean", title_justify="left")
    table.add_column("layer", justify="right", width=WIDTH + 2)
    for column in columns:
        table.add_column(_span(column), justify="right", width=WIDTH)
    for line in lines:
        worst = [float(view.load_RY[np.ix_(column, line)].max()) for column in columns]
        table.add_row(_span(layers[line]), *(Text(f"{load:.2f} ", style=_shade(load)) for load in worst))
    return table


def _span(numbers: np.ndarray) -> str:
    first, last = int(numbers[0]), int(numbers[-1])
    return f"{first} " if first == last else f"{first}-{last} "


def _shade(load: float) -> str:
    return next((style for limit, style in SHADES if load <= limit), TOO_HOT)
