"""`epbackend demo`: the main job in a minute, checked against Hugging Face transformers."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from epbackend.cli.loads import facts, print_load, save_heat_map
from epbackend.cli.output import console, json_stdout
from epbackend.cli.reference import greedy_tokens
from epbackend.cli.session import Answer, JsonOption, ask, running
from epbackend.config import EPConfig
from epbackend.models import TINY_MODELS, resolve

PROMPTS = (
    "Fellow citizens of the Senate",
    "class Parser:\n    def __init__(self",
    "In the year 1861",
)


def demo(
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(TINY_MODELS)}, or a path.")
    ] = "tiny-qwen3-moe",
    ranks: Annotated[Literal["1", "2", "4"], typer.Option(help="Processes that share the experts.")] = "2",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 40,
    out: Annotated[Path, typer.Option(help="Folder for the heat map.")] = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Answer three prompts with a MoE model whose experts live in several processes, and check every token."""
    config = EPConfig.load(
        {
            "device": "cpu",
            "ep_size": int(ranks),
            "ep_level": 2,
            "engine": {
                "dtype": "float32",
                "session_len": 512,
                "max_batch_size": 8,
                "cache_gb": 0.1,
                "log_level": "ERROR",
            },
        }
    )
    if as_json:
        with json_stdout() as print_json:
            result = _run(model, config, max_new_tokens, out, talk=False)
            print_json(result)
    else:
        result = _run(model, config, max_new_tokens, out, talk=True)
    raise typer.Exit(0 if result["tokens_identical"] else 1)


def _run(model: str, config: EPConfig, max_new_tokens: int, out: Path, *, talk: bool) -> dict:
    """The demo's facts as one object; with `talk` shown as they come."""
    start = time.perf_counter()
    with running(model, config) as pipe:
        started = time.perf_counter() - start
        answers = [_answer(pipe, prompt, max_new_tokens, talk) for prompt in PROMPTS]
        load = pipe.load()
        if talk:
            print_load(load)
    picture = save_heat_map(load, out / "expert-load.png", title=f"{model}, {config.ep_size} ranks")

    expected = greedy_tokens(resolve(model), PROMPTS, max_new_tokens)
    identical = [answer.token_ids for answer in answers] == expected
    result = {
        "tokens_identical": identical,
        "seconds": round(time.perf_counter() - start, 2),
        "start_seconds": round(started, 2),
        "ranks": config.ep_size,
        "model": model,
        "tokens_per_second": round(_speed(answers), 1),
        "answers": [answer.text for answer in answers],
        "heat_map": str(picture),
        **facts(config, load),
    }
    if talk:
        verdict = "[green]identical[/green]" if identical else "[red]DIFFERENT[/red]"
        console.print(f"{result['tokens_per_second']} tokens/s; heat map: {picture}", highlight=False)
        console.print(f"{sum(map(len, expected))} tokens beside Hugging Face's own generate: {verdict}")
        console.print(
            f"all in {result['seconds']} s, {result['start_seconds']} s of it the start", highlight=False
        )
    return result


def _answer(pipe: Any, prompt: str, max_new_tokens: int, talk: bool) -> Answer:
    """One greedy answer, streamed to the terminal behind its prompt."""
    if talk:
        console.out(f"\n{prompt}", style="bold", end="", highlight=False)
    show = (lambda text: console.out(text, end="", highlight=False)) if talk else None
    answer = ask(pipe, prompt, {"max_new_tokens": max_new_tokens, "ignore_eos": True}, show=show)
    if talk:
        console.out("")
    return answer


def _speed(answers: list[Answer]) -> float:
    """Tokens per second over all answers."""
    return sum(len(answer.token_ids) for answer in answers) / sum(answer.seconds for answer in answers)
