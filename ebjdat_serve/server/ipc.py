"""What the HTTP process and its workers say to each other, over one Unix socket a worker: a length, then a pickled message.

LitServe's own queues go through a third process and cost half the throughput; a queue of multiprocessing's is locked for ever by a reader
that was killed while it slept. A socket has neither fault, and its end tells of a worker's death at once.
"""

import asyncio
import pickle
import select
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.pixels import Pixels
from ebjdat_serve.sgld import Sampler

LENGTH = struct.Struct("!I")


@dataclass(frozen=True)
class Verdicts:
    """What a worker says of n images: logits-derived arrays with n rows, ready to be written as JSON."""

    probability: NDArray[np.float32]
    joint_energy: NDArray[np.float32]
    energy: NDArray[np.float32]
    suspicion: NDArray[np.float32]
    p_value: NDArray[np.float64]
    suspicious: NDArray[np.bool_]

    def rows(self, chosen: slice) -> "Verdicts":
        """Return what is said of the images at ``chosen``."""
        return Verdicts(*(array[chosen] for array in vars(self).values()))


def joined(parts: Sequence[Verdicts]) -> Verdicts:
    """Return what is said of all images of ``parts``, in order."""
    return Verdicts(*(np.concatenate(arrays) for arrays in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class Job:
    """One request to /generate; a preview of it is wanted ``every`` so many steps, 0: none."""

    label: int
    n: int
    sampler: Sampler
    seed: int
    every: int = 0

    @property
    def work(self) -> int:
        """Chain-steps."""
        return self.n * self.sampler.steps


@dataclass(frozen=True)
class Hello:
    """A worker is there, and which lane it serves."""

    lane: str
    pid: int


@dataclass(frozen=True)
class Load:
    """Open the bundle in ``folder`` whose bundle.json has the sha256 ``key``, which names it from now on."""

    key: str
    folder: Path


@dataclass(frozen=True)
class Drop:
    """The bundle ``key`` is asked for no more."""

    key: str


@dataclass(frozen=True)
class Loaded:
    """The bundle is open, passed its self-test, and runs here."""

    key: str
    about: dict[str, str]


@dataclass(frozen=True)
class Refused:
    """The bundle is not served, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Ask:
    """Do this: classify pixels (n, H, W, 3), or draw a Job."""

    number: int
    key: str
    payload: Any


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for the answer to ``number`` any more."""

    number: int


@dataclass(frozen=True)
class Show:
    """The client has taken the last preview of ``number``: there may be another."""

    number: int


@dataclass(frozen=True)
class Answer:
    """The last word on ``number``: Verdicts of pixels, Drawn for a Job."""

    number: int
    value: Any


@dataclass(frozen=True)
class Preview:
    """How far a Job has come, and how it looks."""

    number: int
    step: int
    image: Pixels
    verdicts: Verdicts


@dataclass(frozen=True)
class Pace:
    """Chain-steps a second of late, what is left of each job in chain-steps, and the seconds that a chain waited longest for a step."""

    rate: float
    left: dict[int, int]
    longest: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """The answer to a Job: pixels (n, H, W, 3) and what the model says of them."""

    image: Pixels
    verdicts: Verdicts


def pack(message: object) -> bytes:
    """Return the message as it goes over the wire."""
    body = pickle.dumps(message, protocol=5)
    return LENGTH.pack(len(body)) + body


async def receive(reader: asyncio.StreamReader) -> Any:
    """Return the next message; raise asyncio.IncompleteReadError or ConnectionError when the other end has gone."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


class Line:
    """A worker's end of the wire; several threads may send."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Send a message; raise OSError when the HTTP process has gone."""
        with self._lock:
            self._socket.sendall(pack(message))

    def waiting(self, seconds: float | None) -> bool:
        """Return whether a message has begun to arrive, waiting so long for one; None: as long as it takes."""
        return bool(select.select([self._socket], [], [], seconds)[0])

    def receive(self) -> Any:
        """Return the next message; raise EOFError when the HTTP process has gone."""
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        return pickle.loads(self._exactly(length))

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            n = self._socket.recv_into(view[got:])
            if not n:
                raise EOFError("the HTTP process has gone")
            got += n
        return data
