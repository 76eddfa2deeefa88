"""The state of a deployment as one object that JSON can say: what `GET /epbackend/status` answers and `top` draws.

It is read from the load report's memory alone, so any process of the machine can make it; no rank is asked.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import psutil

from epbackend.engines.lmdeploy.load.report import STATS_VARIABLE, StatsReader
from epbackend.errors import EPError
from epbackend.names import PHASES


def status(stats: StatsReader) -> dict[str, Any]:
    """`at_s` is a clock for differences: `tokens_RY`, those of each phase, and `steps` count from the engine's start.

    `balance` holds the fields of BalanceReport, and is None where balance is off.
    """
    about, load, now = stats.about, stats.latest(), time.monotonic()
    balance = about.get("balance")
    if balance and balance["planner_age_s"]:
        balance["planner_age_s"] += now - about["balance_at"]
    sharing = about.get("ep_size", len(load.tokens_RYE))
    return {
        "at_s": now,
        "ep_size": sharing,
        "layers": list(load.layers),
        "experts": load.tokens_RYE.shape[2],
        "top_k": load.top_k,
        "steps": load.calls,
        "tokens_RY": load.tokens_RYE[:sharing].sum(axis=2).tolist(),
        "tokens_of_phase": {
            phase: tokens_RYE[:sharing].sum(axis=2).tolist()
            for phase, tokens_RYE in zip(PHASES, load.tokens_2RYE, strict=True)
        },
        "step_imbalance_Y": load.step_imbalance_Y.tolist(),
        "split": about.get("split", {}),
        "dispatchers": {phase: choice["name"] for phase, choice in load.dispatchers.items()},
        "balance": balance,
    }


def local_engines() -> dict[int, StatsReader]:
    """The engines of this user that run on this machine, by the process that started them."""
    found = {}
    for variable in {_variable_of(process) for process in psutil.process_iter()} - {""}:
        with contextlib.suppress(EPError):  # it has ended, but a child of its program has not
            reader = StatsReader.attach(variable)
            if pid := reader.about.get("pid"):
                found[pid] = reader
    return found


def _variable_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ().get(STATS_VARIABLE, "")
    return ""
