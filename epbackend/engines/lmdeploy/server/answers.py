"""What the server itself answers, in the form that OpenAI's clients know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.middleware import Middleware

UNAVAILABLE = "service_unavailable"
"""Kind of the error that comes with status 503."""
WHEN_UNAVAILABLE: Mapping[str, str] = {"retry-after": "10"}
"""Headers of an answer with status 503: seconds in which a server is often started again."""


def error_form(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it; `kind` is its type."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def asks_for_key(api_keys: Sequence[str]) -> list[Middleware]:
    """Middleware by which a request must bring one of the keys (`Authorization: Bearer KEY`); none for no keys."""
    if not api_keys:
        return []
    from lmdeploy.serve.utils.server_utils import AuthenticationMiddleware

    return [Middleware(AuthenticationMiddleware, tokens=list(api_keys))]
