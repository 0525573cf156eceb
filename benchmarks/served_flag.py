#!/usr/bin/env python3
"""What a bundle's flag does in each served precision, by its own calibration: `python benchmarks/served_flag.py [BUNDLE] [--json FILE]`.

No fit and no choice: engine, views, ranks and calibration are those that a server opens. Per precision the share flagged at alpha .05 of
test images (untouched, and handled as the calibration's), OOD sets, odd images and benign shifts, and the AUROC of the OOD sets, with
max softmax of the same precision beside, thresholded on the selection split's images, handled alike.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.view_images import image_sets
from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.detection import Detector
from ebjdat_serve.engines import Precision, load_engine
from ebjdat_serve.pixels import Pixels, to_unit
from ebjdat_serve.scores import ood_score
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.views import Seen
from training.data.bundle_data import dataset_of
from training.evaluation.metrics import auroc, auroc_stderr, wilson

ALPHA = 0.05
ROLES = ("clean/test", "handled/test", "ood/", "odd/", "benign/")
CHUNK = 100


def scores(bundle: Bundle, precision: Precision, sets: dict[str, Pixels]) -> dict[str, dict[str, np.ndarray]]:
    """Return the served score and max softmax of each image, by score and set."""
    engine, combination = load_engine(bundle, "onnx", "cpu", 1, precision), bundle.combination(precision)
    found: dict[str, dict[str, np.ndarray]] = {"views": {}, "max_softmax": {}}
    for where, image in sets.items():
        own, plain = [], []
        for i in range(0, len(image), CHUNK):
            unit = to_unit(image[i : i + CHUNK])
            out = engine.classify(unit)
            own.append(combination.score(combination.terms(Seen(unit, out.features, out.logits))))
            plain.append(ood_score("max_softmax", 0.0, out.logits))
        found["views"][where], found["max_softmax"][where] = np.concatenate(own), np.concatenate(plain)
        print(f"{precision}: {where}, {len(image)} images", file=sys.stderr)
    return found


def rows(bundle: Bundle, precision: Precision, sets: dict[str, Pixels]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one precision."""
    about = {"precision": precision, "bundle": bundle.manifest.version, "of": bundle.measured(precision), "alpha": ALPHA, "seed": 0}
    for score, values in scores(bundle, precision, sets).items():
        calibrated = bundle.calibration(precision).scores if score == "views" else values["handled/selection"]
        detector = Detector(np.sort(np.asarray(calibrated)), ALPHA)
        clean = values["clean/test"]
        for where, value in values.items():
            if where == "handled/selection":
                continue
            flagged = detector.suspicious(detector.p_value(value))
            share = {"value": float(flagged.mean()), "unit": "share", "interval": wilson(int(flagged.sum()), len(flagged))}
            yield {"name": f"{precision}, {score}: flagged, {where}", **share, "n": len(value), "set": where, "score": score, **about}
            if where.startswith("ood/"):
                separated = {"value": auroc(clean, value), "unit": "AUROC", "stderr": auroc_stderr(clean, value)}
                counts = {"n": len(value), "against_n": len(clean)}
                yield {"name": f"{precision}, {score}: AUROC, {where}", **separated, **counts, "set": where, "score": score, **about}


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "int8"], help="precisions with an ONNX graph and a calibration (%(default)s)"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    every = image_sets(dataset_of(bundle), lambda line: print(line, file=sys.stderr))
    sets = {name: image for name, image in every.items() if name.startswith(ROLES) or name == "handled/selection"}
    found = [row for precision in options.precision for row in rows(bundle, precision, sets)]
    if options.json:
        write_json(options.json, found)
    else:
        json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
