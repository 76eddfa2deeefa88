"""No test leaves the plug enabled for the next; those with captured graphs come first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from epbackend import disable


@pytest.hookimpl(trylast=True)  # after the other order, which puts engines first
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU that is there for minutes may not come to the end."""
    items.sort(key=lambda item: hasattr(item, "callspec") and item.callspec.params.get("eager", False))


@pytest.fixture(autouse=True)
def _unplugged() -> Iterator[None]:
    yield
    disable()
