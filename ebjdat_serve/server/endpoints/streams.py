"""Server-sent events of a job in a generate worker."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse

from ebjdat_serve.server.answer import Schema
from ebjdat_serve.server.answer.images import event
from ebjdat_serve.server.endpoints.endpoint import Service
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.queues.generate_queue import GenerateQueue
from ebjdat_serve.server.queues.request_queue import PendingRequest

Made = TypeVar("Made")


async def events(
    service: Service,
    queue: GenerateQueue,
    pending: PendingRequest,
    *,
    opening: str,
    preview: Callable[[Any], Schema],
    done: Callable[[Any], Schema],
) -> AsyncIterator[bytes]:
    """Yield ``preview`` of the newest one whenever the client has received the last, then ``done`` of the result, or the error."""
    yield f": {opening}\n\n".encode()
    while not pending.future.done():
        try:
            async with asyncio.timeout(service.settings.stream_heartbeat):
                await pending.changed.wait()
        except TimeoutError:
            yield b": still there\n\n"
            continue
        pending.changed.clear()
        if pending.preview and not pending.future.done():
            newest, pending.preview = pending.preview, None
            yield await in_encoder(service, encode_event("preview", preview, newest))
            queue.preview_taken(pending)
    try:
        yield await in_encoder(service, encode_event("done", done, pending.future.result()))
    except Problem as problem:
        yield event("error", problem.document())


def encode_event(kind: str, make: Callable[[Any], Schema], value: Any) -> Callable[[], bytes]:
    """Return a function that makes the event of a preview or a result."""
    return lambda: event(kind, make(value).model_dump_json(exclude_unset=True))


async def in_encoder(service: Service, make: Callable[[], Made]) -> Made:
    """Return what ``make`` returns in a thread: to write a PNG takes time."""
    return await asyncio.get_running_loop().run_in_executor(service.encoders, make)


class EventStream(StreamingResponse):
    """Server-sent events; ``held`` is closed when the last event is sent, or the client leaves."""

    def __init__(self, stream: AsyncIterator[bytes], held: contextlib.ExitStack) -> None:
        super().__init__(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        with self._held:
            await super().__call__(scope, receive, send)
