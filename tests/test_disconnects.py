"""Who works for a client is told that it has left: once, soon, and only while it works."""

import asyncio

import numpy as np
import pytest

from ebjdat_serve.manifest import Input
from ebjdat_serve.server import disconnects
from ebjdat_serve.server.disconnects import on_disconnect
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.queues.classify_queue import ClassifyQueue
from ebjdat_serve.server.queues.request_queue import PendingRequest
from ebjdat_serve.server.read.images import ImageDecoder
from ebjdat_serve.server.settings import Settings


class Connection:
    """A request whose connection says that its client has left, or fails to say."""

    def __init__(self, left=False):
        self.left, self.asked, self.scope = left, 0, {"client_name": "one"}

    async def is_disconnected(self):
        self.asked += 1
        if self.left is None:
            raise RuntimeError("nobody foresaw this")
        return self.left


@pytest.fixture
def watched(monkeypatch):
    """Run a scenario beside the watch."""
    monkeypatch.setattr(disconnects, "POLL_SECONDS", 0.01)

    async def run(scenario):
        watching = asyncio.create_task(disconnects.watch())
        try:
            async with asyncio.timeout(5):
                await scenario()
        finally:
            assert not watching.done()
            watching.cancel()
        assert not disconnects._watched

    return lambda scenario: asyncio.run(run(scenario))


def test_who_works_for_a_client_that_leaves_is_told_once(watched, caplog):
    told = []

    async def scenario():
        silent, here, gone, done = Connection(None), Connection(), Connection(True), Connection(True)
        with on_disconnect(done, lambda: told.append("done")):
            pass
        with (
            on_disconnect(silent, lambda: told.append("silent")),
            on_disconnect(here, lambda: told.append("here")),
            on_disconnect(gone, lambda: told.append("gone")),
        ):
            while here.asked < 5:
                await asyncio.sleep(0.01)
            assert told == ["gone"]
            here.left = True
            while len(told) < 2:
                await asyncio.sleep(0.01)
        assert (told, gone.asked, done.asked) == (["gone", "here"], 1, 0)
        assert silent.asked > 1

    watched(scenario)
    assert "nobody foresaw this" in caplog.text


def test_a_queued_request_and_a_decode_end_when_their_client_leaves(watched, monkeypatch):
    async def scenario():
        queue = ClassifyQueue(workers=1, size=8, deadline=10.0, worker_timeout=30.0, max_batch=4)
        deadline = asyncio.get_running_loop().time() + 60
        pending = PendingRequest("k", "predict", np.zeros((1, 4, 4, 3), np.uint8), Connection(True), "one", deadline)
        with pytest.raises(Problem) as left:
            await queue.submit(pending)
        assert (left.value.status, queue.pending) == (499, set())
        decoder, ended = ImageDecoder(Settings()), []

        async def endless(*_):
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        monkeypatch.setattr(decoder.decoders, "decode", endless)
        with pytest.raises(Problem) as left:
            await decoder.decode(Connection(True), [b""], Input(4, 4), deadline, listed=False)
        assert (left.value.status, ended) == (499, [True])
        with pytest.raises(Problem) as late:
            await decoder.decode(Connection(), [b""], Input(4, 4), asyncio.get_running_loop().time() + 0.1, listed=False)
        assert late.value.status == 504

    watched(scenario)
