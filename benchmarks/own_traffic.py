#!/usr/bin/env python3
"""What a calibration on recorded scores does for shifted traffic: `python benchmarks/own_traffic.py [--json FILE]`.

The bundle's test images, in random order, handled in one way, are sent to a server that writes an audit log: the first half is the period
that an operator vouches for, `ebjdat-serve calibrate --scores` takes it from the log by its times. Shares flagged are of the second half,
of such images inverted, and of noise handled alike, by the calibration on images and by the one on scores. Nothing is
fitted; noise was put into the last period after a tenth of inverted images had changed little (docs/drift.md).
"""

import argparse
import base64
import json
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ebjdat_serve
from benchmarks.load import serving
from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.cli import main as command
from ebjdat_serve.handling import brightened, encoded
from ebjdat_serve.measures import flag_rate_interval, wilson
from ebjdat_serve.pixels import Pixels
from ebjdat_serve.server.settings import SHIPPED

ALPHA, SEED, LIST = 0.05, 0, 50
POISONED = "untouched, a tenth of the period noise"
TRAFFIC: dict[str, Callable[[Image.Image], bytes]] = {
    "untouched": lambda p: encoded(p, "PNG"),
    "JPEG 50": lambda p: encoded(p, "JPEG", quality=50),
    "brightness x1.5": lambda p: encoded(brightened(p, 1.5), "PNG"),
    "brightness x0.5, JPEG 50": lambda p: encoded(brightened(p, 0.5), "JPEG", quality=50),
    POISONED: lambda p: encoded(p, "PNG"),
}
"""What becomes of each image before it is sent."""


def sent(images: Pixels, handled: Callable[[Image.Image], bytes]) -> list[bytes]:
    """Return uint8 images (N, H, W, 3) as their files."""
    return [handled(Image.fromarray(image)) for image in images]


def post(port: int, files: list[bytes]) -> None:
    """Have a server classify files, in lists."""
    for begin in range(0, len(files), LIST):
        body = json.dumps({"images": [base64.b64encode(one).decode() for one in files[begin : begin + LIST]]}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/classify", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).read()


def instant() -> str:
    """Return the time between two periods, none of whose rows has it."""
    time.sleep(0.01)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    time.sleep(0.01)
    return now


def periods(bundle: Path, log: Path, traffic: dict[str, list[bytes]]) -> dict[str, tuple[str, str]]:
    """Send each kind of traffic to a server that writes ``log``; return when each began and ended."""
    options = ["--threads", "1", "--device", "cpu", "--generate-workers", "0", "--audit-log", str(log), "--port"]
    found = {}
    with serving(lambda port: [sys.executable, "-m", "ebjdat_serve.cli", "serve", str(bundle), *options, str(port)]) as server:
        for name, files in traffic.items():
            begin = instant()
            post(server.port, files)
            found[name] = begin, instant()
    return found


def flagged(bundle: Path, calibration: str, files: list[bytes]) -> int:
    """Return how many of the files are flagged by a calibration."""
    model = ebjdat_serve.load(bundle, device="cpu", threads=1, calibration=calibration, alpha=ALPHA)
    return sum(bool(one.suspicious) for one in model.classify(files).results)


def rows(source: Path, half: int, work: Path) -> Iterator[dict[str, Any]]:
    """Yield the share flagged of each kind of traffic by both calibrations."""
    from training.data.bundle_data import check_data, dataset_of

    bundle, data = work / "bundle", dataset_of(Bundle.load(source))
    shutil.copytree(source, bundle, copy_function=shutil.copyfile)
    check_data(Bundle.load(bundle), data)
    order = np.random.default_rng(SEED).permutation(len(data.test.image))[: 2 * half]
    first, second = data.test.image[order[:half]], data.test.image[order[half:]]
    noise = np.random.default_rng(SEED).integers(0, 256, (half + half // 10, *first.shape[1:]), dtype=np.uint8)
    mixed = np.concatenate([noise[half:], first[half // 10 :]])
    recorded = {name: sent(mixed if name == POISONED else first, handled) for name, handled in TRAFFIC.items()}
    when = periods(bundle, work / "audit.jsonl", recorded)
    about = {"bundle": Bundle.load(source).manifest.version, "of": Bundle.load(source).measured("fp32"), "alpha": ALPHA}
    about |= {"dataset": data.name, "data_sha256": data.sha256, "split": "test", "seed": SEED}
    for number, (traffic, handled) in enumerate(TRAFFIC.items()):
        name, (since, until) = f"traffic-{number}", when[traffic]
        arguments = ["calibrate", str(bundle), "--scores", str(work / "audit.jsonl"), "--name", name, "--since", since, "--until", until]
        if command(arguments):
            sys.exit(f"{name}: not calibrated")
        sets = {"second half": sent(second, handled), "inverted": sent(255 - second, handled), "noise": sent(noise[:half], handled)}
        for images, files in sets.items():
            for by, calibration in (("images", "images"), ("recorded scores", name)):
                done = Bundle.load(bundle)
                n = len(done.calibration().scores if by == "images" else done.recorded()[name].scores)
                hits, expected = flagged(bundle, calibration, files), flag_rate_interval(n, len(files), ALPHA, 0.95)
                yield {
                    "name": f"{traffic}: {images}, by {by}",
                    "value": hits / len(files),
                    "unit": "share flagged",
                    "interval": wilson(hits, len(files)),
                    "interval_kind": "wilson",
                    "expected": expected if images == "second half" and traffic != POISONED else None,  # Beta-binomial
                    **{"n": len(files), "calibration_n": n, "traffic": traffic, "images": images, "by": by, **about},
                }


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, default=SHIPPED)
    parser.add_argument("--half", type=int, default=1000, help="images of the period, and as many to measure on (%(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = list(rows(options.bundle, options.half, Path(folder)))
    for row in found:
        print(f"{row['name']:72}{row['value']:>8.3f}  {row['interval']}  {row['expected']}")
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
