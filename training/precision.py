#!/usr/bin/env python3
"""Add a precision to a bundle, with its evidence: `python training/precision.py BUNDLE --precision int8`.

Writes the precision's graphs (fp16: classify and step; int8: classify, ranges from training images; bf16 is the torch engine's and
needs none), calibrates it on its own energies, and measures what it costs against fp32 on the same images. A precision outside the
limits of ebjdat_serve/precision.py is refused and the bundle stays as it was.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebjdat_serve.bundle import MANIFEST, Bundle, write_json
from ebjdat_serve.detection import Detector
from ebjdat_serve.engines import Engine, Floats, Labels, Precision, load_engine
from ebjdat_serve.engines.eager import load_model
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.precision import LOWER, check, rows_of
from export.to_int8 import write_int8
from export.to_onnx import write
from training.adversary import Attack, Threat, cross_entropy, pgd
from training.calibrate import calibrate, check_data, dataset_of
from training.errors import DataError
from training.evaluate import ALPHA, EPS, EPS_DIGITS, SEED, eps_name, number, through
from training.images import Dataset
from training.measures import flag_rate_interval
from training.ranks import Noise

RANGE_IMAGES = 512
Row = dict[str, Any]


@dataclass(frozen=True)
class Amounts:
    """How many test images are measured, attacked by PGD on the fp32 net, and attacked by Square with so many queries each."""

    n: int = 2000
    attacked: int = 1000
    square: int = 200
    queries: int = 1000


def admit(bundle: Bundle, data: Dataset, precision: Precision, amounts: Amounts) -> Bundle:
    """Return ``bundle`` with ``precision`` added, calibrated and measured; raise BundleError, the bundle untouched, beyond a limit."""
    check_data(bundle, data)
    with tempfile.TemporaryDirectory(prefix=f"{precision}-") as folder:
        trial = Path(folder) / "bundle"
        shutil.copytree(bundle.path, trial)
        draft = Bundle.draft(trial)
        names = write_graphs(draft, data, precision)
        draft = calibrate(draft.update(*names), data, precision)
        rows = list(measure(draft, data, precision, amounts))
        for row in rows:
            print(f"{row['metric']:36}{row['value']:>12.5g}  n = {row['n']:<6} {row['protocol']}", flush=True)
        check(rows, precision, draft.measured(precision))
        others = [row for row in bundle.metrics() if row not in rows_of(bundle.metrics(), precision)]
        write_json(trial / "metrics.json", [*others, *rows])
        draft.update("metrics.json")
        for name in (*names, "calibration.json", "metrics.json", MANIFEST):  # the manifest last: until then the old one is true
            shutil.copyfile(trial / name, bundle.path / f".{name}.part")
            (bundle.path / f".{name}.part").replace(bundle.path / name)
    return Bundle.draft(bundle.path)


def write_graphs(bundle: Bundle, data: Dataset, precision: Precision) -> list[str]:
    """Write the graphs that ``precision`` has of its own and return their names."""
    if precision == "int8":
        chosen = np.random.default_rng(SEED).permutation(len(data.train))[:RANGE_IMAGES]
        return [write_int8(bundle, to_unit(data.train.image[np.sort(chosen)]))]
    return [write(bundle, function, precision) for function in ("classify", "step")] if precision == "fp16" else []


def measure(bundle: Bundle, data: Dataset, precision: Precision, amounts: Amounts) -> Iterator[Row]:
    """Yield what ``precision`` costs against fp32 on the same test images, each engine on one thread of the CPU."""
    full, low = (load_engine(bundle, "auto", "cpu", 1, p) for p in ("fp32", precision))
    test, where, of = data.test.first(amounts.n), f"{data.name} test", bundle.measured(precision)
    attacked, square = amounts.attacked, amounts.square
    eps = EPS_DIGITS if data.name == "digits" else EPS

    def row(metric: str, value: float, n: int, protocol: str, **more: Any) -> Row:
        return {**number(f"{metric}_{precision}", float(value), n, where, protocol, of), **more}

    image, label = to_unit(test.image), test.label
    (f, e), (f_low, e_low) = through(full, image), through(low, image)
    yield row(
        "logit_error_max", np.abs(f_low - f).max() / np.abs(f).max(), len(f), "largest difference from fp32's logits over the largest logit"
    )
    yield row("energy_error_max", np.abs(e_low - e).max(), len(e), "largest difference from fp32's energy, nats")
    yield row(
        "energy_error_mean_over_sd",
        np.abs(e_low - e).mean() / e.std(),
        len(e),
        "mean distance from fp32's energy over the deviation of fp32's energies",
    )
    yield row("label_disagreement", (f_low.argmax(1) != f.argmax(1)).mean(), len(f), "share of images whose class differs from fp32's")
    yield from costs(row, "accuracy_clean", right(f, label), right(f_low, label), "served graph")

    adversarial = transferred(bundle, image[:attacked], label[:attacked], eps)
    before, after = (right(through(engine, adversarial)[0], label[:attacked]) for engine in (full, low))
    yield from costs(row, "accuracy_pgd20_transfer", before, after, f"PGD-20 made on the fp32 net, l-inf {eps_name(eps)}, last iterate")
    before, after = (square_survivors(engine, image[:square], label[:square], eps, amounts.queries) for engine in (full, low))
    yield from costs(row, "accuracy_square", before, after, f"Square on the graph itself, {amounts.queries} queries, l-inf {eps_name(eps)}")

    calibration = bundle.calibration(precision)
    flagged = Detector(np.asarray(calibration.energies), ALPHA)
    rate = flagged.suspicious(flagged.p_value(e_low)).mean()
    stale = Detector(np.asarray(bundle.calibration().energies), ALPHA)
    bounds = flag_rate_interval(len(calibration.energies), len(e), ALPHA)
    yield row("flag_rate_clean", rate, len(e), f"alpha {ALPHA}, its own calibration", interval=list(bounds))
    yield row("flag_rate_excess", max(bounds[0] - rate, rate - bounds[1], 0.0), len(e), "distance from the Beta-binomial 99 % interval")
    yield row("flag_rate_clean_fp32_threshold", stale.suspicious(stale.p_value(e_low)).mean(), len(e), f"alpha {ALPHA}, fp32's calibration")
    if precision != "bf16":
        yield row("graph_bytes", bundle.graph("classify", precision).stat().st_size, 1, "classify graph; weights.safetensors is shared")
    for batch in (1, 32):
        protocol = f"images/s over fp32's, batch {batch}, one CPU thread, calls interleaved, 20th percentile of 40"
        yield row(f"ratio_classify_batch{batch}", speed_ratio(full, low, image[:batch]), 40, protocol)


def costs(row: Any, metric: str, before: np.ndarray, after: np.ndarray, protocol: str) -> Iterator[Row]:
    """Yield the accuracy of a precision and what it lost against fp32 on the same images, (n,) bool each."""
    yield row(metric, after.mean(), len(after), protocol, fp32=float(before.mean()))
    yield row(f"{metric}_drop", before.mean() - after.mean(), len(after), f"{protocol}: fp32's accuracy minus this one's")


def right(logits: Floats, label: Labels) -> np.ndarray:
    """Return which rows are classified as ``label``, (N,) bool."""
    result: np.ndarray = logits.argmax(axis=1) == label
    return result


def transferred(bundle: Bundle, image: Floats, label: Labels, eps: float) -> Floats:
    """Return PGD-20 images made on the fp32 network with torch."""
    model, noise = load_model(bundle), Noise.seeded(SEED)
    parts = [
        pgd(model, x, y, objective=cross_entropy, threat=Threat("linf", eps), attack=Attack(steps=20), noise=noise).numpy()
        for x, y in zip(torch.split(torch.from_numpy(image), 100), torch.split(torch.from_numpy(label), 100), strict=True)
    ]
    return np.concatenate(parts)


def square_survivors(engine: Engine, image: Floats, label: Labels, eps: float, queries: int) -> np.ndarray:
    """Return which images Square (arXiv 1912.00049, package pyautoattack) leaves standing, (N,) bool, asking the engine alone."""
    from pyautoattack.square import SquareAttack

    def ask(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(through(engine, x.contiguous().numpy())[0])

    attack = SquareAttack(ask, "Linf", queries, eps, seed=SEED, device="cpu")
    x, y = torch.from_numpy(image), torch.from_numpy(label)
    return right(ask(attack.perturb(x, y)).numpy(), label)


def speed_ratio(full: Engine, low: Engine, image: Floats) -> float:
    """Return how many times as many images a second ``low`` classifies as ``full``."""
    times: list[list[float]] = [[], []]
    for _ in range(40):
        for engine, taken in zip((full, low), times, strict=True):
            started = time.perf_counter()
            engine.classify(image)
            taken.append(time.perf_counter() - started)
    return float(np.percentile(times[0], 20) / np.percentile(times[1], 20))


def table(rows: list[Row]) -> str:
    """Return what each precision costs as Markdown: a line a figure, a column a precision."""
    found = [precision for precision in LOWER if rows_of(rows, precision)]
    lines = [f"| figure | {' | '.join(found)} | n | protocol |", "|---" * (len(found) + 3) + "|"]
    values = {row["metric"]: row["value"] for row in rows}
    names: dict[str, Row] = {}
    for precision in found:
        for row in rows_of(rows, precision):
            names.setdefault(row["metric"].removesuffix(f"_{precision}"), row)
    for name, row in names.items():
        cells = [f"{values[f'{name}_{p}']:.4g}" if f"{name}_{p}" in values else "" for p in found]
        beside = f"; fp32 {row['fp32']:.4g}" if "fp32" in row else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {row['n']} | {row['protocol']}{beside} |")
    return "\n".join(lines)


def main() -> None:
    """Add the precisions named on the command line, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", nargs="+", required=True, choices=LOWER)
    default = Amounts()
    parser.add_argument("--n", type=int, default=default.n, help="test images for parity, accuracy and flags (%(default)s)")
    parser.add_argument("--attacked", type=int, default=default.attacked, help="test images attacked by PGD on the fp32 net (%(default)s)")
    parser.add_argument("--square", type=int, default=default.square, help="test images attacked by Square (%(default)s)")
    parser.add_argument("--queries", type=int, default=default.queries, help="questions that Square may ask of each (%(default)s)")
    parser.add_argument("--data", help="the folder that a bundle of a user's own data was trained on, when it has moved")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        bundle = Bundle.draft(options.bundle)
        data = dataset_of(bundle, options.data)
        for precision in options.precision:
            bundle = admit(bundle, data, precision, Amounts(options.n, options.attacked, options.square, options.queries))
            print(f"{precision} admitted to {bundle.path}", flush=True)
    except (EbjdatError, DataError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
