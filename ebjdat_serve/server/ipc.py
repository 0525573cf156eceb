"""Messages between the HTTP process and its workers, over one Unix socket per worker: a head, a pickled message, its large arrays.

The arrays are sent from where they are and received where they stay: no turn of the event loop copies a whole one.

LitServe's own queues go through a third process and cost half the throughput; a multiprocessing queue stays locked when its reader is
killed while it waits. A socket has neither fault, and its end tells of a worker's death at once.
"""

import asyncio
import pickle
import select
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

HEAD = struct.Struct("!II")  # bytes of the pickle, and how many arrays follow it
SIZE = struct.Struct("!Q")  # bytes of an array; they come before the pickle
LARGE = 2**16
"""Bytes from which an array is not part of the pickle."""
SLICE = 2**18
"""Bytes that are received at a time."""
Parts = list[bytes | memoryview]
Kind = Literal["classify", "generate"]
"""The kinds of worker: one runs a forward pass per batch, the other moves chains."""


@dataclass(frozen=True)
class Hello:
    """First message of a worker: the name of the model that it is for, its kind and process id."""

    model: str
    kind: Kind
    pid: int


@dataclass(frozen=True)
class LoadModel:
    """Open the bundle in ``folder``, whose bundle.json has the sha256 ``key``; later messages name it by ``key``."""

    key: str
    folder: Path


@dataclass(frozen=True)
class UnloadModel:
    """Close the bundle ``key``: no request for it will follow."""

    key: str


@dataclass(frozen=True)
class ModelLoaded:
    """The bundle is open and passed its self-test; ``engine_info`` is engine, provider and precision."""

    key: str
    engine_info: dict[str, str]


@dataclass(frozen=True)
class ModelRefused:
    """The bundle cannot be served, for ``reason``."""

    key: str
    reason: str


@dataclass(frozen=True)
class Request:
    """Run ``operation`` with the bundle ``key`` on ``payload``; ``number`` is unique per queue.

    A generate worker counts the work for ``client``; a batch has no client, since images of several may be in it.
    """

    number: int
    key: str
    operation: str
    payload: Any
    client: str = ""


@dataclass(frozen=True)
class Cancel:
    """The response to request ``number`` is not wanted any more."""

    number: int


@dataclass(frozen=True)
class PreviewTaken:
    """The client has received the last preview of request ``number``; the next may be made."""

    number: int


@dataclass(frozen=True)
class Response:
    """The result of request ``number``, and the seconds that it took here."""

    number: int
    value: Any
    seconds: float = 0.0


@dataclass(frozen=True)
class UnknownOperation:
    """Request ``number`` asks for an operation that no endpoint lists: the worker does not have it."""

    number: int
    operation: str


@dataclass(frozen=True)
class Preview:
    """An intermediate result of request ``number``."""

    number: int
    value: Any


@dataclass(frozen=True)
class Stats:
    """Chain-steps per second, those left by request number, the longest wait of a chain for a step in seconds, and steps since the last."""

    rate: float
    left: dict[int, int]
    longest_wait: float = 0.0
    steps: int = 0


def encode(message: object) -> Parts:
    """Return the message as bytes, and its large arrays as they are, which must not change until they are sent."""
    beside: list[memoryview] = []

    def within(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= LARGE:
            beside.append(raw)
        return raw.nbytes < LARGE

    body = pickle.dumps(message, protocol=5, buffer_callback=within)
    return [HEAD.pack(len(body), len(beside)) + b"".join(SIZE.pack(raw.nbytes) for raw in beside) + body, *beside]


async def receive(reader: asyncio.StreamReader) -> Any:
    """Return the next message; raise asyncio.IncompleteReadError or ConnectionError when the worker has gone."""
    length, n = HEAD.unpack(await reader.readexactly(HEAD.size))
    sizes = _sizes(await reader.readexactly(n * SIZE.size))
    body = await reader.readexactly(length)
    return pickle.loads(body, buffers=[await _receive_array(reader, size) for size in sizes])


def _sizes(data: bytes | bytearray) -> list[int]:
    return [size for (size,) in SIZE.iter_unpack(data)]


async def _receive_array(reader: asyncio.StreamReader, size: int) -> NDArray[np.uint8]:
    array, got = np.empty(size, np.uint8), 0
    while got < size:
        if not (data := await reader.read(min(SLICE, size - got))):
            raise asyncio.IncompleteReadError(b"", size - got)
        array[got : got + len(data)] = np.frombuffer(data, np.uint8)
        got += len(data)
    return array


class Channel:
    """The worker's end of the socket; several threads may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Send a message; raise OSError when the HTTP process has gone."""
        with self._lock:
            for part in encode(message):
                self._socket.sendall(part)

    def poll(self, timeout: float | None) -> bool:
        """Return whether a message can be received, waiting up to ``timeout`` seconds for one; None: without limit."""
        return bool(select.select([self._socket], [], [], timeout)[0])

    def receive(self) -> Any:
        """Return the next message; raise EOFError when the HTTP process has gone."""
        length, n = HEAD.unpack(self._exactly(HEAD.size))
        sizes = _sizes(self._exactly(n * SIZE.size))
        body = self._exactly(length)
        return pickle.loads(body, buffers=[self._exactly(size) for size in sizes])

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            n = self._socket.recv_into(view[got:])
            if not n:
                raise EOFError("the HTTP process has gone")
            got += n
        return data
