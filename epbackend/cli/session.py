"""One pipeline as the commands use it: read the config, start the pipeline, stream an answer."""

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import epbackend
from epbackend.cli.output import error_console, read_config, say
from epbackend.config import EPConfig
from epbackend.config.overrides import Override, assignment, read_value
from epbackend.errors import ConfigError, EPError
from epbackend.models import TINY_MODELS

PANEL = "Expert parallelism (each over what the config file says)"
ENGINE = "Engine (likewise)"
ModelArgument = Annotated[
    str, typer.Argument(help=f"Path of a checkpoint, or {', '.join(TINY_MODELS)} (packaged).")
]


@dataclass(frozen=True)
class Answer:
    """What a prompt got back."""

    text: str
    token_ids: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


def load_config(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="YAML, JSON or MindIE config.json; without it: one rank, every default.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or ascend.", rich_help_panel=PANEL)
    ] = None,
    ep_size: Annotated[
        int | None,
        typer.Option(
            "--ep-size",
            "--ep",
            "--expert-parallel-size",
            help="Ranks that share the experts.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    ep_level: Annotated[
        str | None,
        typer.Option(help="1, 2, or '{prefill: 2, decode: 1}'.", rich_help_panel=PANEL),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(
            "--tp", "--tp-size", "--tensor-parallel-size", help="Tensor parallelism.", rich_help_panel=PANEL
        ),
    ] = None,
    dp: Annotated[
        int | None,
        typer.Option(
            "--dp",
            "--dp-size",
            "--data-parallel-size",
            help="Attention groups with requests of their own.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    dispatcher: Annotated[
        str | None,
        typer.Option(help="auto, a name, or names in order of preference.", rich_help_panel=PANEL),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=ENGINE)
    ] = None,
    session_len: Annotated[
        int | None,
        typer.Option(
            "--session-len",
            "--max-model-len",
            "--context-length",
            help="Longest prompt plus answer, in tokens.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(
            "--max-batch-size",
            "--max-num-seqs",
            "--max-running-requests",
            help="Requests decoded together.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(help="DEBUG, INFO, WARNING, ERROR or CRITICAL.", rich_help_panel=ENGINE),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SETTING=VALUE",
            help="Any setting, as engine.dtype=float32 (epbackend config show lists them). Repeatable.",
            rich_help_panel=PANEL,
        ),
    ] = None,
) -> EPConfig:
    """The config of a file, or the defaults, with what options say over it; warnings go to stderr."""
    given = {
        "device": ("--device", device),
        "ep_size": ("--ep-size", ep_size),
        "ep_level": ("--ep-level", None if ep_level is None else read_value(ep_level, "--ep-level")),
        "engine.tp": ("--tp", tp),
        "engine.dp": ("--dp", dp),
        "dispatcher": ("--dispatcher", dispatcher),
        "engine.dtype": ("--dtype", dtype),
        "engine.session_len": ("--session-len", session_len),
        "engine.max_batch_size": ("--max-batch-size", max_batch_size),
        "engine.log_level": ("--log-level", log_level and log_level.upper()),
    }
    overrides = [
        Override(name, value, origin) for name, (origin, value) in given.items() if value is not None
    ]
    overrides += map(assignment, assignments or ())
    settings, remarks = read_config(config or {}, overrides)
    for remark in remarks:
        say(error_console, f"warning: {remark}", "yellow")
    return settings


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `load_config` in the place of its parameter `settings`."""
    own = inspect.signature(command).parameters
    options = inspect.signature(load_config).parameters

    @functools.wraps(command)
    def run(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in options}
        command(**values, settings=load_config(**chosen))

    parameters = [each for name, each in own.items() if name != "settings"] + list(options.values())
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    )
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


@contextmanager
def running(
    model: str, config: EPConfig, chat_template: str | None = None, **arguments: Any
) -> Iterator[Any]:
    """The LMDeploy pipeline of `model`, closed at the end; what its start prints goes to stderr.

    `arguments` are further ones of LMDeploy's pipeline.

    Raises:
        ConfigError: the engine would be TurboMind, which does not tell what its experts do: these commands show it.
    """
    if config.engine.backend == "turbomind":
        raise ConfigError(
            "engine.backend: this command shows what the experts did, which TurboMind does not tell; use epbackend "
            "serve, epbackend.pipeline, or engine.backend: pytorch"
        )
    if chat_template is not None:
        from epbackend.engines.lmdeploy.hub import locate
        from epbackend.engines.lmdeploy.server.chat_templates import chat_template_config

        arguments["chat_template_config"] = chat_template_config(
            chat_template, locate(model), arguments.get("trust_remote_code", False)
        )
    ranks = config.world_size
    with error_console.status(f"starting {model} on {ranks} rank{'s' * (ranks > 1)}"):
        pipe = epbackend.pipeline(model, config, **arguments)
    with pipe:
        yield pipe


def ask(
    pipe: Any,
    prompt: Any,
    generation: dict[str, Any],
    *,
    show: Callable[[str], None] | None = None,
    raw: bool = True,
) -> Answer:
    """The answer to one prompt; `show` gets each piece of text as it comes.

    `generation` holds fields of LMDeploy's GenerationConfig: greedy unless they say otherwise. `raw` continues the
    prompt as it stands, otherwise the model's chat template is applied. Ctrl-C stops the answer and is raised.
    """
    from lmdeploy import GenerationConfig

    start = time.perf_counter()
    text, token_ids = "", []
    # A session is a handle to stop its request by; several engines behind one pipe (dp > 1) offer none.
    session = pipe.session() if hasattr(pipe, "session") else None
    stoppable = {} if session is None else {"sessions": session}
    try:
        for piece in pipe.stream_infer(
            prompt, gen_config=GenerationConfig(**generation), do_preprocess=not raw, **stoppable
        ):
            if piece.finish_reason == "error":
                raise EPError(f"the engine gave no answer: {piece.error_message}")
            text += piece.text
            token_ids += piece.token_ids
            if show:
                show(piece.text)
    except KeyboardInterrupt:
        if session is not None:
            session.abort()
        raise
    return Answer(text, token_ids, time.perf_counter() - start)
