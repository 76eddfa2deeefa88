"""LMDeploy's OpenAI server with expert parallelism: one engine, or dp engines behind one address.

However it ends, it ends whole and says so: 0 after a signal, ENGINE_FAILED after a failure of its engine, both within
seconds. With `restart` a process above it starts it again.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from epbackend.config import EPConfig
from epbackend.engines.lmdeploy import balance, plug
from epbackend.engines.lmdeploy.lmdeploy_config import engine_config
from epbackend.engines.lmdeploy.load.recording import Recording, recording_server
from epbackend.engines.lmdeploy.load.report import SharedStats, last_error
from epbackend.engines.lmdeploy.patching import Patches
from epbackend.engines.lmdeploy.processes import (
    LOOPBACK,
    POLL_S,
    free_port,
    listens,
    start_engines,
    start_server,
    stop_engines,
)
from epbackend.engines.lmdeploy.server.experts import ExpertEndpoints
from epbackend.engines.lmdeploy.server.front import DRAIN_S, Front, import_parsers
from epbackend.engines.lmdeploy.server.guard import Guard, end_server, looking_out, signals_unwind
from epbackend.engines.lmdeploy.server.metrics import ExpertMetrics
from epbackend.engines.lmdeploy.shown_log import ShownLog
from epbackend.engines.lmdeploy.state import active
from epbackend.engines.lmdeploy.workers.process_guard import signal_name
from epbackend.engines.placement import warm_splits
from epbackend.errors import ENGINE_FAILED, ConfigError, EngineFailedError, EPError, WorkerError
from epbackend.placement.placement import Placement

RESTART_AFTER_S = 1.0

logger = logging.getLogger("epbackend")


@dataclass(frozen=True)
class Serving:
    """What a server is asked to do, by the arguments of `serve_model`."""

    model_path: str
    config: EPConfig
    host: str
    port: int
    placement: Placement | None
    recording: Recording | None
    front: Front
    drain_seconds: float
    arguments: dict[str, Any]
    """Of LMDeploy's `api_server.serve`."""

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port


def serve_model(
    model_path: str,
    config: EPConfig,
    host: str,
    port: int,
    placement: Placement | None,
    recording: Recording | None,
    front: Front,
    *,
    restart: int = 0,
    drain_seconds: float = DRAIN_S,
    **kwargs: Any,
) -> None:
    """Serves until SIGINT or SIGTERM, then ends every process. Call it in the main thread.

    With `engine.dp` > 1 a reverse proxy listens at host and port, and its engines at free ports of this machine alone.
    `recording` saves the experts' loads, `front` says what clients see. A signal lets requests finish for
    `drain_seconds` at most; a second one ends all at once. After a failure of the engine, or where it was killed, the
    server is started again, `restart` times. Further arguments go to LMDeploy's `api_server.serve`.

    Raises:
        ConfigError: an argument cannot be right; checked before anything is loaded.
        EngineFailedError: the engine failed while it served, and was not or cannot be started again.
        WorkerError: the engine did not start.
    """
    if not (math.isfinite(drain_seconds) and drain_seconds >= 0):
        raise ConfigError(f"drain_seconds: must be a number of seconds from 0 on, not {drain_seconds}")
    if restart < 0:
        raise ConfigError(f"restart: must be how often to start again, from 0 on, not {restart}")
    kwargs = {"log_level": config.engine.log_level, **front.engine_arguments(model_path), **kwargs}
    serving = Serving(model_path, config, host, port, placement, recording, front, drain_seconds, kwargs)
    if restart:
        with signals_unwind():
            _serve_again(serving, restart)
    else:
        _serve_once(serving)


def _serve_again(serving: Serving, restarts: int) -> None:
    """Runs the server in a process of its own, and again whenever its engine fails or it is killed."""
    for left in range(restarts, -1, -1):
        failure = _serve_in_child(serving)
        if failure is None:
            return
        if left:
            logger.error("%s; the server is started again (%d times left)", failure, left)
            time.sleep(RESTART_AFTER_S)
    raise EngineFailedError(f"the engine failed once more after {restarts} restarts: {failure}")


def _serve_in_child(serving: Serving) -> EngineFailedError | None:
    """Returns when the server has ended: what it failed of, or None where it was asked to end.

    Raises:
        EPError: it could not start, and said why.
        WorkerError: it could not start.
    """
    ours, theirs = Pipe(duplex=False)
    with ours, theirs:
        server = start_server(_serve_child, (theirs, serving))
        try:
            server.join()
        except BaseException:  # SIGTERM or SIGINT: it drains
            server.terminate()
            server.join()
            raise
        error: EPError | None = ours.recv() if ours.poll() else None
    code = server.exitcode or 0
    if isinstance(error, EngineFailedError) or (error is None and code == 0):
        return error
    if code < 0:
        return EngineFailedError(f"the server was killed by {signal_name(-code)}")
    raise error or WorkerError(f"the server ended with exit code {code}; its log is above")


def _serve_child(failed: Connection, serving: Serving) -> None:
    """The process of `_serve_in_child`, which it tells of the error that it ends by."""
    try:
        _serve_once(serving)
    except EPError as error:
        failed.send(error)
        sys.exit(error.exit_code)


def _serve_once(serving: Serving) -> None:
    config, front = serving.config, serving.front
    guard = Guard(serving.drain_seconds)
    try:
        with signals_unwind(), front.shown(), ShownLog(config.engine.log_level):
            if config.engine.dp == 1:
                plug.enable(config, serving.placement)
                try:
                    stats, balancer = active().stats, active().balancer
                    assert stats is not None, "it is this process that starts the engine"
                    guard.experts = ExpertEndpoints(stats, serving.placement, balancer).app(front.api_keys)
                    saved = recording_server(serving.recording, stats.report, [serving.address])
                    with ExpertMetrics(stats), saved:
                        _serve_engine(serving, 0, guard)
                finally:
                    plug.disable()
            else:
                warm_splits(config)
                _serve_balanced(serving, guard)
    finally:
        # However the server was left: uvicorn repeats the signal by which the guard ended it.
        if guard.failure is not None:
            raise EngineFailedError(guard.failure)


def _serve_engine(serving: Serving, dp_rank: int, guard: Guard) -> None:
    import_parsers()
    from lmdeploy.serve.openai import api_server

    stats = active().stats
    try:
        with (
            _without_hint(api_server),
            guard.in_place(),
            looking_out(
                guard,
                None,
                lambda: stats.verdict if stats else None,
                serving.config.timeout_s,
                active().balancer,
            ),
        ):
            api_server.serve(
                serving.model_path,
                backend="pytorch",
                backend_config=engine_config(serving.config, dp_rank),
                server_name=serving.host,
                server_port=serving.port,
                **serving.arguments,
            )
    except RuntimeError as error:
        # The engine's process ended; LMDeploy knows no more than that.
        if said := last_error(0):
            raise WorkerError(f"the engine failed: {said}") from error
        raise


@contextmanager
def _without_hint(api_server: ModuleType) -> Iterator[None]:
    """LMDeploy prints where it will listen before it does, with dp > 1 at a port that is not the clients'."""
    vars(api_server)["print"] = lambda *_: None
    try:
        yield
    finally:
        del vars(api_server)["print"]


def _serve_balanced(serving: Serving, guard: Guard) -> None:
    import uvicorn

    from epbackend.engines.lmdeploy.patches.server import errors_in_openai_form
    from epbackend.engines.lmdeploy.server.reverse_proxy import ReverseProxy

    config, front, placement = serving.config, serving.front, serving.placement
    arguments = dict(serving.arguments)
    # A client's order to end is heeded here: of an engine that ends, we would say that it has failed.
    end = end_server if arguments.pop("allow_terminate_by_client", False) else None
    tls: dict[str, Any] = {}
    if arguments.pop("ssl", False):  # here, and not between us and the engines
        tls = {"ssl_keyfile": os.environ["SSL_KEYFILE"], "ssl_certfile": os.environ["SSL_CERTFILE"]}
    hidden = replace(
        front, root_path="", access_log=False, ssl_keyfile=None, ssl_certfile=None, announcement=None
    )
    behind = [
        replace(
            serving,
            host=LOOPBACK,
            port=free_port(),
            recording=None,
            front=hidden,
            drain_seconds=0.0,  # the reverse proxy has drained
            arguments=arguments,
        )
        for _ in range(config.engine.dp)
    ]
    addresses = [each.address for each in behind]
    with ExitStack() as started:
        errors = Patches()  # its own, as for a missing key; the engines have the plug
        errors.apply([errors_in_openai_form])
        started.callback(errors.restore)
        stats = SharedStats.of(config)
        started.callback(stats.remove)
        balancer = balance.start(config, stats, placement)
        guard.experts = ExpertEndpoints(stats, placement, balancer).app(front.api_keys)
        processes: list[BaseProcess] = []
        # Of engines that have failed nothing can be closed in order, and a stopped process would be waited for.
        started.callback(lambda: stop_engines(processes, at_once=guard.failure is not None))
        if balancer is not None:
            started.callback(balancer.close)
        processes += start_engines(
            config, stats, _run_engine_server, [(each, dp_rank) for dp_rank, each in enumerate(behind)]
        )
        _await_engines(processes, addresses, stats)
        engines = [f"http://{each.host}:{each.port}" for each in behind]
        app = ReverseProxy(engines, ExpertMetrics(stats)).app(end, front.api_keys)
        with (
            recording_server(serving.recording, stats.report, addresses),
            guard.in_place(),
            looking_out(guard, processes, lambda: stats.verdict, config.timeout_s, balancer),
        ):
            uvicorn.run(
                app,
                host=serving.host,
                port=serving.port,
                log_level=os.getenv("UVICORN_LOG_LEVEL", "info").lower(),
                **tls,
            )


def _run_engine_server(serving: Serving, dp_rank: int) -> None:
    """An engine process behind the reverse proxy."""
    plug.enable(serving.config, serving.placement)
    guard = Guard(serving.drain_seconds)
    os.environ.setdefault("UVICORN_LOG_LEVEL", "warning")  # it would tell of its own port
    try:
        with serving.front.shown():
            _serve_engine(serving, dp_rank, guard)
    finally:
        if guard.failure is not None:
            sys.exit(ENGINE_FAILED)


def _await_engines(
    processes: list[BaseProcess], addresses: list[tuple[str, int]], stats: SharedStats
) -> None:
    """Returns when all engines listen; raises WorkerError where one ends before."""
    while not all(map(listens, addresses)):
        for process in processes:
            if process.exitcode is not None:
                how = stats.verdict or f"exit code {process.exitcode}; its log is above"
                raise WorkerError(f"{process.name} ended while it started: {how}")
        time.sleep(POLL_S)
