"""`python -m tests.helpers.lacking numba,ray tests/cuda ...`: pytest where these packages cannot be found."""

from __future__ import annotations

import sys
from typing import Any


class Lacking:
    """A finder that comes first, and finds none of them."""

    def __init__(self, packages: list[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in self._packages:
            raise ModuleNotFoundError(
                f"No module named {name!r} (as tests.helpers.lacking was told)", name=name
            )


if __name__ == "__main__":
    _, packages, *arguments = sys.argv
    sys.meta_path.insert(0, Lacking(packages.split(",")))
    import pytest

    sys.exit(pytest.main(arguments))
