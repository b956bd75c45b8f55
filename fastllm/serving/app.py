"""The web application: one page, and JSON for each task. Needs the extra ``[serve]`` (Starlette, uvicorn)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files

from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..config import MAX_FLOAT, InputError, check_encodable
from ..data import Tokenizer
from ..data.corpus import lines_of
from ..generate.sampling import check_sampling, generate
from ..models import Model
from ..tasks.answer import answers
from ..tasks.classify import classify
from ..tasks.translate import translate_lines

TASKS = ("generate", "translate", "classify", "answer")
# Bytes of a request's body, and seconds that one may take. Guesses, as LIMITS are.
MAX_BODY_BYTES, MAX_SECONDS = 64 << 10, 60.0
# Characters of a text, tokens written, beams.
LIMITS = {"text": 20_000, "question": 1_000, "max_new_tokens": 1_000, "beams": 16}


class _Held(StreamingResponse):
    """A stream for which a lock is held; it gives the lock back at its end, also where nobody reads it."""

    def __init__(self, content, lock: asyncio.Lock, **options):
        super().__init__(content, **options)
        self.lock = lock

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.lock.release()


class BadRequest(ValueError):
    """What was asked for cannot be done; the message goes to the browser."""


@dataclass
class ServedModel:
    """A model and its tokenizer."""

    model: Model
    tokenizer: Tokenizer


def _text(values: dict, name: str, default: str | None = None) -> str:
    """The text under ``name``; without a ``default`` it may not be empty."""
    value = values.get(name, default)
    limit = LIMITS.get(name, LIMITS["text"])
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise BadRequest(f"{name}: expected a text")
    if len(value) > limit:
        raise BadRequest(f"{name}: expected at most {limit:,} characters, got {len(value):,}")
    try:
        check_encodable(value, name)
    except InputError as error:
        raise BadRequest(str(error)) from error
    return value


def _number(values: dict, name: str, default: float, kind: type = float):
    value = values.get(name, default)
    # JSON has no number that is not finite, but 1e999 becomes one.
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT
    if not finite or (kind is int and value != int(value)):
        raise BadRequest(f"{name}: expected a number{' that is whole' if kind is int else ''}, got {str(value)[:40]!r}")
    if name in LIMITS and value > LIMITS[name]:
        raise BadRequest(f"{name}: expected at most {LIMITS[name]:,}, got {value}")
    return kind(value)


def _written(served: ServedModel, values: dict, deadline: float) -> Iterator[str]:
    """The continuation of ``prompt``, piece by piece, until the deadline."""
    prompt = _text(values, "prompt", "")
    top_p = _number(values, "top_p", 0.95)
    options = dict(
        max_new_tokens=_number(values, "max_new_tokens", 200, int), temperature=_number(values, "temperature", 0.8),
        top_k=None, top_p=top_p, seed=None if values.get("seed") is None else _number(values, "seed", 0, int),
    )  # fmt: skip
    try:
        check_sampling(**options)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    tokenizer = served.tokenizer
    start = tokenizer.encode(prompt)
    tokens = generate(served.model, [tokenizer.end_of_text, *start], stop_token=tokenizer.end_of_text, **options)

    def in_time() -> Iterator[int]:
        for token in tokens:
            if time.monotonic() > deadline:
                return
            yield token

    return tokenizer.stream(in_time(), after=start)


def _until(deadline: float) -> Callable[[int], None]:
    """What a computation calls after each of its parts; raises a TimeoutError after the deadline."""

    def check(count: int) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    return check


def _translated(served: ServedModel, values: dict, deadline: float) -> dict:
    beams = _number(values, "beams", 4, int)
    if beams < 1:
        raise BadRequest(f"beams: expected at least 1, got {beams}")
    lines, done = lines_of(_text(values, "text")), _until(deadline)
    return {"translation": "\n".join(translate_lines(served.model, served.tokenizer, lines, beams=beams, done=done))}


def _classified(served: ServedModel, values: dict, deadline: float) -> dict:
    row = classify(served.model, served.tokenizer, [_text(values, "text")])[0].tolist()
    labels = served.model.config.labels
    ranked = sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1])
    return {"labels": [{"label": label, "probability": probability} for label, probability in ranked]}


def _answered(served: ServedModel, values: dict, deadline: float) -> dict:
    asked = (_text(values, "question"), _text(values, "text"))
    (span,) = answers(served.model, served.tokenizer, [asked], allow_none=True, done=_until(deadline))
    return {"answer": span.text, "start": span.start, "end": span.end}


ANSWERS: dict[str, Callable[[ServedModel, dict, float], dict]] = {
    "translate": _translated, "classify": _classified, "answer": _answered,
}  # fmt: skip


def _no_constant(name: str):
    """Python's reader takes NaN and Infinity, which are no JSON."""
    raise ValueError(f"{name} is no JSON")


async def _body(request: Request) -> dict:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A form of another site cannot send JSON without asking first.
        raise BadRequest("expected application/json")
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise BadRequest(f"expected at most {MAX_BODY_BYTES:,} bytes")
    try:
        values = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest("expected JSON") from error
    if not isinstance(values, dict):
        raise BadRequest("expected a JSON object")
    return values


def _name_of(host: str) -> str:
    """The name in a Host header, without port and brackets. Upper and lower case are the same (RFC 9110, 4.2.3)."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower()


class _Site:
    """The pages of :func:`make_app`."""

    def __init__(self, models: dict[str, ServedModel], seconds: float):
        self.models, self.seconds = models, seconds
        # One computation at a time: they share the cores.
        self.busy = asyncio.Lock()
        self.page = files("fastllm.serving").joinpath("page.html").read_text("utf-8")

    def routes(self) -> list[Route]:
        return [Route("/", self.home), Route("/models", self.about), Route("/{task}", self.work, methods=["POST"])]

    async def home(self, request: Request) -> Response:
        return HTMLResponse(self.page)

    async def about(self, request: Request) -> Response:
        return JSONResponse(
            {task: {"parameters": served.model.num_parameters(), "labels": list(served.model.config.labels)}
             for task, served in self.models.items()}
        )  # fmt: skip

    async def work(self, request: Request) -> Response:
        task = request.path_params["task"]
        if task not in self.models:
            return JSONResponse({"error": f"no model for {task} is served"}, 404)
        try:
            return await self._answer(task, request)
        except BadRequest as error:
            return JSONResponse({"error": str(error)}, 400)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except (TimeoutError, asyncio.TimeoutError):
            return JSONResponse({"error": f"took more than {self.seconds:g} s"}, 503)

    async def _answer(self, task: str, request: Request) -> Response:
        """What the model of ``task`` makes of the request.

        Raises:
            BadRequest: it asks for what cannot be done.
            ClientDisconnect: nobody waits for the answer any more.
            TimeoutError, asyncio.TimeoutError: it took more than ``seconds``.
        """
        values = await asyncio.wait_for(_body(request), self.seconds)
        deadline = time.monotonic() + self.seconds
        if task == "generate":
            pieces = _written(self.models[task], values, deadline)
            await asyncio.wait_for(self.busy.acquire(), self.seconds)
            return _Held(iterate_in_threadpool(pieces), self.busy, media_type="text/plain; charset=utf-8")
        return JSONResponse(await asyncio.wait_for(self._computed(task, values, deadline), self.seconds))

    async def _computed(self, task: str, values: dict, deadline: float) -> dict:
        await self.busy.acquire()
        running = asyncio.ensure_future(run_in_threadpool(ANSWERS[task], self.models[task], values, deadline))

        def ended(running: asyncio.Future) -> None:
            self.busy.release()
            if not running.cancelled():
                running.exception()  # seen, also where nobody waits for it any more

        running.add_done_callback(ended)
        # A thread cannot be stopped: after a timeout it goes on to the end of its part of the work, and the next
        # computation waits for that.
        return await asyncio.shield(running)


def make_app(models: dict[str, ServedModel], hosts: tuple[str, ...], seconds: float = MAX_SECONDS) -> Callable:
    """The application for ``models`` by task, a subset of :data:`TASKS`.

    Args:
        hosts: the names under which it may be called; others are refused, so that no other site's page can reach it
            by a name that points here.
        seconds: seconds that a request may take, its wait for others included.
    """
    names = {host.lower() for host in hosts}
    app = Starlette(routes=_Site(models, seconds).routes())

    async def guarded(scope, receive, send):
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if _name_of(host) not in names:
                await JSONResponse({"error": "unknown host"}, 421)(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded
