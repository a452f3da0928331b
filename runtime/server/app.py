"""The routes of a server, over one `Service`.

    POST /v1/chat/completions    an answer, whole or in pieces (SSE)
    GET  /v1/models, /v1/models/NAME
    GET  /health, /health/ready  whether it lives, whether it takes requests
    GET  /metrics, /version
    GET  /                       a page to ask on

What is not said here is 404. A browser's page of somebody else can send nothing that is answered: bodies are
application/json, which needs a preflight that is not answered, and the Host must be one of ours.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import framefusion
from framefusion.errors import ClosedError, RequestError
from framefusion.runtime.request import Step
from framefusion.runtime.server.ask_page import PAGE_HEADERS, ask_page
from framefusion.runtime.server.protocol.body import read_body
from framefusion.runtime.server.protocol.response import Answer, error_body, status_of, usage_of
from framefusion.runtime.server.service import RETRY_SECONDS, ChatJob, Service

_log = logging.getLogger("framefusion.server")
BODY_BYTES = 256 << 20
BODY_SECONDS = 60.0
GRACE_SECONDS = 5.0
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: names under which the server may be addressed, "*" for any.
        api_key: that requests carry as a bearer token; None asks for none.
        body_bytes: of one request at most.
        body_seconds: for a body to arrive.
    """

    hosts: Sequence[str] = ("127.0.0.1", "localhost", "[::1]")
    api_key: str | None = None
    body_bytes: int = BODY_BYTES
    body_seconds: float = BODY_SECONDS


def create_app(service: Service, access: Access) -> Starlette:
    """The application: any ASGI server runs it.

    Args:
        service: started and closed with the application.
        access: who may ask.
    """
    routes = Routes(service, access)
    guarded = {
        "/v1/models": routes.models,
        "/v1/models/{name:path}": routes.model,
        "/metrics": routes.metrics,
        "/version": routes.version,
    }
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.guard(routes.chat_completions), methods=["POST"]),
            *(Route(path, routes.guard(handler)) for path, handler in guarded.items()),
            Route("/", routes.page),
            Route("/health", routes.health),
            Route("/health/ready", routes.ready),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(access.hosts), www_redirect=False)],
        exception_handlers={HTTPException: _as_error, Exception: _as_bug},
        lifespan=routes.lifespan,
    )


class Routes:
    """The handlers of one application."""

    def __init__(self, service: Service, access: Access) -> None:
        self._service = service
        self._access = access
        self._created = int(time.time())
        given = service.settings.reduction.cost
        self._cost = service.pipeline.manifest.reduction.cost if given is None else given
        self._page, self._policy = ask_page(service.settings.model, self._cost)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """From the first request to the last."""
        self._service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self._service.close)

    def guard(self, handler: Handler) -> Handler:
        """The handler for those who carry the key, with errors as answers."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except Exception as error:
                return self._failure(error)

        return guarded

    def _check_key(self, request: Request) -> None:
        if self._access.api_key is None:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._access.api_key}".encode()):
            raise RequestError("the API key is missing or another: send it as Authorization: Bearer KEY", status=401)

    def _failure(self, error: Exception) -> JSONResponse:
        """An error as an answer."""
        status = status_of(error)
        if status == 500:
            _log.error("a request failed", exc_info=error)
        body = error_body(error)
        self._service.metrics.refused(status, body["error"]["code"])
        headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(body, status, headers)

    # --- What there is ----------------------------------------------------------------------------------------------

    async def models(self, _: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """One model by its name."""
        if request.path_params["name"] != self._service.settings.model:
            raise RequestError(
                f"the model {request.path_params['name'][:120]!r} is not here: ask for "
                f"{self._service.settings.model!r}",
                status=404,
            )
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        pipeline = self._service.pipeline
        manifest = pipeline.manifest
        return {
            "id": self._service.settings.model,
            "object": "model",
            "created": self._created,
            "owned_by": "framefusion-aot",
            "max_model_len": manifest.limits.max_kv_cache_capacity,
            "framefusion": {
                "reduction": manifest.reduction.mode,
                "cost": self._cost,
                "backend": None if pipeline.choice is None else pipeline.choice.text,
            },
        }

    async def page(self, _: Request) -> Response:
        """A page to ask on: static, so it needs no key; what it asks does."""
        return HTMLResponse(self._page, headers=PAGE_HEADERS | {"Content-Security-Policy": self._policy})

    async def health(self, _: Request) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Requests are taken."""
        draining = self._service.is_draining()
        return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)

    async def metrics(self, _: Request) -> Response:
        """Counters for Prometheus."""
        return Response(self._service.metrics.text(), media_type=METRICS_TYPE)

    async def version(self, _: Request) -> Response:
        """Of this package."""
        return JSONResponse({"version": framefusion.__version__})

    # --- Answers ----------------------------------------------------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        """An answer: errors that come before its first token have a status of their own, later ones end the stream."""
        exchange = _Exchange(self._service, request)
        try:
            # 1. Read the body, no more and no longer than is allowed.
            seconds = min(self._access.body_seconds, self._service.settings.request_seconds)
            body = await read_body(request, self._access.body_bytes, seconds)
            chat = await self._service.read(body)
            del body
            # 2. From here on whoever leaves is noticed, and what is begun for them ends.
            exchange.watch()
            job = await self._service.submit(chat, exchange.is_over, exchange.since)
            exchange.ends(job)
            # 3. Wait for the prefill: what is refused until then is refused with a status.
            steps = job.steps()
            first = await anext(steps)
            answer = Answer(self._service.settings.model, job.warnings)
            if not chat.stream:
                whole = await _whole(answer, job, _chained(first, steps))
                exchange.close()
                return JSONResponse(whole)
            return _Stream(exchange, _events(answer, job, exchange, _chained(first, steps), chat.include_usage))
        except BaseException as error:
            exchange.close()
            raise exchange.cause(error) from error


class _Exchange:
    """One request from its arrival to the last byte of its answer: a place in the service, a deadline, a caller.

    Ends what is done for a caller who left or whose time is over. `close` may be called again.

    Raises:
        RequestError: there is no place.
    """

    def __init__(self, service: Service, request: Request) -> None:
        service.admit()
        self.since = time.monotonic()
        self._service = service
        self._request = request
        self._deadline = self.since + service.settings.request_seconds
        self._over = False
        self._left = False
        self._late = False
        self._closed = False
        self._job: ChatJob | None = None
        self._watching: asyncio.Task[None] | None = None
        self._answering = asyncio.current_task()

    def watch(self) -> None:
        """Notice from now on when the caller leaves: the body was read, what comes next is the end."""
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        with anyio.move_on_after(self._deadline - time.monotonic()):
            while (await self._request.receive())["type"] != "http.disconnect":
                pass
            self._left = True
        self._late = not self._left
        self._end()
        await asyncio.sleep(GRACE_SECONDS)
        if self._answering is not None:  # it waits for a caller who takes nothing
            self._answering.cancel()

    def cause(self, error: BaseException) -> BaseException:
        """Why an answer ended before its end, if that is not the error itself: nothing of it is a bug then."""
        if self._left:
            return ClientDisconnect()
        if self._late:
            most = f"{self._service.settings.request_seconds:g}"
            return RequestError(f"the answer took more than {most} s: ask for fewer tokens, show less", status=408)
        if isinstance(error, (ClosedError, asyncio.CancelledError)) and self._service.is_draining():
            return RequestError("the server ended before the answer did: ask another one, or later", status=503)
        return error

    def _end(self) -> None:
        self._over = True
        if self._job is not None:
            self._job.cancel()

    def is_over(self) -> bool:
        """Whether nobody waits any more; any thread may ask."""
        return self._over

    def ends(self, job: ChatJob) -> None:
        """From now on the job ends with the exchange."""
        self._job = job
        if self._over:
            job.cancel()

    def close(self) -> None:
        """The answer was given, or will not be."""
        if self._closed:
            return
        self._closed = True
        self._end()
        if self._watching is not None:
            self._watching.cancel()
        if self._job is None:
            self._service.leave()
        else:  # what it holds is freed by the engine, in its next round
            self._job.when_finished(self._service.leave)


class _Stream(StreamingResponse):
    """An answer in pieces, which closes its exchange even if nobody takes the first one."""

    def __init__(self, exchange: _Exchange, pieces: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError as error:
            if self._exchange.cause(error) is error:
                raise  # somebody else's
        finally:
            self._exchange.close()


async def _chained(first: Step, rest: AsyncIterator[Step]) -> AsyncIterator[Step]:
    yield first
    async for step in rest:
        yield step


async def _whole(answer: Answer, job: ChatJob, steps: AsyncIterator[Step]) -> dict[str, Any]:
    """The answer at once."""
    text = []
    end: Step | None = None
    async for step in steps:
        text.append(step.text)
        end = step
    assert end is not None  # `ChatJob.steps` ends with the end
    assert end.finish_reason is not None
    assert job.report is not None
    drawing = await asyncio.to_thread(job.drawing)  # it takes as long as several tokens of everybody else's
    return answer.completion(
        "".join(text), end.finish_reason, usage_of(job.report, job.new_tokens), job.seconds(end), drawing
    )


async def _events(
    answer: Answer, job: ChatJob, exchange: _Exchange, steps: AsyncIterator[Step], include_usage: bool
) -> AsyncIterator[str]:
    """The answer in pieces, as server-sent events."""
    try:
        yield _event(answer.piece({"role": "assistant", "content": ""}))
        async for step in steps:
            if step.text:
                yield _event(answer.piece({"content": step.text}))
            if step.finish_reason is not None:
                yield _event(answer.piece({}, step.finish_reason))
                if include_usage and job.report is not None:
                    drawing = await asyncio.to_thread(job.drawing)
                    yield _event(answer.counts(usage_of(job.report, job.new_tokens), job.seconds(step), drawing))
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is said already
        cause = exchange.cause(error)
        if isinstance(cause, ClientDisconnect):
            return
        if status_of(cause) == 500:
            _log.error("an answer ended early", exc_info=error)
        yield _event(error_body(cause))


def _event(piece: dict[str, Any]) -> str:
    return f"data: {json.dumps(piece, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _as_error(_: Request, error: Exception) -> Response:
    """What Starlette refuses itself: an unknown path, another method."""
    assert isinstance(error, HTTPException)
    wrapped = RequestError(f"{error.detail}: see /v1/chat/completions, /v1/models, /health", status=error.status_code)
    return JSONResponse(error_body(wrapped), error.status_code, error.headers)


async def _as_bug(_: Request, error: Exception) -> Response:
    """What should not happen; the log has it whole."""
    return JSONResponse(error_body(error), 500)
