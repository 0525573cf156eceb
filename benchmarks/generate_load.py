#!/usr/bin/env python3
"""Load test of /generate: latency of short requests while long ones run, and throughput against the bare engine: `make bench`.

The server runs on core 0, this load generator on core 1; the bare engine on core 0, before and after, with the server stopped.
`--json FILE` writes a flat list of rows.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.load import Connection, Served, pin, request, serving
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Device, load_engine
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.sgld import Chains, Prior

Row = dict[str, Any]
LONG, LONG_STEPS, SHORT_STEPS = 8, 600, 20
SIZES = {"cpu": (1, 2, 4, 8, 16), "cuda": (8, 32, 128, 256)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--device", default="cpu", choices=get_args(Device))
    parser.add_argument("--alone", type=int, default=30, help="number of short requests on an idle server")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)  # this script runs itself on core 0 for the engine alone
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(engine_rates(options.model, options.device)))
        return
    pin(1)
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", str(options.model), "--threads", "1", "--device", options.device]
    command += ["--max-steps", str(LONG_STEPS), "--port"]
    with serving(lambda port: [*command, str(port)]) as server:
        rows = list(measure(server, options))
    for row in rows:
        print(f"{row['name']:84}{row['value']:>9.2f} {row['unit']}")
    if options.json:
        options.json.write_text(json.dumps([{**row, "device": options.device} for row in rows], indent=1) + "\n", encoding="utf-8")


def measure(server: Served, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows."""
    what, beside = f"{SHORT_STEPS}-step drawing", f"{LONG} chains of {LONG_STEPS} steps running"
    before = alone(server, options)
    quiet = asyncio.run(shorts(server.port, options.alone))
    own = float(np.median(quiet))
    yield {"name": f"{what} alone, median", "value": own * 1e3, "unit": "ms", "n": len(quiet)}
    for pause, how in ((0.5, "half a second apart"), (0.0, "one after the other")):
        busy, total, longest = asyncio.run(mixed(server.port, pause))
        after = alone(server, options)
        best = {size: (before[size] + after[size]) / 2 for size in before}
        before = after
        for q in (50, 99):
            yield {
                "name": f"{what}, {how}, {beside}, p{q}",
                "value": float(np.quantile(busy, q / 100)) * 1e3,
                "unit": "ms",
                "n": len(busy),
            }
        yield {"name": f"ratio p99 / alone: {what}, {how}", "value": float(np.quantile(busy, 0.99)) / own, "unit": ""}
        yield {"name": f"longest wait of a chain for its next step, short ones {how}", "value": longest * 1e3, "unit": "ms"}
        for size, rate in best.items():
            yield {"name": f"engine alone, batch {size}, around short ones {how}", "value": rate, "unit": "chain-steps/s"}
        yield {"name": f"server, short ones {how}", "value": total, "unit": "chain-steps/s"}
        yield {"name": f"ratio server / engine at its best batch, short ones {how}", "value": total / max(best.values()), "unit": ""}


async def draw(connection: Connection, steps: int, seed: int) -> float:
    """Return the seconds of one request."""
    began = time.monotonic()
    status = await connection.ask(request(f"/generate?class={seed % 10}&steps={steps}&seed={seed}"))
    if status != 200:
        raise RuntimeError(f"/generate answered {status}")
    return time.monotonic() - began


async def shorts(port: int, n: int) -> list[float]:
    """Return the seconds of ``n`` short requests, one after the other."""
    connection = Connection(port)
    return [await draw(connection, SHORT_STEPS, seed) for seed in range(n)]


async def mixed(port: int, pause: float) -> tuple[list[float], float, float]:
    """Return the seconds of short requests while the long ones run, total chain-steps/s, and the longest wait of a chain."""
    began = time.monotonic()
    long = [asyncio.create_task(draw(Connection(port), LONG_STEPS, seed)) for seed in range(LONG)]
    await asyncio.sleep(1)
    connection, longest = Connection(port), 0.0
    seconds: list[float] = []
    while not any(task.done() for task in long):
        seconds.append(await draw(connection, SHORT_STEPS, len(seconds)))
        if len(seconds) % 10 == 0:
            longest = max(longest, await asyncio.to_thread(longest_wait, port))
        await asyncio.sleep(pause)
    await asyncio.gather(*long)
    steps = LONG * LONG_STEPS + len(seconds) * SHORT_STEPS
    return seconds, steps / (time.monotonic() - began), longest


def longest_wait(port: int) -> float:
    """Return the longest recent wait of a chain, as reported by the server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/info") as answer:
        return float(json.loads(answer.read())["load"]["generate"]["longest_wait_seconds"])


def alone(server: Served, options: argparse.Namespace) -> dict[int, float]:
    """Return the bare engine's chain-steps/s by batch size, in its own process on core 0, with the server stopped."""
    command = [sys.executable, __file__, "--engine", "--model", str(options.model), "--device", options.device]
    with server.asleep():
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, preexec_fn=lambda: pin(0))
    return {int(size): rate for size, rate in json.loads(done.stdout).items()}


def engine_rates(model: Path, device: Device) -> dict[int, float]:
    """Return chain-steps/s by batch size, batches taking turns."""
    bundle = Bundle.load(model)
    engine, prior = load_engine(bundle, "auto", device, 1), Prior.load(bundle.path / "prior.safetensors")
    sizes = SIZES["cpu" if device == "cpu" or "CPU" in engine.provider else "cuda"]
    chains = {n: Chains.start(prior, bundle.manifest.sampler, np.zeros(n, np.int64), seed=0) for n in sizes}
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    for turn in range(6):
        for n in sizes:
            began = time.perf_counter()
            engine.advance(chains[n], max(1, 32 // n))
            if turn:
                seconds[n].append((time.perf_counter() - began) / max(1, 32 // n))
    return {n: n / float(np.median(times)) for n, times in seconds.items()}


if __name__ == "__main__":
    main()
