#!/usr/bin/env python3
"""Load test of /generate: short requests while long ones run, and ten clients beside a greedy one: `make bench`.

The server runs on core 0, this load generator on core 1; the bare engine on core 0, before and after, with the server stopped.
`--json FILE` writes a flat list of rows.
"""

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
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
POLITE, PAUSES = 10, (0.0, 0.5)
"""Clients that draw SHORT_STEPS steps again and again, and the mean seconds between an answer and their next request."""
GREEDY = {"130 drawings": (130, 1), "64-image jobs": (3, 64)}
"""What one client beside them keeps under way: requests, and images of each, with the bundle's own number of steps."""
SETTLE = 5.0
"""Seconds until the server's moving average of chain-steps/s is of this load alone."""
SIZES = {"cpu": (1, 2, 4, 8, 16), "cuda": (8, 32, 128, 256)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--device", default="cpu", choices=get_args(Device))
    parser.add_argument("--alone", type=int, default=30, help="number of short requests on an idle server")
    parser.add_argument("--only", choices=("long", "shares"), help="measure one part")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ten clients without and with a greedy one, in turn")
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds of each turn")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)  # this script runs itself on core 0 for the engine alone
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(engine_rates(options.model, options.device)))
        return
    pin(1)
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", str(options.model), "--threads", "1", "--device", options.device]
    command += ["--max-steps", str(LONG_STEPS), "--port"]
    with serving(lambda port: [*command, str(port)]) as server:
        rows = list(measure(server, options)) if options.only != "shares" else []
        rows += shares(server.port, options.rounds, options.seconds) if options.only != "long" else []
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
            longest = max(longest, (await asyncio.to_thread(generate_load, port))["longest_wait_seconds"])
        await asyncio.sleep(pause)
    await asyncio.gather(*long)
    steps = LONG * LONG_STEPS + len(seconds) * SHORT_STEPS
    return seconds, steps / (time.monotonic() - began), longest


def generate_load(port: int) -> dict[str, float]:
    """Return the load of the generate workers, as reported by the server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/info") as answer:
        found: dict[str, float] = json.loads(answer.read())["load"]["generate"]
        return found


@dataclass
class Seen:
    """What polite clients saw: seconds of their drawings and how many were refused; and the server's chain-steps/s meanwhile."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    rates: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """Return a quantile of the seconds."""
        return float(np.quantile(self.seconds, q))

    @property
    def rate(self) -> float:
        """Mean chain-steps/s."""
        return float(np.mean(self.rates))


def shares(port: int, rounds: int, seconds: float) -> Iterator[Row]:
    """Yield the rows of polite clients without and with a greedy one; unshared: all from one address."""
    cases = [(pause, greedy, True) for pause in PAUSES for greedy in ("", *GREEDY)] + [(0.0, greedy, False) for greedy in GREEDY]
    seen = {case: Seen() for case in cases}
    for round_ in range(rounds):
        for case in cases:
            asyncio.run(beside(port, *case, seconds, round_, seen[case]))
    for pause in PAUSES:
        who = f"ten clients, each {SHORT_STEPS} steps again and again" + (f" after pauses of {pause:g} s" if pause else "")
        before = seen[pause, "", True]
        yield {"name": f"{who}, p99", "value": before.quantile(0.99) * 1e3, "unit": "ms", "n": len(before.seconds)}
        for greedy in GREEDY:
            found, name = seen[pause, greedy, True], f"{who}, beside a client with {greedy}"
            yield {"name": f"{name}, p99", "value": found.quantile(0.99) * 1e3, "unit": "ms", "n": len(found.seconds)}
            yield {"name": f"ratio p99 with / without: {name}", "value": found.quantile(0.99) / before.quantile(0.99), "unit": ""}
            yield {"name": f"refused: {name}", "value": found.refused, "unit": "requests", "n": len(found.seconds) + found.refused}
    for greedy in GREEDY:
        shared, unshared = seen[0.0, greedy, True], seen[0.0, greedy, False]
        yield {"name": f"server, ten clients and one with {greedy}", "value": shared.rate, "unit": "chain-steps/s", "n": len(shared.rates)}
        yield {
            "name": f"ratio chain-steps/s / all as one client: ten and one with {greedy}",
            "value": shared.rate / unshared.rate,
            "unit": "",
        }
        asked = len(unshared.seconds) + unshared.refused
        yield {"name": f"refused, all as one client: ten beside {greedy}", "value": unshared.refused, "unit": "requests", "n": asked}


async def beside(port: int, pause: float, greedy: str, shared: bool, seconds: float, seed: int, seen: Seen) -> None:
    """Add what polite clients see in ``seconds``, while a greedy one has all it may have."""
    clients = [f"127.0.0.{2 + i}" if shared else "127.0.0.1" for i in range(POLITE)]
    async with keeping(port, *GREEDY.get(greedy, (0, 0))):
        rates = asyncio.create_task(watch_rate(port, seconds))
        await asyncio.gather(*(polite(port, client, pause, seconds, 100 * seed + i, seen) for i, client in enumerate(clients)))
        seen.rates += await rates


async def polite(port: int, client: str, pause: float, seconds: float, seed: int, seen: Seen) -> None:
    """Draw again and again, and add what it took; after a refusal wait a second."""
    dice, end = random.Random(seed), time.monotonic() + seconds
    connection = Connection(port, client)
    await asyncio.sleep((0.1 + 2 * pause) * dice.random())
    while (began := time.monotonic()) < end:
        if await connection.ask(request(f"/generate?class={seed % 10}&steps={SHORT_STEPS}&seed={seed}")) == 200:
            seen.seconds.append(time.monotonic() - began)
            await asyncio.sleep(dice.expovariate(1 / pause) if pause else 0.0)
        else:
            seen.refused += 1
            await asyncio.sleep(1.0)
    await connection.close()


@contextlib.asynccontextmanager
async def keeping(port: int, requests: int, images: int) -> AsyncIterator[None]:
    """Keep so many drawings of one client under way during the block, asking again at once, or a second after a refusal."""
    connections = [Connection(port) for _ in range(requests)]

    async def keep(connection: Connection, seed: int) -> None:
        while True:
            status = await connection.ask(request(f"/generate?class={seed % 10}&n={images}&seed={seed}"))
            await asyncio.sleep(0.0 if status == 200 else 1.0)

    tasks = [asyncio.create_task(keep(connection, seed)) for seed, connection in enumerate(connections)]
    await asyncio.sleep(1.0 if tasks else 0.0)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in connections:
            await connection.close()
        while (await asyncio.to_thread(generate_load, port))["chains"]:
            await asyncio.sleep(0.1)


async def watch_rate(port: int, seconds: float) -> list[float]:
    """Return what the server says of its chain-steps/s, twice a second once the average has settled."""
    end, rates = time.monotonic() + seconds, list[float]()
    await asyncio.sleep(min(SETTLE, seconds / 2))
    while time.monotonic() < end:
        rates.append((await asyncio.to_thread(generate_load, port))["chain_steps_per_second"])
        await asyncio.sleep(0.5)
    return rates


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
