"""LMDeploy's OpenAI server with expert parallelism: one engine, or dp engines behind LMDeploy's proxy."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from epbackend.config import EPConfig
from epbackend.engines.lmdeploy import plug
from epbackend.engines.lmdeploy.deployment import LOOPBACK, check_port, free_port, start_engines, stop_engines
from epbackend.engines.lmdeploy.engine import engine_config
from epbackend.engines.lmdeploy.load import LoadBoard, last_words
from epbackend.errors import WorkerError

PROXY_START_S = 60.0


def serve_model(model_path: str, config: EPConfig, host: str, port: int, **kwargs: Any) -> None:
    """Serves until SIGINT or SIGTERM, then ends every process. Call it in the main thread.

    With `engine.dp` > 1 a proxy listens at host and port, and its engines at free ports of the loopback interface.
    Further arguments go to LMDeploy's `api_server.serve` (model_name, api_keys, ...).

    Raises:
        ConfigError: the port is in use; checked before anything is loaded.
        WorkerError: an engine ended by itself.
    """
    check_port(host, port)
    kwargs.setdefault("log_level", config.engine.log_level)
    with _sigterm_as_exit():
        if config.engine.dp == 1:
            plug.enable(config)
            try:
                _serve_engine(model_path, config, 0, host, port, kwargs)
            finally:
                plug.disable()
        else:
            _serve_behind_proxy(model_path, config, host, port, kwargs)


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
        if said := last_words(0):
            raise WorkerError(f"the engine failed: {said}") from error
        raise


def _serve_behind_proxy(
    model_path: str, config: EPConfig, host: str, port: int, kwargs: dict[str, Any]
) -> None:
    from lmdeploy.serve.proxy.proxy import proxy

    board = LoadBoard(config.world_size)
    proxy_at = LOOPBACK if host == "0.0.0.0" else host
    processes = start_engines(
        config,
        board,
        _run_engine_server,
        [
            (model_path, config.to_json(), dp_rank, free_port(), (proxy_at, port), kwargs)
            for dp_rank in range(config.engine.dp)
        ],
    )
    ended: list[BaseProcess] = []
    threading.Thread(target=_stop_with_first, args=(processes, ended), daemon=True).start()
    try:
        # Its status file would bring nodes of an earlier deployment back.
        proxy(server_name=host, server_port=port, disable_cache_status=True, log_level=kwargs["log_level"])
    finally:
        stop_engines(processes)
        board.remove()
    if ended:
        raise WorkerError(f"{ended[0].name} ended with exit code {ended[0].exitcode}; its log is above")


def _run_engine_server(
    model_path: str,
    config_json: str,
    dp_rank: int,
    port: int,
    proxy_at: tuple[str, int],
    kwargs: dict[str, Any],
) -> None:
    """An engine process behind the proxy."""
    config = EPConfig.from_json(config_json)
    plug.enable(config)
    _await_listener(proxy_at)
    proxy_url = f"http://{proxy_at[0]}:{proxy_at[1]}"
    _serve_engine(model_path, config, dp_rank, LOOPBACK, port, {**kwargs, "proxy_url": proxy_url})


def _await_listener(address: tuple[str, int]) -> None:
    """LMDeploy tells the proxy of its server once, so the proxy has to listen by then."""
    deadline = time.monotonic() + PROXY_START_S
    while True:
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"the proxy does not listen at {address[0]}:{address[1]}: {error}"
                ) from error
            time.sleep(0.2)


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
