#!/usr/bin/env python3
"""False alarms and delays of the drift test, the simple jumper martingale beside: `python benchmarks/drift.py [--json FILE] [--plot FILE]`.

Simulated: each draw is a calibration set of n normal scores and a stream of such scores, which move by some sd at the change. Real: the
p-values of a bundle's own test images by its own calibration, handled alike, or shifted, in random orders; nothing is fitted or chosen.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.drift import LEVEL, DriftTest, Jumper
from ebjdat_serve.engines import load_engine
from ebjdat_serve.pixels import Pixels, to_unit
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.views import Seen

Ints: TypeAlias = NDArray[np.int64]
Doubles: TypeAlias = NDArray[np.float64]
SEED, BLOCK, CHUNK = 0, 1000, 100
JUMPER = "simple jumper"
TEST = "drift test"
ORDERS = 100


@dataclass
class Alarms:
    """When each stream's e-values were first at least 1/level, by test and level; 0: never."""

    first: dict[tuple[str, float], Ints]
    lowest: float = 0.0  # log e-value of the drift test, of all streams and times

    @classmethod
    def of(cls, streams: int) -> "Alarms":
        """Return those of streams that have not begun."""
        kinds = [(TEST, LEVEL), (TEST, 0.01), (JUMPER, LEVEL), (JUMPER, 0.01)]
        return cls({kind: np.zeros(streams, np.int64) for kind in kinds})

    def look(self, t: int, log_e: dict[str, Doubles]) -> None:
        """Note the alarms at time ``t``."""
        for (test, level), first in self.first.items():
            first[(first == 0) & (log_e[test] >= -math.log(level))] = t
        self.lowest = min(self.lowest, float(log_e[TEST].min()))


def watch(n: int, blocks: Iterator[Ints], streams: int, paths: list[dict[str, Doubles]] | None = None, until_all: bool = False) -> Alarms:
    """Return the alarms of streams of ranks, in blocks (streams, time) of values 1 to n + 1; ``paths`` takes log e-values of each block."""
    test, jumper, found, t = DriftTest(n, streams), Jumper(streams), Alarms.of(streams), 0
    for block in blocks:
        bins, p = test.bin_of_rank[block].T.copy(), (block / (n + 1)).T.copy()
        for now_bins, now_p in zip(bins, p, strict=True):
            test.add(now_bins)
            jumper.add(now_p)
            t += 1
            found.look(t, {TEST: test.log_e, JUMPER: jumper.log_e})
        if paths is not None:
            paths.append({TEST: test.log_e, JUMPER: jumper.log_e})
        if until_all and all((first > 0).all() for first in found.first.values()):
            break
    return found


def simulated(n: int, streams: int, requests: int, shift: float = 0.0, change: int = 0, block: int = BLOCK) -> Iterator[Ints]:
    """Yield blocks of ranks of normal scores, ``shift`` higher after ``change``, each stream with a calibration set of its own."""
    noise = np.random.default_rng([SEED, n, streams, requests, change, round(1000 * shift)])
    clean = np.sort(noise.standard_normal((streams, n)), axis=1)
    for begin in range(0, requests, block):
        live = noise.standard_normal((streams, min(block, requests - begin)))
        live[:, max(0, change - begin) :] += shift
        yield np.stack([1 + n - np.searchsorted(own, scores) for own, scores in zip(clean, live, strict=True)])


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def false_alarms(n: int, streams: int, requests: int) -> Iterator[dict[str, Any]]:
    """Yield how many streams of clean requests raised an alarm."""
    say(f"clean: n = {n}, {streams} draws of {requests} requests")
    found = watch(n, simulated(n, streams, requests), streams)
    for (test, level), first in found.first.items():
        about = {"test": test, "level": level, "calibration_n": n, "requests": requests, "n": streams, "seed": SEED}
        yield {
            "name": f"false alarms, {test}, level {level:g}, n {n}, {requests} requests",
            "value": int((first > 0).sum()),
            "unit": "draws",
        } | about
    name = f"lowest log e, {TEST}, n {n}, {requests} requests"
    yield {"name": name, "value": found.lowest, "unit": "nats", "calibration_n": n, "requests": requests, "n": streams, "seed": SEED}


def delays(first: Ints, change: int, about: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the row of delays after ``change``: the median, infinite delays included, None where most were not found."""
    late = np.where(first > change, (first - change).astype(float), np.inf)
    early = (first > 0) & (first <= change)
    late = late[~early]
    median, high = np.quantile(late, [0.5, 0.9], method="higher") if len(late) else (math.inf, math.inf)
    shown = {"value": float(median) if np.isfinite(median) else None, "q90": float(high) if np.isfinite(high) else None}
    return {"name": name, **shown, "unit": "requests", "found": float(np.isfinite(late).mean()), "early": int(early.sum()), **about}


def simulated_delays(n: int, shift: float, change: int, streams: int, most: int) -> Iterator[dict[str, Any]]:
    """Yield delays after scores move by ``shift`` sd at ``change``."""
    say(f"shift {shift:g} sd: n = {n}, change after {change}")
    found = watch(n, simulated(n, streams, change + most, shift, change), streams, until_all=True)
    for (test, level), first in found.first.items():
        if test == TEST or level != LEVEL:
            about = {"test": test, "level": level, "calibration_n": n, "shift_sd": shift, "change": change, "within": most, "n": streams}
            yield delays(first, change, about | {"seed": SEED}, f"delay, {test}, level {level:g}, n {n}, {shift:g} sd after {change}")


def scores_of(bundle: Bundle, images: Pixels) -> Doubles:
    """Return the served score of images (N, H, W, 3)."""
    engine, combination = load_engine(bundle, "onnx", "cpu", 1, "fp32"), bundle.combination("fp32")
    found = []
    for begin in range(0, len(images), CHUNK):
        unit = to_unit(images[begin : begin + CHUNK])
        out = engine.classify(unit)
        found.append(combination.score(combination.terms(Seen(unit, out.features, out.logits))))
    return np.concatenate(found).astype(np.float64)


def traffic(bundle: Bundle, images: int) -> dict[str, Doubles]:
    """Return scores of test images by what has become of the traffic."""
    from ebjdat_serve.handling import CALIBRATION, handled
    from training.data.bundle_data import check_data, dataset_of
    from training.evaluation.shifts import SHIFTS, shifted

    data = dataset_of(bundle)
    check_data(bundle, data)
    image, label = data.test.image[:images], data.test.label[:images]
    say(f"{len(image)} test images, handled, untouched and as JPEG 50")
    usual = scores_of(bundle, handled(image, CALIBRATION))
    plain = scores_of(bundle, image)
    squeezed = scores_of(bundle, shifted(image, SHIFTS["JPEG q50"]))
    names = np.asarray(data.names)[label]
    vehicles = np.isin(names, ["airplane", "automobile", "ship", "truck"])
    half = np.random.default_rng(SEED).random(len(image)) < 0.5
    return {
        "handled as the calibration images": usual,
        "untouched": plain,
        "JPEG 50": squeezed,
        "half of it JPEG 50": np.where(half, squeezed, usual),
        "vehicles alone": usual[vehicles],
        "cats alone": usual[names == "cat"],
        "ships alone": usual[names == "ship"],
    }


def real(bundle: Bundle, images: int) -> Iterator[dict[str, Any]]:
    """Yield after how many images of a bundle's own test set the tests raise an alarm, by what has become of the traffic."""
    clean = np.asarray(bundle.calibration("fp32").scores)
    n = len(clean)
    about = {"bundle": bundle.manifest.version, "of": bundle.measured("fp32"), "calibration_n": n, "orders": ORDERS, "seed": SEED}
    for name, score in traffic(bundle, images).items():
        noise = np.random.default_rng(SEED)
        order = np.stack([noise.permutation(len(score)) for _ in range(ORDERS)])
        rank = 1 + n - np.searchsorted(clean, score)
        blocks = (rank[order[:, begin : begin + BLOCK]] for begin in range(0, len(score), BLOCK))
        found = watch(n, blocks, ORDERS)
        p = rank / (n + 1)
        own = about | {"n": len(score), "set": name, "flagged": float((p < 0.05).mean()), "mean_p": float(p.mean())}
        for (test, level), first in found.first.items():
            if test == TEST or level != LEVEL:
                yield delays(first, 0, {"test": test, "level": level, **own}, f"delay, {test}, level {level:g}, {name}")


def plot(file: Path) -> None:
    """Draw log e-values of both tests: of clean requests, and with scores higher by .3 sd after 10,000."""
    import matplotlib as mpl

    mpl.use("svg" if file.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, shift, title in zip(axes, (0.0, 0.3), ("clean", "scores higher by .3 sd from 10,000 on"), strict=True):
        paths: list[dict[str, Doubles]] = []
        requests = 12_000 if shift else 100_000
        watch(2500, simulated(2500, 20, requests, shift, 10_000, block=requests // 200), 20, paths)
        at = np.linspace(0, requests, len(paths) + 1)[1:]
        for name, colour in ((TEST, "#0072B2"), (JUMPER, "#D55E00")):
            lines = np.stack([path[name] for path in paths])
            axis.plot(at, np.clip(lines, -30, 60), color=colour, alpha=0.5, linewidth=0.8)
            axis.plot([], [], color=colour, label=name)
        axis.axhline(-math.log(LEVEL), color="black", linestyle=":", linewidth=1, label=f"alarm, level {LEVEL:g}")
        axis.set(title=title, xlabel="requests", ylabel="log e-value, nats (cut at -30 and 60)")
    axes[1].set_xlim(8000, 12_000)
    axes[0].legend(loc="upper right", fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=1000, help="of 100,000 clean requests (%(default)s)")
    parser.add_argument("--long-draws", type=int, default=20, help="of 1,000,000 clean requests (%(default)s)")
    parser.add_argument("--bundle", type=Path, default=SHIPPED)
    parser.add_argument("--images", type=int, default=10_000, help="test images of its data set; 0: simulations alone (%(default)s)")
    parser.add_argument("--only", choices=("clean", "delays", "real"), help="one part; the rows of others are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="file for a plot, by matplotlib")
    options = parser.parse_args()
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "clean": lambda: clean_parts(options.draws, options.long_draws),
        "delays": delay_parts,
        "real": lambda: real(Bundle.load(options.bundle), options.images),
    }
    if not options.images:
        del parts["real"]
    kept: dict[str, list[dict[str, Any]]] = {}
    if options.json and options.json.exists():
        for row in json.loads(options.json.read_text(encoding="utf-8")):
            kept.setdefault(row["part"], []).append(row)
    for name, part in parts.items():
        if options.only in (None, name):
            kept[name] = [{**row, "part": name} for row in part()]
    found = [row for name in ("clean", "delays", "real") for row in kept.get(name, [])]
    if options.plot:
        plot(options.plot)
    if options.json:
        write_json(options.json, found)
    else:
        json.dump(found, sys.stdout, indent=1)


def clean_parts(draws: int, long_draws: int) -> Iterator[dict[str, Any]]:
    """Yield false alarms of calibration sets of several sizes."""
    yield from false_alarms(2500, draws, 100_000)
    yield from false_alarms(200, draws, 100_000)
    yield from false_alarms(2500, long_draws, 1_000_000)


def delay_parts() -> Iterator[dict[str, Any]]:
    """Yield delays by n, shift and time of the change."""
    for n, shift, change in ((2500, 0.3, 0), (2500, 0.3, 10_000), (2500, 1.0, 0), (2500, 1.0, 10_000), (200, 1.0, 0), (200, 0.3, 0)):
        yield from simulated_delays(n, shift, change, streams=200, most=11_000)
    yield from simulated_delays(2500, 0.07, 100_000, streams=50, most=20_000)  # what is too little for 2,500 images alone


if __name__ == "__main__":
    main()
