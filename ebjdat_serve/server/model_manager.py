"""The workers of all lanes and the bundle they serve: opened on all of them, then swapped in one move while requests go on."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve.bundle import MANIFEST, SIGNATURE, Bundle, Calibration, resolve
from ebjdat_serve.detection import Detector
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.locking import hold
from ebjdat_serve.rows import to_json
from ebjdat_serve.server.ipc import Drop, Hello, Load, Loaded, Refused, receive
from ebjdat_serve.server.queues.request_queue import Lane, Peer
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.store import reason_held_back

log = logging.getLogger("ebjdat_serve")
LOOK = 1.0
"""Seconds between looks at the store's pointer, at the parent process, and at bundles that are no longer used."""
OPENING = 1200.0
"""Seconds that workers may take to open a bundle: TensorRT builds engines for minutes."""
DEATHS = 3
"""Workers that may die while a bundle is opened before it is held to be the cause."""
AGAIN = 5.0
"""Seconds until a worker that could not open the bundle being served tries again."""


@dataclass(frozen=True)
class Served:
    """A verified bundle, as the HTTP process needs it; ``key`` is the sha256 of what decides its answers, ``Bundle.served``."""

    key: str
    bundle: Bundle
    calibration: Calibration
    metrics: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """What answers call the model that made them."""
        return f"{self.bundle.manifest.name}@{self.bundle.manifest.version}"


def open_bundle(path: Path, settings: Settings) -> Served:
    """Return the bundle at ``path``, or what a store there points at, with everything checked that needs no engine.

    Raises BundleError, and EbjdatError for an alpha that its calibration cannot serve.
    """
    folder = resolve(path)
    signed = ""
    if settings.trust:
        from ebjdat_serve.signing import check_signature  # cryptography costs 100 ms and memory

        signed = check_signature(folder, settings.trust)
    if reason := reason_held_back(folder):
        raise BundleError(f"{folder} is a candidate and is not served: {reason}; ebjdat-serve publish {folder} STORE --force publishes it")
    bundle = Bundle.load(folder)
    if signed and bundle.key != signed:
        raise BundleError(f"{folder} was changed while it was read; publish the change as a new version")
    bundle.check_precision(settings.precision)
    calibration = bundle.calibration(settings.precision)
    Detector(np.asarray(calibration.scores), settings.alpha)
    return Served(bundle.served, bundle, calibration, [to_json(row) for row in bundle.metrics()])


def fingerprint(folder: Path) -> tuple[Any, ...]:
    """Return what changes when the bundle in a folder, or its signature, is replaced."""
    times = [file.stat().st_mtime_ns if file.exists() else 0 for file in (folder / MANIFEST, folder / SIGNATURE)]
    return (folder, *times)


class Fleet:
    """Which bundle is served, and the workers that serve it."""

    def __init__(self, served: Served, settings: Settings, lanes: list[Lane], listener: socket.socket) -> None:
        self.active = served
        self.started = False
        self.refused: dict[str, str] = {}
        self._settings, self._listener = settings, listener
        self._lanes = {lane.name: lane for lane in lanes}
        self._candidate: Served | None = None
        self._since = 0.0  # when the candidate was first to be opened
        self._deaths = 0  # of workers, while it was
        self._retiring: dict[str, Served] = {}
        self._seen = fingerprint(served.bundle.path)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._held: dict[tuple[Path, int], int] = {}  # descriptors that mark bundles as served

    def ready(self) -> bool:
        """Return whether every worker of every lane has the served bundle open."""
        return all(lane.ready(self.active.key) for lane in self._lanes.values())

    def about(self) -> dict[str, str]:
        """Return what runs the served bundle, as the first worker that opened it says."""
        for lane in self._lanes.values():
            for peer in lane.peers:
                if self.active.key in peer.loaded:
                    return peer.loaded[self.active.key].about
        return {"engine": "none yet"}

    def refresh(self) -> dict[str, Any]:
        """Return how the refresh stands: a version being opened, the last one refused, and those kept for requests under way."""
        return {
            "opening": self._candidate.name if self._candidate else None,
            "refused": self.refused or None,
            "retiring": [served.name for served in self._retiring.values()],
        }

    async def run(self, announce: Callable[[], None], give_up: Callable[[str], None]) -> None:
        """Welcome workers and follow the store, until cancelled.

        ``announce`` is called when all is ready for the first time, ``give_up`` with the reason should the first bundle be refused.
        """
        self._announce, self._give_up = announce, give_up
        # a task of ours for each worker: asyncio would log those of its own that are cancelled at the end
        server = await asyncio.start_unix_server(lambda *ends: self._keep(self._welcome(*ends)), sock=self._listener)
        parent = os.getppid()
        async with server:
            for lane in self._lanes.values():
                self._keep(lane.watch())
            while True:
                self._mark()
                await asyncio.sleep(LOOK)
                if os.getppid() != parent:
                    return give_up("the main process has gone")
                self._retire()
                await self._look()

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the HTTP process cannot go on", exc_info=error)
            self._give_up(f"the HTTP process cannot go on: {error}")

    # workers ---------------------------------------------------------------------------------------------------------

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one worker's wire until it ends."""
        peer: Peer | None = None
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # so a worker's death looks
            hello: Hello = await receive(reader)
            lane, peer = self._lanes[hello.lane], Peer(hello.pid, writer)
            lane.peers.append(peer)
            for served in self._open():
                peer.send(Load(served.key, served.bundle.path))
            while True:
                self._hear(lane, peer, await receive(reader))
        writer.close()
        if peer:
            lane.lost(peer)
            if not lane.closed:
                log.warning("the %s worker %d died; another is starting", lane.name, peer.pid)
            if self._candidate and self._candidate.key not in peer.loaded:
                self._deaths += 1
                if self._deaths >= DEATHS:
                    self._drop_candidate("workers died while opening it")

    def _hear(self, lane: Lane, peer: Peer, message: Any) -> None:
        peer.heard = time.monotonic()
        match message:
            case Loaded(key) if all(key != served.key for served in self._open()):
                peer.send(Drop(key))  # it was refused meanwhile
            case Loaded(key):
                peer.loaded[key] = message
                lane.joined(peer)
                self._settle()
            case Refused(key, reason):
                self._refuse(lane, peer, key, reason)
            case _:
                lane.heard(peer, message)

    def _open(self) -> list[Served]:
        """Return every bundle that workers have open or are to open, each once."""
        candidate = [self._candidate] if self._candidate else []
        return list({served.key: served for served in [*self._retiring.values(), self.active, *candidate]}.values())

    def _refuse(self, lane: Lane, peer: Peer, key: str, reason: str) -> None:
        if self._candidate and key == self._candidate.key:
            self._drop_candidate(reason)
        elif not self.started:
            self._give_up(reason)
        elif served := next((served for served in self._open() if served.key == key), None):
            log.error("a worker cannot open %s: %s", served.name, reason)
            again = Load(key, served.bundle.path)
            asyncio.get_running_loop().call_later(AGAIN, lambda: peer.send(again) if peer in lane.peers else None)

    # refresh ---------------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Open what the store points at now, if it is another bundle than the last looked at."""
        if self._candidate and time.monotonic() - self._since > OPENING:
            self._drop_candidate(f"it was not open within {OPENING:g} s")
        if self._candidate or not self.started:
            return
        try:
            folder = resolve(self._settings.model)
            seen = fingerprint(folder)
        except (BundleError, OSError):
            return  # the pointer is being moved, or was taken away: what is open goes on
        if seen == self._seen:
            return
        self._seen = seen
        try:
            served = await asyncio.get_running_loop().run_in_executor(None, open_bundle, folder, self._settings)
        except EbjdatError as error:
            self._note_refusal(folder.name, str(error))
            return
        except Exception as error:  # noqa: BLE001  whatever a strange bundle makes a library raise: the old one goes on
            self._note_refusal(folder.name, f"{type(error).__name__}: {error}")
            return
        if served.key == self.active.key:
            self.active, self.refused = served, {}  # the same model, perhaps with more evidence: /info shows it, and nothing is opened
            return
        self._candidate, self._since, self._deaths = served, time.monotonic(), 0
        self._tell_all(Load(served.key, served.bundle.path), unless=served.key)
        self._settle()  # it may be open still, for requests that began on it

    def _settle(self) -> None:
        """Swap when every worker has the candidate open; from here on new requests are read for it, those under way end on the old."""
        if not self.started and self.ready():
            self.started = True
            self._announce()
        if self._candidate and all(lane.ready(self._candidate.key) for lane in self._lanes.values()):
            log.warning("now serving %s, before %s", self._candidate.name, self.active.name)
            self._retiring[self.active.key] = self.active
            self.active, self._candidate, self.refused = self._candidate, None, {}
            self._retiring.pop(self.active.key, None)

    def _drop_candidate(self, reason: str) -> None:
        assert self._candidate
        self._note_refusal(self._candidate.name, reason)
        key, self._candidate = self._candidate.key, None
        self._close(key)

    def _note_refusal(self, name: str, reason: str) -> None:
        self.refused = {"bundle": name, "reason": reason}
        log.error("%s is refused, %s goes on: %s", name, self.active.name, reason)

    def _retire(self) -> None:
        """Close bundles that no request needs any more."""
        for key in [key for key in self._retiring if not any(lane.uses[key] for lane in self._lanes.values())]:
            del self._retiring[key]
            self._close(key)

    def _mark(self) -> None:
        """Mark the folders of open bundles as served, so that nobody changes one in passing, and no longer those that are closed."""
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
        """Have the workers forget a bundle, unless it is still needed in another part."""
        if all(key != served.key for served in self._open()):
            self._tell_all(Drop(key))
            for lane in self._lanes.values():
                for peer in lane.peers:
                    peer.loaded.pop(key, None)

    def _tell_all(self, message: object, unless: str = "") -> None:
        """Tell every worker, but not those that have the bundle ``unless`` open."""
        for lane in self._lanes.values():
            for peer in lane.peers:
                if unless not in peer.loaded:
                    peer.send(message)
