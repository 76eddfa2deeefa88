"""`epbackend serve`: LMDeploy's OpenAI-compatible server with expert parallelism."""

import gc
from pathlib import Path
from typing import Annotated

import typer

from epbackend.cli import KEYS_VARIABLE
from epbackend.cli.output import error_console
from epbackend.cli.session import ModelArgument, takes_config
from epbackend.config import EPConfig
from epbackend.engines import lmdeploy
from epbackend.engines.lmdeploy.server.front import DRAIN_S, EVERYTHING, Front
from epbackend.errors import ConfigError

API, TLS, LOG = "Answers", "Access: keys, TLS, CORS", "Logs and records"


@takes_config
def serve(
    model: ModelArgument,
    settings: EPConfig,
    host: Annotated[
        str,
        typer.Option(
            "--host", "--server-name", help="Address to bind; the default is reached from this machine only."
        ),
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option("--port", "--server-port", min=1, max=65535)] = 23333,
    root_path: Annotated[
        str, typer.Option(metavar="/PREFIX", help="Behind a gateway that cuts this prefix off.")
    ] = "",
    served_model_name: Annotated[
        str | None,
        typer.Option(
            "--served-model-name", "--model-name", help="What clients call the model. [default: MODEL]"
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="A Jinja file, a name LMDeploy knows, or a .json file of its ChatTemplateConfig.",
            rich_help_panel=API,
        ),
    ] = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="LMDeploy's name of it, as qwen3.", rich_help_panel=API)
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="LMDeploy's name of it, as default.", rich_help_panel=API)
    ] = None,
    max_concurrent_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests worked on at once; more wait.", rich_help_panel=API)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the checkpoint.", rich_help_panel=API)
    ] = False,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            "--api-keys",
            envvar=KEYS_VARIABLE,
            show_envvar=True,
            help="A request must bring it. Repeatable. Every user of this machine sees it here: rather use a file, or "
            "the variable, with blanks between keys.",
            rich_help_panel=TLS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One key a line.", rich_help_panel=TLS)
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Private key: HTTPS.", rich_help_panel=TLS)
    ] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its certificate.", rich_help_panel=TLS)
    ] = None,
    allow_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origins", "--allowed-origins", help="Repeatable. [default: *]", rich_help_panel=TLS
        ),
    ] = None,
    allow_methods: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-methods", "--allowed-methods", help="Repeatable. [default: *]", rich_help_panel=TLS
        ),
    ] = None,
    allow_headers: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-headers", "--allowed-headers", help="Repeatable. [default: *]", rich_help_panel=TLS
        ),
    ] = None,
    allow_credentials: Annotated[bool, typer.Option("--allow-credentials", rich_help_panel=TLS)] = False,
    allow_terminate_by_client: Annotated[
        bool, typer.Option("--allow-terminate-by-client", help="GET /terminate.", rich_help_panel=TLS)
    ] = False,
    enable_abort_handling: Annotated[
        bool, typer.Option("--enable-abort-handling", help="POST /abort_request.", rich_help_panel=TLS)
    ] = False,
    disable_fastapi_docs: Annotated[
        bool,
        typer.Option("--disable-fastapi-docs", help="No page that describes the API.", rich_help_panel=TLS),
    ] = False,
    log_requests: Annotated[
        bool,
        typer.Option(
            "--log-requests",
            "--enable-log-requests",
            help="Prompts, parameters, answers.",
            rich_help_panel=LOG,
        ),
    ] = False,
    max_log_len: Annotated[
        int | None, typer.Option(min=0, help="Characters of a logged prompt.", rich_help_panel=LOG)
    ] = None,
    access_log: Annotated[
        bool,
        typer.Option(
            "--access-log/--disable-uvicorn-access-log", help="A line a request.", rich_help_panel=LOG
        ),
    ] = True,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the experts' loads there, now and then and at the end, to plan on.",
            rich_help_panel=LOG,
        ),
    ] = None,
    restart: Annotated[
        int, typer.Option(min=0, metavar="N", help="Start again so often after a failure of the engine.")
    ] = 0,
    drain_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="After SIGTERM, requests may finish for so long; a second one ends at once."
        ),
    ] = DRAIN_S,
) -> None:
    """Serve a model at http://HOST:PORT/v1; with dp > 1 one engine a data-parallel rank, behind one address."""
    name, ranks = served_model_name or model, settings.world_size
    on = f"on {ranks} rank{'s' * (ranks > 1)}"
    scheme, shown_host = "https" if ssl_certfile else "http", f"[{host}]" if ":" in host else host
    front = Front(
        model_name=name,
        api_keys=(*(api_key or ()), *(read_keys(api_key_file) if api_key_file else ())),
        chat_template=chat_template,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        request_log=log_requests,
        max_log_len=max_log_len,
        access_log=access_log,
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile,
        allow_origins=tuple(allow_origins or EVERYTHING),
        allow_methods=tuple(allow_methods or EVERYTHING),
        allow_headers=tuple(allow_headers or EVERYTHING),
        allow_credentials=allow_credentials,
        root_path=root_path,
        max_concurrent_requests=max_concurrent_requests,
        trust_remote_code=trust_remote_code,
        disable_fastapi_docs=disable_fastapi_docs,
        allow_terminate_by_client=allow_terminate_by_client,
        enable_abort_handling=enable_abort_handling,
        announcement=f"serving {name} at {scheme}://{shown_host}:{port}{root_path}/v1 {on}",
    )
    error_console.print(f"starting {name} {on}", highlight=False, markup=False, soft_wrap=True)
    try:
        lmdeploy.serve(
            model,
            settings,
            host=host,
            port=port,
            record=record,
            front=front,
            restart=restart,
            drain_seconds=drain_seconds,
        )
    except KeyboardInterrupt:  # while it loads; later it ends by itself
        raise typer.Exit(0) from None
    finally:
        # At its end Python would collect garbage among all that is left, for seconds; a supervisor waits for it.
        gc.freeze()


def read_keys(file: Path) -> list[str]:
    """The API keys of a file.

    Raises:
        ConfigError: it cannot be read, or has no key.
    """
    try:
        keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file: {file} cannot be read: {error}") from None
    if not keys:
        raise ConfigError(f"api_key_file: {file} has no key; write one a line")
    return keys
