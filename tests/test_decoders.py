"""Decoders: processes with limits, whose end costs their own image and nobody else anything."""

import asyncio
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvloop
from PIL import Image

from benchmarks.hostile_images import encoded, jpeg_of_scans, png, webp
from ebjdat_serve import pixels
from ebjdat_serve.contract import Input
from ebjdat_serve.decoding import jobs, pool, pool_settings, small, wire
from ebjdat_serve.decoding.header import Limits
from ebjdat_serve.decoding.jobs import DecoderLost, Large, Small, Suspects
from ebjdat_serve.decoding.judge import judge
from ebjdat_serve.decoding.pool import Decoders
from ebjdat_serve.decoding.pool_settings import PoolSettings
from ebjdat_serve.decoding.processes import UNKNOWN, Channel
from ebjdat_serve.errors import EbjdatError, InvalidImage
from ebjdat_serve.server.read import images
from ebjdat_serve.server.read.images import ImageDecoder
from ebjdat_serve.server.settings import Settings
from tests.test_headers import HOSTILE, colour, needs_heic

PATIENT = PoolSettings(Limits(max_scans=10_000), timeout=120, small_timeout=20)  # the machine of a test may be slow
SMALL = encoded(colour())
MEDIUM = encoded(Image.effect_noise((1200, 1000), 60).convert("RGB"), "PNG", compress_level=1)
SLOW = jpeg_of_scans(6000, (4000, 4000))
"""Some seconds of work."""


@asynccontextmanager
async def decoders(settings=PATIENT, **limits):
    running = Decoders(replace(settings, limits=replace(settings.limits, **limits)))
    await running.start()
    try:
        yield running
    finally:
        await running.close()


async def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def runs(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] not in "ZX"
    return False


def pids(running):
    """Return the decoders, in the order in which they were forked: at first that of small images, then those of large ones."""
    zygote = running.zygote.process.pid
    return [int(word) for word in Path(f"/proc/{zygote}/task/{zygote}/children").read_text(encoding="ascii").split()]


def peak(running):
    """Return the most memory in MiB that one of the decoders has had."""
    status = [Path(f"/proc/{pid}/status").read_text(encoding="ascii") for pid in pids(running)]
    return max(int(each.partition("VmHWM:")[2].split()[0]) for each in status) / 1024


def of_large(running):
    """Return the pid of the decoder of large images that was forked last."""
    return pids(running)[-1]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_small_and_large_images_and_lists_come_out_as_in_one_process(run):
    images = [SMALL, encoded(colour(mode="RGBA"), "WEBP", lossless=True), encoded(colour(), "JPEG", progressive=True), MEDIUM]

    async def main():
        async with decoders() as running:
            alone = [(await running.decode([one], Input(32, 24)))[0] for one in images]
            together = await running.decode(images, Input(32, 24))
            many = await asyncio.gather(*(running.decode([SMALL], Input(8 + i % 3, 8)) for i in range(200)))
            return alone, together, many

    alone, together, many = run(main())
    for data, one, other in zip(images, alone, together, strict=True):
        np.testing.assert_array_equal(one, pixels.decode(data, Input(32, 24)))
        np.testing.assert_array_equal(one, other)
    for i, [one] in enumerate(many):
        np.testing.assert_array_equal(one, pixels.decode(SMALL, Input(8 + i % 3, 8)))


def test_refusals_say_which_image_and_why():
    damaged, large = SMALL[:2000], MEDIUM[: len(MEDIUM) // 2]

    async def main():
        async with decoders() as running:
            for images, index, said in [
                ([b"hello"], 0, "not an image"),
                ([SMALL, b""], 1, "0 bytes"),
                ([SMALL, damaged], 1, "truncated or damaged"),
                ([MEDIUM, SMALL, b"%PDF"], 2, "a PDF"),
                ([SMALL, large], 1, "truncated or damaged"),
                ([webp(4000, 4000)] * 2, None, r"\d+ pixels; the limit is 25000000 in all: send them one by one"),
            ]:
                if index is None:
                    images = [*images, MEDIUM]
                with pytest.raises(InvalidImage, match=said) as raised:
                    await running.decode(images, Input(32, 32))
                assert raised.value.index == index
            assert len(await running.decode([SMALL], Input(32, 32))) == 1

    asyncio.run(main())


@pytest.mark.parametrize(("data", "said"), HOSTILE.values(), ids=list(HOSTILE))
def test_what_broke_the_server_costs_neither_memory_nor_time(data, said):
    async def main():
        async with decoders(max_scans=64) as running:
            await running.decode([SMALL], Input(32, 32))
            began = time.monotonic()
            with pytest.raises(InvalidImage, match=said):
                await running.decode([data], Input(32, 32))
            assert time.monotonic() - began < 5
            assert peak(running) < 100

    asyncio.run(main())


def test_an_empty_webp_of_the_largest_size_stays_within_its_memory():
    async def main():
        async with decoders() as running:
            results = await asyncio.gather(
                *(running.decode([webp(10_000, 2_500)], Input(32, 32)) for _ in range(3)), return_exceptions=True
            )
            assert all(isinstance(one, InvalidImage) for one in results)
            assert peak(running) < 480

    asyncio.run(main())


def test_an_image_that_fails_leaves_no_memory_behind():
    async def main():
        async with decoders(replace(PATIENT, large=1)) as running:
            await running.decode([MEDIUM], Input(32, 32))
            pid = of_large(running)
            for _ in range(3):
                for broken in (webp(10_000, 2_500), png(5000, 5000)):
                    with pytest.raises(InvalidImage, match="truncated or damaged"):
                        await running.decode([broken], Input(32, 32))
                    held = Path(f"/proc/{pid}/status").read_text(encoding="ascii").partition("VmRSS:")[2].split()[0]
                    assert int(held) < 80 * 2**10
                assert len(await running.decode([MEDIUM], Input(32, 32))) == 1
            assert of_large(running) == pid

    asyncio.run(main())


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("PNG", "RGBA")])
def test_an_image_that_takes_more_memory_than_its_header_promises_is_refused(kind, mode, monkeypatch):
    """The estimate is the wall: a decode gets what was estimated, and a decoder that wants more ends its own image only."""
    large = encoded(Image.new(mode, (5000, 4900)), kind)

    async def main():
        async with decoders() as running:
            sent = wire.packed
            monkeypatch.setattr(wire, "packed", lambda message: sent(wire.Go(0) if isinstance(message, wire.Go) else message))
            with pytest.raises(InvalidImage, match=r"more memory|truncated or damaged"):
                await running.decode([large], Input(32, 32))
            monkeypatch.setattr(wire, "packed", sent)
            assert len(await running.decode([large], Input(32, 32))) == 1

    asyncio.run(main())


def test_an_image_that_takes_too_long_is_refused_and_its_decoder_ended():
    async def main():
        async with decoders(max_seconds=1.0) as running:
            await running.decode([SMALL], Input(32, 32))
            before = set(pids(running))
            with pytest.raises(InvalidImage, match="takes longer to decode than the limit of 1 s"):
                await running.decode([SLOW], Input(32, 32))
            await until(lambda: len(pids(running)) == 3)
            assert len(before - set(pids(running))) == 1
            assert len(await running.decode([MEDIUM], Input(32, 32))) == 1

    asyncio.run(main())


def test_a_decode_that_is_stuck_ends_with_its_timeout():
    async def main():
        async with decoders(replace(PATIENT, large=1, timeout=1.5)) as running:
            await running.decode([MEDIUM], Input(32, 32))
            os.kill(of_large(running), signal.SIGSTOP)
            with pytest.raises(DecoderLost, match=r"not decoded within 1\.5 s"):
                await running.decode([SLOW], Input(32, 32))
            assert len(await running.decode([MEDIUM], Input(32, 32))) == 1

    asyncio.run(main())


def test_a_killed_decoder_of_large_images_costs_its_own_request_only():
    async def main():
        async with decoders(replace(PATIENT, large=1)) as running:
            await running.decode([MEDIUM], Input(32, 32))
            task = asyncio.create_task(running.decode([SLOW], Input(32, 32)))
            waiting = asyncio.create_task(running.decode([MEDIUM], Input(32, 32)))
            await asyncio.sleep(0.2)
            pid = of_large(running)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(DecoderLost, match="was ended"):
                await task
            assert len(await waiting) == 1
            assert of_large(running) != pid

    asyncio.run(main())


def test_a_killed_decoder_of_small_images_costs_nobody_anything():
    async def main():
        async with decoders() as running:
            await running.decode([SMALL], Input(32, 32))
            tasks = [asyncio.create_task(running.decode([SMALL], Input(32, 32))) for _ in range(300)]
            await asyncio.sleep(0)
            first = pids(running)[0]
            os.kill(first, signal.SIGSTOP)  # so that a message is surely under way
            await asyncio.sleep(0.1)
            os.kill(first, signal.SIGKILL)
            for [one] in await asyncio.gather(*tasks):
                np.testing.assert_array_equal(one, pixels.decode(SMALL, Input(32, 32)))
            assert first not in pids(running)

    asyncio.run(main())


def camera(kind, **options):
    """Return an image of a few kilobytes with EXIF as cameras write it."""
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "a camera", 0x011A: 72.0, 0x011B: 72.0})
    exif.get_ifd(0x8769).update({0x9000 + i: b"a" * 40 for i in range(40)} | {0x829A: 0.01, 0x829D: 2.8, 0x920A: 35.0})
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 30.5), 3: "E", 4: (11.0, 34.0, 5.25), 29: "2026:11:26"})
    return encoded(colour((48, 32)), kind, exif=exif, icc_profile=os.urandom(500), **options)


def test_ordinary_lists_do_not_wait_for_decoders_of_large_images():
    lists = [
        [camera("PNG")] * 64,
        [camera("JPEG")] * 64,
        [camera("JPEG", progressive=True)] * 64,
        [camera("WEBP")] * 64,
        [camera("JPEG"), camera("PNG"), encoded(colour(), "TIFF"), encoded(colour(), "GIF"), encoded(colour(), "BMP")] * 12,
    ]

    async def main():
        async with decoders(replace(PATIENT, large=1)) as running:
            await running.decode([MEDIUM], Input(32, 32))
            os.kill(of_large(running), signal.SIGSTOP)
            for images in lists:
                async with asyncio.timeout(10):
                    assert len(await running.decode(images, Input(32, 32))) == len(images)

    asyncio.run(main())


def test_a_small_image_that_hangs_its_decoder_delays_the_others_of_its_message_by_the_timeout():
    async def main():
        async with decoders(replace(PATIENT, small_timeout=0.5)) as running:
            await running.decode([SMALL], Input(32, 32))
            os.kill(pids(running)[0], signal.SIGSTOP)
            began = time.monotonic()
            assert len(await asyncio.gather(*(running.decode([SMALL], Input(32, 32)) for _ in range(20)))) == 20
            assert 0.4 < time.monotonic() - began < 10

    asyncio.run(main())


def test_a_client_whose_image_costs_the_decoder_of_small_ones_is_kept_from_it(monkeypatch):
    monkeypatch.setattr(small, "SMALL_WORK", 10**15)  # so that this one is taken for small
    bomb = jpeg_of_scans(120, (3000, 3000))
    assert len(bomb) <= small.SMALL_BYTES

    async def main():
        async with decoders(replace(PATIENT, small_timeout=0.2)) as running:
            await running.decode([SMALL], Input(32, 32))
            first = pids(running)[0]
            tasks = [running.decode([data], Input(32, 32), client) for data, client in ((bomb, "guilty"), (SMALL, "innocent"))]
            assert [len(one) for one in await asyncio.gather(*tasks)] == [1, 1]
            assert first not in pids(running)
            assert list(running.suspects.until) == ["guilty"]
            await until(lambda: len(pids(running)) == 3)
            os.kill(of_large(running), signal.SIGSTOP)  # the new decoder of small images
            async with asyncio.timeout(5):
                assert len(await running.decode([SMALL], Input(32, 32), "guilty")) == 1  # which this one does not need

    asyncio.run(main())


def test_clients_take_turns_however_much_one_sends():
    async def main():
        async with decoders(replace(PATIENT, large=1)) as running:
            await running.decode([MEDIUM], Input(32, 32))
            done = []

            async def one(data, client):
                await running.decode([data], Input(32, 32), client)
                done.append(client)

            for data, many, others in ((MEDIUM, 12, 3), (SMALL, 1000, 200)):
                done.clear()
                tasks = [asyncio.create_task(one(data, "greedy")) for _ in range(many)]
                await asyncio.sleep(0)
                await asyncio.gather(*tasks, one(data, "polite"))
                assert done.index("polite") <= others

    asyncio.run(main())


def test_what_is_too_long_or_no_image_is_refused_before_it_takes_a_turn():
    async def main():
        async with decoders(replace(PATIENT, large=1)) as running:
            await running.decode([MEDIUM], Input(32, 32))
            os.kill(of_large(running), signal.SIGSTOP)
            for data, said in ((bytes(20_000_000), "20000000 bytes; the limit is"), (b"%PDF" + bytes(10**6), "it is a PDF")):
                with pytest.raises(InvalidImage, match=said) as refused:
                    async with asyncio.timeout(1):
                        await running.decode([MEDIUM, data], Input(32, 32))
                assert refused.value.index == 1

    asyncio.run(main())


def test_what_libraries_say_of_a_damaged_image_is_not_logged(capfd):
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000), dtype=np.uint8)  # libtiff says nothing of one in two others
    fax = bytearray(encoded(Image.fromarray(noise).convert("1"), "TIFF", compression="group4"))
    fax[2000:20_000:50] = bytes(360)
    with suppress(InvalidImage):
        pixels.decode(bytes(fax), Input(32, 32))
    assert "Fax4Decode" in capfd.readouterr().err

    async def main():
        async with decoders() as running:
            with suppress(InvalidImage):
                await running.decode([bytes(fax)], Input(32, 32))

    asyncio.run(main())
    assert capfd.readouterr().err == ""


def test_the_decoder_of_a_client_that_has_gone_is_ended_at_once():
    async def main():
        async with decoders(replace(PATIENT, large=1)) as running:
            await running.decode([MEDIUM], Input(32, 32))
            pid = of_large(running)
            task = asyncio.create_task(running.decode([SLOW], Input(32, 32)))
            queued = [asyncio.create_task(running.decode([SLOW], Input(32, 32))) for _ in range(40)]
            await asyncio.sleep(0.2)
            for each in (task, *queued):
                each.cancel()
            await until(lambda: not runs(pid), 2)
            assert not len(running.fresh) + len(running.heavy)
            assert running.free == running.settings.heavy_memory
            assert len(await running.decode([MEDIUM], Input(32, 32))) == 1

    asyncio.run(main())


def test_small_images_that_nobody_waits_for_are_dropped_and_not_charged():
    async def main():
        async with decoders() as running:
            await running.decode([SMALL], Input(32, 32))
            os.kill(pids(running)[0], signal.SIGSTOP)  # so that nothing leaves the queue for its turn
            first = asyncio.create_task(running.decode([SMALL], Input(32, 32), "first"))
            await asyncio.sleep(0.05)
            tasks = [asyncio.create_task(running.decode([SMALL] * 3, Input(32, 32), "gone")) for _ in range(10)]
            waiting = asyncio.create_task(running.decode([SMALL], Input(32, 32), "waiting"))
            await asyncio.sleep(0)
            assert len(running.small) == 31
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert len(running.small) == 1
            os.kill(pids(running)[0], signal.SIGCONT)
            assert len(await first) == len(await waiting) == 1

    asyncio.run(main())


def test_small_images_that_nobody_waits_for_are_not_decoded():
    async def main():
        async with decoders() as running:
            await running.decode([SMALL], Input(32, 32))
            tasks = [asyncio.create_task(running.decode([SMALL], Input(32, 32))) for _ in range(10)]
            await asyncio.sleep(0)
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert running._batch() == []
            assert len(await running.decode([SMALL], Input(32, 32))) == 1

    asyncio.run(main())


def test_the_death_of_the_zygote_is_survived_by_requests_under_way():
    async def main():
        async with decoders() as running:
            await running.decode([SMALL], Input(32, 32))
            zygote = running.zygote
            old = pids(running)
            tasks = [asyncio.create_task(running.decode([one], Input(32, 32))) for one in (MEDIUM, *[SMALL] * 20, MEDIUM)]
            await asyncio.sleep(0.01)
            zygote.process.kill()
            assert len(await asyncio.gather(*tasks)) == 22
            assert running.zygote is not zygote
            await until(lambda: not any(map(runs, old)), 2)

    asyncio.run(main())


def test_a_request_is_decoded_again_for_each_decoder_of_one_zygote_but_not_for_another_zygote():
    """Of several decoders that died with it the next may take the request before its end is known, and is not to blame either."""

    async def main():
        running = Decoders(PoolSettings())

        def dead():
            fate = asyncio.get_running_loop().create_future()
            fate.set_result(UNKNOWN)
            return SimpleNamespace(gone=True, kill=lambda number: None, fates={1: fate})

        job = Large([MEDIUM], Input(32, 32), asyncio.get_running_loop().create_future(), "client")
        channel, first = SimpleNamespace(number=1), dead()
        for _ in range(3):
            await running._explain(first, channel, job)
            assert not job.future.done()
            assert running._eligible() is job
        await running._explain(dead(), channel, job)
        with pytest.raises(DecoderLost):
            job.future.result()
        assert running._eligible() is None

    asyncio.run(main())


def test_nothing_is_left_when_the_process_that_uses_decoders_dies(tmp_path):
    script = tmp_path / "user.py"
    script.write_text(
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from ebjdat_serve.contract import Input\n"
        "from ebjdat_serve.decoding.pool import Decoders\n"
        "from ebjdat_serve.decoding.pool_settings import PoolSettings\n"
        "async def main():\n"
        "    running = Decoders(PoolSettings())\n"
        "    await running.start()\n"
        "    await running.decode([sys.stdin.buffer.read()], Input(32, 32))\n"
        "    zygote = running.zygote.process.pid\n"
        "    while len(pids := Path(f'/proc/{zygote}/task/{zygote}/children').read_text().split()) < 3: await asyncio.sleep(.01)\n"
        "    print(zygote, *pids, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n",
        encoding="utf-8",
    )

    async def main():
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        process.stdin.write(SMALL)
        process.stdin.close()
        tree = [int(word) for word in (await process.stdout.readline()).split()]
        assert len(tree) == 4
        assert all(map(runs, tree))
        process.kill()
        await process.wait()
        await until(lambda: not any(map(runs, tree)), 5)

    asyncio.run(main())


def test_a_decoder_inherits_nothing_and_may_open_nothing_new(monkeypatch):
    monkeypatch.setenv("LIT_SERVER_API_KEY", "a key that no image may read")

    async def main():
        async with decoders() as running:
            await running.decode([SMALL], Input(32, 32))
            await until(lambda: len(pids(running)) == 3)
            for number, pid in enumerate(pids(running), 1):
                await until(lambda pid=pid: "ebjdat-decode" in Path(f"/proc/{pid}/comm").read_text(encoding="ascii"))
                await asyncio.sleep(0.1)
                opened = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
                assert sum(each.startswith("socket:") for each in opened) == 1
                assert b"API_KEY" not in Path(f"/proc/{pid}/environ").read_bytes()
                assert len(opened) <= 5  # and the three streams, and the standard error that images cannot write to
                limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
                assert "Max file size             0" in limits
                assert "Max core file size        0" in limits
                assert "Max address space         unlimited" not in limits
                nice = int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[16])
                assert (nice > os.nice(0)) == (number != 1)
                ignored = int(Path(f"/proc/{pid}/status").read_text(encoding="ascii").partition("SigIgn:")[2].split()[0], 16)
                assert all(ignored >> number - 1 & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    asyncio.run(main())


def test_decoders_keep_the_hard_limits_that_they_were_started_with():
    """Those of ``ulimit -v`` or of systemd's LimitAS=, which only root may raise; each decoder ended once where there was one."""

    async def main():
        async with decoders() as running:
            await running.decode([SMALL], Input(32, 32))
            await until(lambda: len(pids(running)) == 3)
            old = pids(running)
            for kind, hard in ((resource.RLIMIT_AS, 2**34), (resource.RLIMIT_CPU, 200)):
                resource.prlimit(running.zygote.process.pid, kind, (hard, hard))
            for pid in old:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not any(map(runs, old)))
            assert [len(await running.decode([one], Input(32, 32))) for one in (SMALL, MEDIUM)] == [1, 1]
            await until(lambda: len(pids(running)) == 3)
            for pid in pids(running):
                space = resource.prlimit(pid, resource.RLIMIT_AS)
                assert space[0] < space[1] == 2**34
                assert resource.prlimit(pid, resource.RLIMIT_CPU)[1] == 200

    asyncio.run(main())


def test_a_limit_above_the_hard_one_is_the_hard_one():
    script = (
        "import resource; from ebjdat_serve.decoding.zygote import limit; resource.setrlimit(resource.RLIMIT_CPU, (60, 60));"
        "limit(resource.RLIMIT_CPU, 100); print(resource.getrlimit(resource.RLIMIT_CPU))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == "(60, 60)\n"


def pauses(caplog):
    return [float(one.message.split()[-2]) for one in caplog.records if "the next one starts in" in one.message]


def test_decoders_that_end_before_they_are_asked_anything_are_started_again_ever_later(monkeypatch, caplog):
    monkeypatch.setattr(pool, "PAUSE", 0.05)

    async def main():
        async with decoders() as running:
            await until(lambda: running.zygote and len(pids(running)) == 3)
            forked, end = set(), time.monotonic() + 1.5
            while time.monotonic() < end:
                forked |= set(pids(running))
                for pid in pids(running):
                    with suppress(ProcessLookupError):  # ended between the list and here
                        os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.001)
            assert len(forked) <= 3 * 6  # 0.05 + 0.1 + 0.2 + 0.4 + 0.8 s
            assert len(await running.decode([SMALL], Input(32, 32))) == 1

    asyncio.run(main())
    assert max(pauses(caplog)) >= 0.2


def test_a_decoder_that_fails_at_its_first_request_is_started_again_later_and_one_ended_by_its_image_at_once(monkeypatch, caplog):
    monkeypatch.setattr(pool, "PAUSE", 0.05)
    encoded = wire.Work.encoded

    async def main():
        async with decoders(replace(PATIENT, large=1)) as running:
            await until(lambda: running.zygote and len(pids(running)) == 2)
            task = asyncio.create_task(running.decode([SLOW], Input(32, 32)))
            await asyncio.sleep(0.2)
            task.cancel()
            assert len(await running.decode([SMALL], Input(32, 32))) == 1
            assert pauses(caplog) == []
            monkeypatch.setattr(wire.Work, "encoded", lambda work: [wire.packed(wire.Park())])  # no work
            for _ in range(3):
                with pytest.raises(DecoderLost, match="was ended"):
                    await running.decode([MEDIUM], Input(32, 32))
            monkeypatch.setattr(wire.Work, "encoded", encoded)
            assert len(await running.decode([MEDIUM], Input(32, 32))) == 1
            assert pauses(caplog) == [0.05, 0.1, 0.2]

    asyncio.run(main())


def test_a_fault_of_the_pool_is_logged_and_costs_the_requests_under_way_only(monkeypatch, caplog):
    monkeypatch.setattr(pool, "PAUSE", 0.01)
    decode_plan, decode_results = wire.decode_plan, wire.decode_results

    def unforeseen(*_):
        raise RuntimeError("nobody foresaw this")

    async def main():
        async with decoders() as running:
            monkeypatch.setattr(wire, "decode_plan", unforeseen)
            monkeypatch.setattr(wire, "decode_results", unforeseen)
            for one in (SMALL, MEDIUM):
                async with asyncio.timeout(5):
                    with pytest.raises(DecoderLost, match="a fault of the server"):
                        await running.decode([one], Input(32, 32))
            monkeypatch.setattr(wire, "decode_plan", decode_plan)
            monkeypatch.setattr(wire, "decode_results", decode_results)
            for one in (SMALL, MEDIUM):
                assert len(await running.decode([one], Input(32, 32))) == 1

    asyncio.run(main())
    assert caplog.text.count("RuntimeError: nobody foresaw this") == 2


def test_heavy_decodes_wait_for_memory_in_turn_and_others_pass_them(monkeypatch):
    for module in (pool, pool_settings):
        monkeypatch.setattr(module, "LIGHT", 40 * 2**20)
    heavy = encoded(Image.new("RGB", (3000, 3000), (1, 2, 3)))  # 100 MiB
    settings = replace(PATIENT, memory=(150 + 40) * 2**20, limits=Limits(max_memory=150 * 2**20))

    async def main():
        async with decoders(settings) as running:
            await running.decode([SMALL], Input(32, 32))
            done = []

            async def one(name, data, client):
                await running.decode([data], Input(32, 32), client)
                done.append(name)

            tasks = [asyncio.create_task(one(f"a{i}", heavy, "a")) for i in range(4)]
            await until(lambda: running.heavies == 1)
            tasks += [asyncio.create_task(one("b", heavy, "b")), asyncio.create_task(one("light", MEDIUM, "c"))]
            tasks.append(asyncio.create_task(one("small", SMALL, "c")))
            least = running.free
            while not all(task.done() for task in tasks):
                assert running.heavies <= 1
                least = min(least, running.free)
                await asyncio.sleep(0.002)
            await asyncio.gather(*tasks)
            assert 0 <= least < running.settings.heavy_memory
            assert running.free == running.settings.heavy_memory
            return done

    done = asyncio.run(main())
    assert done.index("small") < done.index("a1")
    assert done.index("light") < done.index("a3")
    assert done.index("b") < done.index("a3")  # one client's four do not all come first


def test_a_decode_may_take_as_long_as_its_request():
    async def main():
        return ImageDecoder(Settings(classify_deadline=60.0, decode_seconds=30.0)).decoders.settings

    settings = asyncio.run(main())
    assert settings.timeout == 60
    assert settings.limits.max_seconds == 30


def test_an_image_may_have_as_many_bytes_as_the_settings_say():
    settings = Settings(max_image_bytes=len(SMALL) - 1)

    async def main():
        decoder = ImageDecoder(settings)
        with pytest.raises(InvalidImage, match=f"{len(SMALL)} bytes; the limit is {len(SMALL) - 1}") as refused:
            await decoder.decoders.decode([SMALL], Input(32, 32))
        return refused.value

    assert asyncio.run(main()).too_large
    assert images.limits(Settings(max_image_bytes=30 * 2**20)).max_bytes == 30 * 2**20


def test_an_image_that_needs_more_memory_with_its_bytes_than_there_is_is_refused():
    """It waited for memory until its deadline."""
    large = encoded(Image.new("RGB", (2000, 2000)))
    limits = replace(PATIENT.limits, max_memory=judge(large, Input(32, 32), PATIENT.limits).memory(Input(32, 32), PATIENT.limits) + 2**20)

    async def main():
        async with decoders(replace(PATIENT, limits=limits, memory=limits.max_memory + 64 * 2**20)) as running:
            async with asyncio.timeout(10):
                assert len(await running.decode([large], Input(32, 32))) == 1
                with pytest.raises(InvalidImage, match=r"MiB to decode; the limit is \d+: send it smaller") as refused:
                    await running.decode([large + bytes(2**20)], Input(32, 32))
                assert refused.value.too_large

    asyncio.run(main())


def test_bytes_that_are_more_than_a_decoder_has_for_itself_reach_it_and_cost_no_decoder():
    limits = replace(PATIENT.limits, max_bytes=200 * 2**20, max_memory=2**29)
    small_part = encoded(Image.new("RGB", (600, 600)))

    async def main():
        async with decoders(replace(PATIENT, limits=limits, memory=2**29 + 64 * 2**20, large=1)) as running:
            assert len(await running.decode([small_part + bytes(110 * 2**20)], Input(32, 32))) == 1
            with pytest.raises(InvalidImage, match="MiB to decode") as refused:
                await running.decode([small_part, small_part + bytes(190 * 2**20)], Input(32, 32))
            assert refused.value.index == 1
            return running.numbers

    assert asyncio.run(main()) == PATIENT.small + 1


def test_memory_that_is_too_little_for_one_image_is_refused_at_the_start():
    with pytest.raises(EbjdatError, match="at least 512 MiB for one image of 448 MiB"):
        PoolSettings(memory=400 * 2**20)
    with pytest.raises(EbjdatError, match="at least 1 decoder"):
        PoolSettings(large=0)


def test_what_is_left_when_it_closes_is_refused():
    async def main():
        async with decoders(replace(PATIENT, large=1)) as running:
            await running.decode([SMALL], Input(32, 32))
            tasks = [asyncio.create_task(running.decode([one], Input(32, 32))) for one in (SLOW, SLOW, *[SMALL] * 100)]
            await asyncio.sleep(0.05)
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(main())
    assert all(isinstance(one, DecoderLost | list) for one in results)
    assert isinstance(results[0], DecoderLost)
    assert isinstance(results[1], DecoderLost)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (False, b"x"),
        (True, wire.FRAME.pack(wire.RESULTS, 2**32 - 1)),
        (True, wire.FRAME.pack(wire.RESULTS, 101)),
        (True, wire.FRAME.pack(wire.PLAN, 10) + bytes(10)),
        (True, wire.FRAME.pack(wire.RESULTS, 10) + bytes(11)),
    ],
    ids=["unasked", "4 GiB", "a byte more than can be", "of another kind", "a byte after its end"],
)
def test_a_decoder_that_says_more_than_it_was_asked_for_is_cut_off(run, asked, said):
    async def main():
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        _, channel = await loop.create_unix_connection(lambda: Channel(1, ended.set), sock=ours)
        with theirs:
            asking = asyncio.create_task(channel.ask([b"work"], wire.RESULTS, 100)) if asked else None
            await asyncio.sleep(0)
            with suppress(ConnectionError):
                await loop.sock_sendall(theirs, said)
                await loop.sock_sendall(theirs, bytes(2**24))
            async with asyncio.timeout(5):
                await ended.wait()
                if asking:
                    with pytest.raises(EOFError):
                        await asking
            assert channel.lost
            assert not channel.held

    run(main())


def test_the_largest_answers_that_decoders_give_are_not_cut_off():
    refusal = InvalidImage("\N{GREEK SMALL LETTER ALPHA}" * wire.LONGEST_TEXT)
    frame = wire.FRAME.size
    assert len(wire.encode_plan(refusal)) == frame + wire.LARGEST_PLAN
    assert len(wire.encode_plan(2**40)) < frame + wire.LARGEST_PLAN
    for size in (8, 32):
        image = np.zeros((size, size, 3), np.uint8)
        most = frame + wire.largest_results(3, Input(size, size))
        assert max(len(wire.encode_results([one] * 3, [0.5] * 3)) for one in (refusal, image)) == most


@pytest.mark.parametrize("too_large", [False, True])
def test_a_refusal_comes_from_a_decoder_as_it_was(too_large):
    refusal = InvalidImage("the limit is elsewhere", too_large=too_large)
    refusal.index = 3
    [arrived], [took] = wire.decode_results(wire.encode_results([refusal], [0.25])[wire.FRAME.size :], 1, Input(2, 2))
    assert took == 0.25
    with pytest.raises(InvalidImage) as raised:
        wire.decode_plan(wire.encode_plan(refusal)[wire.FRAME.size :])
    for error in (arrived, raised.value):
        assert (str(error), error.index, error.too_large) == (str(refusal), 3, too_large)


def test_a_client_whose_small_images_take_long_is_charged_and_then_suspect(monkeypatch):
    """Each takes 30 ms more than it may; with the fourth its client is suspect."""
    suspects, now = Suspects(), [1000.0]
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    item = Small(SMALL, judge(SMALL, Input(32, 32), PATIENT.limits), Input(32, 32), None, "greedy")
    allowed = 4 * (5e-4 + 15e-9 * (item.header.work + 32 * 32) + 8e-9 * len(SMALL))
    assert suspects.took(item, 15e-9 * item.header.work) == pytest.approx(0, abs=1e-6)
    assert suspects.took(item, 0.0) == -item.header.work
    for _ in range(100):
        suspects.took(item, allowed)
    large = replace(item, contract=Input(1024, 1024))  # whose result takes longer than its pixels
    for _ in range(100):
        suspects.took(large, 0.05)
    for _ in range(4):
        assert "greedy" not in suspects
        assert suspects.took(item, allowed + 0.03) == pytest.approx((allowed + 0.03) / 15e-9 - item.header.work)
        now[0] += 0.1
    assert "greedy" in suspects
    assert "polite" not in suspects
    now[0] += 61
    assert "greedy" not in suspects
    for _ in range(20):  # forgiven meanwhile
        suspects.took(item, allowed + 0.03)
        now[0] += 1.6
    assert "greedy" not in suspects


def test_decoders_say_what_each_small_image_took_and_its_client_is_charged(monkeypatch):
    """As if an image might take no time at all: whatever the decoder measures is beyond what it may."""
    monkeypatch.setattr(jobs, "LENIENCE", 0)
    monkeypatch.setattr(jobs, "FORGIVEN", 0)
    charged = []

    async def main():
        async with decoders(PATIENT) as running:
            charge = running.small.charge
            running.small.charge = lambda client, cost: (charged.append((client, cost)), charge(client, cost))
            while "greedy" not in running.suspects:
                await running.decode([SMALL] * 30, Input(32, 32), "greedy")
            assert "polite" not in running.suspects

    asyncio.run(main())
    work = judge(SMALL, Input(32, 32), PATIENT.limits).work
    seconds = [jobs.PIXEL_SECONDS * (cost + work) for client, cost in charged if client == "greedy"]
    assert sum(seconds) > jobs.EXCESS_SECONDS
    assert all(1e-6 <= one < 1 for one in seconds)


def test_answers_of_a_decoder_are_checked():
    for body in (b"", b"P123", b"T", b"T" + bytes(8), wire.encode_results([np.zeros((2, 2, 3), np.uint8)] * 2, [0.0] * 2)[5:], b"X" * 20):
        with pytest.raises(ValueError, match="a decoder's"):
            wire.decode_results(body, 1, Input(2, 2))
    with pytest.raises(ValueError, match="a decoder's"):
        wire.decode_plan(b"T")


def gradient(size, mode="RGB"):
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    array = np.stack([x // 23 % 256, y // 17 % 256, (x + y) // 40 % 256, 255 - x // 60 % 200], -1).astype(np.uint8)
    return Image.fromarray(array).convert(mode)


def large(running_on, data, **limits):
    """Return (pixels, MiB of memory at its peak, MiB that were estimated) of an image decoded alone."""

    async def main():
        async with decoders(replace(PATIENT, large=1), **limits) as running:
            await running.decode([SMALL], Input(32, 32))
            [image] = await running.decode([data], Input(32, 32))
            return image, peak(running)

    image, used = asyncio.run(main())
    allowed = replace(Limits(), **limits)
    estimate = judge(data, Input(32, 32), allowed).memory(Input(32, 32), allowed) / 2**20
    assert used < 1.1 * estimate + 32, running_on
    assert used < 480
    return image


def test_a_jpeg_of_48_megapixels_is_decoded_by_draft():
    picture = gradient((1008, 756)).resize((8064, 6048), Image.Resampling.BILINEAR)
    image = large("draft", encoded(picture, "JPEG", quality=85), jpeg_draft=True)
    exact = np.asarray(picture.resize((32, 32), Image.Resampling.BOX)).astype(int)
    assert np.abs(image - exact).max() <= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGBA", {"compress_level": 1}),
        ("WEBP", "RGBA", {"method": 0, "quality": 60}),
        ("AVIF", "RGBA", {"speed": 10, "quality": 50}),
        ("AVIF", "RGB", {"speed": 10, "quality": 50, "subsampling": "4:4:4"}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
        ("GIF", "L", {}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_24_megapixels_are_decoded_in_less_memory_than_the_limit(kind, mode, options):
    picture = gradient((6000, 4000), mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = large(kind, encoded(picture, kind, **options, **({} if kind == "GIF" else {"exif": exif})))
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture) if mode == "RGBA" else picture
    upright = white.convert("RGB") if kind == "GIF" else white.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    exact = np.asarray(upright.resize((32, 32), Image.Resampling.BOX)).astype(int)
    assert np.abs(image - exact).mean() < 3


@needs_heic
def test_heic_is_decoded():
    import pillow_heif

    pillow_heif.register_heif_opener()
    data = encoded(gradient((640, 480)), "HEIF", quality=90)

    async def main():
        async with decoders() as running:
            return await running.decode([data], Input(32, 32))

    [image] = asyncio.run(main())
    exact = np.asarray(gradient((640, 480)).resize((32, 32), Image.Resampling.BOX)).astype(int)
    assert np.abs(image - exact).mean() < 4


@pytest.mark.parametrize(
    ("kind", "mode"), [("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGBA"), ("TIFF", "I;16"), ("AVIF", "RGB"), ("TIFF", "CMYK")]
)
def test_new_formats_are_decoded_as_pillow_decodes_them(kind, mode):
    picture = colour(mode=mode)
    data = encoded(picture, kind)
    with Image.open(io.BytesIO(data)) as opened:
        expected = opened.convert("RGBA") if mode == "RGBA" else opened.convert("RGB") if mode != "I;16" else None
    header = judge(data, Input(37, 53), Limits())
    image = pixels.decode_judged(data, header, Input(37, 53))
    if mode == "RGBA":
        expected = Image.alpha_composite(Image.new("RGBA", expected.size, "white"), expected).convert("RGB")
    if expected is None:
        np.testing.assert_array_equal(image[..., 0], np.asarray(picture) >> 8)
    else:
        np.testing.assert_array_equal(image, np.asarray(expected))
