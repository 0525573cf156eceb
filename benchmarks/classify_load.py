#!/usr/bin/env python3
"""Images per second of the live server beside the bare ONNX Runtime session, in one run: `make bench`.

The server runs on core 0, this load generator on core 1 where there are two; `--json FILE` writes a flat list of rows.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import httpx2
import numpy as np

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Device, Engine, Precision, load_engine
from ebjdat_serve.pixels import encode_png
from ebjdat_serve.server.settings import SHIPPED

Row = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--device", default="auto", choices=get_args(Device))
    parser.add_argument("--precision", default="fp32", choices=get_args(Precision))
    options = parser.parse_args()
    engine = load_engine(Bundle.load(options.model), "auto", options.device, 1, options.precision)
    bare = bare_rate(engine, options.seconds)
    rows: list[Row] = [{"name": "bare session, batch 32, one thread", "value": bare, "unit": "images/s"}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", str(options.model), "--port", str(port), "--threads", "1"]
    command += ["--device", options.device, "--precision", options.precision]
    server = subprocess.Popen(command, preexec_fn=lambda: pin(0), stdout=subprocess.DEVNULL)
    pin(1)
    try:
        url = f"http://127.0.0.1:{port}"
        started = time.monotonic()
        wait(url)
        rows.append({"name": "ready after", "value": time.monotonic() - started, "unit": "s"})
        info = httpx2.get(f"{url}/info").json()
        about = {"provider": info["provider"], "precision": info["precision"]}
        assert about == {"provider": engine.provider, "precision": engine.precision}
        for connections in (1, 32):
            rate, p50, p99 = load(url, connections, options.seconds)
            rows += [
                {"name": f"server, {connections} connections, one image each", "value": rate, "unit": "images/s"},
                {"name": f"ratio server / bare session, {connections} connections", "value": rate / bare, "unit": ""},
                {"name": f"latency p50, {connections} connections", "value": p50, "unit": "ms"},
                {"name": f"latency p99, {connections} connections", "value": p99, "unit": "ms"},
            ]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    for row in rows:
        print(f"{row['name']:56}{row['value']:>10.2f} {row['unit']}")
    print(f"on {about['provider']}, {about['precision']}")
    if options.json:
        options.json.write_text(json.dumps([{**row, **about} for row in rows], indent=1) + "\n")


def pin(core: int) -> None:
    """Run this process on one core, where there are several."""
    if hasattr(os, "sched_setaffinity") and core in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {core})


def bare_rate(engine: Engine, seconds: float) -> float:
    """Return images per second of the session alone at batch 32, one thread, pictures of 32 x 32."""
    image = np.random.default_rng(0).random((32, 3, 32, 32), dtype=np.float32)
    engine.classify(image)
    done, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        engine.classify(image)
        done += 32
    return done / (time.monotonic() - started)


def wait(url: str) -> None:
    """Return when the server is ready; raise TimeoutError after a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if httpx2.get(f"{url}/health").status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise TimeoutError("the server was not ready within a minute")


def load(url: str, connections: int, seconds: float) -> tuple[float, float, float]:
    """Return images/s, and p50 and p99 latency in ms, of a closed loop with so many connections."""
    picture = encode_png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    end = time.monotonic() + seconds

    def one(_: int) -> list[float]:
        times = []
        with httpx2.Client(timeout=60) as client:
            while (begin := time.monotonic()) < end:
                client.post(f"{url}/classify", content=picture).raise_for_status()
                times.append(time.monotonic() - begin)
        return times

    started = time.monotonic()
    with ThreadPoolExecutor(connections) as pool:
        times = [value for part in pool.map(one, range(connections)) for value in part]
    elapsed = time.monotonic() - started
    return len(times) / elapsed, float(np.quantile(times, 0.5)) * 1e3, float(np.quantile(times, 0.99)) * 1e3


if __name__ == "__main__":
    main()
