#!/usr/bin/env python3
"""What others see while four clients send hostile images without pause: `python benchmarks/hostile_load.py [--json FILE] [--seconds S]`.

PNGs of 300 x 300 come at 20 a second, and /health is asked ten times a second: alone, then beside the four, in alternating rounds whose
medians count. The server runs on core 0, the load generators on core 1. At the end the server is stopped while the four go on.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.hostile_images import (
    avif_that_lies,
    encoded,
    jpeg_of_scans,
    jpeg_of_segments,
    jpeg_of_tags,
    png,
    png_of_tags,
    png_of_texts,
    webp,
    webp_of_tags,
)
from benchmarks.load import Connection, Served, open_loop, pin, request, serving
from ebjdat_serve.bundle import write_json
from ebjdat_serve.server.settings import SHIPPED

CLIENTS, RATE = 4, 20.0
P99 = "300 x 300 PNG, 20/s, p99"
Row = dict[str, Any]


def hostile() -> list[bytes]:
    """Return images that are refused by their headers, and the dearest that are not."""
    return [
        webp(16_000, 2_500),
        png(1, 40_000_000),
        jpeg_of_scans(8000),
        jpeg_of_segments(2**18),
        png_of_texts(60),
        webp(10_000, 2_500),
        jpeg_of_scans(64, (4000, 4000)),
        png(5000, 5000, pixels=bytes(5000 * 15001)),
        encoded(Image.new("RGB", (5000, 5000), (1, 2, 3)), "WEBP", method=0),
        webp_of_tags(30_000, 400_000),
        png_of_tags(30_000, 4_000_000),
        jpeg_of_tags(4000, 12_000),
        avif_that_lies((4900, 4900), (64, 64)),
    ]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description="What others see while four clients send hostile images without pause.")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attack", type=int, metavar="PORT", help=argparse.SUPPRESS)  # this script runs itself as the attackers
    options = parser.parse_args()
    pin(1)
    if options.attack:
        print(json.dumps(asyncio.run(attack(options.attack, options.seconds))))
        return
    rows = measure(options.seconds, options.rounds)
    for row in rows:
        print(f"{row['name']:72}{row['value']:>10.2f} {row['unit']}")
    if options.json:
        write_json(options.json, rows)


async def attack(port: int, seconds: float) -> dict[str, Any]:
    """Send hostile images over four connections without pause; return how many answers there were by status, and the slowest's seconds."""
    images, end = [request("/classify", data) for data in hostile()], time.monotonic() + seconds
    seen: Counter[str] = Counter()
    slowest = 0.0

    async def client(turn: int) -> None:
        nonlocal slowest
        connection = Connection(port)
        while time.monotonic() < end:
            began, turn = time.monotonic(), turn + 1
            try:
                status = str(await connection.ask(images[turn % len(images)]))
            except (OSError, EOFError):
                status, connection = "hung up", Connection(port)
                await asyncio.sleep(0.1)
            seen[status] += 1
            slowest = max(slowest, time.monotonic() - began)
        with contextlib.suppress(OSError):
            await connection.close()

    await asyncio.gather(*(client(2 * n) for n in range(CLIENTS)))
    return {"answers": dict(seen), "slowest": slowest}


def measure(seconds: float, rounds: int) -> list[Row]:
    """Return the rows."""
    picture = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)))
    polite = request("/classify", picture)
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", str(SHIPPED), "--threads", "1", "--device", "cpu", "--port"]
    seen: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    answers: Counter[str] = Counter()
    slowest = 0.0
    with serving(lambda port: [*command, str(port)]) as server:
        for turn in range(rounds):
            for attacked in (False, True):
                with attackers(server.port, seconds + 2) if attacked else contextlib.nullcontext() as process:
                    seen[attacked].append(observe(server, polite, seconds, turn))
                if process:
                    said = json.loads(process.stdout.read())
                    answers.update(said["answers"])
                    slowest = max(slowest, said["slowest"])
        with attackers(server.port, 4) as process:
            time.sleep(2)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(70)
            stopped = time.monotonic() - began
        process.stdout.read()
    rows: list[Row] = []
    for attacked, where in ((False, "alone"), (True, "beside the four")):
        for name, unit, summary in (
            ("300 x 300 PNG, 20/s, p50", "ms", np.median),
            (P99, "ms", np.median),
            ("300 x 300 PNG, 20/s, refused", "", np.max),
            ("/health p50", "ms", np.median),
            ("memory, PSS of the whole tree", "MB", np.max),
        ):
            rows.append({"name": f"{name}, {where}", "value": float(summary([one[name] for one in seen[attacked]])), "unit": unit})
    ratio = float(np.median([bad[P99] / good[P99] for good, bad in zip(seen[False], seen[True], strict=True)]))
    rows.append({"name": "ratio p99 beside the four / alone", "value": ratio, "unit": ""})
    rows.append({"name": "slowest answer to the four", "value": slowest, "unit": "s"})
    rows += [{"name": f"answers to the four: {status}", "value": n, "unit": ""} for status, n in sorted(answers.items())]
    rows.append({"name": "stopped while the four go on, after", "value": stopped, "unit": "s"})
    return rows


@contextlib.contextmanager
def attackers(port: int, seconds: float) -> Any:
    """Run the four until their time is over, and give their process."""
    process = subprocess.Popen([sys.executable, __file__, "--attack", str(port), "--seconds", str(seconds)], stdout=subprocess.PIPE)
    time.sleep(1.5)  # their images are made
    yield process
    process.wait(60)


def observe(server: Served, polite: bytes, seconds: float, seed: int) -> dict[str, float]:
    """Return what polite clients see."""
    over, health, memory = threading.Event(), [], []

    def watch() -> None:
        async def ask() -> None:
            connection = Connection(server.port)
            while not over.is_set():
                began = time.monotonic()
                await connection.ask(request("/health"))
                health.append(time.monotonic() - began)
                await asyncio.sleep(0.1)
                if len(health) % 10 == 1:
                    memory.append(await asyncio.to_thread(server.pss))
            await connection.close()

        asyncio.run(ask())

    thread = threading.Thread(target=watch)
    thread.start()
    result = open_loop(server.port, polite, RATE, seconds, seed)
    over.set()
    thread.join()
    return {
        "300 x 300 PNG, 20/s, p50": result.quantile(0.5),
        P99: result.quantile(0.99),
        "300 x 300 PNG, 20/s, refused": result.refused,
        "/health p50": float(np.median(health)) * 1e3,
        "memory, PSS of the whole tree": max(memory),
    }


if __name__ == "__main__":
    main()
