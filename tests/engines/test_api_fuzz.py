"""Requests made from the server's own OpenAPI schema, whole and broken: none is an error of the server's."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.helpers.api import Server, served

SECONDS = 120
EXAMPLES = 1000
BASE: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "def main(", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
    "/generate": {"prompt": "def main(", "max_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"input": "hello", "max_output_tokens": 3},
    "/v1/encode": {"input": "hello"},
    "/v1/embeddings": {"input": "hello"},
    "/pooling": {"input": "hello"},
    "/get_ppl": {"input": "hello there"},
}
"""Endpoint -> what it answers; all but those that stop the server or change its weights."""
REFUSED = {"/v1/embeddings": 501}
"""Endpoint -> its answer to whatever comes: a model that generates text has no embeddings."""

ODD = (
    float("nan"),
    float("inf"),
    -1,
    0,
    1,
    1e-300,
    2**31,
    10**30,
    1.5,
    True,
    "",
    "\ud800",
    "a" * 3000,
    "<|endoftext|>",
    [],
    {},
    [[]],
    [""],
    [-1],
    [2**70],
    [5, 6],
    [None],
    {"": {}},
    None,
)


def any_request(openapi: dict[str, Any]) -> st.SearchStrategy[tuple[str, Any]]:
    """(endpoint, body): by the schema, against it, and with odd values in some fields of a good request."""
    schema = schemathesis.openapi.from_dict(openapi)
    requests_of = []
    for path, base in BASE.items():
        operation = schema[path]["POST"]
        legal = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        broken = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        fields = sorted(_fields(openapi, path) - {"model"})
        odd = st.lists(st.sampled_from(fields), min_size=1, max_size=3, unique=True).flatmap(
            lambda names: st.fixed_dictionaries({name: st.sampled_from(ODD) for name in names})
        )
        bodies = st.one_of(
            legal.map(lambda case: case.body),
            legal.map(lambda case, base=base: base | _some(case.body)),
            broken.map(lambda case: case.body),
            odd.map(lambda changed, base=base: base | changed),
        )
        requests_of.append(st.tuples(st.just(path), bodies))
    return st.one_of(*requests_of)


def _fields(openapi: dict[str, Any], path: str) -> set[str]:
    body = openapi["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return set(openapi["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"])


def _some(body: Any) -> dict[str, Any]:
    """Three fields of a made body: with all of them hardly a request would be served."""
    return dict([*body.items()][-3:]) if isinstance(body, dict) else {}


def outcome(server: Server, path: str, body: Any) -> int:
    """The status; 500 too where a stream that began well tells an error of the server's."""
    if isinstance(body, dict):
        body = body | {"model": server.model}
    elif not isinstance(body, bytes | list | str | int | float | None):
        body = b""  # the case has no body
    response = server.post(path, body)
    return 500 if '"server_error"' in response.text else response.status_code


@pytest.mark.slow
def test_no_request_of_the_schemas_kind_is_the_servers_error(tmp_path: Path) -> None:
    """Bounded by SECONDS and by EXAMPLES, whichever is first."""
    counts: Counter[tuple[str, int]] = Counter()
    wrong: list[tuple[str, Any, int]] = []
    with served(tmp_path) as server:
        before = server.greedy()
        openapi = requests.get(f"{server.url}/openapi.json", timeout=60).json()
        deadline = time.monotonic() + SECONDS

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        @given(any_request(openapi))
        def send(request: tuple[str, Any]) -> None:
            if time.monotonic() > deadline:
                return
            status = outcome(server, *request)
            counts[request[0], status] += 1
            if status >= 500 and status != REFUSED.get(request[0]):
                wrong.append((*request, status))

        send()
        assert server.greedy() == before
    print(f"{counts.total()} requests: {dict(sorted(counts.items()))}")
    assert not wrong, "\n".join(str(each)[:400] for each in wrong[:20])
    assert {path for path, status in counts if status == 200} >= {"/v1/completions", "/v1/chat/completions"}
