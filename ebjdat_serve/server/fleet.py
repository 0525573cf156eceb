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

from ebjdat_serve.bundle import Bundle, Calibration, manifest_key, resolve
from ebjdat_serve.detection import Detector
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.server.lanes import Lane, Peer
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.wire import Drop, Hello, Load, Loaded, Refused, receive

log = logging.getLogger("ebjdat_serve")
LOOK = 1.0
"""Seconds between looks at the store's pointer, at the parent process, and at bundles that are no longer used."""
AGAIN = 5.0
"""Seconds until a worker that could not open the bundle being served tries again."""


@dataclass(frozen=True)
class Served:
    """A verified bundle, as the HTTP process needs it; ``key`` is the sha256 of its manifest."""

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
    key = manifest_key(folder)
    if settings.trust:
        from ebjdat_serve.signing import check_signature  # cryptography costs 100 ms and memory

        check_signature(folder, settings.trust)
    bundle = Bundle.load(folder)
    if manifest_key(folder) != key:
        raise BundleError(f"{folder} was changed while it was read; publish the change as a new version")
    bundle.check_precision(settings.precision)
    calibration = bundle.calibration(settings.precision)
    Detector(calibration.energies, settings.alpha)  # type: ignore[arg-type]
    return Served(key, bundle, calibration, bundle.metrics())


class Fleet:
    """Which bundle is served, and the workers that serve it."""

    def __init__(self, served: Served, settings: Settings, lanes: list[Lane], listener: socket.socket) -> None:
        self.active = served
        self.started = False
        self.refused: dict[str, str] = {}
        self._settings, self._listener = settings, listener
        self._lanes = {lane.name: lane for lane in lanes}
        self._candidate: Served | None = None
        self._retiring: list[Served] = []
        self._seen = served.bundle.path
        self._tasks: set[asyncio.Task[Any]] = set()

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
            "retiring": [served.name for served in self._retiring],
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
        hello: Hello = await receive(reader)
        lane, peer = self._lanes[hello.lane], Peer(hello.pid, writer)
        lane.peers.append(peer)
        for served in self._open():
            peer.send(Load(served.key, served.bundle.path))
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # so a worker's death looks
            while True:
                message = await receive(reader)
                peer.heard = time.monotonic()
                match message:
                    case Loaded(key) if all(key != served.key for served in self._open()):
                        peer.send(Drop(key))  # it was refused meanwhile
                    case Loaded(key):
                        peer.loaded[key] = message
                        lane.joined(peer)
                        self._settle()
                    case Refused(key, reason):
                        self._refuse(peer, key, reason)
                    case _:
                        lane.heard(peer, message)
        writer.close()
        lane.lost(peer)
        if not lane.closed:
            log.warning("the %s worker %d died; another is starting", lane.name, peer.pid)
        if self._candidate and self._candidate.key not in peer.loaded:
            self._drop_candidate("a worker died while opening it")

    def _open(self) -> list[Served]:
        return [*self._retiring, self.active, *([self._candidate] if self._candidate else [])]

    def _refuse(self, peer: Peer, key: str, reason: str) -> None:
        if self._candidate and key == self._candidate.key:
            self._drop_candidate(reason)
        elif not self.started:
            self._give_up(reason)
        elif key == self.active.key:
            log.error("a worker cannot open %s: %s", self.active.name, reason)
            asyncio.get_running_loop().call_later(AGAIN, lambda: peer.send(Load(key, self.active.bundle.path)))

    # refresh ---------------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Open what the store points at now, if it is another bundle than the last looked at."""
        if self._candidate or not self.started:
            return
        try:
            folder = resolve(self._settings.model)
        except (BundleError, OSError):
            return  # the pointer is being moved, or was taken away: what is open goes on
        if folder == self._seen:
            return
        self._seen = folder
        try:
            served = await asyncio.get_running_loop().run_in_executor(None, open_bundle, folder, self._settings)
        except (EbjdatError, OSError) as error:
            self._note_refusal(folder.name, str(error))
            return
        if served.key != self.active.key:
            self._candidate = served
            self._tell_all(Load(served.key, served.bundle.path))

    def _settle(self) -> None:
        """Swap when every worker has the candidate open; from here on new requests are read for it, those under way end on the old."""
        if not self.started and self.ready():
            self.started = True
            self._announce()
        if self._candidate and all(lane.ready(self._candidate.key) for lane in self._lanes.values()):
            log.warning("now serving %s, before %s", self._candidate.name, self.active.name)
            self._retiring.append(self.active)
            self.active, self._candidate, self.refused = self._candidate, None, {}

    def _drop_candidate(self, reason: str) -> None:
        assert self._candidate
        self._note_refusal(self._candidate.name, reason)
        key, self._candidate = self._candidate.key, None
        self._tell_all(Drop(key))
        self._forget(key)

    def _note_refusal(self, name: str, reason: str) -> None:
        self.refused = {"bundle": name, "reason": reason}
        log.error("%s is refused, %s goes on: %s", name, self.active.name, reason)

    def _retire(self) -> None:
        """Close bundles that no request waits for any more."""
        for served in [old for old in self._retiring if not any(lane.uses(old.key) for lane in self._lanes.values())]:
            self._retiring.remove(served)
            if served.key != self.active.key:
                self._tell_all(Drop(served.key))
                self._forget(served.key)

    def _tell_all(self, message: object) -> None:
        for lane in self._lanes.values():
            for peer in lane.peers:
                peer.send(message)

    def _forget(self, key: str) -> None:
        for lane in self._lanes.values():
            for peer in lane.peers:
                peer.loaded.pop(key, None)
