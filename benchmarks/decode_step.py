"""Milliseconds of a decode step of the demo's model on two CPU ranks, joined by the CPU's process group and by gloo.

    python -m benchmarks.decode_step

The engine is started for each in turn. A step's time is that of 100 tokens, from the difference of two answers of
110 and of 10 tokens, so that the prompt does not count.
"""

from __future__ import annotations

import time
from collections import defaultdict
from statistics import median
from typing import Any
from unittest import mock

from lmdeploy import GenerationConfig

import epbackend
from benchmarks.report import command_line, print_table
from epbackend import EPConfig
from epbackend.device import cpu_group
from epbackend.engines.lmdeploy.hub import locate
from epbackend.engines.lmdeploy.workers import mp

PROMPT, SHORT, LONG = "Call me Ishmael", 10, 110
BATCHES = (1, 8)
ENGINE = {"dtype": "float32", "session_len": 512, "max_batch_size": 8, "cache_gb": 0.1, "log_level": "ERROR"}


class GlooProc(mp.GuardedProc):
    """A rank that takes its peers to be on other machines."""

    def _main_loop(self, *args: Any, **kwargs: Any) -> None:
        cpu_group._machine = lambda: ""
        super()._main_loop(*args, **kwargs)


def step_ms(model: str, config: EPConfig, repetitions: int) -> dict[int, list[float]]:
    """Milliseconds by the number of prompts that are answered together."""
    found = defaultdict(list)
    with epbackend.pipeline(model, config) as pipe:

        def seconds(prompts: int, tokens: int) -> float:
            start = time.perf_counter()
            greedy = GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
            pipe([PROMPT] * prompts, gen_config=greedy, do_preprocess=False)
            return time.perf_counter() - start

        seconds(1, SHORT)
        for batch in BATCHES:
            for _ in range(repetitions):
                short, long = seconds(batch, SHORT), seconds(batch, LONG)
                found[batch].append(1e3 * (long - short) / (LONG - SHORT))
    return found


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="starts of each engine")
    parser.add_argument("--repetitions", type=int, default=3, help="answers of each length in one start")
    args = parser.parse_args()
    model, found = str(locate("tiny-qwen3-moe")), defaultdict(list)
    for _ in range(args.rounds):
        for level in (2, 1):
            settings = {"device": "cpu", "ep_size": 2, "ep_level": level, "engine": ENGINE}
            for joined, process in (("cpu group", mp.GuardedProc), ("gloo", GlooProc)):
                with mock.patch.object(mp, "GuardedProc", process):
                    for batch, times in step_ms(model, EPConfig.load(settings), args.repetitions).items():
                        found[level, batch, joined] += times
    rows = []
    for level in (2, 1):
        for batch in BATCHES:
            ours, gloo = (median(found[level, batch, joined]) for joined in ("cpu group", "gloo"))
            rows.append(
                {"ep_level": level, "prompts": batch, "ms": ours, "ms by gloo": gloo, "ratio": gloo / ours}
            )
    print_table("a decode step of tiny-qwen3-moe on 2 CPU ranks", rows)


if __name__ == "__main__":
    main()
