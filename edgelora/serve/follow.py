"""A request while its job is worked on: its events, its deadline, and whether its client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.responses import Response

from edgelora.serve.refusal import Refusal, as_refusal
from edgelora.serve.replies import TextReply, Written, event
from edgelora.serve.worker import Job, Worker

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientGone(Exception):
    """The client has closed the connection: nobody reads the answer."""


@asynccontextmanager
async def followed(worker: Worker, job: Job, receive: Receive, timeout_s: float) -> AsyncIterator[AsyncIterator[Any]]:
    """Submit a job and give its events; on leaving, whatever the reason, the job is cancelled.

    The events raise Refusal where the job failed or took longer than `timeout_s`, ClientGone where the client left.
    """
    worker.submit(job)
    watcher = asyncio.create_task(watch(job, receive))
    try:
        yield events(job, asyncio.get_running_loop().time() + timeout_s)
    finally:
        watcher.cancel()
        worker.cancel(job)


async def watch(job: Job, receive: Receive) -> None:
    """Cancel the job when the client leaves. The body has been read: the next message says so."""
    while (await receive())["type"] != "http.disconnect":
        continue
    job.cancelled = True
    job.events.put_nowait(ClientGone())


async def events(job: Job, deadline: float) -> AsyncIterator[str | Written | list[Any]]:
    """Yield what comes of a job, for ever: the caller knows which event is the last."""
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                found = await job.events.get()
        except TimeoutError:
            raise Refusal(503, "the request took too long: the server is busy, or the answer is long", code="timeout") from None
        if isinstance(found, Exception):
            raise found
        yield found


async def stream(reply: TextReply, found: AsyncIterator[Any], note: Callable[[Written], None]) -> AsyncIterator[bytes]:
    """Yield the server-sent events of an answer. What fails after the first is told in an event: the status is sent."""
    begun = False
    try:
        async for item in found:
            if not begun:
                begun = True
                for part in reply.first():
                    yield part
            if isinstance(item, Written):
                note(item)
                for part in reply.last(item):
                    yield part
                return
            yield reply.piece(item)
    except Exception as error:
        if not begun or isinstance(error, ClientGone):
            raise
        yield event(as_refusal(error).body())


class EventStream(Response):
    """Server-sent events, sent as they come; `parts` is closed at the end, also when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, parts: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # not known yet
        self.first, self.parts = first, parts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.first, "more_body": True})
        async with aclosing(self.parts):
            try:
                async for part in self.parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except ClientGone:
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
