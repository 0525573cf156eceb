"""Messages between the HTTP process and its workers, over one Unix socket per worker: a length, then a pickled message.

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

LENGTH = struct.Struct("!I")
Kind = Literal["classify", "generate"]
"""The kinds of worker: one runs a forward pass per batch, the other moves chains."""


@dataclass(frozen=True)
class Hello:
    """First message of a worker: its kind and process id."""

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
    """The result of request ``number``."""

    number: int
    value: Any


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
    """Chain-steps per second, chain-steps left by request number, and the longest wait of a chain for a step in seconds."""

    rate: float
    left: dict[int, int]
    longest_wait: float = 0.0


def encode(message: object) -> bytes:
    """Return the message as bytes: its length, then its pickle."""
    body = pickle.dumps(message, protocol=5)
    return LENGTH.pack(len(body)) + body


async def receive(reader: asyncio.StreamReader) -> Any:
    """Return the next message; raise asyncio.IncompleteReadError or ConnectionError when the worker has gone."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


class Channel:
    """The worker's end of the socket; several threads may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Send a message; raise OSError when the HTTP process has gone."""
        with self._lock:
            self._socket.sendall(encode(message))

    def poll(self, timeout: float | None) -> bool:
        """Return whether a message can be received, waiting up to ``timeout`` seconds for one; None: without limit."""
        return bool(select.select([self._socket], [], [], timeout)[0])

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
