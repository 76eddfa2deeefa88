"""`epbackend generate`: one prompt, one answer, and the load of the experts."""

from typing import Annotated, Any

import typer

from epbackend.cli.loads import facts, print_load
from epbackend.cli.output import JsonOption, console, json_if
from epbackend.cli.session import ModelArgument, ask, running, takes_config
from epbackend.config import EPConfig


@takes_config
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    settings: EPConfig,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    chat_template: Annotated[
        bool, typer.Option(help="Wrap the prompt in the model's chat template.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt with the model's experts spread over the config's ranks."""
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        generation["temperature"] = temperature
    stream = stream and not as_json
    show = (lambda text: console.out(text, end="", highlight=False)) if stream else None
    with json_if(as_json) as print_json, running(model, settings) as pipe:
        answer = ask(pipe, prompt, generation, show=show, raw=not chat_template)
        load = pipe.load()
        if print_json:
            print_json(
                {
                    "text": answer.text,
                    "token_ids": answer.token_ids,
                    "tokens_per_second": round(answer.tokens_per_second, 2),
                    **facts(settings, load),
                }
            )
        else:
            console.out("" if stream else answer.text)
            print_load(load)
            console.print(f"{answer.tokens_per_second:.1f} tokens/s", highlight=False)
