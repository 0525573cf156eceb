#!/usr/bin/env python3
"""What int8 costs by how it is quantised: `python benchmarks/int8_ranges.py BUNDLE --images DIR [--json FILE]`.

Weights of 8 bits or 7, batch norms folded into convolutions or separate. Where a CPU has no VNNI, which the rows say, sums of two products
with weights of 8 bits saturate. The bundle is not changed.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.cpus import threads
from ebjdat_serve.engines import Engine, Floats, Outputs, load_engine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.exporting.int8 import RECTIFIERS, fold_norms, quantised
from ebjdat_serve.listing import list_images
from ebjdat_serve.pixels import decode, to_unit
from ebjdat_serve.precision_figures import speed_ratio

CPUINFO = Path("/proc/cpuinfo")


def vnni() -> str:
    """Return whether this CPU has VNNI: "yes", "no" or "unknown"."""
    if not CPUINFO.is_file():
        return "unknown"
    return "yes" if "vnni" in CPUINFO.read_text(encoding="utf-8") else "no"


def chunks(image: Floats, size: int = 10) -> Iterator[Floats]:
    """Yield images in chunks."""
    return (image[i : i + size] for i in range(0, len(image), size))


def said(engine: Engine, image: Floats) -> Outputs:
    """Return what an engine says of images."""
    return Outputs.join([engine.classify(part) for part in chunks(image)])


def measure(bundle: Bundle, ranges: Floats, image: Floats, *, folded: bool, reduce_range: bool) -> dict[str, Any]:
    """Return the row of one way to quantise ``bundle``, which is a copy, by ``image``, none of which ranges are of."""
    model = onnx.load(bundle.path / "classify.onnx")
    products = fold_norms(model.graph) if folded else {}
    operators = ["Conv", *RECTIFIERS] if folded else ["Conv"]
    low_bundle = bundle.update(quantised(bundle, chunks(ranges), model, operators, products, reduce_range=reduce_range))
    full, low = (
        said(load_engine(bundle, "onnx", "cpu", threads()), image),
        said(load_engine(low_bundle, "onnx", "cpu", threads(), "int8"), image),
    )
    ratio, times = speed_ratio(load_engine(bundle, "onnx", "cpu", 1), load_engine(low_bundle, "onnx", "cpu", 1, "int8"), image[:8])
    row: dict[str, Any] = {
        "name": f"{bundle.manifest.name}, norms {'folded' if folded else 'separate'}, weights of {7 if reduce_range else 8} bits",
        "value": float((full.logits.argmax(1) != low.logits.argmax(1)).mean()),
        "unit": "label disagreement",
        "n": len(image),
        "ranges": len(ranges),
        "seed": 0,
        "of": low_bundle.measured("int8"),
        "vnni": vnni(),
        "logit_error_over_spread": float(np.abs(full.logits - low.logits).max() / np.ptp(full.logits)),
        "ratio_classify_batch8": ratio,
        "times": times,
    }
    if full.energy is not None and low.energy is not None:
        row["energy_error_mean_over_sd"] = float(np.abs(full.energy - low.energy).mean() / full.energy.std())
    return row


def main() -> None:
    """Measure the bundle named on the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="a folder of images like those to come")
    parser.add_argument("--ranges", type=int, default=150, help="images that ranges are of (%(default)s)")
    parser.add_argument("--n", type=int, default=200, help="other images, to measure on (%(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with command(parser), tempfile.TemporaryDirectory() as folder:
        files = list_images(options.images).images
        if len(files) < options.ranges + options.n:
            raise EbjdatError(f"{options.images} holds {len(files)} images, fewer than {options.ranges + options.n}")
        home = Path(folder) / "bundle"
        shutil.copytree(Bundle.load(options.bundle).path, home)
        bundle, rows = Bundle.draft(home), []
        chosen = np.random.default_rng(0).permutation(len(files))[: options.ranges + options.n]
        image = to_unit(np.stack([decode(files[i].read_bytes(), bundle.manifest.input) for i in chosen]))
        for folded in (False, True):
            for reduce_range in (False, True):
                row = measure(bundle, image[: options.ranges], image[options.ranges :], folded=folded, reduce_range=reduce_range)
                print(
                    ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()),
                    flush=True,
                )
                rows.append(row)
        if options.json:
            write_json(options.json, rows)


if __name__ == "__main__":
    main()
