"""What the experts of a run did: facts for programs, a table for people. `pictures` draws it."""

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from epbackend.cli.output import console
from epbackend.config import EPConfig

if TYPE_CHECKING:
    from epbackend.engines.load_report import LoadReport


def facts(config: EPConfig, load: "LoadReport") -> dict[str, Any]:
    """The part of every `--json` answer about devices, ranks and experts."""
    from epbackend.device import get_device  # imports torch, which what is found wrong before needs not

    names = {phase: choice["name"] for phase, choice in load.dispatchers.items()}  # empty for a dense model
    distinct = set(names.values())
    return {
        "device": get_device(config.device).name,
        "ep_size": config.ep_size,
        "ep_level": config.model_dump()["ep_level"],
        "dispatcher": names if len(distinct) > 1 else next(iter(distinct), None),
        "expert_tokens_per_rank": load.tokens_per_rank,
        "passes": load.passes,
        "rounds": load.rounds,
        **imbalance(load),
    }


def imbalance(load: "LoadReport") -> dict[str, float]:
    """Tokens of the busiest rank over the ranks' mean, of the run and of its steps: mean of the layers, worst layer."""
    found = {"imbalance": load.imbalance_Y, "step_imbalance": load.step_imbalance_Y}
    return {
        f"{name}_{what}": round(float(number(ratio_Y)), 4) if ratio_Y.size else 1.0
        for name, ratio_Y in found.items()
        for what, number in (("mean", np.mean), ("worst", np.max))
    }


def print_load(load: "LoadReport") -> None:
    """Which dispatcher served and why, and the load of each rank."""
    for reason, phases in _choices(load).items():
        console.print(f"dispatcher ({', '.join(phases)}): {reason}", highlight=False)
    table = Table(
        "rank", "expert tokens", "share", "busiest expert", title="load of the ranks", title_justify="left"
    )
    total = max(1, load.tokens_RYE.sum())
    for rank, tokens_YE in enumerate(load.tokens_RYE):
        layer, expert = np.unravel_index(tokens_YE.argmax(), tokens_YE.shape) if tokens_YE.size else (0, 0)
        tokens, most = tokens_YE.sum(), tokens_YE.max(initial=0)
        busiest = f"{expert} of layer {load.layers[layer]} ({most:,})" if most else "none"
        table.add_row(str(rank), f"{tokens:,}", f"{tokens / total:.1%}", busiest)
    console.print(table)
    console.print(f"busiest rank of a layer: {imbalance_in_words(load)}", highlight=False)


def imbalance_in_words(load: "LoadReport") -> str:
    """The imbalance, in a sentence."""
    found = imbalance(load)
    step, worst, run = (
        found[name] for name in ("step_imbalance_mean", "step_imbalance_worst", "imbalance_mean")
    )
    return f"{step:.3f} times the mean of a step ({worst:.3f} in the worst layer), {run:.3f} of the run"


def _choices(load: "LoadReport") -> dict[str, list[str]]:
    """Text about a dispatcher -> the phases that it serves."""
    said: dict[str, list[str]] = {}
    for phase, choice in load.dispatchers.items():
        others = "".join(f"\n  not {name}: {reason}" for name, reason in choice["passed_over"])
        said.setdefault(f"{choice['name']}: {choice['reason']}{others}", []).append(phase)
    return said
