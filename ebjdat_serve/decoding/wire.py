"""What the HTTP process and a decoder say to each other over a Unix socket.

To a decoder go pickles, and encoded images after them. Back come plain structures, checked for their sizes: a decoder has touched hostile
bytes, and what it says is not unpickled.
"""

import math
import pickle
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ebjdat_serve.contract import Input
from ebjdat_serve.decoding.header import Bytes, Header
from ebjdat_serve.errors import InvalidImage
from ebjdat_serve.pixels import Pixels

Decoded = Pixels | InvalidImage

LENGTH = struct.Struct("!I")
FORK, KILL = b"FK"
ORDER = struct.Struct("!BI?")  # FORK or KILL, the decoder's number, whether for large images
NEWS = struct.Struct("!Ii")  # number, exit status as waitpid gives it, or -1: it has started
PLAN, RESULTS = b"PR"
FRAME = struct.Struct("!BI")  # PLAN or RESULTS, bytes that follow
NEED = struct.Struct("!Q")
TEXT, PIXELS = b"TP"
ERROR = struct.Struct("!Bi?I")  # TEXT, which image, -1: none of them; whether it is too large; bytes of UTF-8 that follow
TOOK = struct.Struct("!I")  # microseconds of processor time, one for each image before all results
LONGEST_TEXT = 2000
LARGEST_PLAN = ERROR.size + LONGEST_TEXT
TOGETHER = 2**18
"""Bytes of images up to which a copy is quicker than another call of the system."""


@dataclass(frozen=True)
class Work:
    """Images to decode for ``contract``, whose bytes follow. Those without a header are to be judged first."""

    contract: Input
    lengths: tuple[int, ...]
    headers: tuple[Header, ...] = ()
    images: list[Bytes] = field(default_factory=list, compare=False)

    def encoded(self) -> list[Bytes]:
        """Return the parts of a message."""
        head = pickle.dumps(Work(self.contract, self.lengths, self.headers), 5)
        return [LENGTH.pack(len(head)), head, *self.images]


@dataclass(frozen=True)
class Go:
    """Decode what was judged, with so many bytes of memory at the most."""

    memory: int


@dataclass(frozen=True)
class Park:
    """Forget what was judged; it comes again when there is memory for it."""


def packed(message: object) -> bytes:
    """Return a message to a decoder that holds no images."""
    head = pickle.dumps(message, 5)
    return LENGTH.pack(len(head)) + head


def receive(line: socket.socket, expect: Callable[[int], None] = lambda n: None) -> object:
    """Return the next message to a decoder; ``expect`` is told how many bytes of images come, before they do.

    Raises EOFError when the other end hangs up.
    """
    message = pickle.loads(read(line, LENGTH.unpack(read(line, LENGTH.size))[0]))
    if isinstance(message, Work):
        expect(sum(message.lengths))
        message.images.extend(read_images(line, message.lengths))
    return message


def read_images(line: socket.socket, lengths: tuple[int, ...]) -> list[bytes]:
    """Return the images that follow a message; small ones are read together."""
    if sum(lengths) > TOGETHER:
        return [read(line, length) for length in lengths]
    images, at, data = [], 0, read(line, sum(lengths))
    for length in lengths:
        images.append(data[at : at + length])
        at += length
    return images


def read(line: socket.socket, n: int) -> bytes:
    """Return the next ``n`` bytes, as they came from the system, without a copy. Raises EOFError."""
    data = line.recv(n, socket.MSG_WAITALL) if n else b""
    if len(data) != n:
        raise EOFError
    return data


def encode_plan(judged: int | InvalidImage) -> bytes:
    """Return the answer of a decoder that judged: how much memory it needs, or why it refuses."""
    body = _text(judged) if isinstance(judged, InvalidImage) else NEED.pack(judged)
    return FRAME.pack(PLAN, len(body)) + body


def encode_results(decoded: list[Decoded], seconds: list[float]) -> bytes:
    """Return the answer of a decoder that decoded, and took so much processor time for each image."""
    parts: list[bytes | memoryview] = [TOOK.pack(min(int(1e6 * one), 2**32 - 1)) for one in seconds]
    for one in decoded:
        parts += [_text(one)] if isinstance(one, InvalidImage) else [bytes([PIXELS]), np.ascontiguousarray(one).data.cast("B")]
    return b"".join([FRAME.pack(RESULTS, sum(map(len, parts))), *parts])


def largest_results(n: int, contract: Input) -> int:
    """Return the most bytes after the frame that the results of ``n`` images take."""
    return n * (TOOK.size + max(1 + 3 * contract.height * contract.width, ERROR.size + LONGEST_TEXT))


def decode_plan(body: bytes | memoryview) -> int:
    """Return how much memory is needed. Raises InvalidImage: what the decoder refuses; ValueError: no answer of ours."""
    if len(body) == NEED.size:
        return int(NEED.unpack(body)[0])
    error, rest = _read_text(body)
    if rest:
        raise ValueError("a decoder's plan is too long")
    raise error


def decode_results(body: bytes | memoryview, n: int, contract: Input) -> tuple[list[Decoded], list[float]]:
    """Return the images and errors of ``n`` images in an answer, and the seconds each took. Raises ValueError: no answer of ours."""
    results: list[Decoded] = []
    if len(body) < n * TOOK.size:
        raise ValueError("a decoder's answer is cut off")
    seconds = [1e-6 * took for (took,) in TOOK.iter_unpack(body[: n * TOOK.size])]
    shape = (contract.height, contract.width, 3)
    size, rest = math.prod(shape), memoryview(body)[n * TOOK.size :]
    for _ in range(n):
        if rest[:1] == bytes([PIXELS]) and len(rest) > size:
            results.append(np.frombuffer(rest[1 : 1 + size], np.uint8).reshape(shape))
            rest = rest[1 + size :]
        else:
            error, rest = _read_text(rest)
            results.append(error)
    if rest:
        raise ValueError("a decoder's answer is too long")
    return results, seconds


def _text(error: InvalidImage) -> bytes:
    text = str(error).encode("utf-8", "replace")[:LONGEST_TEXT]
    return ERROR.pack(TEXT, -1 if error.index is None else error.index, error.too_large, len(text)) + text


def _read_text(body: bytes | memoryview) -> tuple[InvalidImage, memoryview]:
    if bytes(body[:1]) != bytes([TEXT]) or len(body) < ERROR.size:
        raise ValueError("a decoder's answer is cut off")
    _, index, too_large, length = ERROR.unpack(body[: ERROR.size])
    end = ERROR.size + length
    if len(body) < end:
        raise ValueError("a decoder's answer is cut off")
    error = InvalidImage(bytes(body[ERROR.size : end]).decode("utf-8", "replace"), too_large=too_large)
    error.index = None if index < 0 else index
    return error, memoryview(body)[end:]
