"""The workers of a model and the bundle they serve: a new one is opened on all of them, then swapped in one move while requests go on."""

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from ebjdat_serve.bundle import resolve
from ebjdat_serve.errors import BundleError, EbjdatError, cause
from ebjdat_serve.history import SERVED_FILE
from ebjdat_serve.listing import printable
from ebjdat_serve.locking import Held, hold
from ebjdat_serve.server import ipc
from ebjdat_serve.server.queues.request_queue import RequestQueue, WorkerConnection
from ebjdat_serve.server.served_model import ServedModel, fingerprint, open_bundle, open_last, store_at
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.threads import in_daemon_thread
from ebjdat_serve.store import remember

log = logging.getLogger("ebjdat_serve")
MAX_DEATHS = 3
"""Workers that may die while a bundle is opened before the bundle is held to be the cause."""
RETRY_SECONDS = 5.0
"""Seconds until a worker that could not open the bundle being served tries again."""


class ModelManager:
    """Decides which bundle of one model is served, and has the workers of its queues open and close bundles."""

    def __init__(self, served: ServedModel, settings: Settings, queues: list[RequestQueue], refused: str = "") -> None:
        """``refused``: why ``served`` is not the current version of the store."""
        self.active = served
        self.started = False
        self.refused: dict[str, str] = {}
        self.refreshes: Counter[str] = Counter()  # by result: served or refused
        self._store = store_at(settings.model)
        self._settings = settings
        self._queues = {queue.kind: queue for queue in queues}
        self._candidate: ServedModel | None = None
        self._candidate_since = 0.0
        self._deaths = 0  # of workers, while the candidate was opened
        self._retiring: dict[str, ServedModel] = {}
        self._seen = fingerprint(served.bundle.path, self._store)
        if refused:
            self._pass_over(refused)
        self._remembered, self._memorable = "", True
        self._held: dict[tuple[Path, int], int] = {}  # descriptors that mark bundles as served

    def ready(self) -> bool:
        """Return whether every worker of every queue has the served bundle open."""
        return all(queue.ready(self.active.key) for queue in self._queues.values())

    def engine_info(self) -> dict[str, str]:
        """Return engine, provider and precision of the served bundle, of the first worker that opened it."""
        for queue in self._queues.values():
            for worker in queue.workers:
                if self.active.key in worker.loaded:
                    return worker.loaded[self.active.key].engine_info
        return {"engine": "none yet"}

    def refresh_status(self) -> dict[str, Any]:
        """Return the version being opened, the last one refused, and those kept for requests that began on them."""
        return {
            "opening": self._candidate.name if self._candidate else None,
            "refused": self.refused or None,
            "retiring": [served.name for served in self._retiring.values()],
        }

    def work(self, started: Callable[[], None], give_up: Callable[[str], None]) -> list[Coroutine[Any, Any, None]]:
        """Return what is to run beside each other while requests are served, none of which ends.

        ``started`` is called once, when all workers are ready; ``give_up`` with the reason if the first bundle is refused.
        """
        self._announce, self._give_up = started, give_up
        return [self._follow(), *(queue.watch() for queue in self._queues.values())]

    async def _follow(self) -> None:
        """Follow the store."""
        while True:
            self._mark_served()
            await asyncio.sleep(self._settings.refresh_interval)
            self._close_retired()
            await self._check_store()
            await self._remember()

    # workers ---------------------------------------------------------------------------------------------------------

    async def attend(self, hello: ipc.Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Give a worker its bundles and its requests until it is gone."""
        queue, worker = self._queues[hello.kind], WorkerConnection(hello.pid, reader, writer)
        queue.workers.append(worker)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # raised when a worker dies
            for served in self._open():
                worker.send(ipc.LoadModel(served.key, served.bundle.path))
            async for message in queue.serve(worker):
                self._handle(queue, worker, message)
        queue.worker_lost(worker)
        if not queue.closed:
            log.warning("the %s worker %d died; another is starting", queue.kind, worker.pid)
        if self._candidate and self._candidate.key not in worker.loaded:
            self._deaths += 1
            if self._deaths >= MAX_DEATHS:
                self._drop_candidate("workers died while opening it")

    def _handle(self, queue: RequestQueue, worker: WorkerConnection, message: ipc.ModelLoaded | ipc.ModelRefused) -> None:
        match message:
            case ipc.ModelLoaded(key) if all(key != served.key for served in self._open()):
                worker.send(ipc.UnloadModel(key))  # it was refused meanwhile
            case ipc.ModelLoaded(key):
                worker.loaded[key] = message
                queue.worker_ready(worker)
                self._settle()
            case ipc.ModelRefused(key, reason):
                self._refuse(queue, worker, key, reason)

    def _open(self) -> list[ServedModel]:
        """Return every bundle that workers have open or are to open, each once."""
        candidate = [self._candidate] if self._candidate else []
        return list({served.key: served for served in [*self._retiring.values(), self.active, *candidate]}.values())

    def _refuse(self, queue: RequestQueue, worker: WorkerConnection, key: str, reason: str) -> None:
        if self._candidate and key == self._candidate.key:
            self._drop_candidate(reason)
        elif not self.started:
            if key == self.active.key:  # not of one that was passed over already
                self._fall_back(reason)
        elif served := next((served for served in self._open() if served.key == key), None):
            log.error("a worker cannot open %s: %s", served.name, reason)
            again = ipc.LoadModel(key, served.bundle.path)
            asyncio.get_running_loop().call_later(RETRY_SECONDS, lambda: worker.send(again) if worker in queue.workers else None)

    def _fall_back(self, reason: str) -> None:
        """Start with what a server of the store served last, in place of a version that the workers refuse."""
        last = open_last(self._settings, self._store)
        if last is None or last.key == self.active.key:
            self._give_up(reason)
            return
        self.active = last
        self._pass_over(reason)
        self._send_all(ipc.LoadModel(last.key, last.bundle.path))

    def _pass_over(self, reason: str) -> None:
        """Note that the current version of the store is refused at the start, and look at it again when it changes."""
        name = str(self._settings.model)
        with contextlib.suppress(BundleError, OSError):
            folder = resolve(self._settings.model)
            self._seen, name = fingerprint(folder, self._store), folder.name
        self._note_refusal(name, reason)

    # refresh ---------------------------------------------------------------------------------------------------------

    async def _check_store(self) -> None:
        """Open the store's current bundle, if it is not the one last looked at."""
        timeout = self._settings.open_timeout
        if self._candidate and time.monotonic() - self._candidate_since > timeout:
            self._drop_candidate(f"it was not open within {timeout:g} s (serve --open-timeout)")
        if self._candidate or not self.started:
            return
        try:
            folder = resolve(self._settings.model)
            seen = fingerprint(folder, self._store)
        except (BundleError, OSError):
            return  # the pointer is being moved, or was taken away: what is open goes on
        if seen == self._seen:
            return
        self._seen = seen
        try:
            served = await in_daemon_thread(partial(open_bundle, folder, self._settings, self._store))
        except (EbjdatError, OSError) as error:
            self._note_refusal(folder.name, cause(error))
            if isinstance(error, OSError):
                self._seen = ()  # looked at again: the system had no thread left
            return
        if served.key == self.active.key:
            self.active, self.refused = served, {}  # the same model, perhaps with more evidence: /info shows it, and nothing is opened
            return
        self._candidate, self._candidate_since, self._deaths = served, time.monotonic(), 0
        self._send_all(ipc.LoadModel(served.key, served.bundle.path), unless=served.key)
        self._settle()  # it may be open still, for requests that began on it

    def _settle(self) -> None:
        """Swap when every worker has the candidate open: new requests are read for it, those in progress end on the old one."""
        if not self.started and self.ready():
            self.started = True
            self._announce()
        if self._candidate and all(queue.ready(self._candidate.key) for queue in self._queues.values()):
            log.warning("now serving %s, before %s", self._candidate.name, self.active.name)
            self._retiring[self.active.key] = self.active
            self.active, self._candidate, self.refused = self._candidate, None, {}
            self.refreshes["served"] += 1
            self._retiring.pop(self.active.key, None)

    def _drop_candidate(self, reason: str) -> None:
        assert self._candidate
        self._note_refusal(self._candidate.name, reason)
        key, self._candidate = self._candidate.key, None
        self._close(key)

    def _note_refusal(self, name: str, reason: str) -> None:
        self.refused = {"bundle": printable(name), "reason": printable(reason)}  # a strange name must not break /info
        self.refreshes["refused"] += 1
        log.error("%s is refused, %s goes on: %s", name, self.active.name, reason)

    async def _remember(self) -> None:
        """Record in the store what is served now, for a restart and for --trust; again when a publisher holds the store, or it was lost."""
        store, served = self._store, self.active
        if store is None or not self.started:
            return
        if served.key == self._remembered and (not self._memorable or (store / SERVED_FILE).exists()):
            return
        try:
            work = partial(remember, store, served.bundle, self._settings.trusted())  # reads the keys of --trust
            await in_daemon_thread(work)
            self._memorable = True
        except Held:
            return
        except (EbjdatError, OSError) as error:
            self._memorable = False
            log.log(logging.WARNING if self._settings.trust else logging.DEBUG, "what is served is not remembered: %s", cause(error))
        self._remembered = served.key

    def _close_retired(self) -> None:
        """Close bundles that no request needs any more."""
        for key in [key for key in self._retiring if not any(queue.uses[key] for queue in self._queues.values())]:
            del self._retiring[key]
            self._close(key)

    def _mark_served(self) -> None:
        """Mark the folders of open bundles as served, so that nobody changes one by accident, and unmark those that are closed."""
        folders: dict[tuple[Path, int], Path] = {}
        for path in [served.bundle.path for served in self._open()]:
            with contextlib.suppress(OSError):  # it was taken away: what is open goes on
                folders[path, path.stat().st_ino] = path  # a folder that took the place of another is another
        for mark in [mark for mark in self._held if mark not in folders]:
            os.close(self._held.pop(mark))
        for mark in [mark for mark in folders if mark not in self._held]:
            if (held := hold(folders[mark])) is not None:
                self._held[mark] = held

    def _close(self, key: str) -> None:
        """Have the workers close a bundle, unless it is also open for another reason."""
        if all(key != served.key for served in self._open()):
            self._send_all(ipc.UnloadModel(key))
            for queue in self._queues.values():
                for worker in queue.workers:
                    worker.loaded.pop(key, None)

    def _send_all(self, message: object, unless: str = "") -> None:
        """Send a message to every worker, except those that have the bundle ``unless`` open."""
        for queue in self._queues.values():
            for worker in queue.workers:
                if unless not in worker.loaded:
                    worker.send(message)
