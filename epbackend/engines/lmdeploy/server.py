"""LMDeploy's OpenAI server with expert parallelism: one engine, or dp engines behind LMDeploy's proxy."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from epbackend.config import EPConfig
from epbackend.engines.lmdeploy import balance, plug
from epbackend.engines.lmdeploy.lmdeploy_config import engine_config
from epbackend.engines.lmdeploy.load_report import SharedStats, last_error
from epbackend.engines.lmdeploy.processes import (
    LOOPBACK,
    POLL_S,
    check_port,
    free_port,
    listens,
    start_engines,
    stop_engines,
)
from epbackend.engines.lmdeploy.recording import Recording, recording_server
from epbackend.engines.lmdeploy.state import active
from epbackend.engines.placement import warm_splits
from epbackend.errors import WorkerError
from epbackend.placement.placement import Placement

PROXY_START_S = 60.0


def serve_model(
    model_path: str,
    config: EPConfig,
    host: str,
    port: int,
    placement: Placement | None = None,
    recording: Recording | None = None,
    **kwargs: Any,
) -> None:
    """Serves until SIGINT or SIGTERM, then ends every process. Call it in the main thread.

    With `engine.dp` > 1 a proxy listens at host and port, and its engines at free ports of the loopback interface.
    `recording` saves the experts' loads. Further arguments go to LMDeploy's `api_server.serve` (model_name,
    api_keys, ...).

    Raises:
        ConfigError: the port is in use; checked before anything is loaded.
        WorkerError: an engine ended by itself.
    """
    check_port(host, port)
    kwargs.setdefault("log_level", config.engine.log_level)
    with _sigterm_as_exit():
        if config.engine.dp == 1:
            plug.enable(config, placement)
            try:
                with recording_server(recording, active().load_report, [(host, port)]):
                    _serve_engine(model_path, config, 0, host, port, kwargs)
            finally:
                plug.disable()
        else:
            warm_splits(config)
            _serve_behind_proxy(model_path, config, host, port, placement, recording, kwargs)


def _serve_engine(
    model_path: str, config: EPConfig, dp_rank: int, host: str, port: int, kwargs: dict[str, Any]
) -> None:
    from lmdeploy.serve.openai import api_server

    try:
        api_server.serve(
            model_path,
            backend="pytorch",
            backend_config=engine_config(config, dp_rank),
            server_name=host,
            server_port=port,
            **kwargs,
        )
    except RuntimeError as error:
        # The engine's process ended; LMDeploy knows no more than that.
        if said := last_error(0):
            raise WorkerError(f"the engine failed: {said}") from error
        raise


def _serve_behind_proxy(
    model_path: str,
    config: EPConfig,
    host: str,
    port: int,
    placement: Placement | None,
    recording: Recording | None,
    kwargs: dict[str, Any],
) -> None:
    from lmdeploy.serve.proxy.proxy import proxy

    board = SharedStats(config.world_size)
    balancer = balance.start(config, board, placement)
    proxy_at = LOOPBACK if host == "0.0.0.0" else host
    ports = [free_port() for _ in range(config.engine.dp)]
    processes = start_engines(
        config,
        board,
        _run_engine_server,
        [
            (model_path, config.to_json(), dp_rank, engine_port, (proxy_at, port), placement, kwargs)
            for dp_rank, engine_port in enumerate(ports)
        ],
    )
    ended: list[BaseProcess] = []
    threading.Thread(target=_stop_with_first, args=(processes, ended), daemon=True).start()
    try:
        with recording_server(recording, board.report, [(LOOPBACK, each) for each in ports]):
            # With its status file, nodes of an earlier deployment would come back.
            proxy(
                server_name=host, server_port=port, disable_cache_status=True, log_level=kwargs["log_level"]
            )
    finally:
        stop_engines(processes)
        if balancer is not None:
            balancer.close()
        board.remove()
    if ended:
        raise WorkerError(f"{ended[0].name} ended with exit code {ended[0].exitcode}; its log is above")


def _run_engine_server(
    model_path: str,
    config_json: str,
    dp_rank: int,
    port: int,
    proxy_at: tuple[str, int],
    placement: Placement | None,
    kwargs: dict[str, Any],
) -> None:
    """An engine process behind the proxy."""
    config = EPConfig.from_json(config_json)
    plug.enable(config, placement)
    _await_listener(proxy_at)
    proxy_url = f"http://{proxy_at[0]}:{proxy_at[1]}"
    _serve_engine(model_path, config, dp_rank, LOOPBACK, port, {**kwargs, "proxy_url": proxy_url})


def _await_listener(address: tuple[str, int]) -> None:
    """Waits for the proxy: LMDeploy's server registers there once, when it starts."""
    deadline = time.monotonic() + PROXY_START_S
    while not listens(address):
        if time.monotonic() > deadline:
            raise WorkerError(f"the proxy does not listen at {address[0]}:{address[1]}")
        time.sleep(POLL_S)


def _stop_with_first(processes: list[BaseProcess], ended: list[BaseProcess]) -> None:
    """Stops this process, as SIGTERM would, when the first of the engines ends: the others wait for it."""
    first = wait([process.sentinel for process in processes])[0]
    ended.extend(process for process in processes if process.sentinel == first)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that everything that is open gets closed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
