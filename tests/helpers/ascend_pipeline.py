"""A LMDeploy pipeline on NPUs, in a process of its own as a user starts it: its answers, its load, its end.

Settings are the caller's; `ascend_demo` is the one that people see. On emulated NPUs only CANN is ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.helpers import ascend
from tests.helpers.answers import Answer
from tests.helpers.cann import registry
from tests.helpers.patience import PATIENCE_S
from tests.helpers.processes import ending

ENGINE = {
    "dtype": "float16",
    "session_len": 512,
    "max_batch_size": 8,
    "cache_gb": 0.1,
    "log_level": "ERROR",
}
DONE = "PIPELINE "
"""Begins the line that tells what happened."""


@dataclass(frozen=True)
class Told:
    """By the pipeline's process."""

    answers: list[Answer]
    facts: dict[str, Any]
    """Of the load report (`cli.loads.facts`)."""
    failure: str | None
    """The error, in words, that a lost rank ended the pipeline with."""
    moved: dict[str, Any] | None = None
    """What balance did (`BalanceReport`), where experts were to move."""
    later: tuple[list[Answer], ...] = ()
    """The answers while they moved, one list for each time that all were asked."""


def run(
    npu: str,
    ranks: int,
    model: str,
    settings: dict[str, Any],
    *,
    lose: int | None = None,
    texts: int | None = None,
    migrations: int = 0,
    log: Path | None = None,
) -> Told:
    """Answer by `ranks` NPUs (those of `ascend.PLATFORMS`); then kill the rank `lose`, and ask again.

    With `texts` only so many are asked; the same are asked again, one after the other, until so many `migrations`
    have been made. `log` is a folder for each process's calls (`cann.registry.LOG`).

    `settings` are those of the config beside the engine's common ones.
    """
    config = {"device": "ascend", "ep_size": ranks} | settings
    config["engine"] = ENGINE | settings.get("engine", {})
    environment = ascend.outside()
    if npu != ascend.REAL:
        environment |= ascend.environment(npu, ranks)
    if log is not None:
        environment[registry.LOG] = str(log)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        __spec__.name,
        model,
        json.dumps([config, texts, migrations, lose]),
    ]
    done = subprocess.run(
        command,
        cwd=ascend.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=10 * PATIENCE_S,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(DONE)]
    said = f"it ended with {ending(done.returncode)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert lines, said
    assert done.returncode == 0, f"all was told, then {said}"
    told = json.loads(lines[-1].removeprefix(DONE))
    answers = [Answer(**each) for each in told["answers"]]
    later = tuple([Answer(**each) for each in answers] for answers in told["later"])
    return Told(answers, told["facts"], told["failure"], told["moved"], later)


def _tell(
    model: str, settings: dict[str, Any], texts: int | None, migrations: int, lose: int | None
) -> dict[str, Any]:
    import epbackend
    from epbackend.cli.loads import facts
    from epbackend.config import EPConfig
    from epbackend.errors import WorkerError
    from tests.helpers.answers import TEXTS, ask
    from tests.helpers.processes import engine_workers

    config, failure, moved = EPConfig.load(settings), None, None
    if config.engine.executor == "ray":
        _start_ray(config.ep_size)
    later: list[list[Answer]] = []
    with epbackend.pipeline(model, config) as pipe:
        answers = ask(pipe, TEXTS[:texts])
        deadline = time.monotonic() + PATIENCE_S
        while migrations and (moved := asdict(pipe.balance()))["migrations"] < migrations:
            assert time.monotonic() < deadline, moved
            later.append([answer for text in TEXTS[:texts] for answer in ask(pipe, [text])])
        told = facts(config, pipe.load())
        if lose is not None:
            engine_workers()[lose].kill()
            try:
                ask(pipe)
            except WorkerError as error:
                failure = str(error)
    return {
        "answers": [asdict(each) for each in answers],
        "later": [[asdict(each) for each in answers] for answers in later],
        "facts": told,
        "failure": failure,
        "moved": moved,
    }


def _start_ray(npus: int) -> None:
    """Ray finds no emulated NPUs: it is told, as by `ray start --resources`."""
    import ray

    os.environ.setdefault("RAY_AUTH_TOKEN", "of a test")  # else Ray writes one into the home
    ray.init(address="local", num_cpus=npus, resources={"NPU": npus}, include_dashboard=False)


if __name__ == "__main__":
    # At once: what is not yet written is lost where the interpreter's end fails.
    print(DONE + json.dumps(_tell(sys.argv[1], *json.loads(sys.argv[2]))), flush=True)
