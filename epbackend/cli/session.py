"""One pipeline as the commands use it: read the config, start the pipeline, stream an answer."""

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
from epbackend.errors import EPError
from epbackend.models import TINY_MODELS

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="YAML, JSON or MindIE config.json; without it: one rank, every default."
    ),
]
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


def load_config(path: Path | None) -> EPConfig:
    """The config of a file, or the defaults; warnings go to stderr."""
    if path is None:
        return EPConfig()
    config, remarks = read_config(path)
    for remark in remarks:
        say(error_console, f"warning: {remark}", "yellow")
    return config


@contextmanager
def running(model: str, config: EPConfig) -> Iterator[Any]:
    """The LMDeploy pipeline of `model`, closed at the end; what its start prints goes to stderr."""
    ranks = config.world_size
    with error_console.status(f"starting {model} on {ranks} rank{'s' * (ranks > 1)}"):
        pipe = epbackend.pipeline(model, config)
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
    prompt as it stands, otherwise the model's chat template is applied.
    """
    from lmdeploy import GenerationConfig

    start = time.perf_counter()
    text, token_ids = "", []
    for piece in pipe.stream_infer(prompt, gen_config=GenerationConfig(**generation), do_preprocess=not raw):
        if piece.finish_reason == "error":
            raise EPError(f"the engine failed: {piece.error_message} (its log above says more)")
        text += piece.text
        token_ids += piece.token_ids
        if show:
            show(piece.text)
    return Answer(text, token_ids, time.perf_counter() - start)
