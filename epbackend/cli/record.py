"""`epbackend record`: the loads of a real run, to plan a placement on."""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from epbackend.cli.loads import facts, print_load
from epbackend.cli.output import JsonOption, console, json_if
from epbackend.cli.session import ModelArgument, running, takes_config
from epbackend.config import EPConfig
from epbackend.errors import ConfigError, EPError
from epbackend.files import check_apart, check_target


@takes_config
def record(
    model: ModelArgument,
    prompts: Annotated[Path, typer.Option(help="One prompt a line; or, named .json, a list of them.")],
    out: Annotated[Path, typer.Option(help="JSON for the loads of every layer: what plan and SGLang read.")],
    settings: EPConfig,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 64,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="JSON or npz for which experts are chosen together, counted on some of the tokens: plan --affinity "
            "reads it."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts, and write down how many tokens each expert of each layer got."""
    texts = read_prompts(prompts)
    check_apart({"out": out, "pairs": pairs}, {"--prompts": [prompts]})
    with json_if(as_json) as print_json:
        load = _run(model, settings, texts, out, max_new_tokens, pairs)
        if print_json:
            also = {} if pairs is None else {"pairs": str(pairs)}
            print_json({"loads": str(out), **also, "prompts": len(texts), **facts(settings, load)})
        else:
            print_load(load)
            beside = "" if pairs is None else f"; pairs: {pairs}"
            console.print(f"{len(texts)} prompts; loads: {out}{beside}", highlight=False)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a JSON list where its name ends in .json, otherwise one a line.

    Raises:
        ConfigError: the file is missing, has no prompt, or its JSON is no list of texts; or it is such a list under
            another name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: {path} cannot be read: {getattr(error, 'strerror', error)}") from None
    if path.suffix.lower() == ".json":
        prompts = _list_of_texts(text, path)
    elif re.match(r'\s*\[\s*"', text):  # not as [INST] does
        raise ConfigError(f"prompts: {path} begins as a JSON list does: give it a name that ends in .json")
    else:
        prompts = text.splitlines()
    if not (found := [prompt for prompt in prompts if prompt.strip()]):
        raise ConfigError(f"prompts: {path} has none; write one a line")
    return found


def _list_of_texts(text: str, path: Path) -> list[str]:
    try:
        prompts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"prompts: {path} is no JSON: {error}") from None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"prompts: {path} must be a list of texts")
    return prompts


def _run(
    model: str, config: EPConfig, prompts: list[str], out: Path, max_new_tokens: int, pairs: Path | None
) -> Any:
    """The load of answering the prompts, written to `out`; and their pairs to `pairs`."""
    from lmdeploy import GenerationConfig

    from epbackend.engines.lmdeploy.hub import locate
    from epbackend.engines.lmdeploy.load.pairs import counting_pairs
    from epbackend.engines.lmdeploy.load.recording import Recording
    from epbackend.placement.formats.pairs import write_pairs

    recording = Recording.of(out, locate(model), config.ep_size)
    if pairs is not None:
        check_target("pairs", pairs)
    generation = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    with ExitStack() as stack:
        if pairs is not None:
            counted = stack.enter_context(
                counting_pairs(config.world_size, recording.layers, pairs.stem, recording.numbering)
            )
        with running(model, config) as pipe:
            before = pipe.load()
            answers = pipe.infer(prompts, gen_config=generation, do_preprocess=False)
            load = pipe.load().since(before)
        failed = [
            f"prompt {number}, {prompt[:40]!r}: {answer.error_message}"
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)
            if answer.finish_reason == "error"
        ]
        if len(failed) == len(prompts):
            raise EPError(f"no prompt was answered; {failed[0]}")
        recording.write(load)
        if pairs is not None:
            write_pairs(counted(), pairs)
    if failed:
        raise EPError(f"{out}: is without {len(failed)} of {len(prompts)} prompts; {failed[0]}")
    return load
