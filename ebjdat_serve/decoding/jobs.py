"""What waits for a decoder, in which order, and how it is answered."""

import asyncio
from collections import deque
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from ebjdat_serve.decoding.header import Header
from ebjdat_serve.errors import EbjdatError, InvalidImage
from ebjdat_serve.pixels import Pixels

T = TypeVar("T")


class DecoderLost(EbjdatError):
    """A decoder ended before it answered, through no proven fault of the image: the request may be sent again."""


@dataclass(eq=False)
class Small:
    """One small image on its way."""

    data: bytes
    header: Header
    height: int
    width: int
    future: "asyncio.Future[Pixels]"


@dataclass(eq=False)
class Large:
    """A request whose images are decoded by one decoder; ``need`` is 0 until they were judged."""

    images: list[bytes]
    height: int
    width: int
    future: "asyncio.Future[list[Pixels]]"
    client: Hashable = None
    need: int = 0
    granted: int = 0  # bytes of those for heavy decodes
    tries: int = 0


class FairQueue(Generic[T]):
    """A queue for each client; they take turns."""

    def __init__(self) -> None:
        self.queues: dict[Hashable, deque[T]] = {}

    def put(self, client: Hashable, item: T) -> None:
        """Add an item behind the client's others."""
        self.queues.setdefault(client, deque()).append(item)

    def head(self) -> T | None:
        """Return whose turn it is, or nothing."""
        return next(iter(self.queues.values()))[0] if self.queues else None

    def pop(self) -> T:
        """Take out whose turn it is; the client's next turn comes after those of all others."""
        client = next(iter(self.queues))
        queue = self.queues.pop(client)
        item = queue.popleft()
        if queue:
            self.queues[client] = queue
        return item

    def remove(self, client: Hashable, item: T) -> None:
        """Take out an item, if it is there."""
        queue = self.queues.get(client, deque())
        with suppress(ValueError):
            queue.remove(item)
            if not queue:
                del self.queues[client]

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))


def settle(future: "asyncio.Future[T]", result: "T | InvalidImage") -> None:
    """Give a result or an error to whoever waits, if anybody does."""
    if isinstance(result, InvalidImage):
        refuse(future, result)
    elif not future.done():
        future.set_result(result)


def refuse(future: "asyncio.Future[T]", error: Exception) -> None:
    """Give an error to whoever waits, if anybody does."""
    if not future.done():
        future.set_exception(error)


def hand_on(alone: "asyncio.Future[list[Pixels]]", waiting: "asyncio.Future[Pixels]") -> None:
    """Give the one image of ``alone`` to whoever waits for it, and end its decoding when nobody does."""

    def arrived(done: "asyncio.Future[list[Pixels]]") -> None:
        if not done.cancelled():
            error = done.exception()
            settle(waiting, done.result()[0]) if error is None else refuse(waiting, error)  # type: ignore[arg-type]

    alone.add_done_callback(arrived)
    waiting.add_done_callback(lambda done: done.cancelled() and alone.cancel())
