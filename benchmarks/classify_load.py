#!/usr/bin/env python3
"""Load test of the server's /classify against the bare session, stock LitServe, and FastAPI with PyTorch: `make bench`.

Servers run on core 0, one at a time, this load generator on core 1. Every ratio to the bare session is to one measured on
core 0 just before and just after. `--json FILE` writes a flat list of rows.
"""

import argparse
import base64
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.load import Result, Served, closed_loop, open_loop, pin, request, serving
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Device, Precision, load_engine
from ebjdat_serve.pixels import encode_png
from ebjdat_serve.server.settings import SHIPPED

Row = dict[str, Any]
MANY = 32
STOCK = {"batch 32, wait 2 ms": (32, 0.002), "batch 32, wait 0": (32, 0.0), "batch 1": (1, 0.0)}
STOCK_SERVER = """
import sys
from pathlib import Path
from ebjdat_serve.server import stock
from ebjdat_serve.server.settings import Settings
if __name__ == "__main__":
    stock.BATCH_SECONDS = {wait}
    about = dict(device={device!r}, threads={threads}, max_batch={batch}, generate_workers=0)
    stock.run(Settings(model=Path({model!r}), port=int(sys.argv[1]), **about))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds, of which medians are taken")
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--device", default="auto", choices=get_args(Device))
    parser.add_argument("--precision", default="fp32", choices=get_args(Precision))
    parser.add_argument("--alone", action="store_true", help="measure only our server, not the ones it is compared with")
    parser.add_argument("--bare", type=float, help=argparse.SUPPRESS)  # this script runs itself on core 0 for the bare session
    options = parser.parse_args()
    if options.bare:
        print(bare_rate(options.model, options.device, options.precision, options.bare))
        return
    pin(1)
    rows, about = measure(options)
    for row in rows:
        print(f"{row['name']:72}{row['value']:>10.2f} {row['unit']}")
    print(f"on {about['provider']}, {about['precision']}")
    if options.json:
        options.json.write_text(json.dumps([{**row, **about} for row in rows], indent=1) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Return the rows, and the provider and precision of our server."""
    pictures = [encode_png(image) for image in np.random.default_rng(0).integers(0, 256, (MANY, 32, 32, 3), dtype=np.uint8)]
    single = request("/classify", pictures[0])
    encoded = [base64.b64encode(picture).decode() for picture in pictures]
    many = request("/classify", json.dumps({"images": encoded}).encode(), "application/json")
    stock_single = request("/classify", json.dumps({"image": encoded[0]}).encode(), "application/json")
    ours = [sys.executable, "-m", "ebjdat_serve.cli", "serve", str(options.model), "--threads", "1"]
    ours += ["--device", options.device, "--precision", options.precision, "--generate-workers", "0", "--port"]

    def closed(data: bytes, connections: int, images: int) -> Callable[[Served], Result]:
        return lambda server: closed_loop(server.port, data, connections, options.seconds * (1 if images == 1 else 2))

    rows: list[Row] = []
    with serving(lambda port: [*ours, str(port)]) as server:
        rows += at_rest(server)
        about = what_runs(server.port)
        for name, connections, data, images in (
            ("server", 1, single, 1),
            ("server", MANY, single, 1),
            ("server, base64 in JSON", MANY, stock_single, 1),
            ("server", 4, many, MANY),
        ):
            rows += compared(name, server, closed(data, connections, images), connections, images, options)
        top = next(row["value"] for row in rows if row["name"] == f"server, {MANY} connections, 1 image each")
        for share in (0.5, 0.8):
            came = open_loop(server.port, single, share * top, options.seconds * 2)
            name = f"server, open loop at {share:.0%} of its closed-loop rate"
            rows += [{"name": f"{name}, p{q}", "value": came.quantile(q / 100), "unit": "ms", "refused": came.refused} for q in (50, 99)]
        rows.append({"name": "memory after load, PSS of the whole tree", "value": server.pss(), "unit": "MB"})
    if not options.alone and options.precision == "fp32":  # the other servers support only fp32
        for kind in ("torch", "onnx"):
            plain = [sys.executable, str(Path(__file__).parent / "plain.py")]
            with serving(lambda port, plain=plain, kind=kind: [*plain, str(port), str(options.model), kind]) as server:  # type: ignore[misc]
                for connections, data, images in ((MANY, single, 1), (4, many, MANY)):
                    rows += compared(f"FastAPI + {kind}", server, closed(data, connections, images), connections, images, options)
        with tempfile.TemporaryDirectory() as folder:
            for name, (batch, wait) in STOCK.items():
                script = Path(folder) / f"stock_{batch}_{wait}.py"  # LitServe spawns its workers from a file
                stock = STOCK_SERVER.format(model=str(options.model), device=options.device, batch=batch, wait=wait, threads=1)
                script.write_text(stock, encoding="utf-8")
                with serving(lambda port, script=script: [sys.executable, str(script), str(port)]) as server:  # type: ignore[misc]
                    rows += compared(f"stock LitServe, {name}", server, closed(stock_single, MANY, 1), MANY, 1, options)
        rows += ratios(rows)
    return rows, about


def at_rest(server: Served) -> list[Row]:
    """Return the cost of an idle server: seconds until ready, share of a core, memory."""
    before = server.cpu()
    time.sleep(10)
    idle = (server.cpu() - before) / 10
    return [
        {"name": "ready after", "value": server.ready, "unit": "s"},
        {"name": "idle, share of a core", "value": idle, "unit": ""},
        {"name": "memory at rest, PSS of the whole tree, classify only", "value": server.pss(), "unit": "MB"},
    ]


def compared(
    name: str, server: Served, drive: Callable[[Served], Result], connections: int, images: int, options: argparse.Namespace
) -> list[Row]:
    """Return images/s and latency of a closed loop, and their ratio to the bare session measured around it."""
    seen, shares, rates = [], [], []
    for _ in range(options.rounds):
        before = bare(options, server)
        result = drive(server)
        around = (before + bare(options, server)) / 2
        seen.append(result)
        rates.append(result.rate * images)
        shares.append(result.rate * images / around)
    what = f"{name}, {connections} connections, {images} image{'s' if images > 1 else ''} each"
    refused = sum(result.refused for result in seen)
    return [
        {"name": what, "value": float(np.median(rates)), "unit": "images/s", "refused": refused},
        {"name": f"ratio to bare session: {what}", "value": float(np.median(shares)), "unit": ""},
        *({"name": f"{what}, p{q}", "value": float(np.median([r.quantile(q / 100) for r in seen])), "unit": "ms"} for q in (50, 99)),
    ]


def ratios(rows: list[Row]) -> list[Row]:
    """Return the ratio of our server's share of the bare session to each other server's."""
    shares = {row["name"].removeprefix("ratio to bare session: "): row["value"] for row in rows if row["name"].startswith("ratio to bare")}
    found = []
    for name, share in shares.items():
        who, what = name.split(", ")[0], ", ".join(name.split(", ")[-2:])
        ours = "server, base64 in JSON" if who.startswith("stock") else "server"
        if who != "server":
            found.append({"name": f"ratio {ours} / {name}", "value": shares[f"{ours}, {what}"] / share, "unit": ""})
    return found


def bare(options: argparse.Namespace, server: Served) -> float:
    """Return images/s of the bare session on core 0, in its own process, with the server stopped, since some servers are never idle."""
    command = [sys.executable, __file__, "--bare", "2", "--model", str(options.model), "--device", options.device]
    command += ["--precision", options.precision]
    with server.asleep():
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, preexec_fn=lambda: pin(0))
    return float(done.stdout)


def bare_rate(model: Path, device: Device, precision: Precision, seconds: float) -> float:
    """Return images per second of the bare session at batch 32, one thread."""
    bundle = Bundle.load(model)
    engine, size = load_engine(bundle, "auto", device, 1, precision), bundle.manifest.input
    image = np.random.default_rng(0).random((MANY, 3, size.height, size.width), dtype=np.float32)
    engine.classify(image)
    done, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        engine.classify(image)
        done += MANY
    return done / (time.monotonic() - started)


def what_runs(port: int) -> dict[str, str]:
    """Return the provider and precision that the server reports."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/info") as answer:
        info = json.loads(answer.read())
    return {"provider": info["provider"], "precision": info["precision"]}


if __name__ == "__main__":
    main()
