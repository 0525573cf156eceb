"""Sockets between the processes of a server, none with a name: what nobody can find, nobody can delete or connect to.

The main process makes a pair of sockets for each worker, gives one end to the worker as it starts and sends the other to the HTTP process.
Whatever ends these processes leaves nothing behind.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

READY, FAILED = "ready", "failed: "


class WorkerSockets:
    """A pair of sockets between the main and the HTTP process: connections of workers one way, lines of text the other."""

    def __init__(self) -> None:
        self._main, self._http = socket.socketpair()
        self._said = b""

    # the main process

    @contextlib.contextmanager
    def connect(self) -> Iterator[socket.socket]:
        """Give the worker's end of a new connection, open in this process only until the worker has started."""
        worker, http = socket.socketpair()
        with worker, http:
            with contextlib.suppress(OSError):  # the HTTP process has gone, and the server ends
                socket.send_fds(self._main, [b"+"], [http.fileno()])
            yield worker

    def forked(self) -> None:
        """Close the HTTP process's end here, once that process has a copy: it alone tells workers that it is there."""
        self._http.close()

    def ready(self) -> bool:
        """Return whether the HTTP process has said that every worker is ready."""
        return READY in self._lines()

    def failure(self) -> str:
        """Return why the HTTP process ended the server, "" if it did not say."""
        return next((line.removeprefix(FAILED) for line in self._lines() if line.startswith(FAILED)), "")

    def _lines(self) -> list[str]:
        """Return the lines that have come."""
        with contextlib.suppress(OSError):  # nothing more
            while chunk := self._main.recv(4096, socket.MSG_DONTWAIT):
                self._said += chunk
        return self._said.decode(errors="replace").splitlines()

    # the HTTP process

    def tell(self, line: str) -> None:
        """Tell the main process."""
        with contextlib.suppress(OSError):  # it has gone, and this process follows
            self._http.sendall(" ".join(line.splitlines()).encode() + b"\n")

    @contextlib.contextmanager
    def accepting(self, accept: Callable[[socket.socket], None]) -> Iterator[None]:
        """Call ``accept`` with the connection of every worker, those that came before included."""
        loop = asyncio.get_running_loop()
        self._main.close()
        self._http.setblocking(False)

        def receive() -> None:
            with contextlib.suppress(BlockingIOError):
                sent, descriptors, _, _ = socket.recv_fds(self._http, 1, 1)
                for descriptor in descriptors:
                    accept(socket.socket(fileno=descriptor))
                if not sent:
                    loop.remove_reader(self._http)  # the main process has gone

        loop.add_reader(self._http, receive)
        try:
            yield
        finally:
            loop.remove_reader(self._http)
            self._http.close()
