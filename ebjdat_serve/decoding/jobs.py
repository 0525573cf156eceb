"""What waits for a decoder, in which order, and how it is answered."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ebjdat_serve.contract import Input
from ebjdat_serve.decoding.header import Bytes, Header
from ebjdat_serve.errors import EbjdatError, InvalidImage
from ebjdat_serve.fairness import FairQueue
from ebjdat_serve.pixels import Pixels

if TYPE_CHECKING:
    from ebjdat_serve.decoding.processes import Zygote

T = TypeVar("T")
SUSPICION_SECONDS = 60.0
PIXEL_SECONDS, BYTE_SECONDS, IMAGE_SECONDS, LENIENCE = 15e-9, 8e-9, 5e-4, 4
"""What an honest small image takes for each pixel of its work and of its result, each byte and itself, and how many times that it may."""
EXCESS_SECONDS, FORGIVEN = 0.1, 0.02
"""Seconds beyond that of a client's images together which make it suspect, and those that are forgiven each second."""
TURN_SECONDS = 0.05
"""What a turn at a decoder of large images is taken to cost before it is over."""


class DecoderLost(EbjdatError):
    """A decoder ended before it answered, through no proven fault of the image: the request may be sent again."""


@dataclass(eq=False)
class Small:
    """One small image on its way."""

    data: bytes
    header: Header
    contract: Input
    future: "asyncio.Future[Pixels]"
    client: str


@dataclass(eq=False)
class Large:
    """A request whose images are decoded by one decoder; ``need`` is 0 until they were judged."""

    images: list[Bytes]
    contract: Input
    future: "asyncio.Future[list[Pixels]]"
    client: str
    suspect: bool = False  # it was one of the small images of a message that was never answered
    need: int = 0
    granted: int = 0  # bytes of those for heavy decodes
    lost_with: "Zygote | None" = None  # which ended while it was decoded
    queue: "FairQueue[Large]" = field(default_factory=FairQueue)
    number: int = 0  # in the queue, the last that it waited in

    def wait_in(self, queue: "FairQueue[Large]") -> None:
        """Queue behind the client's others; what it costs is known when its turn is over."""
        self.queue, self.number = queue, queue.push(self.client, self, TURN_SECONDS)

    def withdraw(self) -> None:
        """Leave the queue, if it is in one."""
        self.queue.remove(self.number)


class Suspects:
    """Clients whose small images have cost the decoder of small ones: for a while all of theirs are decoded as large ones."""

    def __init__(self) -> None:
        self.until: dict[str, float] = {}
        self.excess: dict[str, tuple[float, float]] = {}  # by client: seconds, as of a time

    def took(self, item: Small, seconds: float) -> float:
        """Count what a small image took beyond what it may: a client whose images did so too often is suspect.

        Return its work, in pixels, beyond that of its header, for the client to be charged; it is negative where the header said more.
        """
        charge = seconds / PIXEL_SECONDS - item.header.work
        pixels = item.header.work + item.contract.height * item.contract.width
        beyond = seconds - LENIENCE * (IMAGE_SECONDS + PIXEL_SECONDS * pixels + BYTE_SECONDS * len(item.data))
        if beyond <= 0:
            return charge
        now = time.monotonic()
        self.excess = {name: (left, now) for name, (was, at) in self.excess.items() if (left := was - FORGIVEN * (now - at)) > 0}
        total = self.excess.pop(item.client, (0.0, now))[0] + beyond
        if total > EXCESS_SECONDS:
            self.add(item.client)
        else:
            self.excess[item.client] = total, now
        return charge

    def add(self, client: str) -> None:
        """Suspect a client from now on."""
        now = time.monotonic()
        self.until = {name: end for name, end in self.until.items() if end > now} | {client: now + SUSPICION_SECONDS}

    def __contains__(self, client: str) -> bool:
        return self.until.get(client, 0.0) > time.monotonic()


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
