#!/usr/bin/env python3
"""What each view of the OOD score sees, alone and in sums, and what it costs: `python benchmarks/views.py [BUNDLE] [--json FILE]`.

Views are fitted on the first 20,000 training images, their ranks are of the selection split, sums are calibrated on the calibration
split at alpha .05, and 2,000 test images are the clean ones. Candidates are chosen on the second half of the selection split, with
ranks of the first, against proxies made from it (turned, inverted, shuffled, mixed ...): never on the test images or the OOD sets.
Statistics are fitted on clean training images or on 10,000 lightly handled ones (training/evaluation/shifts.py), and ranks and the
calibration are of clean images or of a mixture in which half were handled: four ways. Seed 0. Needs CIFAR-10, the OOD atlases and
imagenet_500 in the data folder; what is missing is named and left out.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.view_candidates import CANDIDATES, CLOSELY, LARGEST, LOWER, SUMS
from benchmarks.view_figures import CHOSEN, HANDLED, MODES, Figures, Row
from benchmarks.view_images import image_sets
from benchmarks.view_tables import document
from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.engines import Floats, Precision, given, load_engine
from ebjdat_serve.engines.eager import load_model
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.handling import handled
from ebjdat_serve.pixels import Pixels, to_unit
from ebjdat_serve.views import DEFAULT_VIEWS, Seen, rank_term, score_of
from training.data.bundle_data import dataset_of

SHIPPED = Path(__file__).parents[1] / "ebjdat_serve" / "models" / "cifar10"
Forward = Callable[[Floats], tuple[Floats, Floats]]
"""Images -> pooled features and logits."""


def eager(bundle: Bundle) -> tuple[Forward, Floats, Floats]:
    """Return the fp32 network of the torch engine, and its head's weight and bias."""
    model = load_model(bundle)

    def forward(image: Floats) -> tuple[Floats, Floats]:
        with torch.inference_mode():
            features = model.features(torch.from_numpy(image))
            return features.numpy(), model.head(features).numpy()

    return forward, model.head.weight.numpy(), model.head.bias.numpy()


def by_engine(bundle: Bundle, precision: Precision) -> Forward:
    """Return the engine of ``precision``."""
    engine = load_engine(bundle, "auto", "cpu", 1, precision)

    def forward(image: Floats) -> tuple[Floats, Floats]:
        found = engine.classify(image)
        return given(found.features, "features"), found.logits

    return forward


def looked(image: Pixels, forward: Forward, cache: Path | None, key: str) -> Seen:
    """Return what views see of images, features and logits from the ``cache`` folder where they are there."""
    digest = hashlib.sha256(key.encode() + str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
    file = cache / f"{digest}.npz" if cache else None
    unit = to_unit(image)
    if file and file.is_file():
        with np.load(file) as kept:
            return Seen(unit, kept["features"], kept["logits"])
    parts = [forward(unit[i : i + 100]) for i in range(0, len(unit), 100)]
    features, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
    if file:
        np.savez(file, features=features, logits=logits)
    return Seen(unit, features, logits)


def cost_rows(bundle: Bundle, figures: Figures, seconds: float) -> Iterator[Row]:
    """Yield ms an image on one core and bytes stored of each view, and ms of the classify graph, in batches of 1 and 32."""
    engine = OnnxEngine(bundle, "cpu", 1)
    fitted, test = figures.fits["handled"], figures.seen["clean/test"]
    for name, stored in fitted.stored.items():
        kept = sum(array.nbytes for array in stored.values()) + fitted.clean[name].nbytes
        yield {"name": f"bytes stored, {name}", "value": kept, "unit": "bytes", "metric": "bytes", "score": name}
    for batch in (1, 32):
        seen = Seen(test.image[:batch], given(test.features, "features")[:batch], test.logits[:batch])
        works: dict[str, Callable[[], object]] = {"classify graph": lambda seen=seen: engine.classify(seen.image)}  # type: ignore[misc]
        for name, view in CANDIDATES.items():
            works[name] = lambda name=name, view=view, seen=seen: rank_term(  # type: ignore[misc]
                fitted.clean[name], score_of(view, fitted.ready[name], seen)
            )
        best = dict.fromkeys(works, float("inf"))
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:  # rounds alternate, and the best of each counts
            for name, work in works.items():
                began = time.perf_counter()
                work()
                best[name] = min(best[name], time.perf_counter() - began)
        for name, took in best.items():
            about = {"metric": "ms", "score": name, "batch": batch, "ratio_to_classify": took / best["classify graph"]}
            yield {"name": f"ms an image, {name}, batch {batch}", "value": 1e3 * took / batch, "unit": "ms", **about}


def measure(bundle: Bundle, precision: Precision, cache: Path | None, seconds: float, only: list[str]) -> list[Row]:
    """Return all rows."""
    data = dataset_of(bundle)
    forward, weight, bias = eager(bundle)
    forward = forward if precision == "fp32" else by_engine(bundle, precision)
    sets = image_sets(data, lambda line: print(line, file=sys.stderr))
    key = f"{bundle.manifest.files['weights.safetensors'].sha256} {precision}"
    lightly = to_unit(handled(data.train.image[:HANDLED], 0, untouched=0.0))
    figures = Figures({where: looked(image, forward, cache, key) for where, image in sets.items()}, lightly, weight, bias)
    rows = []
    for title in only or (*SUMS, LARGEST):
        for mode in MODES if title in CLOSELY else (CHOSEN,):
            rows += [*figures.rows(title, mode), *(figures.choice_rows(title, mode) if len(SUMS.get(title, DEFAULT_VIEWS)) > 1 else [])]
    rows += [*figures.paired_rows("sum", CHOSEN), *figures.spoke_rows("sum", CHOSEN)]
    of = {"precision": precision, "bundle": bundle.manifest.version}
    return [{**each, **of} for each in [*rows, *(cost_rows(bundle, figures, seconds) if seconds else [])]]


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--precision", nargs="*", default=[], help="also these, of which there are classify graphs, each with its own fits")
    parser.add_argument("--only", nargs="*", default=[], choices=[*SUMS, LARGEST], metavar="SCORE", help="measure these views and sums")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--document", type=Path, help="write the tables of --json's rows into this file, and measure nothing")
    parser.add_argument("--cache", type=Path, help="a folder that keeps features and logits")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, per batch size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.document:
        if not options.json:
            parser.error("--document needs --json, the rows that it shows")
        rows = json.loads(options.json.read_text(encoding="utf-8"))
        options.document.write_text(document(options.document.read_text(encoding="utf-8"), rows), encoding="utf-8")
        return
    if options.cache:
        options.cache.mkdir(parents=True, exist_ok=True)
    bundle = Bundle.load(options.bundle)
    rows = measure(bundle, "fp32", options.cache, options.seconds, options.only)
    for precision in options.precision:
        rows += measure(bundle, precision, options.cache, 0.0, options.only or list(LOWER))
    for each in rows:
        if each.get("score") in ("sum", "max_softmax") and each.get("mode", CHOSEN) == CHOSEN:
            print(f"{each['name']:90s} {each['value']:.4f}")
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
