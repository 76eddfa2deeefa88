"""docs/lmdeploy.md lists every patch as it is."""

from pathlib import Path

from epbackend.engines.lmdeploy.patches import every_patch

DOCUMENT = Path(__file__).parents[2] / "docs" / "lmdeploy.md"


def table() -> str:
    """The patches as Markdown."""
    rows = [f"| `{each.name}` | `{each.target}` | {each.when} | {each.why} |" for each in every_patch()]
    return "\n".join(["| patch | replaces | when | why |", "|---|---|---|---|", *rows])


def test_the_documented_patches_are_up_to_date():
    assert table() in DOCUMENT.read_text(encoding="utf-8"), f"paste this into {DOCUMENT.name}:\n{table()}"
