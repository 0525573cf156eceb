#!/usr/bin/env python3
"""How fast images are decoded: `python benchmarks/decoding.py [--json FILE] [--seconds S]`.

Images per second through the decoder processes of a server, 32 requests of one image under way, beside one process that decodes without
any; and of 12-megapixel JPEGs, one at a time, at full size and at the fraction that a server may choose. Rounds alternate and the best of
each counts. On a machine with one core the ratios are the price and the gain that a server sees; decoders of large images stand back
behind whatever else runs.
"""

import argparse
import asyncio
import io
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ebjdat_serve import pixels
from ebjdat_serve.bundle import write_json
from ebjdat_serve.contract import Input
from ebjdat_serve.decoding.header import Limits
from ebjdat_serve.decoding.judge import judge
from ebjdat_serve.decoding.pool import Decoders
from ebjdat_serve.decoding.pool_settings import PoolSettings

SIDE = 32
SQUASHED = Input(SIDE, SIDE)
CONNECTIONS = 32
ROUNDS = 5


def photo(width: int, height: int, kind: str) -> bytes:
    """Return an encoded image with edges, gradients and grain, as a photo has."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (height, width, 1)).astype(np.int16)
    picture = Image.fromarray((np.asarray(coarse).astype(np.int16) + grain).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


async def rate(one: Callable[[], Awaitable[object]], connections: int, seconds: float) -> float:
    """Return how many calls a second are done when ``connections`` are under way."""
    done = 0
    began = time.perf_counter()

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < began + seconds:
            await one()
            done += 1

    await asyncio.gather(*(client() for _ in range(connections)))
    return done / (time.perf_counter() - began)


async def measure(seconds: float) -> list[dict[str, object]]:
    """Return the rows."""
    limits = Limits(jpeg_draft=True)
    images = {"png 32": photo(SIDE, SIDE, "PNG"), "png 300": photo(300, 300, "PNG"), "jpeg 12 MP": photo(4000, 3000, "JPEG")}
    rows: list[dict[str, object]] = []
    exact, draft = (Decoders(PoolSettings(Limits(jpeg_draft=each), large=1)) for each in (False, True))
    for each in (exact, draft):
        await each.start()
    for name, data in images.items():
        connections = 1 if "MP" in name else CONNECTIONS

        async def here(data: bytes = data) -> object:
            await asyncio.sleep(0)
            return pixels.decode(data, SQUASHED)

        async def here_reduced(data: bytes = data) -> object:
            await asyncio.sleep(0)
            header = judge(data, SQUASHED, limits)
            return pixels.decode_judged(data, header, SQUASHED, header.scale(SQUASHED, limits))

        async def there(data: bytes = data) -> object:
            return await exact.decode([data], SQUASHED)

        async def reduced(data: bytes = data) -> object:
            return await draft.decode([data], SQUASHED)

        ways = {"in process": here, "decoders": there} | (
            {"in process, draft": here_reduced, "decoders, draft": reduced} if "MP" in name else {}
        )
        best = dict.fromkeys(ways, 0.0)
        for call in ways.values():
            await call()
        for _ in range(ROUNDS):
            for way, call in ways.items():
                best[way] = max(best[way], await rate(call, connections, seconds))
        rows += [{"name": f"{name}, {way}", "value": value, "unit": "images/s", "connections": connections} for way, value in best.items()]
        rows += [
            {
                "name": f"{name}, {way}, ratio to in process",
                "value": best[way] / best["in process"],
                "unit": "1",
                "connections": connections,
            }
            for way in best
            if way != "in process"
        ]
    for each in (exact, draft):
        await each.close()
    return rows


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description="How fast images are decoded, in processes with limits and without.")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round")
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments.seconds))
    for row in rows:
        print(f"{row['name']:45s} {row['value']:10.2f} {row['unit']}")
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
