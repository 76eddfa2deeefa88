"""`epbackend demo`: answers from experts in several processes, checked token by token; then with experts placed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from epbackend.cli.demo_balance import TOPICS, balance_demo
from epbackend.cli.loads import facts, imbalance, imbalance_in_words, print_load
from epbackend.cli.output import JsonOption, console, error_console, json_if
from epbackend.cli.pictures import save_imbalance, save_load
from epbackend.cli.session import Answer, ask, running
from epbackend.config import EPConfig
from epbackend.engines.load_report import LoadReport
from epbackend.errors import ConfigError
from epbackend.files import check_target
from epbackend.models import TINY_MODELS, resolve

PROMPTS = (
    "Fellow-Citizens of the Senate",
    "def bisect_left(a, x",
    "Call me Ishmael",
)
REDUNDANT_EXPERTS = 8
SESSION_LEN = 512
"""Tokens of a prompt and its answer: LMDeploy ends a longer answer there, Hugging Face goes on."""
LONGEST_ANSWER = SESSION_LEN - 1 - max(map(len, sum(TOPICS, PROMPTS)))
"""Whatever the tokenizer: at most a token for each character, and one before them."""
Engine = Literal["lmdeploy", "transformers"]


def engine_settings(engine: Engine, ranks: int) -> dict[str, Any]:
    """The settings of the demo's engine; with transformers each rank has prompts of its own."""
    of_engine: dict[str, Any] = {
        "dtype": "float32",
        "session_len": SESSION_LEN,
        "max_batch_size": 8,
        "cache_gb": 0.1,
        "log_level": "ERROR",
    }
    if engine == "transformers":
        of_engine = {"dp": ranks}
    return {"device": "cpu", "ep_size": ranks, "ep_level": 2, "engine": of_engine}


@dataclass(frozen=True)
class Run:
    """One engine, started, asked every prompt, and ended."""

    answers: list[Answer]
    load: LoadReport
    start_seconds: float

    @property
    def token_ids(self) -> list[list[int]]:
        return [answer.token_ids for answer in self.answers]

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.token_ids)) / sum(answer.seconds for answer in self.answers)


def demo(
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(TINY_MODELS)}, or a path.")
    ] = "tiny-qwen3-moe",
    ranks: Annotated[
        Literal["1", "2", "4"] | None,
        typer.Option(help="Processes that share the experts: 2, and 4 with --balance.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LONGEST_ANSWER,
            help="Tokens of each answer: 40, and 12 with --balance.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="Who runs the model around the experts.")] = "lmdeploy",
    balance: Annotated[
        bool, typer.Option("--balance", help="Instead: experts that move between ranks while they answer.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for pictures and recorded loads.")] = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Answer three prompts with a MoE model whose experts live in several processes, and check every token.

    Then record what the experts did, plan a placement with replicas of the busy ones, and answer again.
    """
    if balance and engine == "transformers":
        raise ConfigError(
            "--balance: experts do not move while transformers runs a model; use --engine lmdeploy"
        )
    if balance and max_new_tokens == 1:
        raise ConfigError("--max-new-tokens: --balance times the steps from token to token; use 2 or more")
    check_target("out", out / "expert-load.png")
    settings = engine_settings(engine, int(ranks or ("4" if balance else "2")))
    with json_if(as_json) as print_json:
        if balance:
            result = balance_demo(model, settings, max_new_tokens or 12, out, talk=not as_json)
        else:
            result = _demo(model, engine, settings, max_new_tokens or 40, out, talk=not as_json)
        if print_json:
            print_json(result)
    raise typer.Exit(0 if result["tokens_identical"] else 1)


def _demo(
    model: str, engine: Engine, settings: dict[str, Any], max_new_tokens: int, out: Path, *, talk: bool
) -> dict[str, Any]:
    """The demo's results as one object; with `talk` they are shown as they come."""
    start = time.perf_counter()
    config, answer_all = EPConfig.load(settings), RUNS[engine]
    run = answer_all(model, config, max_new_tokens, talk)
    picture = save_load(run.load, out / "expert-load.png", title=f"{model}, {config.ep_size} ranks")
    expected = greedy_tokens(resolve(model), PROMPTS, max_new_tokens)
    identical = run.token_ids == expected
    if talk:
        print_load(run.load)
        console.print(f"{run.tokens_per_second:.1f} tokens/s; heat map: {picture}", highlight=False)
        console.print(f"{_count(expected)} tokens beside Hugging Face's own generate: {_verdict(identical)}")
    result = {
        "tokens_identical": identical,
        "start_seconds": round(run.start_seconds, 2),
        "ranks": config.ep_size,
        "model": model,
        "engine": engine,
        "tokens_per_second": round(run.tokens_per_second, 1),
        "answers": [answer.text for answer in run.answers],
        "heat_map": str(picture),
        **facts(config, run.load),
    }
    if config.ep_size > 1:
        placement = {
            "loads": str(_recorded(model, run.load, out)),
            "redundant_experts": REDUNDANT_EXPERTS,
            "split": "level",
        }
        placed = EPConfig.load({**settings, "placement": placement})
        after = answer_all(model, placed, max_new_tokens, False)
        result["placement"] = placement | _compared(model, run, after, config.ep_size, out, talk)
        result["tokens_identical"] = identical and result["placement"]["tokens_identical"]
    result["seconds"] = round(time.perf_counter() - start, 2)
    if talk:
        console.print(
            f"all in {result['seconds']} s, {result['start_seconds']} s of it the start", highlight=False
        )
    return result


def _recorded(model: str, load: LoadReport, out: Path) -> Path:
    """The file of a run's loads."""
    from epbackend.engines.lmdeploy.load.recording import Recording

    recorded = out / "loads.json"
    Recording.of(recorded, resolve(model), len(load.tokens_RYE)).write(load)
    return recorded


def _compared(model: str, before: Run, after: Run, ranks: int, out: Path, talk: bool) -> dict[str, Any]:
    """The same answers without and with experts placed by the loads of the first run."""
    identical = after.token_ids == before.token_ids
    picture = save_imbalance(
        {"experts in order": before.load, "placed and levelled": after.load},
        out / "placement.png",
        title=f"{model}: {REDUNDANT_EXPERTS} replicas of busy experts, placed on {ranks} ranks",
    )
    if talk:
        console.print(
            f"\nplaced by these loads, {REDUNDANT_EXPERTS} replicas a layer, every batch levelled over them:"
        )
        console.print(f"busiest rank of a layer before: {imbalance_in_words(before.load)}", highlight=False)
        console.print(f"busiest rank of a layer after:  {imbalance_in_words(after.load)}", highlight=False)
        console.print(f"the same {_count(after.token_ids)} tokens again: {_verdict(identical)}")
        console.print(f"loads: {out / 'loads.json'}; before and after: {picture}", highlight=False)
    return {
        "tokens_identical": identical,
        "before": imbalance(before.load),
        "after": imbalance(after.load),
        "picture": str(picture),
    }


def run_lmdeploy(model: str, config: EPConfig, max_new_tokens: int, talk: bool) -> Run:
    start = time.perf_counter()
    with running(model, config) as pipe:
        start_seconds = time.perf_counter() - start
        before = pipe.load()
        answers = [_answer(pipe, prompt, max_new_tokens, talk) for prompt in PROMPTS]
        return Run(answers, pipe.load().since(before), start_seconds)


def _run_transformers(model: str, config: EPConfig, max_new_tokens: int, talk: bool) -> Run:
    from epbackend.engines.transformers.ranks import generate

    start = time.perf_counter()
    with error_console.status(f"{model} on {config.ep_size} ranks, by transformers"):
        done = generate(resolve(model), config, PROMPTS, max_new_tokens)
    start_seconds = time.perf_counter() - start - done.seconds
    if talk:
        for prompt, text in zip(PROMPTS, done.texts, strict=True):
            console.out(f"\n{prompt}", style="bold", end="", highlight=False)
            console.out(text, highlight=False)
    share = done.seconds / len(PROMPTS)  # the ranks answer beside each other
    answers = [Answer(text, ids, share) for text, ids in zip(done.texts, done.token_ids, strict=True)]
    return Run(answers, done.load, start_seconds)


RUNS = {"lmdeploy": run_lmdeploy, "transformers": _run_transformers}
"""Who answers the prompts, for each engine."""


def _answer(pipe: Any, prompt: str, max_new_tokens: int, talk: bool) -> Answer:
    """One greedy answer, streamed to the terminal behind its prompt."""
    if talk:
        console.out(f"\n{prompt}", style="bold", end="", highlight=False)
    show = (lambda text: console.out(text, end="", highlight=False)) if talk else None
    answer = ask(pipe, prompt, {"max_new_tokens": max_new_tokens, "ignore_eos": True}, show=show)
    if talk:
        console.out("")
    return answer


def greedy_tokens(model_path: str, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """Hugging Face transformers' own answers: the token ids that greedy float32 `generate` continues each prompt with.

    Every answer has `max_new_tokens` ids: none ends the text early.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokens = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,  # what the engine does with ignore_eos
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        tokens.append(output[0, inputs.input_ids.shape[1] :].tolist())
    return tokens


def _count(token_ids: list[list[int]]) -> int:
    return sum(map(len, token_ids))


def _verdict(identical: bool) -> str:
    return "[green]identical[/green]" if identical else "[red]DIFFERENT[/red]"
