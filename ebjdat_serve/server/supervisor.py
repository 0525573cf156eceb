"""What runs in the HTTP process beside its requests: workers are accepted, and every model is looked after."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from ebjdat_serve.errors import cause
from ebjdat_serve.server import ipc
from ebjdat_serve.server.model_manager import ModelManager
from ebjdat_serve.server.worker_sockets import WorkerSockets

log = logging.getLogger("ebjdat_serve")
LOOK_SECONDS = 1.0
"""Seconds between looks at the main process."""


class Supervisor:
    """Runs the managers of all models, by name, and brings each worker to its own."""

    def __init__(self, managers: Mapping[str, ModelManager], sockets: WorkerSockets) -> None:
        self._managers, self._sockets = managers, sockets
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(
        self, announce: Callable[[], None], give_up: Callable[[str], None], beside: Sequence[Coroutine[Any, Any, None]] = ()
    ) -> None:
        """Accept workers and follow the stores, until cancelled.

        ``announce`` is called once, when all workers are ready; ``give_up`` with the reason if the first bundle of a model is refused, if
        what runs ``beside`` fails, and when the main process has gone.
        """
        self._give_up, parent = give_up, os.getppid()
        started = lambda: announce() if all(manager.started for manager in self._managers.values()) else None  # noqa: E731
        with self._sockets.accepting(lambda connection: self._start(self._accept(connection))):
            for manager in self._managers.values():
                for work in manager.work(started, give_up):
                    self._start(work)
            for work in beside:
                self._start(work)
            while os.getppid() == parent:
                await asyncio.sleep(LOOK_SECONDS)
            give_up("the main process has gone")

    async def _accept(self, connection: socket.socket) -> None:
        """Serve one worker's connection until it ends."""
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # it died before it said a word
            hello: ipc.Hello = await ipc.receive(reader)
            await self._managers[hello.model].attend(hello, reader, writer)
        writer.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the HTTP process cannot go on", exc_info=error)
            self._give_up(f"the HTTP process cannot go on: {cause(error)}")
