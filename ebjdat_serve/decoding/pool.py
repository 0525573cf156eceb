"""Decoders as the HTTP process sees them: processes with limits, which may be killed at any time at the cost of their own image.

Small images, judged here, go many to a message to a decoder of their own; they never wait for a large one. All else goes, whole requests
at a time, to decoders that stand back: they judge, say how much memory it takes, and wait for leave.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence

from ebjdat_serve.contract import Input
from ebjdat_serve.decoding import wire
from ebjdat_serve.decoding.header import Bytes, Header
from ebjdat_serve.decoding.jobs import TURN_SECONDS, DecoderLost, Large, Small, Suspects, hand_on, refuse, settle
from ebjdat_serve.decoding.judge import NEVER_SURE, each, judge_kind
from ebjdat_serve.decoding.pool_settings import LIGHT, PoolSettings
from ebjdat_serve.decoding.processes import UNKNOWN, Channel, Zygote
from ebjdat_serve.decoding.small import SMALL_BYTES, small_headers
from ebjdat_serve.errors import InvalidImage, cause
from ebjdat_serve.fairness import FairQueue
from ebjdat_serve.pixels import Pixels

log = logging.getLogger(__name__)

MESSAGE_IMAGES, MESSAGE_BYTES, MESSAGE_WORK, MESSAGE_PIXELS = 64, 2**20, 2**19, 2**22
"""Small images of one message, their encoded bytes, their work, and the pixels that they are decoded to."""
PATIENCE = 1.0
"""Seconds until the fate of a decoder that is gone is taken for unknown, or a zygote that failed to start is started again."""
PAUSE, LONGEST_PAUSE = 0.25, 15.0
"""Seconds until the next decoder is started after one that failed for no image's fault; twice as long after each that follows."""
START_SECONDS = 20.0
"""Seconds that a zygote has to fork a decoder, its own start included."""
STOPPING = "the server is stopping; try again when it is back"
FAILED = "the image was not decoded, for a fault of the server; try again"


class Decoders:
    """Decodes images in processes, within limits of memory and time."""

    def __init__(self, settings: PoolSettings) -> None:
        self.settings, self.limits = settings, settings.limits
        self.small: FairQueue[Small] = FairQueue()
        self.fresh: FairQueue[Large] = FairQueue()  # not judged, or light
        self.heavy: FairQueue[Large] = FairQueue()  # judged, and waiting for memory
        self.free = settings.heavy_memory
        self.heavies = 0
        self.arrived, self.changed = asyncio.Event(), asyncio.Event()
        self.zygote: Zygote | None = None
        self.starting = asyncio.Lock()
        self.numbers = 0
        self.tasks: list[asyncio.Task[None]] = []
        self.suspects = Suspects()
        self.closed = False

    async def start(self) -> None:
        """Start the processes."""
        for large in [False] * self.settings.small + [True] * self.settings.large:
            self.tasks.append(asyncio.create_task(self._tend(large=large)))

    async def close(self) -> None:
        """End the processes, and refuse what is left and what comes."""
        self.closed = True
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.zygote:
            self.zygote.close()
        while len(self.small):
            refuse(self.small.pop().future, DecoderLost(STOPPING))
        while len(self.fresh) or len(self.heavy):
            refuse((self.fresh if len(self.fresh) else self.heavy).pop().future, DecoderLost(STOPPING))

    async def decode(self, images: Sequence[Bytes], contract: Input, client: str = "") -> list[Pixels]:
        """Return each image as (height, width, 3) uint8, as ``contract`` says.

        Raises InvalidImage: the first that is refused, with its index; DecoderLost: an image's decoder ended, or the server does.
        To cancel it ends a decoder that works on it.
        """
        kinds = set(each(images, lambda data: judge_kind(data, self.limits)))  # before anything of it is held and sent
        few = sum(map(len, images)) <= SMALL_BYTES and NEVER_SURE.isdisjoint(kinds) and client not in self.suspects
        small = list(map(bytes, images)) if few else []
        headers = await small_headers(small, contract, self.limits) if small else []
        if self.closed:
            raise DecoderLost(STOPPING)
        if headers:
            return await self._decode_small(small, headers, contract, client)
        return await self._decode_large(list(images), contract, client)

    async def _decode_small(self, images: Sequence[bytes], headers: Sequence[Header], contract: Input, client: str) -> list[Pixels]:
        loop = asyncio.get_running_loop()
        items = [Small(data, header, contract, loop.create_future(), client) for data, header in zip(images, headers, strict=True)]
        numbers = [self.small.push(client, item, item.header.work) for item in items]
        self.arrived.set()
        decoded = []
        try:
            for index, item in enumerate(items):
                try:
                    decoded.append(await item.future)
                except InvalidImage as error:
                    error.index = index
                    raise
        finally:
            for number, item in list(zip(numbers, items, strict=True))[len(decoded) :]:
                self.small.remove(number)
                if not item.future.cancel() and not item.future.cancelled():
                    item.future.exception()  # seen: one refusal a request is enough
        return decoded

    async def _decode_large(self, images: list[Bytes], contract: Input, client: str) -> list[Pixels]:
        job = Large(images, contract, asyncio.get_running_loop().create_future(), client)
        job.wait_in(self.fresh)
        self.changed.set()
        try:
            return await job.future
        finally:
            job.withdraw()

    # the decoders

    async def _tend(self, *, large: bool) -> None:
        """Keep one decoder alive and at work, whatever happens; pause, ever longer, while each fails for no image's fault."""
        pause = PAUSE
        while True:
            try:
                failure = await self._use_one(large=large)
            except OSError as error:
                failure = f"cannot start a decoder: {cause(error)}"
            except Exception:
                log.exception("a decoder was lost for a fault of the server")
                failure = "the task of a decoder failed"
            if not failure:
                pause = PAUSE
                continue
            log.warning("%s; the next one starts in %g s", failure, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _use_one(self, *, large: bool) -> str:
        """Start a decoder and keep it at work until it is lost; return why, if that was no image's fault. Raises OSError: none started."""
        zygote = await self._running()
        channel = await self._fork(zygote, large=large)
        try:
            while not channel.lost:
                await (self._next_large(zygote, channel) if large else self._next_small(channel))
            if channel.answered or zygote.gone:  # which has its own pause
                return ""
            zygote.kill(channel.number)
            await asyncio.wait([zygote.fates[channel.number]], timeout=PATIENCE)
            status = zygote.fates[channel.number].result() if zygote.fates[channel.number].done() else UNKNOWN
            # one that was killed at work, by a limit or since nobody waited, may have been so for its image
            failed = status != UNKNOWN and (os.waitstatus_to_exitcode(status) > 0 or not channel.asked)
            return f"a decoder ended with status {status} before its first answer" if failed else ""
        finally:
            channel.transport.abort()
            zygote.kill(channel.number)
            zygote.fates.pop(channel.number, None)

    async def _running(self) -> Zygote:
        """Return the zygote, started again if need be; one that ends at once is not started again at once."""
        async with self.starting:
            if self.zygote is None or self.zygote.gone:
                if self.zygote and (left := self.zygote.began + PATIENCE - asyncio.get_running_loop().time()) > 0:
                    await asyncio.sleep(left)
                self.zygote = Zygote.start(self.limits)
            return self.zygote

    async def _fork(self, zygote: Zygote, *, large: bool) -> Channel:
        self.numbers += 1
        ours, theirs = socket.socketpair()
        number = self.numbers
        try:
            with theirs:
                async with asyncio.timeout(START_SECONDS):
                    await zygote.fork(number, theirs, large=large)
        except BaseException as error:
            ours.close()
            if isinstance(error, TimeoutError):  # an OSError
                zygote.close()  # it hears nothing
            raise
        _, channel = await asyncio.get_running_loop().create_unix_connection(lambda: Channel(number, self._wake), sock=ours)
        return channel

    def _wake(self) -> None:
        """Have everyone look again for what there is to do."""
        self.arrived.set()
        self.changed.set()

    async def _next_small(self, channel: Channel) -> None:
        """Have the small images that wait decoded, as many as one message takes."""
        while not len(self.small):
            self.arrived.clear()
            await self.arrived.wait()
            if channel.lost:
                return
        if not (batch := self._batch()):
            return
        contract = batch[0].contract
        work = wire.Work(contract, tuple(len(one.data) for one in batch), tuple(one.header for one in batch), [one.data for one in batch])
        try:
            async with asyncio.timeout(self.settings.small_timeout):
                body = await channel.ask(work.encoded(), wire.RESULTS, wire.largest_results(len(batch), contract))
            results, seconds = wire.decode_results(body, len(batch), contract)
        except (EOFError, TimeoutError, ValueError):
            channel.lost = True
            self._suspect(batch)
            return
        except BaseException as error:
            for item in batch:
                refuse(item.future, DecoderLost(STOPPING if isinstance(error, asyncio.CancelledError) else FAILED))
            raise
        for item, result, took in zip(batch, results, seconds, strict=True):
            self.small.charge(item.client, self.suspects.took(item, took))
            settle(item.future, result)

    def _batch(self) -> list[Small]:
        """Take out small images for one contract, up to the limits of a message."""
        batch: list[Small] = []
        work = size = pixels = 0
        while (item := self.small.peek()) and len(batch) < MESSAGE_IMAGES and work < MESSAGE_WORK and size < MESSAGE_BYTES:
            if batch and (item.contract != batch[0].contract or pixels >= MESSAGE_PIXELS):
                break
            self.small.pop()
            if not item.future.done():  # its client has gone
                batch.append(item)
                work += item.header.work
                size += len(item.data)
                pixels += item.contract.height * item.contract.width
        return batch

    def _suspect(self, batch: list[Small]) -> None:
        """Have each image of a message that was never answered decoded alone, where it can cost nobody else anything."""
        log.warning("a decoder of small images was lost; its %d images are decoded again, one by one", len(batch))
        for item in batch:
            alone: asyncio.Future[list[Pixels]] = asyncio.get_running_loop().create_future()
            hand_on(alone, item.future)
            Large([item.data], item.contract, alone, item.client, suspect=True).wait_in(self.fresh)
        self.changed.set()

    async def _next_large(self, zygote: Zygote, channel: Channel) -> None:
        """Have the next request that there is memory for decoded."""
        while (job := self._eligible()) is None:
            self.changed.clear()
            await self.changed.wait()
            if channel.lost:
                return
        if job.future.done():
            return
        if job.need > LIGHT:
            self._grant(job)
        queue, began = job.queue, asyncio.get_running_loop().time()

        def end_decoder(future: "asyncio.Future[list[Pixels]]") -> None:
            if future.cancelled():
                zygote.kill(channel.number)

        job.future.add_done_callback(end_decoder)
        try:
            async with asyncio.timeout(self.settings.timeout):
                await self._converse(channel, job)
        except TimeoutError:
            channel.lost = True
            refuse(job.future, DecoderLost(f"the image was not decoded within {self.settings.timeout:g} s; try again, or send it smaller"))
        except (EOFError, ValueError):
            channel.lost = True
            await self._explain(zygote, channel, job)
        except BaseException as error:
            refuse(job.future, DecoderLost(STOPPING if isinstance(error, asyncio.CancelledError) else FAILED))
            raise
        finally:
            job.future.remove_done_callback(end_decoder)
            channel.lost |= job.future.cancelled()
            self._give_back(job)
            took = asyncio.get_running_loop().time() - began
            queue.charge(job.client, took - TURN_SECONDS)
            if job.suspect and (channel.lost or took > self.settings.small_timeout):
                self.suspects.add(job.client)

    async def _explain(self, zygote: Zygote, channel: Channel, job: Large) -> None:
        """Answer a request whose decoder is gone, or have it decoded again if it is not to blame."""
        if job.future.done():  # its client has gone
            return
        zygote.kill(channel.number)
        done, _ = await asyncio.wait([zygote.fates[channel.number]], timeout=PATIENCE)
        if not done:
            zygote.close()  # it hears nothing
        status = zygote.fates[channel.number].result()
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            limit = self.limits.max_seconds
            refuse(job.future, InvalidImage(f"the image takes longer to decode than the limit of {limit:g} s: save it anew, or smaller"))
        elif zygote.gone and job.lost_with in (None, zygote):  # more of its decoders may be dead that are not known to be
            job.lost_with, job.need = zygote, 0
            job.wait_in(self.fresh)
        else:
            log.warning("a decoder of large images ended with status %d", status)
            refuse(job.future, DecoderLost("the process that decoded the image was ended; try again, or send another image"))

    def _grant(self, job: Large) -> None:
        self.free -= job.need
        self.heavies += 1
        job.granted = job.need

    def _give_back(self, job: Large) -> None:
        if job.granted:
            self.free += job.granted
            self.heavies -= 1
            job.granted = 0
            self.changed.set()

    def _eligible(self) -> Large | None:
        """Take out the next request: one that waits for memory and may have it, else the next of those that wait for nothing."""
        head = self.heavy.peek()
        if head is not None and (head.future.done() or self._fits(head.need)):
            return self.heavy.pop()
        return self.fresh.pop() if len(self.fresh) else None

    def _fits(self, need: int) -> bool:
        """Return whether a heavy decode may begin: there is memory, and a decoder is left for the others."""
        return need <= self.free and self.heavies < max(1, self.settings.large - 1)

    async def _converse(self, channel: Channel, job: Large) -> None:
        """Have a request judged, and decoded if there is memory for it; else it waits for that."""
        work = wire.Work(job.contract, tuple(map(len, job.images)), (), job.images)
        body = await channel.ask(work.encoded(), wire.PLAN, wire.LARGEST_PLAN, sliced=True)
        try:
            need = wire.decode_plan(body)
        except InvalidImage as error:
            refuse(job.future, error)
            return
        if need > LIGHT and not job.granted:
            job.need = need
            if len(self.heavy) or not self._fits(need):
                channel.transport.write(wire.packed(wire.Park()))
                job.wait_in(self.heavy)
                self.changed.set()
                return
            self._grant(job)
        n = len(job.images)
        body = await channel.ask([wire.packed(wire.Go(need))], wire.RESULTS, wire.largest_results(n, job.contract))
        results, _ = wire.decode_results(body, n, job.contract)
        images: list[Pixels] = []
        for index, one in enumerate(results):
            if isinstance(one, InvalidImage):
                one.index = index
                refuse(job.future, one)
                return
            images.append(one)
        settle(job.future, images)
