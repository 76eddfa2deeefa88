"""`epbackend demo --balance`: the same questions with experts that move and with experts that stay.

The topic shifts half-way, from speeches to program text, and with it the experts that are asked for. The first run
decides how long a topic lasts: until a plan made for it is in use. The second repeats the same rounds.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from epbackend.cli.output import console
from epbackend.cli.pictures import save_rounds
from epbackend.cli.session import running
from epbackend.config import EPConfig
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
NEW_TOKENS = 12
FEWEST_ROUNDS, MOST_SECONDS = 2, 15.0
"""Of a topic, until a plan has been made for it."""
JUDGED_ROUNDS = 2
"""The last ones of each topic, in which the plan is in use."""


@dataclass(frozen=True)
class Step:
    """From one token of an answer to its next, as who reads the stream sees it."""

    seconds: float
    moving: bool
    """Whether a migration was under way, or flipped."""


@dataclass(frozen=True)
class Run:
    """All rounds of one engine."""

    rounds: tuple[int, ...]
    """Of each topic."""
    token_ids: list[list[int]]
    seconds: list[float]
    """Of each round."""
    steps: "list[Step]"
    imbalance: list[float]
    """The busiest rank over the mean of each round, the mean of the layers."""
    report: "BalanceReport"

    @property
    def tokens_per_second(self) -> float:
        """Of the median round, which what else the machine does leaves alone."""
        return len(self.token_ids) / len(self.seconds) * NEW_TOKENS / float(np.median(self.seconds))

    @property
    def judged(self) -> float:
        """The imbalance of the rounds in which a plan is in use, where there is any."""
        ends = np.cumsum(self.rounds)
        chosen = [self.imbalance[end - JUDGED_ROUNDS : end] for end in ends]
        return float(np.mean(chosen))


def balance_demo(model: str, settings: dict[str, Any], out: Path, *, talk: bool) -> dict[str, Any]:
    """The demo's results as one object; with `talk` they are shown as they come."""
    start = time.perf_counter()
    moving = EPConfig.load({**settings, "balance": BALANCE})
    with_balance = _run(model, moving, talk)
    still = EPConfig.load({**settings, "placement": {"file": str(_start_file(model, moving, out))}})
    without = _run(model, still, talk, with_balance.rounds)
    report = with_balance.report
    picture = save_rounds(
        {"experts stay": without.imbalance, "experts move": with_balance.imbalance},
        with_balance.rounds[0],
        out / "balance.png",
        title=f"{model} on {moving.ep_size} ranks: {report.migrations} migrations while it answers",
    )
    result = {
        "tokens_identical": with_balance.token_ids == without.token_ids,
        "migrations": report.migrations,
        "slots_moved": report.slots_moved,
        "bytes_moved": report.bytes_moved,
        "imbalance_before": round(without.judged, 4),
        "imbalance_after": round(with_balance.judged, 4),
        "step_ms": step_times(with_balance.steps),
        "step_ms_without": step_times(without.steps),
        "throughput_ratio": round(with_balance.tokens_per_second / without.tokens_per_second, 4),
        "ranks": moving.ep_size,
        "model": model,
        "engine": "lmdeploy",
        "tokens": sum(map(len, with_balance.token_ids)),
        "rounds": list(with_balance.rounds),
        "balance": {name: _rounded(value) for name, value in asdict(report).items()},
        "picture": str(picture),
        "seconds": round(time.perf_counter() - start, 2),
    }
    if talk:
        _tell(result)
    return result


def _start_file(model: str, config: EPConfig, out: Path) -> Path:
    """The placement that balance starts from, for the run in which nothing moves."""
    from epbackend.engines.lmdeploy.balance import starting_placement

    placement = starting_placement(resolve(model), config, None)
    assert placement is not None
    file = out / "balance-start.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(placement.to_json(), encoding="utf-8")
    return file


def _run(model: str, config: EPConfig, talk: bool, rounds: tuple[int, ...] = ()) -> Run:
    """Both topics, for as many rounds each as given, or until a plan made in it is in use."""
    from lmdeploy import GenerationConfig

    from epbackend.balance.balancer import BalanceReport

    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True)
    token_ids, imbalance, seconds, done = [], [], [], []
    steps: list[Step] = []
    with running(model, config) as pipe:
        report = pipe.balance if config.balance.on else BalanceReport
        before = pipe.load()
        for topic, prompts in enumerate(TOPICS):
            began, plans, last, count = time.perf_counter(), report().plans, 0, 0
            while count < rounds[topic] if rounds else not last or count < last:
                start = time.perf_counter()
                token_ids += _answers(pipe, prompts, greedy, report, steps)
                seconds.append(time.perf_counter() - start)
                now, count = pipe.load(), count + 1
                imbalance.append(float(now.since(before).imbalance_Y.mean()))
                before = now
                planned = report().plans > plans
                late = time.perf_counter() - began > MOST_SECONDS
                if not last and count >= FEWEST_ROUNDS and (planned or late):
                    last = count + JUDGED_ROUNDS + 1  # one round for the experts to move in
                if talk:
                    moved = report().migrations
                    console.print(
                        f"topic {topic + 1}, round {count}: busiest rank {imbalance[-1]:.2f} times the mean, "
                        f"{moved} migrations so far",
                        highlight=False,
                    )
            done.append(count)
        return Run(tuple(done), token_ids, seconds, steps, imbalance, report())


def _answers(
    pipe: Any, prompts: tuple[str, ...], generation: Any, report: Callable[[], Any], steps: list[Step]
) -> list[list[int]]:
    """Token ids of the answers; the steps are told by the stream of the first one."""
    token_ids: list[list[int]] = [[] for _ in prompts]
    last, before = 0.0, report()
    for part in pipe.stream_infer([*prompts], gen_config=generation, do_preprocess=False):
        token_ids[part.index] += part.token_ids
        if part.index == 0 and part.token_ids:
            now, after = time.perf_counter(), report()
            if last:
                moving = before.moving or after.moving or before.migrations != after.migrations
                steps.append(Step(now - last, moving))
            last, before = now, after
    return token_ids


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
        f"{result['imbalance_after']:.3f} where they move; tokens/s {result['throughput_ratio']:.2f} times",
        highlight=False,
    )
    times = result["step_ms"]
    console.print(
        f"a step takes {times['median']} ms (median); the longest {times['worst_still']} ms, "
        f"and {times['worst_moving']} ms of those in which experts moved",
        highlight=False,
    )
    console.print(f"picture: {result['picture']}; all in {result['seconds']} s", highlight=False)
