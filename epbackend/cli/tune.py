"""`epbackend tune`: the best tiles of a model's experts on this GPU."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from epbackend.checkpoint import expert_count, expert_width, read_model_config
from epbackend.cli.output import console
from epbackend.device import get_device
from epbackend.engines.lmdeploy.checks import BLOCKED_FP8, W8A8, form_of_experts
from epbackend.errors import ConfigError, UnavailableError
from epbackend.models import resolve

if TYPE_CHECKING:
    from epbackend.kernels.triton.tuning import ExpertShape

Form = Literal["half", "fp8", "int8"]
FORM_OF: dict[str, Form] = {BLOCKED_FP8: "fp8", W8A8: "int8"}
"""What LMDeploy makes of a quantized checkpoint -> the kernels' name for it."""


def tune(
    model: Annotated[
        str | None, typer.Argument(help="Directory of a checkpoint; only its config.json is read.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SLOTSxHIDDENxINNER", help="Experts of one GPU, instead of a model: 16x7168x2048."
        ),
    ] = None,
    ep_size: Annotated[int, typer.Option(min=1, help="Ranks that share the model's experts.")] = 1,
    form: Annotated[
        Form | None, typer.Option(help="Form of the weights. [default: the checkpoint's, or half]")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="JSON to write. [default: $EPBACKEND_TILES, or ~/.cache/epbackend/tiles.json]"),
    ] = None,
) -> None:
    """Time every tile that may be the best for the experts of a model, and store the best for later runs.

    It takes about ten minutes a model. Results are written as they come, so it may be stopped at any time.
    """
    experts = wanted(model, shape or [], ep_size, form)
    device = get_device("cuda")
    if device.emulated:
        raise UnavailableError(
            "tune: Triton interprets kernels here (TRITON_INTERPRET), so that no times can be measured"
        )
    # Imported late: these import Triton.
    from epbackend.kernels.triton.tiles import chip_of, own_table
    from epbackend.kernels.triton.tuning import tune as search
    from epbackend.kernels.triton.tuning import tuning_cases

    chip, path = chip_of(device.torch_device(0)), table or own_table()
    to_do = [case for each, its_form in experts for case in tuning_cases(each, its_form, chip)]
    console.print(f"{chip.name}: {len(to_do)} products; table: {path}", highlight=False)
    for done, finding in enumerate(search(to_do, chip, path), start=1):
        console.print(f"{done}/{len(to_do)} {finding}", highlight=False)


def wanted(
    model: str | None, shapes: list[str], ep_size: int, form: Form | None
) -> list[tuple["ExpertShape", str]]:
    """The experts to tune for, each with its form.

    Raises:
        ConfigError: no experts, or none that can be tuned for, are named.
    """
    if (model is None) == (not shapes):
        raise ConfigError("tune: name a model, or shapes by --shape, for example --shape 16x7168x2048")
    if model is None:
        return [(_parsed(shape), form or "half") for shape in shapes]
    settings = read_model_config(Path(resolve(model)))
    return [(_of_model(model, settings, ep_size), form or _form_of(model, settings))]


def _parsed(text: str) -> "ExpertShape":
    from epbackend.kernels.triton.tuning import ExpertShape

    if not (found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)):
        raise ConfigError(f"tune: --shape {text} is not SLOTSxHIDDENxINNER, for example 16x7168x2048")
    slots, hidden, inner = map(int, found.groups())
    return ExpertShape(text, slots, hidden, inner)


def _of_model(name: str, settings: dict[str, Any], ep_size: int) -> "ExpertShape":
    """What one of `ep_size` ranks holds of a model's experts."""
    from epbackend.kernels.triton.tuning import ExpertShape

    experts, text = expert_count(settings), settings.get("text_config") or settings
    hidden, inner = text.get("hidden_size"), expert_width(text)
    if not experts or not hidden or not inner:
        raise ConfigError(f"tune: {name} has no experts, or config.json does not say how large; use --shape")
    top_k = max(1, round((text.get("num_experts_per_tok") or 1) / ep_size))
    return ExpertShape(Path(name).name, -(-experts // ep_size), hidden, inner, top_k)


def _form_of(name: str, settings: dict[str, Any]) -> Form:
    found = form_of_experts(settings)
    if found is None:
        return "half"
    if found not in FORM_OF:
        raise ConfigError(
            f"tune: our kernels do not multiply {found} experts, which {name} has; name a --form"
        )
    return FORM_OF[found]
