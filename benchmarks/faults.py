"""What happens to a server when one of its processes is stopped or killed, seen from outside: a table.

    python -m benchmarks.faults                        # all cases
    python -m benchmarks.faults --dp 1 --ep 2 --victim "rank 1" --signal SIGSTOP --phase decode

Each case starts `epbackend serve`, does what the phase says (a long prompt, an answer under way, nothing), sends the
signal to the victim, and tells when the clients and `/health` heard of it, what they heard, the exit code, and what was
left. A server that goes on is asked once more, and ended by SIGTERM. A case in which this process itself was held up is
made again: other work on the machine may stop all that is here.
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
HELD_UP_S = 1.5
"""Longer than this process ever waits for a core."""
SURVIVED_S = 12.0
"""Beyond `timeout_s`: a server that still answers then is not going to fail of it."""
ATTEMPTS = 4

NAMED = {"raylet": "raylet", "gcs": "gcs_server", "engine": "ZMQMPEngine"}
"""Victims that are found by the name of their process: two of Ray's, and the one that the ranks belong to."""
PLANNER = "epbackend.balance.planner"


@dataclass(frozen=True)
class Case:
    """One fault."""

    dp: int = 1
    ep: int = 2
    executor: str = "mp"
    victim: str = "rank 1"
    """A rank; "server", the process that was started; "api server", one of those behind it with dp > 1; "planner", for
    which balance is on; "everything", the server and all that it started; or a key of NAMED."""
    signal: str = "SIGSTOP"
    phase: str = "decode"
    resume_s: float | None = None
    """When the victim gets SIGCONT, after the signal."""
    timeout_s: float = 6.0

    @property
    def outlived(self) -> bool:
        """Whether the server should go on."""
        return self.victim == "planner" or self.resume_s is not None


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
    answers: bool = False
    """Whether the server went on, and answered one more request; it was then ended by SIGTERM."""
    held_up_s: float = 0.0
    """The longest that this process did not run."""
    left: list[str] = field(default_factory=list)


class Server:
    """A server of its own process, and what belongs to it."""

    def __init__(self, case: Case, folder: Path, *options: str) -> None:
        config = folder / "config.json"
        engine = {"session_len": 2048, "log_level": "ERROR", "dp": case.dp, "executor": case.executor}
        engine["max_prefill_token_num"] = 128  # a long prompt takes many steps
        settings = {"device": "cpu", "ep_size": case.ep, "ep_level": 2, "timeout_s": case.timeout_s}
        if case.victim == "planner":
            settings |= {"balance": {"on": True, "interval_s": 0.2, "window_steps": 8}}
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

    def pids_of(self, victim: str, ranks: int) -> list[int]:
        """Of the victim's processes; of several alike, such as the engines of dp > 1, the last that was started."""
        if victim == "server":
            return [self.process.pid]
        if victim == "everything":  # parents first: none sees that its children are stopped
            return [self.process.pid, *(each.pid for each in descendants(self.process.pid))]
        if victim.startswith("rank "):
            pids = np.memmap(self._stats_of(ranks), RANK, mode="r", shape=ranks)["pid"]
            return [int(pids[int(victim.removeprefix("rank "))])]
        if victim == "planner":
            return [each.pid for each in descendants(self.process.pid) if PLANNER in " ".join(each.cmdline())]
        if victim == "api server":
            return [psutil.Process(*self.pids_of("engine", ranks)).ppid()]
        return [each.pid for each in descendants(self.process.pid) if each.name() == NAMED[victim]][-1:]

    def _stats_of(self, ranks: int) -> str:
        """The segment of their load report. A look at a process that is about to map it misses it: another finds it."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if stats := next((each for each in self.segments if _holds_ranks(each, ranks)), None):
                return stats
            time.sleep(0.1)
            self.look()
        raise RuntimeError(f"no load report of {ranks} ranks among {self.segments}: {self.log.read_text()}")

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
    for _ in range(ATTEMPTS):
        outcome = _run_once(case, *options)
        if outcome.held_up_s < HELD_UP_S:
            return outcome
    raise RuntimeError(f"{case}: this process was held up for {outcome.held_up_s:.1f} s, {ATTEMPTS} times")


def _run_once(case: Case, *options: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder, _running(case, Path(folder), *options) as server:
        server.await_ready()
        complete(server, "hello", 2)
        outcome, stop = Outcome(), threading.Event()
        client = threading.Thread(target=_load, args=(server, case, outcome, stop), daemon=True)
        if case.phase != "idle":
            client.start()
        time.sleep(1.0)
        server.look()
        victims = server.pids_of(case.victim, max(case.ep, case.dp))
        threading.Thread(target=_note_pauses, args=(outcome, stop), daemon=True).start()
        _signal(victims, case.signal)
        began = time.monotonic()
        limit_s = (SURVIVED_S if case.outlived else 60) + case.timeout_s + (case.resume_s or 0)
        waiting = case.resume_s
        while server.process.poll() is None and time.monotonic() < began + limit_s:
            if waiting is not None and time.monotonic() > began + waiting:
                _signal(victims, "SIGCONT")
                waiting = None
            if waiting is None:
                _probe(server, outcome, began)
            time.sleep(0.1)
        outcome.exit_s, outcome.exit_code = time.monotonic() - began, server.process.poll()
        stop.set()
        if outcome.exit_code is None:
            _go_on(server, outcome)
        if client.ident is not None:
            client.join(10)
        if outcome.client_s is not None:
            outcome.client_s -= began
        outcome.left = server.left()
        return outcome


def _go_on(server: Server, outcome: Outcome) -> None:
    """A server that the fault did not end: whether it serves, and how it ends."""
    outcome.exit_s = None
    with contextlib.suppress(requests.RequestException):
        outcome.answers = complete(server, "hello", 2, patience_s=30).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        outcome.exit_code = server.process.wait(90)


def all_cases() -> Iterator[Case]:
    """The table."""
    signals = ("SIGSTOP", "SIGKILL")
    for (dp, ep, executor), name in itertools.product([(1, 2, "mp"), (1, 4, "mp"), (2, 2, "ray")], signals):
        for phase in ("prefill", "decode", "idle"):
            yield Case(dp, ep, executor, f"rank {ep - 1}", name, phase)
        yield Case(dp, ep, executor, "rank 0", name)
    for (dp, executor), name in itertools.product([(1, "mp"), (2, "ray")], signals):
        yield Case(dp, 2, executor, "engine", name)
    for victim, name in itertools.product(("rank 1", "raylet", "gcs"), signals):
        yield Case(1, 2, "ray", victim, name)
    for victim, name in itertools.product(("api server", "raylet", "gcs"), signals):
        yield Case(2, 2, "ray", victim, name)
    for name in signals:
        yield Case(victim="planner", signal=name)
    yield Case(victim="server", signal="SIGKILL")
    yield Case(2, 2, "ray", "server", "SIGKILL")
    for victim, phase in (("server", "decode"), ("everything", "idle"), ("everything", "decode")):
        yield Case(victim=victim, phase=phase, resume_s=10.0)


def says(pattern: str, text: str) -> bool:
    """Whether an answer holds it."""
    return re.search(pattern, text) is not None


def row(case: Case, outcome: Outcome) -> str:
    """A line of the table."""
    client = f"{outcome.client_status} after {_seconds(outcome.client_s)}" if outcome.client_status else ""
    if outcome.exit_s is not None:
        end = f"{outcome.exit_code} after {_seconds(outcome.exit_s)}"
    else:
        end = f"goes on, {'answers' if outcome.answers else 'does not answer'}; {outcome.exit_code} after SIGTERM"
    resumed = "" if case.resume_s is None else f", SIGCONT after {case.resume_s:g} s"
    cells = (
        f"{case.dp}, {case.ep}, {case.executor}",
        f"{case.signal} of {case.victim}{resumed}",
        case.phase,
        client,
        _seconds(outcome.health_s),
        end,
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


def complete(
    server: Server, prompt: str, tokens: int, *, patience_s: float = PATIENCE_S
) -> requests.Response:
    """The answer to a prompt, of exactly so many tokens."""
    request = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    return requests.post(server.url("/v1/completions"), json=request, timeout=patience_s)


def _load(server: Server, case: Case, outcome: Outcome, stop: threading.Event) -> None:
    """Requests of that phase until one fails."""
    long_answer = 100 if case.outlived else 1500
    prompt, tokens = (LONG_PROMPT, 1) if case.phase == "prefill" else ("the quick", long_answer)
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


def _signal(pids: list[int], name: str) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, name))


def _note_pauses(outcome: Outcome, stop: threading.Event) -> None:
    last = time.monotonic()
    while not stop.wait(0.1):
        now = time.monotonic()
        outcome.held_up_s, last = max(outcome.held_up_s, now - last), now


def _holds_ranks(segment: str, ranks: int) -> bool:
    # Segments are whole pages. Semaphores are mapped, and have no name any more.
    return os.path.exists(segment) and 0 <= os.path.getsize(segment) - ranks * RANK.itemsize < os.sysconf(
        "SC_PAGE_SIZE"
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


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
