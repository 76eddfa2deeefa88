"""What a server answers below `/epbackend`: where its experts live, what they do, and to move them now.

    GET  /epbackend/status      load of ranks and layers, split, balance (`load.status`)
    GET  /epbackend/placement   the placement in use, as a file that `placement.file` reads
    POST /epbackend/rebalance   looks at the loads at once, and moves experts where that pays

It belongs to the process that started the engines, with dp > 1 too, and asks for the server's API key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from epbackend.balance.balancer import Balancer
from epbackend.engines.lmdeploy.load.report import StatsReader
from epbackend.engines.lmdeploy.load.status import status
from epbackend.engines.lmdeploy.server.front import asks_for_key, error_form
from epbackend.errors import EPError
from epbackend.placement.placement import Placement

PREFIX = "/epbackend/"
WAIT_S = 10.0
"""The longest that a client waits for experts to move; afterwards the status tells."""


@dataclass(frozen=True)
class ExpertEndpoints:
    """Those of one deployment."""

    stats: StatsReader
    placement: Placement | None
    """Where they live at the start; None: in the model's order."""
    balancer: Balancer | None

    def app(self, api_keys: Sequence[str]) -> Starlette:
        """The ASGI application. `api_keys`: of which a request must bring one, if there are any."""
        # Functions that are not async run in threads, so that streams go on meanwhile.
        routes = [
            Route(f"{PREFIX}status", self._status),
            Route(f"{PREFIX}placement", self._placement),
            Route(f"{PREFIX}rebalance", self._rebalance, methods=["POST"]),
        ]
        return Starlette(routes=routes, middleware=asks_for_key(api_keys))

    def _status(self, request: Request) -> Response:
        return JSONResponse(status(self.stats))

    def _placement(self, request: Request) -> Response:
        placement = self.balancer.placement if self.balancer else self.placement
        if placement is None:
            return _refused(
                404, "experts live in the model's order: there is no placement.file or placement.loads"
            )
        return Response(placement.to_json(), media_type="application/json")

    def _rebalance(self, request: Request) -> Response:
        """200 with what balance has done so far; 202: it still moves."""
        if self.balancer is None:
            return _refused(
                409, "no expert moves here: start the server with balance.on: true and ep_size > 1"
            )
        try:
            over = self.balancer.rebalance(WAIT_S)
        except EPError as error:
            return _refused(503, str(error))
        return JSONResponse(status(self.stats)["balance"], 200 if over else 202)


def _refused(code: int, message: str) -> Response:
    return JSONResponse(error_form(message, "invalid_request_error"), code)
