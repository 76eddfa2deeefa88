"""Runs the model matrix and writes its table into docs/lmdeploy.md: python -m scripts.model_matrix [NAME ...]

An engine starts for each model and way to spread its experts, one after the other, in twenty minutes on two cores.
Outcomes are kept in a file (--outcomes), so that what was stopped goes on where it stood; without names all models are
run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.helpers.model_matrix import MODELS, RUNS, matching_tokens, refusal

DOCS = Path(__file__).parents[1] / "docs" / "lmdeploy.md"
BEGIN, END = "<!-- model matrix -->\n", "<!-- end of model matrix -->\n"

Outcomes = dict[str, dict[str, str]]
"""model -> run -> what came of it"""


def run(names: list[str], outcomes: Outcomes, kept: Path, folder: Path) -> None:
    """Fills in the outcomes that are missing, cheap runs of all models first, and keeps them."""
    for way, spread in RUNS.items():
        for name in names:
            if way in outcomes.setdefault(name, {}):
                continue
            model, path = MODELS[name], folder / name
            if not path.exists():
                model.save(path)
            start = time.monotonic()
            try:
                if model.refused:
                    said = refusal(path, spread)
                    outcome = "refused" if re.search(model.refused, said) else f"refused: {said}"
                else:
                    same, all_ = matching_tokens(path, spread)
                    outcome = f"{same}/{all_}"
            except Exception as error:
                outcome = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(f"{name}, {way}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
            outcomes[name][way] = outcome
            kept.write_text(json.dumps(outcomes, indent=1))


def table(outcomes: Outcomes) -> str:
    """Markdown: a row for each model, a column for each way."""
    lines = [
        "| architecture | with | " + " | ".join(RUNS) + " |",
        "|---" * (2 + len(RUNS)) + "|",
    ]
    order = list(dict.fromkeys(model.architecture for model in MODELS.values()))
    for name, model in sorted(MODELS.items(), key=lambda row: order.index(row[1].architecture)):
        cells = [outcomes.get(name, {}).get(way, "not run") for way in RUNS]
        lines.append(f"| `{model.architecture}` | {model.what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(outcomes: Outcomes) -> None:
    """The table and the date, in the place of the last ones."""
    text = f"Run on {datetime.date.today():%Y-%m-%d}:\n\n{table(outcomes)}"
    docs = DOCS.read_text()
    between = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    DOCS.write_text(between.sub(lambda _: f"{BEGIN}{text}{END}", docs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], metavar="NAME")
    parser.add_argument("--outcomes", type=Path, default=Path("build/model_matrix.json"))
    arguments = parser.parse_args()
    kept = arguments.outcomes
    kept.parent.mkdir(parents=True, exist_ok=True)
    outcomes: Outcomes = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        run(arguments.names or list(MODELS), outcomes, kept, Path(folder))
    write(outcomes)


if __name__ == "__main__":
    main()
