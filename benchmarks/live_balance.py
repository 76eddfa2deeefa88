"""What moving experts brings an engine, and what it costs a step, while other programs use the machine.

    python -m benchmarks.live_balance gain            # an engine whose experts move beside one whose experts stay
    python -m benchmarks.live_balance gain --ranks 4
    python -m benchmarks.live_balance steps           # decode steps in which experts move beside those around them

`gain`: both engines live in processes of their own and answer the same prompts, round by round and by turns, so that
what else the machine does hits both. The model is small and random, its experts wide enough to be most of a step. A
topic is a handful of words: few experts get most tokens, other ones after the topic has shifted. Beside the measured
ratio stands the most that balance could have brought: had each rank the mean of the time that experts took on all
ranks, layer by layer. Each rank wants a core of its own.

`steps`: experts move all the time. Each step in which a migration is under way, or flips, is divided by the median of
the undisturbed steps around it on the same rank: in processor time of the serving thread, which other programs hardly
change, and on the wall.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import epbackend
from benchmarks.report import command_line, machine, print_table
from epbackend.balance.migration import Migrator
from epbackend.cli.apart import EngineApart
from epbackend.engines.lmdeploy.balance import starting_placement
from epbackend.engines.lmdeploy.load.stats_writer import StatsWriter
from epbackend.errors import EPError
from epbackend.moe import ExpertParallelMoE, LayerStats
from epbackend.names import PHASES

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH = 2, 32, 4, 256, 2048
TOPICS = ("Congress nation people", "else in")
PROMPTS, WORDS = 8, 200
REDUNDANT = 8
MOVING = {"on": True, "redundant_experts": REDUNDANT, "window_steps": 4, "interval_s": 0.2, "threshold": 0.02}
ALWAYS_MOVING = {"on": True, "redundant_experts": 8, "window_steps": 8, "interval_s": 0.1, "threshold": 0.0}
CALM_ROUNDS, MOST_ROUNDS = 4, 16
"""A plan is in use once nothing has moved for so many rounds; a topic waits for it for so many at most."""
QUIET = 0.05
"""The most of the machine that other programs use in a round that is judged, where there are so many such pairs:"""
FEWEST_QUIET = 5
MOST_PAIRS = 2
"""Rounds for each quiet one that is wanted."""
MOST_SHIFTS = 200
SHORT, STEPS = 8, 40
"""Words of a prompt, and tokens of an answer, where steps are compared; the topic shifts after each."""
KINDS = ("undisturbed", "a migration under way", "it flips")
AROUND = 10
"""Undisturbed steps on each side of a step that it is compared with."""

CLOCK_VARIABLE = "EPBACKEND_BENCHMARK_CLOCK"
MOST_LAYERS, MOST_STEPS = 64, 20_000
STEP = np.dtype(
    [
        ("began_s", np.float64),  # of time.perf_counter; 0 where nothing can move
        ("ended_s", np.float64),
        ("thread_s", np.float64),  # of processor time, of the serving thread since the last step's end
        ("phase", np.int64),
        ("moving", np.bool_),
        ("flips", np.int64),
        ("experts_s", np.float64, MOST_LAYERS),  # of processor time
    ]
)


class Clock:
    """A rank's steps, written to a file that others read."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._rows, self._count = folder, np.zeros(0, STEP), 0
        self._now = np.zeros((), STEP)
        self._thread_s = 0.0

    def watch(self, rank: int, number: int, layer: ExpertParallelMoE) -> None:
        if not len(self._rows):
            self._rows = np.memmap(self._folder / f"rank-{rank:03}", STEP, "w+", shape=MOST_STEPS)
        experts = layer.experts

        def timed(*args: Any) -> torch.Tensor:
            began = time.thread_time()
            rows_SD = experts(*args)
            self._now["experts_s"][number] += time.thread_time() - began
            return rows_SD

        layer.experts = timed  # type: ignore[method-assign]

    def begin(self, moving: bool) -> None:
        self._now["began_s"], self._now["moving"] = time.perf_counter(), moving

    def flips(self) -> None:
        self._now["flips"] += 1

    def in_phase(self, phase: str) -> None:
        self._now["phase"] = PHASES.index(phase)

    def end(self, moving: bool) -> None:
        thread_s = time.thread_time()
        self._now["ended_s"], self._now["thread_s"] = time.perf_counter(), thread_s - self._thread_s
        self._now["moving"] |= moving
        self._rows[self._count % MOST_STEPS] = self._now
        self._count, self._thread_s, self._now = self._count + 1, thread_s, np.zeros((), STEP)


def watch_this_rank(folder: Path) -> None:
    """Our own functions are wrapped, in a process that is there for this benchmark alone."""
    clock, migrators = Clock(folder), []
    watch, step, rows_on = StatsWriter.watch, StatsWriter.step, LayerStats.rows_on
    begin_step, flip = Migrator.begin_step, Migrator._flip

    def moving() -> bool:
        mine = migrators[0]._seat._mine if migrators else {"order": 0, "ended": 0}
        return bool(mine["order"] > mine["ended"])

    def watch_(self: StatsWriter, rank: int, number: int, layer: Any, place: Any) -> None:
        watch(self, rank, number, layer, place)
        clock.watch(rank, number, layer)

    def begin_step_(self: Migrator) -> None:
        migrators[:] = [self]
        clock.begin(moving())
        begin_step(self)

    def flip_(self: Migrator, staged: Any) -> None:
        clock.flips()
        flip(self, staged)

    def rows_on_(self: LayerStats, device: Any, phase: Any) -> torch.Tensor:
        clock.in_phase(phase)
        return rows_on(self, device, phase)

    def step_(self: StatsWriter) -> None:
        step(self)
        clock.end(moving())

    StatsWriter.watch, StatsWriter.step, LayerStats.rows_on = watch_, step_, rows_on_  # type: ignore[method-assign]
    Migrator.begin_step, Migrator._flip = begin_step_, flip_  # type: ignore[method-assign]


if CLOCK_VARIABLE in os.environ:  # ranks import the program that starts them
    watch_this_rank(Path(os.environ[CLOCK_VARIABLE]))


@dataclass(frozen=True)
class Round:
    """The prompts of a round, answered by one engine."""

    token_ids: list[list[int]]
    began_s: float
    ended_s: float
    processor_s: float
    """Of all processes of the engine."""
    others: float
    """What other programs used of the machine meanwhile, as a part of all cores."""
    imbalance: float
    """The busiest rank's choices over the mean, the mean of the layers."""
    migrations: int

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


def ask(pipe: Any, prompts: list[str], tokens: int) -> Round:
    """In the process of the engine."""
    from lmdeploy import GenerationConfig

    generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, ignore_eos=True)
    ours = psutil.Process(), *psutil.Process().children(recursive=True)
    before, processor_s, busy_s, began_s = pipe.load(), _processor_s(ours), _busy_s(), time.perf_counter()
    answers = pipe(prompts, gen_config=generation, do_preprocess=False)
    ended_s = time.perf_counter()
    processor_s, busy_s = _processor_s(ours) - processor_s, _busy_s() - busy_s
    others = max(0.0, busy_s - processor_s) / (ended_s - began_s) / (os.cpu_count() or 1)
    imbalance = float(pipe.load().since(before).imbalance_Y.mean())
    moved = 0
    with contextlib.suppress(EPError):  # nothing moves here
        moved = pipe.balance().migrations
    token_ids = [answer.token_ids for answer in answers]
    return Round(token_ids, began_s, ended_s, processor_s, others, imbalance, moved)


def _processor_s(processes: Iterable[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _busy_s() -> float:
    """Processor time of everything on the machine."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait


def write_model(folder: Path) -> str:
    """A random model whose experts are most of its work, with the tokenizer of the tiny one."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tiny = Path(epbackend.__file__).parent / "models" / "tiny_qwen3_moe"
    for file in tiny.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, folder)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=json.loads((tiny / "config.json").read_text())["vocab_size"],
            hidden_size=HIDDEN,
            moe_intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
            initializer_range=0.1,
            max_position_embeddings=4096,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    return str(folder)


def prompts_of(topic: int, round_: int, length: int = WORDS) -> list[str]:
    """Words of the topic in any order, other ones in each round."""
    random, words = np.random.default_rng((topic, round_)), TOPICS[topic].split()
    return [" ".join(random.choice(words, length)) for _ in range(PROMPTS)]


def start(model: str, settings: dict[str, Any], clocks: Path) -> EngineApart:
    """An engine whose ranks write their steps into that folder."""
    clocks.mkdir()
    return EngineApart(model, epbackend.EPConfig.load(settings), {CLOCK_VARIABLE: str(clocks)})


def steps_in(clocks: Path) -> list[np.ndarray]:
    """Of each rank, in their order."""
    found = [np.memmap(file, STEP, "r") for file in sorted(clocks.iterdir())]
    return [np.array(rows[rows["ended_s"] > 0]) for rows in found]


@dataclass
class Topic:
    """The rounds of both engines once the plan for it is in use."""

    pairs: list[tuple[Round, Round]] = field(default_factory=list)
    """Moving, still."""
    identical: bool = True
    migrations: int = 0

    @property
    def quiet(self) -> list[tuple[Round, Round]]:
        """Those in which other programs hardly used the machine."""
        return [pair for pair in self.pairs if max(each.others for each in pair) < QUIET]

    def row(self, name: int, steps: list[np.ndarray]) -> dict[str, Any]:
        """`steps`: of each rank of the engine whose experts stay."""
        judged = self.quiet if len(self.quiet) >= FEWEST_QUIET else self.pairs
        still = [still for _, still in judged]
        share, most = zip(*(possible(round_, steps) for round_ in still), strict=True)
        more_s = [moving.processor_s / still.processor_s for moving, still in judged]
        return {
            "topic": name,
            "pairs": f"{len(self.pairs)}, quiet {len(self.quiet)}",
            "migrations": self.migrations,
            "tokens identical": self.identical,
            "imbalance, stay": statistics.mean(each.imbalance for each in still),
            "move": statistics.mean(moving.imbalance for moving, _ in judged),
            "ms, stay": f"{1e3 * statistics.median(each.seconds for each in still):.0f}",
            "experts' share": statistics.median(share),
            "times the tokens/s (quartiles)": _quartiles(
                still.seconds / moving.seconds for moving, still in judged
            ),
            "at most": f"{statistics.median(most):.3f}",
            "processor time": _quartiles(more_s),
        }


def _quartiles(ratios: Iterable[float]) -> str:
    return "{1:.3f} ({0:.3f}, {2:.3f})".format(*statistics.quantiles(ratios))


def possible(round_: Round, steps: list[np.ndarray]) -> tuple[float, float]:
    """The experts' share of a round, of the busiest rank in each layer; and how much faster at most it could be."""
    inside = [
        rows[(rows["ended_s"] >= round_.began_s) & (rows["ended_s"] <= round_.ended_s)]["experts_s"]
        for rows in steps
    ]
    whole = min(map(len, inside))
    experts_RSY = np.stack([rows[:whole] for rows in inside])
    busiest, mean = experts_RSY.max(axis=0).sum(), experts_RSY.mean(axis=0).sum()
    return busiest / round_.seconds, round_.seconds / (round_.seconds - (busiest - mean))


def gain(args: argparse.Namespace) -> None:
    settings = settings_of(args.ranks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        model = write_model(folder / "model")
        moving = settings | {"balance": MOVING}
        placement = starting_placement(model, epbackend.EPConfig.load(moving), None)
        assert placement is not None
        (folder / "start.json").write_text(placement.to_json())
        still = settings | {"placement": {"file": str(folder / "start.json")}}
        topics = []
        with (
            start(model, moving, folder / "moving") as mover,
            start(model, still, folder / "still") as stayer,
        ):
            mover.wait()
            stayer.wait()
            moved = 0
            for topic in range(len(TOPICS)):
                found, calm, round_ = Topic(), 0, 0
                while len(found.quiet) < args.pairs and len(found.pairs) < MOST_PAIRS * args.pairs:
                    prompts = prompts_of(topic, round_)
                    turns = (mover, stayer) if round_ % 2 else (stayer, mover)
                    rounds = {engine: engine.call(ask, prompts, args.tokens) for engine in turns}
                    found.identical &= rounds[mover].token_ids == rounds[stayer].token_ids
                    now = rounds[mover].migrations
                    found.migrations, calm = found.migrations + now - moved, calm + 1 if now == moved else 0
                    moved, round_ = now, round_ + 1
                    if calm >= CALM_ROUNDS or found.pairs or round_ > MOST_ROUNDS:
                        found.pairs.append((rounds[mover], rounds[stayer]))
                topics.append(found)
            steps = steps_in(folder / "still")
    title = f"{args.ranks} ranks, {args.tokens} tokens after {PROMPTS} prompts of {WORDS} words: experts move, and stay"
    print_table(title, [topic.row(number + 1, steps) for number, topic in enumerate(topics)])


def steps(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        model = args.model or write_model(folder / "model")
        settings = settings_of(args.ranks) | {"balance": ALWAYS_MOVING}
        with start(model, settings, folder / "moving") as engine:
            migrations = round_ = 0
            while migrations < args.migrations and round_ < MOST_SHIFTS:
                prompts = prompts_of(round_ % len(TOPICS), round_, SHORT)
                migrations, round_ = engine.call(ask, prompts, STEPS).migrations, round_ + 1
            found = [beside_undisturbed(rows) for rows in steps_in(folder / "moving")]
    for clock, text in (("processor", "processor time of the serving thread"), ("wall", "time on the wall")):
        of_kind = {kind: np.concatenate([rank[clock, kind] for rank in found]) for kind in KINDS}
        title = (
            f"{text}, over the undisturbed steps around: decode of {PROMPTS} requests on {args.ranks} ranks"
        )
        print_table(title, [ratios_row(kind, ratios) for kind, ratios in of_kind.items()])


def beside_undisturbed(rows: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """By clock and kind, what steps of one rank took over the median of undisturbed ones around."""
    rows = rows[1:]  # the start is in the first
    rows = rows[rows["phase"] == PHASES.index("decode")]
    kind_of = np.where(rows["flips"] > 0, 2, np.where(rows["moving"], 1, 0))
    calm = np.flatnonzero(kind_of == 0)
    took = {"processor": rows["thread_s"], "wall": rows["ended_s"] - rows["began_s"]}
    found: dict[tuple[str, str], list[float]] = {(clock, kind): [] for clock in took for kind in KINDS}
    for at, kind in enumerate(kind_of.tolist()):
        place = np.searchsorted(calm, at)
        near = calm[max(0, place - AROUND) : place + AROUND + 1]
        near = near[near != at]
        for clock, seconds in took.items():
            found[clock, KINDS[kind]].append(seconds[at] / np.median(seconds[near]))
    return {name: np.array(ratios) for name, ratios in found.items()}


def ratios_row(kind: str, ratios: np.ndarray) -> dict[str, Any]:
    return {
        "steps": kind,
        "number": len(ratios),
        "median": float(np.median(ratios)),
        "95 of 100 below": float(np.quantile(ratios, 0.95)),
        "longest": float(ratios.max()),
        "over twice": f"{(ratios > 2).sum()} ({(ratios > 2).mean():.1%})",
    }


def settings_of(ranks: int) -> dict[str, Any]:
    engine = {
        "dtype": "float32",
        "session_len": 1024,
        "max_batch_size": PROMPTS,
        "cache_gb": 0.3,
        "log_level": "ERROR",
    }
    return {"device": "cpu", "ep_size": ranks, "ep_level": 2, "engine": engine}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("what", choices=("gain", "steps"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=20, help="rounds of each topic once its plan is in use")
    parser.add_argument("--tokens", type=int, default=2, help="of each answer")
    parser.add_argument("--migrations", type=int, default=100, help="steps: until so many have flipped")
    parser.add_argument("--model", help="steps: another one than the random one")
    args = parser.parse_args()
    print(machine())
    {"gain": gain, "steps": steps}[args.what](args)


if __name__ == "__main__":
    main()
