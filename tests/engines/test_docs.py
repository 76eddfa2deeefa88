"""docs/lmdeploy.md lists every patch as it is."""

from pathlib import Path

import pytest

from epbackend.engines.lmdeploy.patches import every_patch
from epbackend.engines.lmdeploy.server.front import Front
from epbackend.engines.lmdeploy.server.guard import Guard

DOCUMENT = Path(__file__).parents[2] / "docs" / "lmdeploy.md"


def table() -> str:
    """The patches as Markdown."""
    rows = [f"| `{each.name}` | `{each.target}` | {each.when} | {each.why} |" for each in every_patch()]
    return "\n".join(["| patch | replaces | when | why |", "|---|---|---|---|", *rows])


def table_of_the_server() -> str:
    """Those that are there while our server runs."""
    patches = [*Guard(drain_seconds=0.0).patches(), *Front(announcement="ready", request_log=True).patches()]
    rows = [f"| `{each.name}` | `{each.target}` | {each.why} |" for each in patches]
    return "\n".join(["| patch | replaces | why |", "|---|---|---|", *rows])


@pytest.mark.parametrize("expected", [table, table_of_the_server])
def test_the_documented_patches_are_up_to_date(expected):
    assert expected() in DOCUMENT.read_text(encoding="utf-8"), (
        f"paste this into {DOCUMENT.name}:\n{expected()}"
    )
