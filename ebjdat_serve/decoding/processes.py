"""The process that forks decoders, and the connection to each of these."""

import asyncio
import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

from ebjdat_serve.decoding import wire
from ebjdat_serve.decoding.header import Bytes, Limits
from ebjdat_serve.decoding.jobs import refuse, settle

log = logging.getLogger(__name__)

SECRETS = ("LIT_", "EBJDAT_")
"""Variables that decoders do not get: the key is in one."""
SLICE = 2**18
"""Bytes of a large message that are sent at a time."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**22)}
"""Large blocks go back to the system, and small ones stay: without the second, the pixels of each image came anew, page by page."""
UNKNOWN = -1
"""The fate of a decoder whose zygote ended first."""


class Channel(asyncio.BufferedProtocol):
    """The connection to one decoder, which is asked one thing at a time, and whose answer is received where it stays.

    It has touched hostile bytes: it is cut off as soon as it says more than it was asked for.
    """

    transport: asyncio.Transport

    def __init__(self, number: int, on_lost: Callable[[], None]) -> None:
        self.number, self.lost, self.on_lost = number, False, on_lost
        self.asked = self.answered = False  # ever
        self.held, self.got = bytearray(), 0  # room for the answer that is waited for and a byte more, and what has come of it
        self.kind = 0
        self.waiting: asyncio.Future[memoryview | None] | None = None  # None: there will be no answer
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # which uvloop's does not inherit from

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self.held or bytearray(1))[self.got :]

    def buffer_updated(self, nbytes: int) -> None:
        if self.lost:
            return
        self.got += nbytes
        if self.waiting is None or self.waiting.done() or self.got == len(self.held):
            self._cut()
        elif self.got >= wire.FRAME.size:
            kind, length = wire.FRAME.unpack_from(self.held)
            end = wire.FRAME.size + length
            if kind != self.kind or end >= len(self.held) or self.got > end:
                self._cut()
            elif self.got == end:
                self.waiting.set_result(memoryview(self.held)[wire.FRAME.size : end])
                self.held, self.got, self.answered = bytearray(), 0, True

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self.writable.set()
        if self.waiting and not self.waiting.done():
            self.waiting.set_result(None)
        self.on_lost()

    def _cut(self) -> None:
        log.warning("a decoder said what it was not asked for, and is ended")
        self.lost, self.held, self.got = True, bytearray(), 0
        self.transport.abort()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    async def ask(self, parts: Sequence[Bytes], kind: int, most: int, *, sliced: bool = False) -> memoryview:
        """Send a message, in slices if it is large, and return its answer, of ``kind`` and at most ``most`` bytes.

        Raises EOFError: the decoder is gone, or says anything else.
        """
        if self.lost:
            raise EOFError
        self.asked, self.kind, self.held, self.got = True, kind, bytearray(wire.FRAME.size + most + 1), 0
        self.waiting = asyncio.get_running_loop().create_future()
        if sliced:
            await self._send(parts)
        else:
            self.transport.writelines(parts)
        body = await self.waiting
        if body is None:
            raise EOFError
        return body

    async def _send(self, parts: Sequence[Bytes]) -> None:
        """Send a large message in slices, as the decoder reads them.

        Each slice is a copy: the body that a part is of may be dropped at any time, which no buffer in use allows.
        """
        for part in parts:
            for start in range(0, len(part), SLICE):
                self.transport.write(bytes(part[start : start + SLICE]))
                await self.writable.wait()
                await asyncio.sleep(0)  # the event is often set, and then no wait
                if self.lost:
                    raise EOFError


@dataclass(eq=False)
class Zygote:
    """The process that forks decoders, and what is known of these."""

    process: "subprocess.Popen[bytes]"
    line: socket.socket
    began: float
    born: "dict[int, asyncio.Future[None]]" = field(default_factory=dict)
    fates: "dict[int, asyncio.Future[int]]" = field(default_factory=dict)  # exit statuses, UNKNOWN when the zygote ends first
    gone: bool = False

    @classmethod
    def start(cls, limits: Limits) -> "Zygote":
        """Start one; it is ready some tenths of a second later, and takes orders until then."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", **MALLOC}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ebjdat_serve.decoding.zygote", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if not name.startswith(SECRETS)} | quiet,
            )
        ours.setblocking(False)
        ours.send(pickle.dumps(limits))
        zygote = cls(process, ours, asyncio.get_running_loop().time())
        asyncio.get_running_loop().add_reader(ours.fileno(), zygote.hear)
        return zygote

    async def fork(self, number: int, end: socket.socket, *, large: bool) -> None:
        """Have a decoder forked that serves ``end``, and wait until it is there. Raises OSError when the zygote is gone."""
        loop = asyncio.get_running_loop()
        self.born[number], self.fates[number] = loop.create_future(), loop.create_future()
        socket.send_fds(self.line, [wire.ORDER.pack(wire.FORK, number, large)], [end.fileno()])
        try:
            await self.born[number]
        finally:
            del self.born[number]

    def kill(self, number: int) -> None:
        """Have a decoder killed, if it is still there."""
        if not self.gone:
            with suppress(OSError):
                self.line.send(wire.ORDER.pack(wire.KILL, number, False))

    def hear(self) -> None:
        """Note which decoders started and ended."""
        try:
            news = self.line.recv(wire.NEWS.size)
        except BlockingIOError:
            return
        except OSError:
            news = b""
        if not news:
            self.close()
            return
        number, status = wire.NEWS.unpack(news)
        if status == -1:
            if number in self.born:
                settle(self.born[number], None)
            return
        if number in self.fates:
            settle(self.fates[number], status)

    def close(self) -> None:
        """Hang up, upon which it ends and its decoders with it."""
        if not self.gone:
            self.gone = True
            asyncio.get_running_loop().remove_reader(self.line.fileno())
            self.line.close()
            self.process.kill()
            self.process.wait()
            for birth in self.born.values():
                refuse(birth, ConnectionResetError("the process that forks decoders has ended"))
            for fate in self.fates.values():
                settle(fate, UNKNOWN)
