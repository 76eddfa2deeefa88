"""`epbackend demo --balance`: the same questions to an engine whose experts move, and to one whose experts stay.

Both answer round by round and by turns, so that what else the machine does hits both. The topic shifts half-way, from
speeches to program text, and with it the experts that are asked for. A topic lasts until a plan made for it is in use.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from epbackend.cli.apart import EngineApart
from epbackend.cli.output import console, error_console
from epbackend.cli.pictures import save_rounds
from epbackend.config import EPConfig
from epbackend.files import replace_file
from epbackend.models import resolve

if TYPE_CHECKING:
    from epbackend.balance.balancer import BalanceReport

TOPICS = (
    (
        "Fellow citizens of the Senate",
        "In the year 1861",
        "The people of the United States",
        "It is the duty of Congress",
    ),
    (
        "class Parser:\n    def __init__(self",
        "import os\nfor name in",
        "def main(argv):\n",
        "try:\n    return",
    ),
)
BALANCE = {"on": True, "redundant_experts": 8, "window_steps": 8, "interval_s": 0.5, "threshold": 0.02}
FEWEST_ROUNDS, MOST_SECONDS = 2, 15.0
"""Of a topic, until a plan has been made for it."""
JUDGED_ROUNDS = 4
"""The last ones of each topic, in which the plan is in use."""


@dataclass(frozen=True)
class Step:
    """From one token of an answer to its next, as who reads the stream sees it."""

    seconds: float
    moving: bool
    """Whether a migration was under way, or flipped."""


@dataclass(frozen=True)
class Round:
    """The questions of a topic, answered once by one engine."""

    token_ids: list[list[int]]
    seconds: float
    steps: list[Step]
    imbalance: float
    """The busiest rank over the mean, the mean of the layers."""
    report: "BalanceReport"
    """After it."""


@dataclass(frozen=True)
class Pair:
    """The same round of both engines."""

    moving: Round
    still: Round


def balance_demo(
    model: str, settings: dict[str, Any], new_tokens: int, out: Path, *, talk: bool
) -> dict[str, Any]:
    """The demo's results as one object; with `talk` they are shown as they come."""
    start = time.perf_counter()
    moving = EPConfig.load({**settings, "balance": BALANCE})
    still = EPConfig.load({**settings, "placement": {"file": str(_start_file(model, moving, out))}})
    topics: list[list[Pair]] = []
    with EngineApart(model, moving) as mover, EngineApart(model, still) as stayer:
        with error_console.status(f"starting {model} twice, on {moving.ep_size} ranks each"):
            mover.wait()
            stayer.wait()
        plans = 0
        for prompts in TOPICS:
            topics.append(_topic(mover, stayer, prompts, new_tokens, plans, talk))
            plans = topics[-1][-1].moving.report.plans
    report = topics[-1][-1].moving.report
    pairs = [pair for topic in topics for pair in topic]
    judged = [pair for topic in topics for pair in topic[-JUDGED_ROUNDS:]]
    quarters = np.quantile([pair.still.seconds / pair.moving.seconds for pair in judged], (0.25, 0.5, 0.75))
    picture = save_rounds(
        {
            "experts stay": [pair.still.imbalance for pair in pairs],
            "experts move": [pair.moving.imbalance for pair in pairs],
        },
        len(topics[0]),
        out / "balance.png",
        title=f"{model} on {moving.ep_size} ranks: {report.migrations} migrations while it answers",
    )
    result = {
        "tokens_identical": all(pair.moving.token_ids == pair.still.token_ids for pair in pairs),
        "migrations": report.migrations,
        "slots_moved": report.slots_moved,
        "bytes_moved": report.bytes_moved,
        "imbalance_before": round(float(np.mean([pair.still.imbalance for pair in judged])), 4),
        "imbalance_after": round(float(np.mean([pair.moving.imbalance for pair in judged])), 4),
        "step_ms": step_times([step for pair in pairs for step in pair.moving.steps]),
        "step_ms_without": step_times([step for pair in pairs for step in pair.still.steps]),
        "throughput_ratio": round(float(quarters[1]), 4),
        "throughput_quartiles": [round(float(quarters[0]), 4), round(float(quarters[2]), 4)],
        "ranks": moving.ep_size,
        "model": model,
        "engine": "lmdeploy",
        "tokens": sum(len(ids) for pair in pairs for ids in pair.moving.token_ids),
        "rounds": [len(topic) for topic in topics],
        "balance": {name: _rounded(value) for name, value in asdict(report).items()},
        "picture": str(picture),
        "seconds": round(time.perf_counter() - start, 2),
    }
    if talk:
        _tell(result)
    return result


def _start_file(model: str, config: EPConfig, out: Path) -> Path:
    """The placement that balance starts from, for the engine in which nothing moves."""
    from epbackend.engines.lmdeploy.balance import starting_placement

    placement = starting_placement(resolve(model), config, None)
    assert placement is not None
    file = out / "balance-start.json"
    replace_file(file, placement.to_json().encode())
    return file


def _topic(
    mover: EngineApart,
    stayer: EngineApart,
    prompts: tuple[str, ...],
    new_tokens: int,
    plans: int,
    talk: bool,
) -> list[Pair]:
    """Rounds of both, until a plan after the first `plans` has been in use for JUDGED_ROUNDS."""
    pairs: list[Pair] = []
    began, last = time.perf_counter(), 0
    while not last or len(pairs) < last:
        turns = (mover, stayer) if len(pairs) % 2 else (stayer, mover)
        rounds = {engine: engine.call(_answer, prompts, new_tokens, engine is mover) for engine in turns}
        pairs.append(Pair(rounds[mover], rounds[stayer]))
        now, late = pairs[-1].moving, time.perf_counter() - began > MOST_SECONDS
        if not last and len(pairs) >= FEWEST_ROUNDS and (now.report.plans > plans or late):
            last = len(pairs) + 1 + JUDGED_ROUNDS  # one round for the experts to move in
        if talk:
            console.print(
                f"{prompts[0]!r} and the like, round {len(pairs)}: busiest rank {now.imbalance:.2f} times the mean "
                f"where experts move, {pairs[-1].still.imbalance:.2f} where they stay; {now.report.migrations} "
                "migrations so far",
                highlight=False,
            )
    return pairs


# What follows runs in the processes of the engines.


def _answer(pipe: Any, prompts: tuple[str, ...], new_tokens: int, moving: bool) -> Round:
    """Greedy answers; the steps are told by the stream of the first one."""
    from lmdeploy import GenerationConfig

    from epbackend.balance.balancer import BalanceReport

    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, ignore_eos=True)
    report: Callable[[], BalanceReport] = pipe.balance if moving else BalanceReport
    token_ids: list[list[int]] = [[] for _ in prompts]
    steps: list[Step] = []
    last, before, loaded, began = 0.0, report(), pipe.load(), time.perf_counter()
    for part in pipe.stream_infer([*prompts], gen_config=generation, do_preprocess=False):
        token_ids[part.index] += part.token_ids
        if part.index == 0 and part.token_ids:
            now, after = time.perf_counter(), report()
            if last:
                moved = before.moving or after.moving or before.migrations != after.migrations
                steps.append(Step(now - last, moved))
            last, before = now, after
    seconds = time.perf_counter() - began
    imbalance = float(pipe.load().since(loaded).imbalance_Y.mean())
    return Round(token_ids, seconds, steps, imbalance, report())


def step_times(steps: list[Step]) -> dict[str, Any]:
    """In ms: the median of all, and the worst of those with a migration and without; None where there are none."""
    median = float(np.median([step.seconds for step in steps]))
    found: dict[str, Any] = {"median": round(1e3 * median, 3)}
    for name, moving in (("still", False), ("moving", True)):
        seconds = [step.seconds for step in steps if step.moving == moving]
        found[f"steps_{name}"] = len(seconds)
        found[f"worst_{name}"] = round(1e3 * max(seconds), 3) if seconds else None
        found[f"over_twice_the_median_{name}"] = sum(each > 2 * median for each in seconds)
    return found


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _tell(result: dict[str, Any]) -> None:
    verdict = "[green]identical[/green]" if result["tokens_identical"] else "[red]DIFFERENT[/red]"
    console.print(f"\n{result['tokens']} tokens, experts moving or not: {verdict}", highlight=False)
    console.print(
        f"{result['migrations']} migrations moved {result['slots_moved']} slots, "
        f"{result['bytes_moved'] / 1e6:.1f} MB between ranks",
        highlight=False,
    )
    console.print(
        f"busiest rank at the end of each topic: {result['imbalance_before']:.3f} times the mean where experts stay, "
        f"{result['imbalance_after']:.3f} where they move",
        highlight=False,
    )
    low, high = result["throughput_quartiles"]
    console.print(
        f"tokens/s there, by turns: {result['throughput_ratio']:.2f} times (quartiles {low:.2f} to {high:.2f})",
        highlight=False,
    )
    times = result["step_ms"]
    console.print(
        f"a step takes {times['median']} ms (median); the longest {times['worst_still']} ms, "
        f"and {times['worst_moving']} ms of those in which experts moved",
        highlight=False,
    )
    console.print(f"picture: {result['picture']}; all in {result['seconds']} s", highlight=False)
