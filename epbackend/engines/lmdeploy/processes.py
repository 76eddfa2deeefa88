"""Processes of a deployment with `engine.dp` > 1: one engine each, joined in one group of expert ranks.

Importing this module does not import LMDeploy, which reads its environment when it is imported: a new process sets it
first.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from typing import Any

from epbackend.config import EPConfig
from epbackend.engines.lmdeploy.load.report import STATS_VARIABLE, SharedStats, record_error
from epbackend.engines.lmdeploy.workers.process_guard import (
    GRACE_S,
    descendants,
    ended_by_us,
    guard_process,
    kill_all,
)
from epbackend.errors import ConfigError

ENGINE_VARIABLE = "EPBACKEND_ENGINE"
"""The number of an engine among those that one process started."""

GUARD = 'if __name__ == "__main__":'
LOOPBACK = "127.0.0.1"
REMEDIES = {
    errno.EADDRNOTAVAIL: "that is no address of this machine, so take 127.0.0.1, or 0.0.0.0 for all it has",
    errno.EACCES: "ports below 1024 need privileges, so choose another",
}
"""Why a server cannot listen -> what to do, where nobody else listens there."""
POLL_S = 0.2
"""Between two attempts to connect."""


def check_starts(config: EPConfig) -> None:
    """Raises ConfigError where this process cannot start the ranks, which import the program that starts them.

    In a rank that imports a program without a main guard it does not return: it leaves a line for the parent, and ends.
    """
    if config.world_size == 1:
        return
    if imports_program():
        for rank in range(config.world_size):  # this one's number is not known yet
            record_error(
                rank, f"the ranks import this program, which starts ranks again: put that under {GUARD}"
            )
        os._exit(1)
    ranks = f"ep_size: {config.ep_size}, but" if config.ep_size > 1 else f"{config.world_size} ranks, but"
    if multiprocessing.current_process().daemon:
        raise ConfigError(f"{ranks} a daemonic process may not start any: make it with daemon=False")
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"{ranks} under torchrun each process would start all of them, since LMDeploy starts the ranks itself: "
            "start the program by python alone"
        )
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program is not None and not os.path.exists(program):
        raise ConfigError(
            f"{ranks} ranks import the program that starts them, and {program} is no file: save it"
        )


def imports_program() -> bool:
    """Whether this process is a rank, or another that multiprocessing started, which imports its starter's program."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def start_engines(
    config: EPConfig, stats: SharedStats, target: Callable[..., None], arguments: Iterable[tuple]
) -> list[BaseProcess]:
    """Starts `target(*arguments_of_its_rank)` in a process for each of the dp engines.

    The processes end with their parent. Their ranks meet at a port of this machine.

    Raises:
        ConfigError: RAY_ADDRESS names no host.
    """
    environment = {
        "LMDEPLOY_DP_MASTER_ADDR": own_address(),
        "LMDEPLOY_DP_MASTER_PORT": str(free_port()),
        STATS_VARIABLE: stats.variable,
    }
    context = multiprocessing.get_context("spawn")
    # Not daemons: an API server starts a process for its engine.
    processes: list[BaseProcess] = [
        context.Process(
            target=_run,
            args=(environment | {ENGINE_VARIABLE: str(dp_rank)}, target, each),
            name=f"epbackend-engine-{dp_rank}",
        )
        for dp_rank, each in enumerate(arguments)
    ]
    started: list[BaseProcess] = []
    try:
        for process in processes:
            process.start()
            started.append(process)
            ended_by_us(process)
    except BaseException:
        stop_engines(started, at_once=True)
        raise
    return processes


def start_server(target: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
    """Starts `target(*arguments)` in a process that ends with this one, and that takes its own time after ENDING."""
    process = multiprocessing.get_context("spawn").Process(
        target=_run_server, args=(target, arguments), name="epbackend-server"
    )
    process.start()
    ended_by_us(process)
    return process


def stop_engines(processes: Iterable[BaseProcess], grace_s: float = 0.0, *, at_once: bool = False) -> None:
    """Ends the processes: those still there after `grace_s` by ENDING, then, or `at_once`, by SIGKILL."""
    processes = list(processes)
    started_by_them = [each for process in processes for each in descendants(process.pid or 0)]
    if at_once:
        kill_all(started_by_them)
    for process in processes:
        process.join(timeout=grace_s)
    for process in processes:
        if at_once:
            process.kill()
        else:
            process.terminate()
    for process in processes:
        process.join(timeout=5 * GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()
    kill_all(started_by_them)


def own_address() -> str:
    """By which ranks find this machine: as the cluster that RAY_ADDRESS names sees it, else by the loopback interface.

    Raises:
        ConfigError: RAY_ADDRESS names no host.
    """
    cluster = os.environ.get("RAY_ADDRESS", "")
    host, _, port = cluster.rpartition(":")
    if not host or not port.isdigit():  # "auto": the cluster of this machine
        return LOOPBACK
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing, and chooses the interface
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS={cluster}: {error.strerror}; it is HOST:PORT of the cluster's head"
        ) from error


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raises ConfigError where a server could not listen."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = REMEDIES.get(error.errno or 0, "stop what listens there, or choose another")
            raise ConfigError(f"port {port} of {host} cannot be used ({error.strerror}): {remedy}") from error


def listens(address: tuple[str, int]) -> bool:
    """Whether a connection is accepted there."""
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


def _run(environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    guard_process()
    target(*arguments)


def _run_server(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    guard_process(in_its_own_time=True)
    target(*arguments)
