"""Runs an engine in a process of its own and sees what it leaves behind."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from epbackend.engines.lmdeploy.workers.process_guard import descendants
from tests.helpers.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
THROTTLE_S = 0.006
"""In which a throttled rank runs once: about what a few calls of a tiny model's experts take."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends."""

GENERATE = """
import sys
import epbackend
from epbackend import EPConfig
from lmdeploy import GenerationConfig

def main(model, config):
    with epbackend.pipeline(model, EPConfig.from_json(config)) as pipe:
        endless = GenerationConfig(max_new_tokens=300, ignore_eos=True, do_sample=False)
        print("READY", flush=True)
        while True:
            pipe(["the quick"] * 4, gen_config=endless, do_preprocess=False)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@dataclass
class Running:
    """A process, those it started, and the shared memory they mapped."""

    process: subprocess.Popen
    log: Path
    family: list[psutil.Process] = field(default_factory=list)
    segments: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Notes who is there now, and what they map."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family = [psutil.Process(self.process.pid), *descendants(self.process.pid)]
        self.segments |= {segment for each in self.family for segment in _segments(each.pid)}

    def workers(self) -> list[psutil.Process]:
        """The processes that multiprocessing started for ranks or engines."""
        return [each for each in self.family[1:] if "multiprocessing.spawn" in " ".join(each.cmdline())]

    def listening(self) -> set[tuple[str, int]]:
        """Where the family waits for connections."""
        connections = [found for each in self.family for found in each.net_connections("tcp")]
        return {tuple(found.laddr) for found in connections if found.status == psutil.CONN_LISTEN}

    def assert_nothing_left(self) -> None:
        """No process of the family still runs, no segment of theirs still is."""
        deadline = time.monotonic() + PATIENCE_S
        while left := self._left():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.1)

    def kill(self) -> None:
        """Ends whoever is still there."""
        for each in [*descendants(self.process.pid), *self.family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    def _left(self) -> list[str]:
        alive = [each for each in self.family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        return [str(each) for each in alive] + [name for name in self.segments if Path(name).exists()]


def ending(code: int) -> str:
    """How a process ended, in words, from its exit code as Python gives it."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def engine_workers() -> list[psutil.Process]:
    """The ranks that an engine of this very process started, in their order."""
    children = [child for child in multiprocessing.active_children() if child.name.startswith("ExecutorProc")]
    return [psutil.Process(child.pid) for child in sorted(children, key=lambda child: child.name)]


@contextlib.contextmanager
def throttled_rank(rank: int, share: float) -> Iterator[None]:
    """The rank of the engine that this process has, or starts, is stopped all the time but for that share of it."""
    ended = threading.Event()

    def throttle() -> None:
        worker = None
        while not ended.wait(THROTTLE_S * share):
            with contextlib.suppress(psutil.NoSuchProcess):
                if worker is None or not worker.is_running():
                    workers = engine_workers()
                    worker = workers[rank] if len(workers) > rank else None
                if worker is not None:
                    worker.suspend()
                    ended.wait(THROTTLE_S * (1 - share))
                    worker.resume()

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def start(tmp_path: Path, script: str, *arguments: str, ready: str = "READY") -> Running:
    """Starts the script and waits until it prints a line with `ready`; its output goes to tmp_path/log."""
    file, log = tmp_path / "script.py", tmp_path / "log"
    file.write_text(script)
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(file), *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=_before_the_script,
        )
    running = Running(process, log)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not (ended := process.poll() is not None) and ready not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert not ended or ready in log.read_text(), log.read_text()
    finally:
        running.look()
        if ready not in log.read_text():
            running.kill()
    return running


def _before_the_script() -> None:
    # A shell's background jobs ignore SIGINT, and nohup's SIGHUP; they would hand that down to what tests start.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # Scripts run until they are killed: one must not outlive tests that are themselves killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _segments(pid: int) -> set[str]:
    try:
        return set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))
    except OSError:
        return set()
