"""No test leaves the plug enabled for the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from epbackend import disable


@pytest.fixture(autouse=True)
def _unplugged() -> Iterator[None]:
    yield
    disable()
