"""HTTP in front of the policy and the critic: OpenAI's API, values along a response, and best-of-n by risk.

The gateway holds no model. It answers 429 at once when too many requests are in progress, and it keeps running when
replicas of the policy or the critic die.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dvpo_service.config.serve import ServeConfig
from dvpo_service.serving.policy import Kind, PolicyServer
from dvpo_service.serving.ranking import best_of_n
from dvpo_service.serving.replicas import Replicas, Unavailable
from dvpo_service.serving.requests import BadRequest, check_generation, parse, parse_values, pop_rank
from dvpo_service.serving.value_server import ValueServer

READY_S = 5.0
VERSION_HEADER = "x-dvpo-version"


class Measures:
    """The Prometheus metrics of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("dvpo_requests", "Answered requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram("dvpo_request_seconds", "Time to the last byte", ["route"], registry=self.registry)
        self.under_way = Gauge("dvpo_requests_under_way", "Requests not answered yet", registry=self.registry)


class Gateway:
    """The HTTP routes of one gateway.

    Args:
      policy: calls the replicas of the policy.
      values: calls the replicas of the critic; None when the run has no critic.
      limits: the largest sizes and numbers of requests.
      model_name: the model's name in OpenAI's API.
      key_digest: the SHA-256 of the API key, in hex; None when no key is required.
    """

    def __init__(
        self, policy: Replicas, values: Replicas | None, limits: ServeConfig, model_name: str, key_digest: str | None
    ):
        self.policy = policy
        self.values = values
        self.limits = limits
        self.model_name = model_name
        self.key_digest = key_digest
        self.measures = Measures()
        self.under_way = 0  # requests admitted and not finished yet

    def app(self) -> FastAPI:
        """Return the FastAPI app with every route."""
        app = FastAPI(title="DVPO", description=__doc__, docs_url="/docs", redoc_url=None)
        app.add_api_route("/", self.page, methods=["GET"], include_in_schema=False)
        app.add_api_route("/healthz", self.healthz, methods=["GET"])
        app.add_api_route("/readyz", self.readyz, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/values", self.token_values, methods=["POST"])
        return app

    async def page(self) -> HTMLResponse:
        """Return the page where a prompt is typed and the response's tokens are coloured by value."""
        return HTMLResponse((resources.files("dvpo_service.serving") / "page.html").read_text())

    async def healthz(self) -> PlainTextResponse:
        """Return 200: this process answers."""
        return PlainTextResponse("ok")

    async def readyz(self) -> JSONResponse:
        """Return 200 and the versions served when a replica of the policy, and of the critic if any, answers."""
        versions: dict[str, str] = {}
        waiting_for = "policy"
        try:
            versions["policy"] = await self.policy.call(PolicyServer.ready, timeout_s=READY_S)
            if self.values:
                waiting_for = "values"
                versions["values"] = await self.values.call(ValueServer.ready, timeout_s=READY_S)
        except Unavailable as error:
            return JSONResponse({"ready": False, "waiting_for": waiting_for, "why": str(error)}, 503)
        return JSONResponse({"ready": True, "versions": versions, "model": self.model_name})

    async def metrics(self) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(generate_latest(self.measures.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """Return OpenAI's list of models: the one that is served."""

        async def work(_: UnderWay) -> Response:
            return Response(await self.policy.call(PolicyServer.models), media_type="application/json")

        return await self._answer(request, work)

    async def chat(self, request: Request) -> Response:
        """Answer OpenAI's chat completions; with ``rank_by``, return the best of ``n`` by the critic's distribution."""
        return await self._generate("chat", request)

    async def completions(self, request: Request) -> Response:
        """Answer OpenAI's completions; with ``rank_by``, return the best of ``n`` by the critic's distribution."""
        return await self._generate("completion", request)

    async def token_values(self, request: Request) -> Response:
        """Return the distribution of the return after each token of a response."""

        async def work(_: UnderWay) -> Response:
            critic = self._critic()
            answer = await critic.call(ValueServer.along, parse_values(await self._body(request)))
            return JSONResponse(answer["body"], headers={VERSION_HEADER: answer["version"]})

        return await self._answer(request, work)

    async def _generate(self, kind: Kind, request: Request) -> Response:
        async def work(under_way: UnderWay) -> Response:
            payload = parse(await self._body(request))
            check_generation(payload, self.limits)
            rank_by = pop_rank(payload)
            if payload.get("stream"):
                return await self._stream(kind, payload, under_way)
            if rank_by:
                body, version = await best_of_n(kind, payload, rank_by, self.policy, self._critic())
                return JSONResponse(body, headers={VERSION_HEADER: version})
            answer = await self.policy.call(PolicyServer.complete, kind, payload)
            return Response(answer.body, answer.status, {VERSION_HEADER: answer.version}, media_type="application/json")

        return await self._answer(request, work)

    async def _stream(self, kind: Kind, payload: dict[str, Any], under_way: UnderWay) -> Response:
        """Return server-sent events.

        When a replica dies before its first event, another one takes the request and the client notices nothing. When
        it dies later, the last event is an error.
        """
        events = self.policy.stream(PolicyServer.stream, kind, payload)
        header = await anext(events)
        if header.status != 200:
            return Response(header.body, header.status, media_type="application/json")

        async def body() -> AsyncIterator[str]:
            try:
                async for text in events:
                    yield text
            except Unavailable as error:
                why = BadRequest(f"the response was cut off: {error}", status=503, kind="Unavailable")
                yield f"data: {json.dumps(why.body())}\n\ndata: [DONE]\n\n"
            finally:
                under_way.finish(200)

        return StreamingResponse(body(), media_type="text/event-stream", headers={VERSION_HEADER: header.version})

    def _critic(self) -> Replicas:
        if self.values is None:
            raise BadRequest("this run has no critic, so there are no values and no rank_by", status=501)
        return self.values

    async def _body(self, request: Request) -> bytes:
        """Return the body. Raises BadRequest as soon as it is larger than the limit."""
        most = self.limits.max_body_kib * 1024
        read = bytearray()
        async for part in request.stream():
            read += part
            if len(read) > most:
                raise BadRequest(f"the body is larger than {self.limits.max_body_kib} KiB", status=413)
        return bytes(read)

    def _admit(self, request: Request) -> None:
        """Raise BadRequest when the required key is missing or wrong, or when too many requests are under way."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key_digest and not hmac.compare_digest(sha256(given.encode()).hexdigest(), self.key_digest):
            raise BadRequest("no valid API key: send it as `Authorization: Bearer KEY`", status=401)
        if self.under_way >= self.limits.max_requests:
            raise BadRequest(f"{self.under_way} requests are under way, which is the limit; try again", status=429)

    async def _answer(self, request: Request, work: Callable[[UnderWay], Awaitable[Response]]) -> Response:
        """Admit, count and time a request; turn BadRequest and Unavailable into responses."""
        under_way = UnderWay(self, request.url.path)
        response = Response(status_code=499)  # counted when the client leaves before there is a response
        try:
            self._admit(request)
            under_way.start()
            response = await work(under_way)
        except BadRequest as error:
            response = JSONResponse(error.body(), error.status, {"retry-after": "1"} if error.status == 429 else None)
        except Unavailable as error:
            down = BadRequest(f"no replica can take the request now: {error}", status=503, kind="Unavailable")
            response = JSONResponse(down.body(), 503, {"retry-after": "5"})
        finally:
            if not isinstance(response, StreamingResponse):
                under_way.finish(response.status_code)
        return response


class UnderWay:
    """A request from its arrival to its last byte: counts and times it."""

    def __init__(self, gateway: Gateway, route: str):
        self.gateway = gateway
        self.route = route
        self.admitted = False
        self.began = time.perf_counter()

    def start(self) -> None:
        """Count the request as under way."""
        self.admitted = True
        self._change(+1)

    def finish(self, status: int) -> None:
        """Record the status and the time; a request that was admitted is no longer under way."""
        if self.admitted:
            self._change(-1)
        self.gateway.measures.requests.labels(self.route, status).inc()
        self.gateway.measures.seconds.labels(self.route).observe(time.perf_counter() - self.began)

    def _change(self, by: int) -> None:
        self.gateway.under_way += by
        self.gateway.measures.under_way.inc(by)
