"""A server under mixed requests while experts move every few seconds: is it the same after a long time?

    make soak                       # 20 minutes
    make soak MINUTES=2 SOAK="--ep 4 --dp 2"

First the answers of a server in which nothing moves; then the same requests, in any order and mixture, to one whose
topics shift and whose experts follow. It prints one JSON object, and exits by 1 unless all of this holds: every answer
has the same text, experts moved and no migration failed, memory is flat, there are as many processes and segments of
shared memory at the end as at the beginning, and none after it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from benchmarks.faults import LONG_PROMPT, MODEL, PATIENCE_S, Case, Server

CLIENTS = 3
TOPIC_S = 10.0
"""How long clients stay with a topic."""
TOPICS = (
    ("Fellow citizens of the Senate", "In the year 1861", "It is the duty of Congress", LONG_PROMPT),
    (
        "class Parser:\n    def __init__(self",
        "import os\nfor name in",
        "try:\n    return",
        "def main(argv):\n",
    ),
)
LENGTHS = (1, 8, 40)
SAMPLES = 40
JUDGED_MINUTES = 5.0
"""In a shorter run memory still grows to its size, and is only told."""
FLAT = 1.03
"""The most that memory may grow from the second fifth of the run to its last."""
MOVING = {"redundant_experts": 8, "window_steps": 8, "interval_s": 2.0}


@dataclass(frozen=True)
class Request:
    """A request whose answer the model alone decides."""

    prompt: str
    tokens: int
    stream: bool

    def answer(self, server: Server) -> str:
        """Raises RuntimeError for anything but an answer."""
        body = {"model": MODEL, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": self.stream}
        answer = requests.post(
            server.url("/v1/completions"), json=body, timeout=PATIENCE_S, stream=self.stream
        )
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.text}")
        if not self.stream:
            return answer.json()["choices"][0]["text"]
        events = [line.removeprefix(b"data: ") for line in answer.iter_lines() if line.startswith(b"data: ")]
        parts = [json.loads(event)["choices"] for event in events if event != b"[DONE]"]
        return "".join(choice["text"] for choices in parts for choice in choices)


@dataclass(frozen=True)
class Sample:
    """The server's processes at one moment."""

    memory_mb: float
    """That no other process shares, of all."""
    processes: int
    segments: int
    files: int
    """Open ones."""


@dataclass
class Soak:
    """What was seen."""

    minutes: float
    requests: int = 0
    wrong: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    balance: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    left: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Of memory, from the second fifth of the run to the last."""
        memory = [each.memory_mb for each in self.samples]
        fifth = max(1, len(memory) // 5)
        return float(np.median(memory[-fifth:]) / np.median(memory[fifth : 2 * fifth] or memory[:1]))

    def faults(self) -> list[str]:
        """What should not be; empty: it has passed."""
        first, last = self.samples[0], self.samples[-1]
        found = {
            f"{len(self.wrong)} answers differ: {self.wrong[:3]}": bool(self.wrong),
            "no expert moved": not self.balance["migrations"],
            f"{self.balance['failed']} migrations failed: {self.balance['last_error']}": self.balance[
                "failed"
            ],
            f"{self.balance['planner_restarts']} planners ended": self.balance["planner_restarts"],
            f"memory grew {self.growth:.3f} times": self.growth > FLAT and self.minutes >= JUDGED_MINUTES,
            f"{first.processes} processes became {last.processes}": last.processes != first.processes,
            f"{first.segments} segments became {last.segments}": last.segments != first.segments,
            f"exit code {self.exit_code}": self.exit_code != 0,
            f"left behind: {self.left}": bool(self.left),
        }
        return [what for what, holds in found.items() if holds]


def all_requests() -> list[list[Request]]:
    """Those of each topic."""
    return [
        [
            Request(prompt, tokens, stream)
            for prompt in prompts
            for tokens in LENGTHS
            for stream in (False, True)
        ]
        for prompts in TOPICS
    ]


@contextlib.contextmanager
def serving(case: Case, **balance: Any) -> Iterator[Server]:
    """A server whose experts can move."""
    settings = {"balance.on": "true", "engine.dtype": "float32"}
    settings |= {f"balance.{name}": str(value) for name, value in (MOVING | balance).items()}
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(case, Path(folder), *options)
        try:
            server.await_ready()
            yield server
        finally:
            server.kill()


def undisturbed(case: Case) -> dict[Request, str]:
    """The answer to each request where nothing moves."""
    wanted = [request for topic in all_requests() for request in topic]
    with serving(case, threshold=0.99) as server, ThreadPoolExecutor(CLIENTS) as clients:
        answers = dict(zip(wanted, clients.map(lambda request: request.answer(server), wanted), strict=True))
        assert not status(server)["migrations"]
        return answers


def soak(case: Case, minutes: float) -> Soak:
    """Both servers, one after the other."""
    expected, done = undisturbed(case), Soak(minutes)
    with serving(case, threshold=0.0) as server:
        stop, lock = threading.Event(), threading.Lock()
        began = time.monotonic()

        def ask(seed: int) -> None:
            choose = random.Random(seed)
            while not stop.is_set():
                topic = all_requests()[int((time.monotonic() - began) / TOPIC_S) % len(TOPICS)]
                request = choose.choice(topic)
                try:
                    answer = request.answer(server)
                except (requests.RequestException, RuntimeError) as error:
                    answer = str(error)
                    stop.wait(1)
                with lock:
                    done.requests += 1
                    if answer != expected[request]:
                        done.wrong.append(f"{request}: {answer!r}")

        clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        # The first migration makes the ranks' connections, and the planner is there by then.
        while not status(server)["migrations"] and time.monotonic() - began < PATIENCE_S:
            time.sleep(0.5)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            done.samples.append(sample(server))
            stop.wait(60 * minutes / SAMPLES)
        stop.set()
        for client in clients:
            client.join()
        done.balance = status(server)
        server.look()
        server.process.send_signal(signal.SIGTERM)
        done.exit_code = server.process.wait(timeout=PATIENCE_S)
        done.left = server.left()
    return done


def status(server: Server) -> dict[str, Any]:
    """What balance has done so far."""
    return requests.get(server.url("/epbackend/status"), timeout=PATIENCE_S).json()["balance"]


def sample(server: Server) -> Sample:
    """Its processes now."""
    server.look()
    memory, files, processes = 0, 0, 0
    for each in server.family.values():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            memory += each.memory_full_info().uss
            files += each.num_fds()
            processes += 1
    segments = [each for each in server.segments if Path(each).exists()]
    return Sample(round(memory / 1e6, 1), processes, len(segments), files)


def main() -> None:
    """Prints the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--ep", type=int, default=2)
    parser.add_argument("--dp", type=int, default=1)
    given = parser.parse_args()
    done = soak(Case(dp=given.dp, ep=given.ep, timeout_s=120.0), given.minutes)
    faults = done.faults()
    samples = [asdict(each) for each in done.samples]
    print(
        json.dumps(
            {
                "passed": not faults,
                "faults": faults,
                "minutes": done.minutes,
                "requests": done.requests,
                "wrong": len(done.wrong),
                "memory_growth": round(done.growth, 4),
                "first": samples[0],
                "last": samples[-1],
                "balance": done.balance,
                "exit_code": done.exit_code,
                "left": done.left,
            },
            indent=1,
        )
    )
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
