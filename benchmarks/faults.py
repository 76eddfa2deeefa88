"""What happens to a server when one of its processes is stopped or killed, seen from outside: a table.

    python -m benchmarks.faults                        # all cases
    python -m benchmarks.faults --dp 1 --ep 2 --victim "rank 1" --signal SIGSTOP --phase decode

Each case starts `epbackend serve`, does what the phase says (a long prompt, an answer under way, nothing), sends the
signal to the victim, and tells when the clients and `/health` heard of it, what they heard, the exit code, and what was
left.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import requests

from epbackend.engines.lmdeploy.load.report import RANK
from epbackend.engines.lmdeploy.processes import LOOPBACK, free_port
from epbackend.engines.lmdeploy.workers.process_guard import descendants

MODEL = "tiny-qwen3-moe"
PATIENCE_S = 480.0
LEAVING_S = 10.0
"""For the tracker of shared memory, which ends last, and what Ray started."""
LONG_PROMPT = "the quick brown fox " * 120


@dataclass(frozen=True)
class Case:
    """One fault."""

    dp: int = 1
    ep: int = 2
    executor: str = "mp"
    victim: str = "rank 1"
    """A rank, "engine" (the process that the ranks belong to), or "server" (the one that was started)."""
    signal: str = "SIGSTOP"
    phase: str = "decode"
    timeout_s: float = 6.0


@dataclass
class Outcome:
    """What was seen of it; seconds are after the signal, None: it did not happen."""

    client_s: float | None = None
    client_status: str = ""
    client_text: str = ""
    health_s: float | None = None
    health_text: str = ""
    exit_s: float | None = None
    exit_code: int | None = None
    left: list[str] = field(default_factory=list)


class Server:
    """A server of its own process, and what belongs to it."""

    def __init__(self, case: Case, folder: Path, *options: str) -> None:
        config = folder / "config.json"
        engine = {"session_len": 2048, "log_level": "ERROR", "dp": case.dp, "executor": case.executor}
        engine["max_prefill_token_num"] = 128  # a long prompt takes many steps
        settings = {"device": "cpu", "ep_size": case.ep, "ep_level": 2, "timeout_s": case.timeout_s}
        config.write_text(json.dumps(settings | {"engine": engine}))
        self.port = free_port()
        self.log = folder / "log"
        command = [sys.executable, "-m", "epbackend", "serve", MODEL, "--config", str(config)]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *options],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self.family: dict[int, psutil.Process] = {}
        self.segments: set[str] = set()

    def url(self, path: str) -> str:
        return f"http://{LOOPBACK}:{self.port}{path}"

    def await_ready(self) -> None:
        """Raises RuntimeError, with the log, where it ends or takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(self.url("/ready"), timeout=5).status_code == 200:
                    self.look()
                    return
            time.sleep(0.2)
        raise RuntimeError(self.log.read_text())

    def look(self) -> None:
        """Notes who is there now, and what they map."""
        self.family |= {each.pid: each for each in descendants(self.process.pid)}
        self.family[self.process.pid] = psutil.Process(self.process.pid)
        for pid in self.family:
            with contextlib.suppress(OSError):
                self.segments |= set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))

    def pid_of(self, victim: str, ranks: int) -> int:
        if victim == "server":
            return self.process.pid
        board = next(each for each in self.segments if _holds_ranks(each, ranks))
        pids = np.memmap(board, RANK, mode="r", shape=ranks)["pid"]
        if victim == "engine":
            return psutil.Process(int(pids[0])).ppid()
        return int(pids[int(victim.removeprefix("rank "))])

    def left(self) -> list[str]:
        """Who still runs a few seconds after the server has ended, and segments that are still there."""
        deadline = time.monotonic() + LEAVING_S
        while (left := self._left_now()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _left_now(self) -> list[str]:
        alive = [
            f"{each.name()} {each.pid}"
            for each in self.family.values()
            if each.is_running() and each.status() != psutil.STATUS_ZOMBIE
        ]
        return alive + [each for each in self.segments if Path(each).exists()]

    def kill(self) -> None:
        """Ends whoever is still there."""
        for each in [*descendants(self.process.pid), *self.family.values()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def run(case: Case, *options: str) -> Outcome:
    """One case, from the start of the server to its end."""
    with tempfile.TemporaryDirectory() as folder, _running(case, Path(folder), *options) as server:
        server.await_ready()
        complete(server, "hello", 2)
        outcome, stop = Outcome(), threading.Event()
        client = threading.Thread(target=_load, args=(server, case.phase, outcome, stop), daemon=True)
        if case.phase != "idle":
            client.start()
        time.sleep(1.0)
        server.look()
        os.kill(server.pid_of(case.victim, max(case.ep, case.dp)), getattr(signal, case.signal))
        began = time.monotonic()
        limit_s = case.timeout_s + 60
        while server.process.poll() is None and time.monotonic() < began + limit_s:
            _probe(server, outcome, began)
            time.sleep(0.1)
        if server.process.returncode is not None:
            outcome.exit_s, outcome.exit_code = time.monotonic() - began, server.process.returncode
        stop.set()
        if client.ident is not None:
            client.join(10)
        if outcome.client_s is not None:
            outcome.client_s -= began
        outcome.left = server.left()
        return outcome


def all_cases() -> Iterator[Case]:
    """The table."""
    for (dp, ep, executor), name in itertools.product(
        [(1, 2, "mp"), (1, 4, "mp"), (2, 2, "ray")], ("SIGSTOP", "SIGKILL")
    ):
        for phase in ("prefill", "decode", "idle"):
            for rank in range(ep) if ep == 2 else (0, ep - 1):
                yield Case(dp, ep, executor, f"rank {rank}", name, phase)
        yield Case(dp, ep, executor, "engine", name, "decode")
    yield Case(victim="server", signal="SIGKILL")
    yield Case(dp=2, executor="ray", victim="server", signal="SIGKILL")


def says(pattern: str, text: str) -> bool:
    """Whether an answer holds it."""
    return re.search(pattern, text) is not None


def row(case: Case, outcome: Outcome) -> str:
    """A line of the table."""
    client = (
        f"{outcome.client_status} after {_seconds(outcome.client_s)}" if outcome.client_status else "none"
    )
    cells = (
        f"{case.dp}, {case.ep}, {case.executor}",
        f"{case.signal} of {case.victim}",
        case.phase,
        client,
        _seconds(outcome.health_s),
        f"{outcome.exit_code} after {_seconds(outcome.exit_s)}",
        ", ".join(outcome.left) or "nothing",
    )
    return "| " + " | ".join(cells) + " |"


@contextlib.contextmanager
def _running(case: Case, folder: Path, *options: str) -> Iterator[Server]:
    server = Server(case, folder, *options)
    try:
        yield server
    finally:
        server.kill()


def complete(server: Server, prompt: str, tokens: int, **more: object) -> requests.Response:
    """The answer to a prompt, of exactly so many tokens."""
    request = {"model": _model(server), "prompt": prompt, "max_tokens": tokens, "ignore_eos": True} | more
    return requests.post(server.url("/v1/completions"), json=request, timeout=PATIENCE_S)


def _model(server: Server) -> str:
    return requests.get(server.url("/v1/models"), timeout=PATIENCE_S).json()["data"][0]["id"]


def _load(server: Server, phase: str, outcome: Outcome, stop: threading.Event) -> None:
    """Requests of that phase until one fails."""
    prompt, tokens = (LONG_PROMPT, 1) if phase == "prefill" else ("the quick", 1500)
    while not stop.is_set():
        try:
            answer = complete(server, prompt, tokens)
            if answer.status_code == 200:
                continue
            outcome.client_status, outcome.client_text = str(answer.status_code), answer.text
        except requests.RequestException as error:
            outcome.client_status, outcome.client_text = "hung up", str(error)
        outcome.client_s = time.monotonic()
        return


def _probe(server: Server, outcome: Outcome, began: float) -> None:
    if outcome.health_s is not None:
        return
    with contextlib.suppress(requests.RequestException):
        answer = requests.get(server.url("/health"), timeout=2)
        if answer.status_code != 200:
            outcome.health_s, outcome.health_text = time.monotonic() - began, answer.text


def _holds_ranks(segment: str, ranks: int) -> bool:
    # Segments are whole pages. Semaphores are mapped, and have no name any more.
    return os.path.exists(segment) and 0 <= os.path.getsize(segment) - ranks * RANK.itemsize < os.sysconf(
        "SC_PAGE_SIZE"
    )


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("dp", "ep"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("executor", "victim", "signal", "phase"):
        parser.add_argument(f"--{name}")
    wanted = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    print("| dp, ep, executor | fault | during | the client gets | `/health` 503 | exit code | left over |")
    print("|---|---|---|---|---|---|---|")
    for case in all_cases():
        if all(getattr(case, name) == value for name, value in wanted.items()):
            outcome = run(case)
            print(row(case, outcome), flush=True)
            print(f"  {outcome.client_text or outcome.health_text}"[:400], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
