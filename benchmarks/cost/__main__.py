"""Print the tables of docs/dispatch.md, or every dispatcher's bytes, launches and waits for one case.

python -m benchmarks.cost
python -m benchmarks.cost --model deepseek-v3 --ranks 16 --tokens 128 --decode
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.cost.dispatchers import DISPATCHERS, IN_FULL, Case, Cost, ring, serves
from benchmarks.cost.fabric import H100, ring_us
from benchmarks.cost.published import checks
from benchmarks.cost.shapes import DEEPSEEK_V3, QWEN3_30B

MODELS = {"deepseek-v3": DEEPSEEK_V3, "qwen3-30b": QWEN3_30B}
PHASES = {"decode": 128, "prefill": 4096}
"""Tokens of a rank."""
BUILT_IN = ("allgather", "alltoall", "symmetric")
"""Those that need nothing but torch and Triton."""


def cases() -> Iterator[Case]:
    for model in MODELS.values():
        for ranks in (8, 16, 32):
            for phase, tokens in PHASES.items():
                yield Case(model, ranks, tokens, static=phase == "decode")


def times() -> str:
    """Predicted us of each dispatcher, bfloat16 and 8 bits out, and the one to take."""
    lines = [
        f"| model | EP | phase | {' | '.join(f'`{name}`' for name in DISPATCHERS)} | take | without DeepEP |",
        "|---" * (5 + len(DISPATCHERS)) + "|",
    ]
    for case in cases():
        cells = [_pair(name, case) for name in DISPATCHERS]
        phase = "decode" if case.static else "prefill"
        picks = f"{best(case, tuple(DISPATCHERS))} | {best(case, BUILT_IN)}"
        lines.append(f"| {case.model.name} | {case.ranks} | {phase} | {' | '.join(cells)} | {picks} |")
    return "\n".join(lines)


def best(case: Case, names: tuple[str, ...]) -> str:
    """The fastest of these in bfloat16 when each rank has tokens of its own."""
    usable = [name for name in names if serves(name, case)]
    return min(usable, key=lambda name: DISPATCHERS[name](case).us(H100))


def same_tokens() -> str:
    """us where all ranks hold the same tokens (dp = 1): `replicated`, or the fastest other on slices of them.

    The others send a slice each (epbackend/dispatch/token_groups.py), and then all gather the finished rows.
    """
    lines = ["| model | EP | phase | `replicated` | fastest other | take |", "|---|---|---|---|---|---|"]
    for case in cases():
        own = DISPATCHERS["replicated"](case).us(H100)
        name = best(case, BUILT_IN)
        gather = ring(case, case.tokens * 2 * case.model.D).us(H100) + ring_us(case.ranks)
        other = DISPATCHERS[name](case).us(H100) + gather
        phase = "decode" if case.static else "prefill"
        lines.append(
            f"| {case.model.name} | {case.ranks} | {phase} | {own:.0f} | {other:.0f} (`{name}`) "
            f"| {'replicated' if own <= other else name} |"
        )
    return "\n".join(lines)


def published() -> str:
    """Predicted beside published."""
    lines = ["| measured by others | published | predicted | deviation |", "|---|---|---|---|"]
    for each in checks():
        lines.append(
            f"| {each.what} | {each.published:g} {each.unit} | {each.predicted:.0f} | {each.deviation:+.0%} |"
        )
    return "\n".join(lines)


def details(case: Case) -> str:
    """Megabytes, launches and waits of every dispatcher in one case."""
    lines = [
        "| dispatcher | NVLink MB out, back | network MB out, back | memory MB | launches | waits "
        "| us | us, 8 bits out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, formula in DISPATCHERS.items():
        if name == "symmetric" and not serves(name, case):
            continue
        cost, narrow = formula(case), formula(replace(case, bytes_each=1))
        lines.append(f"| `{name}` | {_bytes(cost)} | {cost.us(H100):.0f} | {narrow.us(H100):.0f} |")
    return "\n".join(lines)


def _pair(name: str, case: Case) -> str:
    if name == "symmetric" and not serves(name, case):
        return "-"
    wide, narrow = (DISPATCHERS[name](replace(case, bytes_each=width)).us(H100) for width in (2, 1))
    return f"{wide:.0f}" if name in IN_FULL else f"{wide:.0f} / {narrow:.0f}"


def _bytes(cost: Cost) -> str:
    nvlink = f"{cost.out.nvlink / 1e6:.1f}, {cost.back.nvlink / 1e6:.1f}"
    network = f"{cost.out.network / 1e6:.1f}, {cost.back.network / 1e6:.1f}"
    return f"{nvlink} | {network} | {cost.memory / 1e6:.0f} | {cost.launches} | {cost.waits}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each rank")
    parser.add_argument("--decode", action="store_true", help="static shapes, in a CUDA graph")
    given = parser.parse_args()
    if given.model:
        print(details(Case(MODELS[given.model], given.ranks, given.tokens, given.decode)))
    else:
        print(times(), same_tokens(), published(), sep="\n\n")


if __name__ == "__main__":
    main()
