"""Tests of the HTTP process's queues: admission, batches by bundle and operation, shares of clients, the rows of each request."""

import asyncio
import gc
import re
import socket
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.hostile_images import encoded
from ebjdat_serve import pixels
from ebjdat_serve.contract import Input
from ebjdat_serve.server import ipc
from ebjdat_serve.server.payloads import GenerateJob
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.queues.classify_queue import ClassifyQueue, together
from ebjdat_serve.server.queues.generate_queue import GenerateQueue
from ebjdat_serve.server.queues.request_queue import PendingRequest, WorkerConnection
from ebjdat_serve.server.read.images import ImageDecoder, stacked
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.sgld import Sampler


@dataclass
class Writer:
    """A socket that goes nowhere."""

    sent: list[ipc.Parts] = field(default_factory=list)

    def writelines(self, parts):
        self.sent.append(parts)

    def is_closing(self):
        return False

    def messages(self):
        return [received(parts) for parts in self.sent]


def received(parts):
    """Return the message that a worker makes of the parts of one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        threading.Thread(target=ours.sendall, args=(b"".join(parts),)).start()
        return ipc.Channel(theirs).receive()


def test_large_arrays_of_a_message_are_sent_and_received_without_being_copied_as_a_whole():
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    message = ipc.Request(7, "k", "predict", [images, images[:1], images[::2]], "one")
    parts = ipc.encode(message)
    assert [len(part) for part in parts[1:]] == [images.nbytes]  # one is small, and one has gaps
    assert parts[1].obj is images

    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(b"".join(parts))
        arrived = await ipc.receive(reader)
        reader.feed_data(b"".join(parts)[:-1])
        reader.feed_eof()
        with pytest.raises(asyncio.IncompleteReadError):
            await ipc.receive(reader)
        return arrived

    for arrived in (received(parts), asyncio.run(read())):
        assert (arrived.number, arrived.operation, arrived.client) == (7, "predict", "one")
        for array, expected in zip(arrived.payload, message.payload, strict=True):
            np.testing.assert_array_equal(array, expected)


def test_a_large_batch_is_put_together_by_the_worker():
    small, large = np.zeros((1, 8, 8, 3), np.uint8), np.ones((1, 500, 500, 3), np.uint8)
    assert together([small]) is small
    assert together([small, small]).shape == (2, 8, 8, 3)
    assert together([large, large])[1] is large


async def longest_turn():
    """Return the longest turn of the event loop, in milliseconds of its thread's own time, once cancelled."""
    longest, last = 0.0, time.thread_time()
    try:
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest, last = max(longest, now - last), now
    except asyncio.CancelledError:
        return 1000 * longest


def sum_rows(connection):
    """Be a worker that answers with the sum of each image, until the other end hangs up."""
    channel = ipc.Channel(connection)
    with suppress(EOFError):
        while True:
            request = channel.receive()
            images = np.concatenate(request.payload) if isinstance(request.payload, list) else request.payload
            channel.send(ipc.Response(request.number, images.sum(axis=(1, 2, 3))))


@pytest.fixture
def frozen():
    """As in the server's process: collections skip what exists before, here all that the tests have imported and kept."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("lists", [[64], [1] * 32, [16] * 8])
@pytest.mark.usefixtures("frozen")
def test_pixels_of_a_model_of_224_keep_the_event_loop_for_no_turn(lists):
    image = encoded(Image.effect_noise((50, 50), 60).convert("RGB"))
    contract = Input(224, 224, "shorter", "bicubic", crop=0.875)
    expected = pixels.decode(image, contract).sum()

    async def main():
        decoder, queue = ImageDecoder(Settings()), classify_queue(max_batch=32)
        ours, theirs = socket.socketpair()
        worker = threading.Thread(target=sum_rows, args=(theirs,))
        worker.start()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        connection = WorkerConnection(1, reader, writer, loaded={"k": ipc.ModelLoaded("k", {})})
        queue.workers.append(connection)

        async def serve():
            async for _ in queue.serve(connection):
                pass

        async def ask(n):
            request = SimpleNamespace(scope={"client_name": "one"})
            images = await decoder.decode(request, [image] * n, contract, time.monotonic() + 60, listed=True)
            return await queue.submit(pending(images))

        await decoder.decoders.start()
        serving, turns = asyncio.create_task(serve()), []
        try:
            for _ in range(3):
                watching = asyncio.create_task(longest_turn())
                for n, sums in zip(lists, await asyncio.gather(*map(ask, lists)), strict=True):
                    assert sums.tolist() == [expected] * n
                watching.cancel()
                turns.append(await watching)
        finally:
            serving.cancel()
            writer.close()
            await decoder.decoders.close()
            await asyncio.to_thread(worker.join)
            theirs.close()
        return turns

    turns = uvloop.run(main())  # as the server does
    print(f"{turns} ms")
    assert sorted(turns)[1] < 10


def test_images_of_a_list_become_one_array():
    images = list(np.random.default_rng(0).integers(0, 256, (9, 400, 400, 3), dtype=np.uint8))
    np.testing.assert_array_equal(asyncio.run(stacked(images)), np.stack(images))


def connected(queue, *keys):
    worker = WorkerConnection(1, None, Writer(), loaded={key: ipc.ModelLoaded(key, {}) for key in keys})
    queue.workers.append(worker)
    return worker


def job(n, steps):
    return GenerateJob(0, n, Sampler(steps, 0.25, 2.0, 0.005), seed=0)


def pending(payload, key="k", operation="predict", client="one"):
    return PendingRequest(key, operation, payload, None, client, time.monotonic() + 60)


def classify_queue(max_batch=4, size=256):
    return ClassifyQueue(workers=1, size=size, deadline=10.0, worker_timeout=30.0, max_batch=max_batch)


def generate_queue(rate=100.0, size=256):
    """A queue with a worker that has made so many chain-steps a second."""
    queue = GenerateQueue(workers=1, size=size, deadline=120.0, worker_timeout=30.0, max_chains=128, max_backlog=60.0)
    worker = connected(queue, "k")
    queue.handle(worker, ipc.Stats(rate, {}))
    return queue, worker


def images(n=1):
    return np.zeros((n, 2, 2, 3), np.uint8)


def test_a_long_job_is_refused_where_a_short_one_that_overtakes_is_not():
    async def run():
        queue, worker = generate_queue()
        queue.admit("one", job(8, 1000))  # when nothing is in progress, whatever the limits of a request allow
        queue.enqueue(pending(job(8, 1000), operation="generate"))
        assert queue.work == 8000
        queue.admit("one", job(1, 20))
        with pytest.raises(Problem) as refused:
            queue.admit("one", job(8, 900))
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) == 60  # it would be 92
        (number,) = worker.in_flight
        queue.handle(worker, ipc.Stats(100.0, {number: 1000}))
        queue.admit("one", job(4, 900))
        with pytest.raises(Problem, match="at most 128"):
            queue.admit("one", job(129, 1))

    asyncio.run(run())


def test_a_bundle_that_no_worker_has_open_keeps_nobody_waiting():
    async def run():
        queue = classify_queue()
        worker = connected(queue, "new")
        pixels = np.zeros((1, 2, 2, 3), np.uint8)
        old, new = pending(pixels, "old"), [pending(pixels, "new") for _ in range(6)]
        for one in [old, *new]:
            queue.enqueue(one)
        await asyncio.sleep(0)
        assert [len(requests) for requests in worker.in_flight.values()] == [4, 2]  # two batches, none larger than a batch may be
        assert old not in [one for requests in worker.in_flight.values() for one in requests]
        queue.handle(worker, ipc.Response(next(iter(worker.in_flight)), np.arange(4)))
        assert [one.future.done() for one in new] == [True] * 4 + [False] * 2
        worker.loaded["old"] = ipc.ModelLoaded("old", {})
        queue.worker_ready(worker)
        await asyncio.sleep(0)
        assert old in [one for requests in worker.in_flight.values() for one in requests]

    asyncio.run(run())


def test_a_batch_is_of_one_operation_and_each_request_gets_its_rows():
    async def run():
        queue = classify_queue(max_batch=8)
        worker = connected(queue, "k")
        wanted = [("predict", 1), ("logits", 2), ("predict", 3), ("logits", 1)]
        requests = [pending(np.full((n, 2, 2, 3), i, np.uint8), operation=operation) for i, (operation, n) in enumerate(wanted)]
        for one in requests:
            queue.enqueue(one)
        await asyncio.sleep(0)
        sent = worker.writer.messages()
        assert [(message.operation, message.payload[:, 0, 0, 0].tolist()) for message in sent] == [
            ("predict", [0, 2, 2, 2]),
            ("logits", [1, 1, 3]),
        ]
        for message in sent:
            queue.handle(worker, ipc.Response(message.number, message.payload[:, 0, 0, 0]))
        assert [one.future.result().tolist() for one in requests] == [[0], [1, 1], [2, 2, 2], [3]]

    asyncio.run(run())


# clients ---------------------------------------------------------------------------------------------------------------


def test_one_client_has_all_slots_it_had_before_and_each_other_finds_one():
    queue = classify_queue(size=8)
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(queue.slot("k", "greedy"))
        for _ in range(2):
            with pytest.raises(Problem, match="8 of your requests are waiting") as refused:
                queue.check_room("greedy")
            assert (refused.value.status, refused.value.headers["Retry-After"]) == (503, "1")
            assert not re.search(r"\d", refused.value.public)  # the number tells how many others have
        for i in range(8):
            stack.enter_context(queue.slot("k", f"polite {i}"))
        assert queue.active == 16
        with pytest.raises(Problem):
            queue.check_room("one more")
    assert queue.active == 0
    assert not queue.slots  # who has left is forgotten


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=80), st.integers(1, 12))
def test_slots_are_given_back_and_never_more_than_twice_the_size(events, size):
    queue, held = classify_queue(size=size), {str(client): [] for client in range(6)}
    for client, comes in events:
        name = str(client)
        if comes:
            slot = queue.slot("k", name)
            try:
                slot.__enter__()
            except Problem:
                assert held[name] or queue.active == 2 * size  # who has none finds one while there is any
            else:
                held[name].append(slot)
        elif held[name]:
            held[name].pop().__exit__(None, None, None)
        assert queue.slots == {name: len(slots) for name, slots in held.items() if slots}
        assert queue.active <= 2 * size
        assert all(len(slots) <= size for slots in held.values())


def test_chains_are_bounded_by_client_and_a_place_is_left_for_others():
    async def run():
        queue, _ = generate_queue(rate=1e6)
        with ExitStack() as stack:
            for _ in range(2):
                queue.admit("greedy", job(64, 20))
                stack.enter_context(queue.waiting(pending(job(64, 20), operation="generate", client="greedy")))
            with pytest.raises(Problem, match="128 of your chains are running and at most 128 may") as refused:
                queue.admit("greedy", job(1, 20))
            assert refused.value.status == 429
            for i in range(10):
                queue.admit(f"polite {i}", job(1, 20))
                stack.enter_context(queue.waiting(pending(job(1, 20), operation="generate", client=f"polite {i}")))
            queue.admit("another", job(32, 20))
            with pytest.raises(Problem, match="at most 59 may"):  # half of what the others leave
                queue.admit("another", job(64, 20))
            assert queue.chains == 138

    asyncio.run(run())


def test_a_long_queue_of_one_client_is_no_reason_to_refuse_another():
    async def run():
        queue, worker = generate_queue()
        queue.enqueue(pending(job(64, 90), operation="generate", client="greedy"))  # 58 s of work
        assert worker.writer.messages()[-1].client == "greedy"  # the worker counts its chain-steps
        with pytest.raises(Problem, match="it would take about 99 s"):
            queue.admit("greedy", job(1, 4100))
        queue.admit("polite", job(1, 500))
        queue.admit("polite", job(4, 700))  # 28 s of its own, and as many for the other
        with pytest.raises(Problem, match="it would take about 70 s"):
            queue.admit("polite", job(5, 700))

    asyncio.run(run())


def test_a_batch_holds_what_clients_sent_in_turn_whoever_came_first():
    async def run():
        queue = classify_queue(max_batch=4)
        worker = connected(queue, "k")
        greedy = [pending(images(), client="greedy") for _ in range(40)]
        polite = [pending(images(), client=f"polite {i}") for i in range(3)]
        for one in [*greedy, *polite]:
            queue.enqueue(one)
        await asyncio.sleep(0)
        first, second = worker.in_flight.values()
        assert first == [greedy[0], *polite]
        assert second == greedy[1:5]

    asyncio.run(run())


def test_a_request_that_is_withdrawn_is_in_no_batch_and_is_charged_to_nobody():
    async def run():
        queue = classify_queue(max_batch=2)
        gone = [pending(images(), client="one") for _ in range(5)]
        stays = [pending(images(), client="one"), pending(images(), client="two")]
        for one in [*gone[:3], stays[0], *gone[3:], stays[1]]:
            queue.enqueue(one)
        for one in gone:
            queue.withdraw(one)
            queue.withdraw(one)
        worker = connected(queue, "k")
        queue.worker_ready(worker)
        await asyncio.sleep(0)
        assert [set(batch) for batch in worker.in_flight.values()] == [set(stays)]
        assert not queue._waiting
        assert not queue._numbers_waiting
        queue.withdraw(stays[0])  # it is answered: nothing is left to take back

    asyncio.run(run())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.booleans()), max_size=40), st.booleans())
def test_every_request_is_in_one_batch_once_and_one_clients_in_the_order_they_came(sent, one_client):
    async def run():
        queue = classify_queue(max_batch=8)
        worker = connected(queue, "k")
        waiting = [pending(images(n), client="a" if one_client else client) for client, n, _ in sent]
        for one, (_, _, leaves) in zip(waiting, sent, strict=True):
            queue.enqueue(one)
            if leaves:
                queue.withdraw(one)
        kept = [one for one, (_, _, leaves) in zip(waiting, sent, strict=True) if not leaves]
        served = []
        await asyncio.sleep(0)
        while worker.in_flight:
            number, batch = next(iter(worker.in_flight.items()))
            assert len(batch) == 1 or sum(len(one.payload) for one in batch) <= 8
            served += batch
            queue.handle(worker, ipc.Response(number, np.zeros(sum(len(one.payload) for one in batch))))
            await asyncio.sleep(0)
        assert len(served) == len(kept)
        for client in "abc":
            assert [one for one in served if one.client == client] == [one for one in kept if one.client == client]

    asyncio.run(run())
