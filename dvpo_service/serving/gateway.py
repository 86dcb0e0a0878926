"""HTTP in front of the policy and the critic: OpenAI's API, values along a response, and best-of-n by risk.

The gateway holds no model. It answers 429 at once when too many requests are in progress, and it keeps running when
replicas of the policy or the critic die.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security.utils import get_authorization_scheme_param
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dvpo_service.config.serve import ServeConfig
from dvpo_service.serving.body import parse
from dvpo_service.serving.errors import BadRequest
from dvpo_service.serving.measures import Measures, UnderWay
from dvpo_service.serving.openapi import BEARER, EVENTS, JSON, add_docs, add_schema, errors, json_body
from dvpo_service.serving.policy import PolicyServer
from dvpo_service.serving.ranking import best_of_n
from dvpo_service.serving.replicas import Replicas, Unavailable
from dvpo_service.serving.requests import Kind, ValuesRequest, check_generation, check_model, checked, request_type
from dvpo_service.serving.value_server import ValueServer

KINDS: tuple[Kind, ...] = ("chat", "completion")
READY_S = 5.0
VERSION_HEADER = "x-dvpo-version"
LEFT = 499  # counted when a client left before there was an answer
HEADERS = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}


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
        self.bodies = {kind: request_type(kind, limits) for kind in KINDS}
        self.measures = Measures()

    def app(self) -> FastAPI:
        """Return the FastAPI app with every route."""
        app = FastAPI(title="DVPO", description=__doc__, docs_url=None, redoc_url=None, servers=[{"url": "."}])
        app.add_exception_handler(HTTPException, _as_openai)
        app.add_exception_handler(Exception, _fault)

        def get(path: str, answer: Callable[..., Awaitable[Response]], **about: Any) -> None:
            app.add_api_route(path, answer, methods=["GET"], **about)

        def post(path: str, answer: Callable[..., Awaitable[Response]], body: type[BaseModel], *forms: str) -> None:
            right = {200: {"description": "the answer", "content": {form: {} for form in (JSON, *forms)}}}
            responses = right | errors(400, 401, 404, 413, 429, 501, 503)
            extra = json_body(body)
            app.add_api_route(path, answer, methods=["POST"], openapi_extra=extra, responses=responses, **keyed)

        keyed: dict[str, Any] = {"dependencies": [Depends(BEARER)] if self.key_digest else []}  # for the schema
        get("/", self.page, include_in_schema=False)
        get("/healthz", self.healthz, response_class=PlainTextResponse)
        get("/readyz", self.readyz, responses={503: {"description": "not ready; `waiting_for` says for what"}})
        get("/metrics", self.metrics, response_class=PlainTextResponse)
        get("/v1/models", self.models, responses=errors(401, 429, 503), **keyed)
        get("/v1/models/{model_id:path}", self.model, responses=errors(401, 404, 429, 503), **keyed)
        post("/v1/chat/completions", self.chat, self.bodies["chat"], EVENTS)
        post("/v1/completions", self.completions, self.bodies["completion"], EVENTS)
        post("/v1/values", self.token_values, ValuesRequest)
        add_docs(app)
        _answer_head(app)
        add_schema(app, *self.bodies.values(), ValuesRequest)
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
        note = {"note": self.limits.note} if self.limits.note else {}
        return JSONResponse({"ready": True, "versions": versions, "model": self.model_name} | note)

    async def metrics(self) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(generate_latest(self.measures.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """Return OpenAI's list of models: the one that is served."""

        async def work(_: UnderWay) -> Response:
            return Response(await self.policy.call(PolicyServer.models), media_type=JSON)

        return await self._answer(request, work)

    async def model(self, request: Request, model_id: str) -> Response:
        """Return OpenAI's description of a model: the one that is served."""

        async def work(_: UnderWay) -> Response:
            check_model(model_id, self.model_name)
            return JSONResponse(json.loads(await self.policy.call(PolicyServer.models))["data"][0])

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
            asked = checked(ValuesRequest, parse(await self._body(request)))
            check_model(asked.model, self.model_name)
            answer = await critic.call(ValueServer.along, asked)
            return JSONResponse(answer["body"], headers={VERSION_HEADER: answer["version"]})

        return await self._answer(request, work)

    async def _generate(self, kind: Kind, request: Request) -> Response:
        async def work(under_way: UnderWay) -> Response:
            asked = check_generation(await self._body(request), self.bodies[kind], self.limits)
            payload = asked.model_dump(exclude_unset=True, exclude={"rank_by", "best_of"})
            if asked.stream:
                return await self._stream(kind, payload, under_way)
            if asked.rank_by:
                body, version = await best_of_n(kind, payload, asked.rank_by, self.policy, self._critic())
                return JSONResponse(body, headers={VERSION_HEADER: version})
            answer = await self.policy.call(PolicyServer.complete, kind, payload)
            return Response(answer.body, answer.status, {VERSION_HEADER: answer.version}, media_type=JSON)

        return await self._answer(request, work)

    async def _stream(self, kind: Kind, payload: dict[str, Any], under_way: UnderWay) -> Response:
        """Return server-sent events.

        When a replica dies before its first event, another one takes the request and the client notices nothing. When
        it dies later, the last event is an error.
        """
        events = self.policy.stream(PolicyServer.stream, kind, payload)
        header = await anext(events)
        if header.status != 200:
            return Response(header.body, header.status, media_type=JSON)

        async def body() -> AsyncIterator[str]:
            try:
                async for text in events:
                    yield text
            except Unavailable as error:
                why = BadRequest(f"the response was cut off: {error}", status=503, kind="Unavailable")
                yield f"data: {json.dumps(why.body())}\n\ndata: [DONE]\n\n"
            finally:
                under_way.finish(200)

        return StreamingResponse(body(), media_type=EVENTS, headers={VERSION_HEADER: header.version})

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
        scheme, key = get_authorization_scheme_param(request.headers.get("authorization"))
        given = sha256(key.strip().encode("latin-1")).hexdigest()  # the header's own bytes
        if self.key_digest and not (scheme.lower() == "bearer" and hmac.compare_digest(given, self.key_digest)):
            raise BadRequest("no valid API key: send it as `Authorization: Bearer KEY`", status=401)
        if self.measures.admitted >= self.limits.max_requests:
            raise BadRequest(
                f"{self.measures.admitted} requests are under way, which is the limit; try again", status=429
            )

    async def _answer(self, request: Request, work: Callable[[UnderWay], Awaitable[Response]]) -> Response:
        """Admit, count and time a request; turn BadRequest and Unavailable into responses."""
        under_way = UnderWay(self.measures, request.scope["route"].path)
        response = Response(status_code=500)  # what is counted when an error is nobody's but ours; _fault answers it
        try:
            self._admit(request)
            under_way.start()
            response = await work(under_way)
        except BadRequest as error:
            response = JSONResponse(error.body(), error.status, HEADERS.get(error.status))
        except Unavailable as error:
            down = BadRequest(f"no replica can take the request now: {error}", status=503, kind="Unavailable")
            response = JSONResponse(down.body(), 503, {"retry-after": "5"})
        except ClientDisconnect:
            response = Response(status_code=LEFT)
        except asyncio.CancelledError:
            response = Response(status_code=LEFT)
            raise
        finally:
            if not isinstance(response, StreamingResponse):
                under_way.finish(response.status_code)
        return response


async def _as_openai(request: Request, error: Exception) -> Response:
    """Answer a request for a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    wrong = BadRequest(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    return JSONResponse(wrong.body(), error.status_code, error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    """Answer a request that failed by a fault of the server's. Uvicorn logs the traceback."""
    wrong = BadRequest("the server failed; its log says how", status=500, kind="InternalServerError")
    return JSONResponse(wrong.body(), 500)


def _answer_head(app: FastAPI) -> None:
    """Answer HEAD where GET is answered; the HTTP server leaves the body out."""
    for route in list(app.routes):
        if isinstance(route, APIRoute) and route.methods == {"GET"}:
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
