"""`epbackend chat`: a conversation on the terminal."""

from typing import Annotated

import typer

from epbackend.cli.output import console
from epbackend.cli.session import ConfigOption, ModelArgument, ask, load_config, running


def chat(
    model: ModelArgument,
    config: ConfigOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 256,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends the conversation, /new forgets it."""
    settings = load_config(config)
    messages: list[dict[str, str]] = []
    with running(model, settings) as pipe:
        console.print("[dim]an empty line or Ctrl-D ends, /new starts over[/dim]")
        while (text := _read()) != "":
            if text == "/new":
                messages.clear()
                continue
            messages.append({"role": "user", "content": text})
            answer = ask(
                pipe,
                messages,
                {"max_new_tokens": max_new_tokens},
                show=lambda piece: console.out(piece, end="", highlight=False),
                raw=False,
            )
            console.out("")
            messages.append({"role": "assistant", "content": answer.text})


def _read() -> str:
    """The next line; the end of input reads as an empty one."""
    try:
        return console.input("[bold]you:[/bold] ").strip()
    except EOFError:
        return ""
