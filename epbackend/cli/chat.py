"""`epbackend chat`: a conversation on the terminal."""

from typing import Annotated

import typer

from epbackend.cli.output import console
from epbackend.cli.session import ModelArgument, ask, running, takes_config
from epbackend.config import EPConfig


@takes_config
def chat(
    model: ModelArgument,
    settings: EPConfig,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 256,
    chat_template: Annotated[
        str | None,
        typer.Option(help="A Jinja file, a name LMDeploy knows, or a .json file of its ChatTemplateConfig."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the checkpoint.")
    ] = False,
) -> None:
    """Talk to a model.

    Ctrl-C stops an answer; an empty line, Ctrl-D or a second Ctrl-C ends the conversation, /new forgets it.
    """
    messages: list[dict[str, str]] = []
    with running(model, settings, chat_template, trust_remote_code=trust_remote_code) as pipe:
        console.print("[dim]Ctrl-C stops an answer, an empty line or Ctrl-D ends, /new starts over[/dim]")
        while (text := _read()) != "":
            if text == "/new":
                messages.clear()
                continue
            messages.append({"role": "user", "content": text})
            said = ""

            def show(piece: str) -> None:
                nonlocal said
                said += piece
                console.out(piece, end="", highlight=False)

            try:
                ask(pipe, messages, {"max_new_tokens": max_new_tokens}, show=show, raw=False)
            except KeyboardInterrupt:
                console.print("[dim] (stopped)[/dim]", end="")
            console.out("")
            messages.append({"role": "assistant", "content": said})


def _read() -> str:
    """The next line; the end of input and Ctrl-C read as an empty one."""
    try:
        return console.input("[bold]you:[/bold] ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
