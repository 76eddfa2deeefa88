"""What stands between a server's clients and its application: true health, failures told, an end that is bounded.

The application is LMDeploy's (`api_server`), or the reverse proxy before several of them. The guard answers for it once
the engine has failed: requests that wait get a 503 that says what happened, so do new ones, and the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any, NoReturn
from urllib.parse import parse_qsl

import psutil
from starlette.requests import ClientDisconnect

from epbackend.balance.balancer import Balancer
from epbackend.dispatch.running_time import RunningTime
from epbackend.engines.lmdeploy.patching import Patch, Patches
from epbackend.engines.lmdeploy.processes import check_port
from epbackend.engines.lmdeploy.server.experts import PREFIX
from epbackend.engines.lmdeploy.server.front import UNAVAILABLE, WHEN_UNAVAILABLE, error_form
from epbackend.engines.lmdeploy.workers.process_guard import (
    STOPPED,
    descendants,
    end_at_once,
    ending_signals,
    kill_all,
    process_state,
)
from epbackend.engines.lmdeploy.workers.rank_watch import LOOK_S

logger = logging.getLogger("epbackend")

LINGER_S = 2.0
"""How long a server that has failed still answers, so that clients and probes learn of it."""
CLOSING_S = 1
"""How long connections that are still open then have, and those of idle clients when the server ends."""
FAMILY_EVERY_S = 1.0
"""How often all processes of the server are looked at."""
AFTER_RANKS_S = 1.5
"""How much longer than a rank another process may be stopped: the watch over the ranks knows more, and is first."""
TOGETHER_S = 0.3
"""Signals in so short a time are one order."""
PROBED_EVERY_S = 0.05
"""How often a server that has just started is asked whether its engine has answered."""
NOT_IMPLEMENTED = "not_implemented_error"
"""Kind of the error that comes with status 501."""
TOO_LARGE = "request_too_large"
"""Kind of the error that comes with status 413."""
LARGEST_BODY = 32 * 2**20
"""Bytes of a request. While its JSON is read nobody else is answered: so many take most of a second."""

_PACKED = (
    "the experts' weights are packed for their device when they are loaded, and cannot be replaced while the server "
    "runs; start it again with the new checkpoint"
)
REFUSED = {
    "/update_weights": _PACKED,
    "/update_weights_from_ipc": _PACKED,
    "/init_weights_update_group": _PACKED,
    "/update_weights_from_distributed": _PACKED,
    "/destroy_weights_update_group": _PACKED,
    "/v1/embeddings": "the model generates text; embeddings take a model, and a server, for them",
}
"""Endpoints of LMDeploy that cannot work, and why."""
DEEP_SLEEP = (
    "level 2 drops the weights and wants new ones afterwards, but the experts' are packed for their device when they "
    "are loaded; use level 1"
)


class Guard:
    """The state of one server, and the ASGI application around it."""

    def __init__(self, drain_seconds: float, end: Callable[[], None] | None = None) -> None:
        """`end` is what happens after a failure: by default `end_server`."""
        self._end = end or end_server
        self.failure: str | None = None
        """What the engine failed of; None while it serves."""
        self._drain_seconds = drain_seconds
        self._asked_at: float | None = None
        """When it was asked to end."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed = asyncio.Event()
        self._probed = False
        """Whether the application has asked its engine, as it begins to when clients can connect."""
        self.app: Any = None
        """The application behind it."""
        self.experts: Any = None
        """The application that answers below `/epbackend/`; None: `app` does, which knows no such path."""

    @property
    def serving(self) -> bool:
        """Whether clients can reach the application, and it has its engine."""
        return self._loop is not None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Servers that uvicorn runs meanwhile in this process are behind the guard."""
        patches = Patches()
        patches.apply(self.patches())
        try:
            yield
        finally:
            patches.restore()

    def patches(self) -> list[Patch]:
        """What is replaced meanwhile."""
        return [
            Patch(
                "server-behind-guard",
                "uvicorn:run",
                "LMDeploy's server stays when its engine has failed, and waits for clients without a bound",
                "always",
                self._uvicorn_run,
            ),
            Patch(
                "server-ends-by-these",
                "uvicorn.server:HANDLED_SIGNALS",
                "it knows no hangup, and ends by what comes to all processes also where its parent decides",
                "always",
                lambda original: ending_signals(),
            ),
            Patch(
                "client-ends-by-this",
                "lmdeploy.serve.openai.endpoints.management:os",
                "a client's request to end sends SIGTERM, which is ignored where a parent decides",
                "always",
                lambda original: SimpleNamespace(getpid=os.getpid, kill=lambda *_: end_server()),
            ),
            Patch(
                "second-signal",
                "uvicorn:Server.handle_exit",
                "a second SIGTERM changes nothing",
                "always",
                self._handle_exit,
            ),
            Patch(
                "idle-clients-not-awaited",
                "uvicorn:Server._wait_tasks_to_complete",
                "clients that keep an idle TLS connection open hold the end up for half a minute",
                "always",
                _wait_without_idle_clients,
            ),
        ]

    def fail(self, text: str) -> None:
        """The engine has failed: tells all clients, ends the server soon. From any thread, while it is `serving`."""
        loop = self._loop
        if loop is None:
            return
        self.failure = text
        logger.critical("%s", text)
        with contextlib.suppress(RuntimeError):  # the loop has just ended
            loop.call_soon_threadsafe(self._failed.set)
        ending = threading.Timer(LINGER_S, self._end)
        ending.daemon = True
        ending.start()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") or "/"
        if path in ("/health", "/ready"):
            await self._first_probe(scope)
        if self.failure is not None:
            await self._say_failure(path, send)
        elif path == "/ready":
            await self._say_ready(scope, send)
        elif self.experts is not None and path.startswith(PREFIX):
            await self.experts(scope, receive, send)
        elif reason := _refused(path, scope):
            await _answer(send, 501, error_form(f"{path}: {reason}", NOT_IMPLEMENTED, NOT_IMPLEMENTED))
        else:
            await self._pass_on(scope, receive, send, path)

    async def _live(self, scope: Any, receive: Any, send: Any) -> None:
        """The application's start and end, between which it serves."""

        async def receive_watched() -> Any:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self._loop = None
            return message

        async def send_watched(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._loop = asyncio.get_running_loop()
            await send(message)

        await self.app(scope, receive_watched, send_watched)

    async def _pass_on(self, scope: Any, receive: Any, send: Any, path: str) -> None:
        """The application's answer; when the engine fails before it has begun, a 503 in its place."""
        begun = False

        async def watched(message: Any) -> None:
            nonlocal begun
            if not begun and message.get("status", 200) in (500, 503):
                # The application may know before us that its engine is lost, but not why.
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._failed.wait(), 2 * LOOK_S)
            if self.failure is not None and not begun:
                return
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        answer = asyncio.ensure_future(self.app(scope, receive, watched))
        failed = asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait({answer, failed}, return_when=asyncio.FIRST_COMPLETED)
            if self.failure is None:
                await answer
                return
        except asyncio.CancelledError:  # by uvicorn, which would say 500
            if self._asked_at is not None and not begun:
                text = f"the server ends, and gave requests under way {self._drain_seconds:g} s more"
                await _answer(send, 503, _unavailable(text))
            raise
        finally:
            failed.cancel()
            if not answer.done():
                answer.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await answer
        if not begun:
            await self._say_failure(path, send)
        else:
            # A stream has its status already. It ends by an error, and without the end that clients wait for.
            event = f"data: {json.dumps(_unavailable(self.failure))}\n\n".encode()
            with contextlib.suppress(Exception):  # or it had ended just before
                await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _say_failure(self, path: str, send: Any) -> None:
        if path in ("/health", "/ready"):
            await _answer(send, 503, {"status": "unhealthy", "message": self.failure})
        else:
            await _answer(send, 503, _unavailable(self.failure or ""))

    async def _first_probe(self, scope: Any) -> None:
        """Returns when the application has asked its engine for the first time."""
        while not self._probed and self.failure is None:
            self._probed = (await self._ask_app("/health", scope)).get("status") != "initializing"
            if not self._probed:
                await asyncio.sleep(PROBED_EVERY_S)

    async def _say_ready(self, scope: Any, send: Any) -> None:
        """503 while it does not take requests: it has failed, it drains, or its engine sleeps."""
        state = await self._ask_app("/health", scope)
        if (await self._ask_app("/is_sleeping", scope)).get("is_sleeping"):
            state = {"status": "sleeping", "message": "The engine sleeps until POST /wakeup."}
        if self._asked_at is not None:
            state = {"status": "draining", "message": "The server ends."}
        await _answer(send, 200 if state.get("status") == "healthy" else 503, state)

    async def _ask_app(self, path: str, scope: Any) -> dict[str, Any]:
        """What the application says at another path than the one that was asked for."""
        parts: list[bytes] = []
        messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def nothing() -> Any:
            message = next(messages, None)
            if message is None:  # who waits for us to hang up waits until the answer is there
                await asyncio.Event().wait()
            return message

        async def keep(message: Any) -> None:
            parts.append(message.get("body", b""))

        path = scope.get("root_path", "") + path
        await self.app({**scope, "path": path, "raw_path": path.encode()}, nothing, keep)
        with contextlib.suppress(ValueError):
            return json.loads(b"".join(parts))
        return {}

    def _uvicorn_run(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def run(app: Any, **kwargs: Any) -> Any:
            self.app = _bounded(app)
            try:
                return original(self, timeout_graceful_shutdown=max(1, round(self._drain_seconds)), **kwargs)
            except SystemExit:  # it could not listen, and has told its log
                if self._asked_at is None:
                    check_port(kwargs["host"], kwargs["port"])
                raise

        return run

    def _handle_exit(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def handle_exit(server: Any, number: int, frame: Any) -> None:
            if self._asked_at is not None and self.failure is None:
                if _is_another(number, self._asked_at):
                    end_at_once(128 + number)
                return
            if self.failure is not None:
                server.config.timeout_graceful_shutdown = CLOSING_S
            self._asked_at = time.monotonic()
            original(server, number, frame)

        return handle_exit


def _bounded(app: Any) -> Any:
    """The application, which reads no body of more than LARGEST_BODY bytes: such requests get a 413."""

    async def bounded(scope: Any, receive: Any, send: Any) -> None:
        declared = dict(scope.get("headers", ())).get(b"content-length", b"")
        size = int(declared) if declared.isdigit() else 0
        got = 0

        async def receive_bounded() -> Any:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            return message if got <= LARGEST_BODY else {"type": "http.disconnect"}

        async def send_bounded(message: Any) -> None:
            if got <= LARGEST_BODY:
                await send(message)

        if size <= LARGEST_BODY:
            with contextlib.suppress(ClientDisconnect):
                await app(scope, receive_bounded, send_bounded)
        if max(size, got) > LARGEST_BODY:
            text = f"the request has more than {LARGEST_BODY} bytes, which no context holds; shorten it"
            await _answer(send, 413, error_form(text, TOO_LARGE, TOO_LARGE))

    return bounded


def _wait_without_idle_clients(original: Callable) -> Callable:
    @functools.wraps(original)
    async def wait_tasks_to_complete(server: Any) -> None:
        abandoning = asyncio.ensure_future(_abandon_closing(server.server_state.connections))
        try:
            await original(server)
        finally:
            abandoning.cancel()

    return wait_tasks_to_complete


async def _abandon_closing(connections: set[Any]) -> None:
    """Ends connections that were closed CLOSING_S ago and have nothing to send: TLS waits for the client to agree."""
    closing: set[Any] = set()
    while True:
        done = {
            each
            for each in connections
            if each.transport.is_closing() and not each.transport.get_write_buffer_size()
        }
        for each in done & closing:
            each.transport.abort()
        closing = done
        await asyncio.sleep(CLOSING_S)


@contextmanager
def signals_unwind() -> Iterator[None]:
    """The first SIGTERM, SIGINT or SIGHUP unwinds this process, so that everything that is open gets closed; a second
    one ends it and all its processes at once."""
    seen: list[tuple[int, float]] = []

    def unwind() -> NoReturn:
        if seen[0][0] == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(0)

    def handle(number: int, frame: Any) -> None:
        if not seen:
            seen.append((number, time.monotonic()))
            unwind()
        if _is_another(number, seen[0][1]):
            end_at_once(128 + number)

    before = {number: signal.signal(number, handle) for number in ending_signals()}
    try:
        yield
    except Exception:
        # LMDeploy waits for its engine by a condition of a manager, which, interrupted, takes any error for handled.
        if seen:
            unwind()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_another(number: int, first_at: float) -> bool:
    """Whether it asks again, as a user does who does not want to wait.

    `timeout` and programs that hand signals on (`uv run`) send one to the server and the terminal the same to all; a
    terminal that closes sends its own and the shell's.
    """
    return number != signal.SIGHUP and time.monotonic() > first_at + TOGETHER_S


def end_server() -> None:
    """Ends the server in this process as its supervisor would, or where a parent decides, as that would."""
    os.kill(os.getpid(), ending_signals()[0])


@contextmanager
def looking_out(
    guard: Guard,
    processes: list[BaseProcess] | None,
    verdict: Callable[[], str | None],
    timeout_s: float,
    balancer: Balancer | None,
) -> Iterator[None]:
    """Tells the guard of an engine that fails while it serves, started and stopped with the block.

    It has failed when it left a verdict, when one of its `processes` ended (None: the one that LMDeploy starts for it),
    or when any process is stopped for longer than `timeout_s`. The planner may be stopped: the balancer replaces it.
    What a failed engine leaves of Ray is ended.
    """
    stop, seen = threading.Event(), dict[int, psutil.Process]()
    arguments = (guard, processes, verdict, timeout_s, balancer, seen, stop)
    thread = threading.Thread(target=_look_out, args=arguments, name="epbackend-lookout", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        if guard.failure is not None:
            kill_all(each for each in seen.values() if _is_of_ray(each))


def _is_of_ray(process: psutil.Process) -> bool:
    """Whether it is one of Ray's that still runs: its agents stay for a minute where their raylet was killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.name().startswith("ray::")
    return False


def _look_out(
    guard: Guard,
    processes: list[BaseProcess] | None,
    verdict: Callable[[], str | None],
    timeout_s: float,
    balancer: Balancer | None,
    seen: dict[int, psutil.Process],
    stop: threading.Event,
) -> None:
    """`seen` gets all processes of the server, by their number."""
    stopped_since: dict[int, float] = {}
    running, looked = RunningTime(), 0.0
    while not guard.serving:
        if stop.wait(LOOK_S):
            return
    watched = processes
    if watched is None:
        watched = [each for each in multiprocessing.active_children() if each.name == "mp_engine_proc"]
    while not stop.is_set():
        ended = wait([each.sentinel for each in watched], timeout=LOOK_S)
        if not guard.serving:
            return
        text = verdict()
        if text is None and processes is None and not watched:
            text = "the engine's process ended as soon as the server had started; its log is above"
        if text is None and ended:
            first = next(each for each in watched if each.sentinel in ended)
            text = f"the engine's process {first.name} ended with exit code {_exit_code(first)}; its log is above"
        now = running.look()
        if text is None and now > looked + FAMILY_EVERY_S:
            looked, family = now, {each.pid: each for each in descendants(os.getpid())}
            seen |= family
            family.pop((balancer and balancer.planner_pid) or 0, None)
            text = _stopped_one(family, stopped_since, running, timeout_s + AFTER_RANKS_S)
        if text is not None:
            guard.fail(text)
            # Who is stopped heeds no request to end, and would be waited for.
            kill_all(each for each in descendants(os.getpid()) if process_state(each.pid) in STOPPED)
            return


def _exit_code(process: BaseProcess) -> int | None:
    with contextlib.suppress(ValueError):  # LMDeploy has closed it just now
        process.join(timeout=1)
        return process.exitcode
    return None


def _stopped_one(
    family: dict[int, psutil.Process], since: dict[int, float], running: RunningTime, limit_s: float
) -> str | None:
    """Names one of these processes that is stopped for longer than that. `since` is kept from look to look."""
    for pid in list(since):
        if pid not in family:
            del since[pid]
    for pid, process in family.items():
        if process_state(pid) not in STOPPED:
            since.pop(pid, None)
        elif (stopped_s := running.age_s(since.setdefault(pid, time.monotonic()))) > limit_s:
            with contextlib.suppress(psutil.NoSuchProcess):
                return (
                    f"process {pid} of the engine ({process.name()}) is stopped (state T: SIGSTOP or a debugger) for "
                    f"{stopped_s:.0f} s"
                )
    return None


def _refused(path: str, scope: Any) -> str | None:
    if path == "/sleep" and any(map(_is_deep, parse_qsl(scope.get("query_string", b"").decode("latin-1")))):
        return DEEP_SLEEP
    return REFUSED.get(path)


def _is_deep(argument: tuple[str, str]) -> bool:
    """Whether LMDeploy would read level 2 from this argument of a query: it calls `int`, to which 02 and +2 are 2."""
    name, value = argument
    with contextlib.suppress(ValueError):
        return name == "level" and int(value) == 2
    return False


def _unavailable(message: str) -> dict[str, Any]:
    return error_form(message, UNAVAILABLE, UNAVAILABLE)


async def _answer(send: Any, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers += [(name.encode(), value.encode()) for name, value in WHEN_UNAVAILABLE.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
