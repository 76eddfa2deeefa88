"""All that is to be known from a GPU that is there for a few minutes, the most important first: `make gpu`.

    python -m benchmarks.cuda.session [--parts e2e layer engine] [--seconds 540] [--out FOLDER] [--list]

Parts that time nothing run first, side by side; then the others, one after the other on a quiet machine. Each runs in
processes of its own that end with its time. What a part finds is written while it runs: session.json (how each part
ended), one JSON file a benchmark, PART.log with what it printed, and notes.txt with what its long tests were doing. The
summary comes last, in one screen. Needs no network, and writes nothing but to that folder (and Triton's cache, and
Python's bytecode).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHORTEST_S = 20.0
"""A part is not begun with less time than that left."""
LOOK_S = 0.2
"""How often it is looked whether a command has ended."""
GRACE_S = 5.0
"""For a part that is told to end, before it is killed."""
EVERYWHERE = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": ""}
"""In the environment of every command. Bytecode is kept: each of many processes would compile what they import."""
LONGEST_LIST = 12
"""Failures that the summary names."""
_ENDED = "(PASSED|FAILED|ERROR|SKIPPED)"
OUTCOME = re.compile(
    rf"^(tests/\S+::.+?) {_ENDED}\b.*\[ *\d+%\]$|^\[gw\d+\] \[ *\d+%\] {_ENDED} (tests/.+?) *$", re.M
)
"""A line of pytest -v about one test, by itself or with xdist."""
FACTS = """
import json, os, torch
from importlib.util import find_spec
from epbackend.device.cuda import CudaDevice
device = CudaDevice()
reason = device.unavailable() or ("TRITON_INTERPRET is set: unset it" if device.emulated else None)
facts = {"torch": torch.__version__, "reason": reason}
if not reason:
    from benchmarks.cuda.report import machine_facts
    facts |= machine_facts()
    found = {name: find_spec(name) for name in ("torch", "transformers", "lmdeploy")}
    if slow := [name for name, spec in found.items() if spec and not os.path.exists(spec.cached)]:
        facts["slow"] = f"no bytecode of {', '.join(slow)}"
print("FACTS" + json.dumps(facts))
"""


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other, the next one also where one failed."""

    name: str
    what: str
    seconds: float
    """At most, all commands together."""
    commands: tuple[Sequence[str], ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    program: str | None = None
    """That must be on the PATH; else the part is skipped."""
    timed: bool = False
    """Whether it times something, and so wants the machine for itself."""


def parts(out: Path, python: str = sys.executable) -> tuple[Part, ...]:
    """In order of importance."""
    cores = os.cpu_count() or 1
    spread = ["-n", str(max(1, min(9, cores * 2 // 3)))] if find_spec("xdist") else []
    # Engines have several processes each, which mostly wait: for each other's, or for the GPU. Tests are handed out one
    # by one in their order, the most telling first.
    one_by_one = ["--dist", "loadgroup", "--no-loadscope-reorder"]
    spread_engines = ["-n", str(max(1, min(8, cores // 2))), *one_by_one] if find_spec("xdist") else []

    def pytest(*arguments: str) -> list[str]:
        # On several ranks the contract's layers would take too long; tests/cuda/test_ranks.py has some, joined by gloo.
        marked = ("-m", "cuda and not several_ranks")
        return [python, "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", *marked, *arguments]

    def bench(name: str, *arguments: str) -> list[str]:
        return [python, "-m", f"benchmarks.cuda{name}", *arguments]

    engines = [f"tests/engines/test_cuda_{name}.py" for name in ("plug", "graphs")]
    told = {
        "EPBACKEND_WHOLE_FAILURES": "60",
        "EPBACKEND_TEST_NOTES": str(out / "notes.txt"),
        # A process for each engine, before it starts: it imports all of LMDeploy and asks whether the GPU works. One
        # test has it checked all the same.
        "LMDEPLOY_ENABLE_CHECK_ENV": "0",
    }
    return (
        Part(
            "tests",
            "kernels and layers, against plain torch",
            150,
            (pytest("tests/cuda", "tests/symmetric", "tests/contract", *spread),),
            told,
        ),
        Part(
            "e2e",
            "whole engines against LMDeploy alone; two ranks on the GPU; experts that move under captured graphs",
            300,
            (pytest("tests/e2e", *engines, *spread_engines),),
            told,
        ),
        Part(
            "sanitizer",
            "memory accesses of every kernel",
            120,
            (
                (
                    "compute-sanitizer",
                    *("--tool", "memcheck", "--error-exitcode", "1"),
                    *pytest("tests/cuda/test_sanitized.py"),
                ),
            ),
            told | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            program="compute-sanitizer",
        ),
        Part(
            "layer",
            "one layer, rows copied and gathered, beside LMDeploy's",
            120,
            (bench(".layer", "--out", str(out / "layer.json")),),
            timed=True,
        ),
        Part(
            "engine",
            "whole engine, alone and with the plug in turns",
            200,
            (bench(".engine", "--seconds", "170", "--out", str(out / "engine.json")),),
            timed=True,
        ),
        Part(
            "kernels",
            "products beside their peers",
            150,
            (bench("", "--out", str(out / "kernels.json")),),
            timed=True,
        ),
        Part("tune", "better tiles", 600, (bench(".tune", "--table", str(out / "tiles.json")),), timed=True),
    )


class Session:
    """Runs parts within a time, and keeps a record that is whole at any moment."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self._deadline = out, time.monotonic() + seconds
        out.mkdir(parents=True, exist_ok=True)
        self.machine: dict[str, Any] = {}
        self.parts: list[dict[str, Any]] = []
        """How each ended, in the order in which they ended."""
        self._record = threading.Lock()
        self._left = threading.Event()

    def log(self, part: str) -> Path:
        """What the part's commands print."""
        return self.out / f"{part}.log"

    def look(self, python: str = sys.executable) -> str | None:
        """Note which GPU this is; why there is none, if so."""
        done = subprocess.run([python, "-c", FACTS], capture_output=True, text=True, timeout=180)
        _, found, facts = done.stdout.rpartition("FACTS")
        if not found:
            return f"torch does not start: {done.stderr.strip().splitlines()[-1:]}"
        self.machine = json.loads(facts)
        reason = self.machine.pop("reason")
        if shutil.which("nvidia-smi"):
            query = "--query-gpu=name,driver_version,clocks.max.sm,power.limit,memory.total"
            asked = subprocess.run(
                ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
            )
            self.machine["nvidia_smi"] = asked.stdout.strip()
        self._write()
        return reason

    def run_all(self, wanted: Sequence[Part]) -> None:
        """Those that time nothing side by side, then the others in their order; all end where this is left early."""
        beside = [part for part in wanted if not part.timed]
        with ThreadPoolExecutor(max(1, len(beside))) as threads:
            try:
                list(threads.map(self.run, beside))
            except BaseException:
                self._left.set()
                raise
        for part in wanted:
            if part.timed:
                self.run(part)

    def run(self, part: Part) -> dict[str, Any]:
        """How it ended: passed, failed, out of time, or skipped and why."""
        began = time.monotonic()
        print(f"{part.name}: {part.what} ...", flush=True)
        row: dict[str, Any] = {"part": part.name, "what": part.what}
        until = min(self._deadline, began + part.seconds)
        if part.program and shutil.which(part.program) is None:
            row |= {"ended": "skipped", "reason": f"{part.program} is not on the PATH"}
        elif self._deadline - began < SHORTEST_S:
            row |= {"ended": "skipped", "reason": "no time was left: raise --seconds, or name it in --parts"}
        else:
            self.log(part.name).write_text("")
            codes = [self._command(part, command, until) for command in part.commands]
            text = self.log(part.name).read_bytes().decode(errors="replace")
            ended = "out of time" if None in codes else "failed" if any(codes) else "passed"
            row |= {"ended": ended, "exit_codes": codes, **outcomes(text)}
        row["seconds"] = round(time.monotonic() - began, 1)
        print(f"{part.name}: {row['ended']} after {row['seconds']:.0f} s", flush=True)
        with self._record:
            self.parts.append(row)
            self._write()
        return row

    def _command(self, part: Part, command: Sequence[str], until: float) -> int | None:
        """Its exit code; None where its time was up."""
        with self.log(part.name).open("a") as log:
            print(f"\n$ {' '.join(command)}", file=log, flush=True)
            if time.monotonic() >= until:
                print("(no time was left)", file=log)
                return None
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **EVERYWHERE, **part.environment},
                start_new_session=True,
            )
        try:
            while process.poll() is None:
                if time.monotonic() >= until or self._left.wait(LOOK_S):
                    return None
            return process.returncode
        finally:
            end_group(process)

    def _write(self) -> None:
        whole = self.out / "session.part"
        whole.write_text(json.dumps({"machine": self.machine, "parts": self.parts}, indent=1) + "\n")
        whole.replace(self.out / "session.json")


def end_group(process: subprocess.Popen) -> None:
    """End a process, if it still runs, and all that it has left behind in its session."""
    for number, grace in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + grace
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    process.wait()


def outcomes(text: str) -> dict[str, Any]:
    """Counts of tests in what pytest -v printed, however far it came, and the names of those that failed."""
    by_test = {test or test_x: ended or ended_x for test, ended, ended_x, test_x in OUTCOME.findall(text)}
    if not by_test:
        return {}
    failed = [test for test, outcome in by_test.items() if outcome in ("FAILED", "ERROR")]
    counts = Counter(by_test.values())
    return {"tests": {name.lower(): count for name, count in sorted(counts.items())}, "failures": failed}


def summary(session: Session) -> str:
    """One screen: how each part ended, what failed, and the figures."""
    lines = [", ".join(str(value) for value in session.machine.values())]
    for row in session.parts:
        counts = ", ".join(f"{count} {name}" for name, count in row.get("tests", {}).items())
        said = counts or row.get("reason", row["what"])
        lines.append(f"{row['part']:10}{row['ended']:12}{row['seconds']:7.0f} s  {said}")
    failures = [name for row in session.parts for name in row.get("failures", [])]
    lines += [f"  failed: {name}" for name in failures[:LONGEST_LIST]]
    if len(failures) > LONGEST_LIST:
        lines.append(f"  and {len(failures) - LONGEST_LIST} more, in {session.out}/*.log")
    for name, show in (("layer", _layers), ("engine", _engines), ("kernels", _kernels)):
        file = session.out / f"{name}.json"
        if file.exists() and (rows := json.loads(file.read_text())["rows"]):
            lines += ["", *show(rows)]
    return "\n".join([*lines, "", f"all of it: {session.out}"])


def _layers(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each number of tokens."""
    lines = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        every = [row for row in rows if row["tokens"] == tokens]
        said = [
            f"{row['by']} {row['us']:.1f} us, {row['launches']:.0f} launches, host {row['host_us']:.0f} us"
            for row in every
        ]
        us = {row["by"]: row["us"] for row in every}
        share = f"  {us['epbackend'] / us['LMDeploy']:.3f}" if us.keys() >= {"epbackend", "LMDeploy"} else ""
        lines.append(f"layer T={tokens:<6}" + " | ".join(said) + share)
    return lines


def _engines(rows: list[dict[str, Any]]) -> list[str]:
    from benchmarks.cuda.engine import table

    return table(rows).splitlines()


def _kernels(rows: list[dict[str, Any]]) -> list[str]:
    """Each case by us and by the fastest of the others, rows and whole layers apart."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        timed = {row["by"]: row["us"] for row in rows if row["case"] == case and "us" in row}
        line = f"{case:40}"
        for ours, layers in (("epbackend", False), ("epbackend, layer", True)):
            theirs = {by: us for by, us in timed.items() if by != ours and ("layer" in by) is layers}
            if ours in timed:
                peer = min(theirs, key=theirs.__getitem__) if theirs else None
                beside = f" ({peer.removesuffix(', layer')} {theirs[peer]:.0f})" if peer else ""
                line += f"{'layer' if layers else 'rows':>6} {timed[ours]:.1f} us{beside}"
        lines.append(line)
    return lines


def main() -> str | None:
    names = [part.name for part in parts(Path())]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.session")
    parser.add_argument(
        "--parts", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--seconds", type=float, default=540, help="for all parts together")
    default = Path(os.environ.get("OUT") or "out/gpu-session")
    parser.add_argument("--out", type=Path, default=default, help=f"folder of the results ({default})")
    parser.add_argument("--list", action="store_true", help="the parts and their times, and run nothing")
    asked = parser.parse_args()
    wanted = [part for part in parts(asked.out.resolve()) if part.name in asked.parts]
    if asked.list:
        print("\n".join(f"{part.name:10}{part.seconds:5.0f} s  {part.what}" for part in wanted))
        return None
    session = Session(asked.out.resolve(), asked.seconds)
    if reason := session.look():
        return f"no session: {reason}"
    session.run_all(wanted)
    print(summary(session))
    failed = [row["part"] for row in session.parts if row["ended"] == "failed"]
    return f"failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
