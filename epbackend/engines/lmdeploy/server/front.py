"""What a server shows to its clients: name, keys, chat template, parsers, TLS, CORS, its path, its request log, and the
form of its own errors."""

from __future__ import annotations

import functools
import logging
import os
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from epbackend.engines.lmdeploy.environment import environment
from epbackend.engines.lmdeploy.patching import Patch, Patches
from epbackend.errors import ConfigError

if TYPE_CHECKING:
    from starlette.middleware import Middleware

EVERYTHING = ("*",)
UNAVAILABLE = "service_unavailable"
"""Kind of the error that comes with status 503."""
WHEN_UNAVAILABLE: Mapping[str, str] = {"retry-after": "10"}
"""Headers of an answer with status 503: seconds in which a server is often started again."""

DRAIN_S = 30.0
"""For which requests may finish after a signal, unless a server is told otherwise."""


@dataclass(frozen=True)
class Front:
    """The options of a server that are no setting of its engine."""

    model_name: str | None = None
    """What clients call the model. None: what the caller called it."""
    api_keys: tuple[str, ...] = ()
    """Of which a request must bring one (`Authorization: Bearer KEY`). None given: all requests are served."""
    chat_template: str | None = None
    """A name that LMDeploy knows, a Jinja file, or a JSON file of its ChatTemplateConfig. None: the model's own."""
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    request_log: bool = False
    """Whether each prompt, its parameters and its answer go to the log."""
    max_log_len: int | None = None
    """Characters of a prompt that the log shows."""
    access_log: bool = True
    """Whether each HTTP request is a line of the log."""
    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = None
    allow_origins: tuple[str, ...] = EVERYTHING
    allow_methods: tuple[str, ...] = EVERYTHING
    allow_headers: tuple[str, ...] = EVERYTHING
    allow_credentials: bool = False
    root_path: str = ""
    """Where a gateway that cuts this prefix off shows the server."""
    max_concurrent_requests: int | None = None
    """Requests worked on at once; more wait."""
    trust_remote_code: bool = False
    disable_fastapi_docs: bool = False
    allow_terminate_by_client: bool = False
    enable_abort_handling: bool = False
    announcement: str | None = None
    """A line for stderr, once clients can connect."""

    def check(self) -> None:
        """Raises ConfigError for what cannot work, before anything is loaded."""
        for name, file in (("ssl_keyfile", self.ssl_keyfile), ("ssl_certfile", self.ssl_certfile)):
            if file is not None and not os.access(file, os.R_OK):
                raise ConfigError(f"{name}: {file} cannot be read")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile belong together: give both, or neither")
        self._check_certificate()
        if not all(self.api_keys):
            raise ConfigError("api_keys: one is empty, and a request without a key would bring it; remove it")
        if self.max_concurrent_requests is not None and self.max_concurrent_requests < 1:
            raise ConfigError(
                f"max_concurrent_requests: {self.max_concurrent_requests} would let no request through; use 1 or more"
            )
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path: {self.root_path} must begin with a slash, as /models/a")
        self._check_parsers()

    def engine_arguments(self, model_path: str) -> dict[str, Any]:
        """What LMDeploy's `api_server.serve` takes of it, where that server is the one that clients reach.

        Raises:
            ConfigError: the chat template is unknown, or cannot be used.
        """
        template = None
        if self.chat_template is not None:
            from epbackend.engines.lmdeploy.server.chat_templates import chat_template_config

            template = chat_template_config(self.chat_template, model_path, self.trust_remote_code)
        return {
            "model_name": self.model_name,
            "api_keys": list(self.api_keys) or None,
            "chat_template_config": template,
            "tool_call_parser": self.tool_call_parser,
            "reasoning_parser": self.reasoning_parser,
            "max_log_len": self.max_log_len,
            "ssl": self.ssl_certfile is not None,
            "allow_origins": list(self.allow_origins),
            "allow_methods": list(self.allow_methods),
            "allow_headers": list(self.allow_headers),
            "allow_credentials": self.allow_credentials,
            "max_concurrent_requests": self.max_concurrent_requests,
            "trust_remote_code": self.trust_remote_code,
            "disable_fastapi_docs": self.disable_fastapi_docs,
            "allow_terminate_by_client": self.allow_terminate_by_client,
            "enable_abort_handling": self.enable_abort_handling,
        }

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Servers that LMDeploy starts meanwhile in this process are at `root_path`, with the logs that were asked."""
        patches, variables = Patches(), {}
        if self.ssl_certfile:
            variables = {"SSL_KEYFILE": str(self.ssl_keyfile), "SSL_CERTFILE": str(self.ssl_certfile)}
        with environment(variables):
            patches.apply(self.patches())
            try:
                yield
            finally:
                patches.restore()

    def patches(self) -> list[Patch]:
        """What is replaced while our server runs, for what clients see of it."""
        found = [
            Patch(
                "server-front",
                "uvicorn:run",
                "LMDeploy hands on neither the path behind a gateway nor whether requests are logged",
                "always",
                self._uvicorn_run,
            )
        ]
        if self.announcement is not None:
            found.append(
                Patch(
                    "server-announced",
                    "uvicorn:Server.startup",
                    "where clients find it is said when it listens, its engine being ready",
                    "always",
                    self._uvicorn_startup,
                )
            )
        if self.request_log:
            found.append(
                Patch(
                    "request-log",
                    "lmdeploy.logger:logger",
                    "its requests are logged only together with all else of level INFO",
                    "always",
                    lambda original: _request_log(),
                )
            )
        return found

    def _uvicorn_run(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            return original(*args, root_path=self.root_path, access_log=self.access_log, **kwargs)

        return run

    def _uvicorn_startup(self, original: Callable) -> Callable:
        @functools.wraps(original)
        async def startup(server: Any, *args: Any, **kwargs: Any) -> None:
            await original(server, *args, **kwargs)
            if server.started:
                print(self.announcement, file=sys.stderr, flush=True)

        return startup

    def _check_certificate(self) -> None:
        if self.ssl_keyfile is None or self.ssl_certfile is None:
            return

        def passphrase() -> NoReturn:
            raise ConfigError(
                f"ssl_keyfile: {self.ssl_keyfile} wants a passphrase, and nobody may be there to type it; write a "
                "key without one by `openssl pkey -in FILE -out NEW`"
            )

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self.ssl_certfile, self.ssl_keyfile, passphrase
            )
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"ssl_keyfile: {self.ssl_keyfile} with ssl_certfile {self.ssl_certfile} cannot be used: {error}; both "
                "are PEM files, the certificate is of this key"
            ) from None

    def _check_parsers(self) -> None:
        if self.tool_call_parser is None and self.reasoning_parser is None:
            return
        try:
            import_parsers().validate_parser_names(
                self.reasoning_parser, self.tool_call_parser, warn_legacy=False
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None


def import_parsers() -> ModuleType:
    """LMDeploy's parsers of answers, without what their import says whatever the model: that openai_harmony is missing.

    The plug says it for the model that needs it.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return "openai_harmony import failed" not in record.getMessage()

    log = logging.getLogger("lmdeploy")
    log.addFilter(wanted)
    try:
        return import_module("lmdeploy.serve.parsers")
    finally:
        log.removeFilter(wanted)


def _request_log() -> logging.Logger:
    from lmdeploy.utils import REQUEST_LOG_LEVEL

    log = logging.getLogger("epbackend.requests")
    log.setLevel(REQUEST_LOG_LEVEL)
    return log


def error_form(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it; `kind` is its type."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def asks_for_key(api_keys: Sequence[str]) -> list[Middleware]:
    """Middleware by which a request must bring one of the keys (`Authorization: Bearer KEY`); none for no keys."""
    if not api_keys:
        return []
    # Imported late: `Front` is read where neither of them is needed.
    from lmdeploy.serve.utils.server_utils import AuthenticationMiddleware
    from starlette.middleware import Middleware

    return [Middleware(AuthenticationMiddleware, tokens=list(api_keys))]
