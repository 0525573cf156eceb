#!/usr/bin/env python3
"""Measure a bundle and write its metrics.json, report.html and model card: `python training/evaluate.py BUNDLE [--suite full]`.

Any torch module is measured in three lines:

    from training.evaluate import evaluate_module
    rows = evaluate_module(my_net, "cifar10", suite="quick", n=500)   # images (N, 3, H, W) in [0,1] -> logits
    print(rows[0]["metric"], rows[0]["value"], rows[0]["interval"])

Work is done in chunks of 100 images, one process a core, each kept on disk: a run that was killed goes on where it stopped. ``--part``
runs some parts alone. What needs a file or a package that is not here is said, and left out.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ebjdat_serve.bundle import Bundle, read_json, sha256, write_json
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.precision import LOWER, rows_of
from training.calibrate import check_data, dataset_of
from training.card import write_card
from training.errors import DataError, TrainingError
from training.evaluation.calibration import calibration_rows, clean_rows
from training.evaluation.context import SUITES, Context, Suite
from training.evaluation.generation import generation_rows
from training.evaluation.landscape import landscape_rows
from training.evaluation.ledger import Arrays, Ledger
from training.evaluation.report import write_evaluation_report
from training.evaluation.robustness import masking_rows, released_rows, robust_rows
from training.evaluation.rows import Row, ball_of, eps_name
from training.evaluation.subject import Spec, bundle_spec, load_weights, module_spec
from training.evaluation.suspicion import hostile_rows, shift_rows, suspicion_rows
from training.images import Dataset, load

Part = Callable[[Context], Iterator[Row]]
PARTS: dict[str, Part] = {
    "clean": clean_rows,
    "calibration": calibration_rows,
    "robustness": robust_rows,
    "masking": masking_rows,
    "suspicion": suspicion_rows,
    "hostile": hostile_rows,
    "shifts": shift_rows,
    "generation": generation_rows,
    "landscape": landscape_rows,
    "released-code": released_rows,
}
USUAL = tuple(name for name in PARTS if name != "released-code")
SURROGATE = Path(__file__).parent.parent / "benchmarks" / "models" / "pgd-at" / "weights.safetensors"


def evaluate(
    bundle: Bundle,
    data: Dataset,
    suite: Suite,
    baseline: Path | None = None,
    *,
    parts: Sequence[str] = USUAL,
    processes: int = 1,
    **more: Any,
) -> Bundle:
    """Measure ``parts`` of a bundle, write metrics.json, report.html, pictures and card, and record them in the bundle.

    Rows of other parts stay while they are of this bundle's files; stale ones are dropped. Raises BundleError for data that the
    bundle was not trained on.
    """
    check_data(bundle, data)
    beside: list[Row] = read_json(baseline or bundle.path / "baseline.json") if baseline or "baseline.json" in bundle.manifest.files else []
    c = context(bundle_spec(bundle.path), data, suite, processes=processes, bundle=bundle, **more)
    before = [row for row in bundle.metrics() if bundle.holds(row["of"])]
    lower = [row for p in LOWER for row in rows_of(before, p)]  # what training/precision.py measured
    kept = [row for row in before if "part" in row and row["part"] not in parts and row not in lower]
    rows = [*kept, *measure(c, parts)]
    rows = [row for name in PARTS for row in rows if row["part"] == name] + lower
    write_json(bundle.path / "metrics.json", rows)
    report = write_evaluation_report(c, rows)
    (bundle.path / "report.html").write_bytes(report.read_bytes())
    written = write_card(bundle, rows, beside, c.arrays)
    return bundle.update("metrics.json", *written)


def evaluate_module(
    module: nn.Module,
    data: str | Dataset,
    *,
    suite: str | Suite = "quick",
    n: int | None = None,
    parts: Sequence[str] = USUAL,
    name: str = "module",
    folder: Path | None = None,
    processes: int = 1,
    **more: Any,
) -> list[Row]:
    """Return the rows of any module that takes images (N, 3, H, W) in [0,1] and returns logits (N, K); it is put in eval mode.

    metrics.json and report.html are written to ``folder``, by default one under EBJDAT_RUNS named after its sha256. More than one
    process needs a module that can be pickled, and a caller that is guarded by ``if __name__ == "__main__"``.
    """
    chosen = SUITES[suite] if isinstance(suite, str) else suite
    chosen = chosen if n is None else chosen.at_most(n)
    dataset = load(data) if isinstance(data, str) else data
    c = context(module_spec(module, name), dataset, chosen, processes=processes, folder=folder, **more)
    file = c.folder / "metrics.json"
    kept = [row for row in (json.loads(file.read_text()) if file.is_file() else []) if row["part"] not in parts]
    rows = [*(row for row in kept if row["of"] in (c.subject.weights, c.subject.graph)), *measure(c, parts)]
    rows = [row for part in PARTS for row in rows if row["part"] == part]
    write_json(file, rows)
    write_evaluation_report(c, rows)
    return rows


def context(
    spec: Spec,
    data: Dataset,
    suite: Suite,
    *,
    processes: int = 1,
    bundle: Bundle | None = None,
    folder: Path | None = None,
    surrogate: Path | None = SURROGATE,
    controls: Sequence[Path] = (),
    buffer: Path | None = None,
) -> Context:
    """Return what the parts are given; the surrogate is left out where it is another data set's, or the subject itself."""
    subject = spec()
    home = folder or work_root() / folder_name(subject.name, subject.weights)
    home.mkdir(parents=True, exist_ok=True)
    (home / "subject.json").write_text(
        json.dumps({"name": subject.name, "weights": subject.weights, "graph": subject.graph, "data": data.name})
    )
    if surrogate is not None and (not surrogate.is_file() or (surrogate == SURROGATE and data.name != "cifar10")):
        surrogate = None
    digest = sha256(surrogate) if surrogate is not None else ""
    if digest == subject.weights:
        surrogate = None  # an attack on itself is no transfer
    ledger = Ledger(work_root() / "chunks", spec, subject, 1 if subject.device.type == "cuda" else processes)
    c = Context(subject, data, suite, ball_of(data.name), ledger, home, bundle, surrogate, digest, tuple(controls), buffer)
    c.images.update(load_flat(home / "images.npz"))
    for kept, file in ((c.arrays, "arrays.npz"), (c.drawings, "drawings.npz")):
        kept.update(unflattened(load_flat(home / file)))
    return c


def folder_name(name: str, weights: str) -> str:
    """Return the name of the folder that a subject's evaluation is kept in."""
    return f"{name}-{weights[:12]}"


def named(file: Path) -> str:
    """Return what a weights file is called: its folder."""
    return file.parent.name


def work_root() -> Path:
    """Return the folder that evaluations are kept in, under EBJDAT_RUNS."""
    return Path(os.environ.get("EBJDAT_RUNS", "~/.cache/ebjdat_serve/runs")).expanduser() / "evaluation"


def measure(c: Context, parts: Sequence[str]) -> list[Row]:
    """Return the rows of ``parts``, printed as they come, and keep what was seen of each image beside them."""
    rows: list[Row] = []
    for name in parts:
        began = time.monotonic()
        print(f"{name}: {c.subject.name} on {c.data.name}", flush=True)
        for row in PARTS[name](c):
            interval = " [{:.3f}, {:.3f}]".format(*row["interval"]) if "interval" in row else ""
            print(f"  {row['metric']:34}{row['value']:>10.4f}{interval}  n = {row['n']:<6} {row['dataset']}: {row['protocol']}", flush=True)
            rows.append({**row, "part": name})
        print(f"  {name} took {time.monotonic() - began:.0f} s", flush=True)
        save_flat(c.folder / "images.npz", dict(c.images))
        for kept, file in ((c.arrays, "arrays.npz"), (c.drawings, "drawings.npz")):
            save_flat(c.folder / file, {f"{key}|{field}": value for key, found in kept.items() for field, value in found.items()})
    return rows


def save_flat(file: Path, arrays: Arrays) -> None:
    """Write arrays aside and rename, so that what is there is whole."""
    aside = file.with_name(f".{file.name}")
    np.savez_compressed(aside, **arrays)  # type: ignore[arg-type]
    os.replace(aside, file)


def load_flat(file: Path) -> Arrays:
    """Return stored arrays, none when there are none."""
    if not file.is_file():
        return {}
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def unflattened(flat: Arrays) -> dict[str, Arrays]:
    """Return arrays that are named "set|field" by set and field."""
    found: dict[str, Arrays] = {}
    for key, value in flat.items():
        name, _, field = key.rpartition("|")
        found.setdefault(name, {})[field] = value
    return found


def main() -> None:
    """Evaluate the bundle named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog=f"parts: {', '.join(PARTS)}; --protocol released-code is the part of that name alone",
    )
    parser.add_argument("bundle", type=Path, help="a bundle, a store, or a weights.safetensors that the trainer wrote")
    parser.add_argument("--suite", choices=sorted(SUITES), default="quick")
    parser.add_argument("--part", nargs="+", choices=sorted(PARTS), default=None, help="only these; rows of the others stay")
    parser.add_argument(
        "--protocol", choices=("official", "released-code"), default="official", help="released-code: what the published code computes"
    )
    parser.add_argument("--n", type=int, help="no measurement on more test images than this")
    parser.add_argument("--samples", type=int, help="how many images are drawn (the suite's number)")
    parser.add_argument("--autoattack", type=int, help="how many images full AutoAttack is run on (the suite's number)")
    parser.add_argument("--baseline", type=Path, help="metrics.json of the warm start, to stand beside every figure")
    parser.add_argument("--surrogate", type=Path, default=SURROGATE, help="weights that transferred attacks are made on")
    parser.add_argument("--control", type=Path, nargs="+", default=[], help="weights sampled with the same prior, steps and seeds")
    parser.add_argument("--buffer", type=Path, help="state.pt of a stage, whose replay buffer is measured beside fresh samples")
    parser.add_argument("--processes", type=int, default=cores(), help="worker processes, one thread each (%(default)s)")
    parser.add_argument(
        "--data", help="of weights: the data set (cifar10); of a bundle of a user's own data: the folder, when it has moved"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        parts = ("released-code",) if options.protocol == "released-code" else options.part or USUAL
        more = {"surrogate": options.surrogate, "controls": options.control, "buffer": options.buffer, "processes": options.processes}
        if options.bundle.suffix == ".safetensors":
            file = options.bundle.resolve()
            rows = evaluate_module(
                load_weights(file), options.data or "cifar10", suite=amounts(options), parts=parts, name=named(file), **more
            )
            print(f"{len(rows)} figures and report.html in {work_root() / folder_name(named(file), rows[0]['of'])}")
            return
        bundle = Bundle.draft(options.bundle)
        done = evaluate(bundle, dataset_of(bundle, options.data), amounts(options), options.baseline, parts=parts, **more)
        print(f"{done.path / 'metrics.json'}, {done.path / 'report.html'}")
    except (EbjdatError, DataError, TrainingError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where this stopped")


def amounts(options: argparse.Namespace) -> Suite:
    """Return the suite with the command line's numbers."""
    asked = [value for value in (options.n, options.samples, options.autoattack, options.processes) if value is not None]
    if min(asked) < 1 and options.autoattack != 0:
        raise TrainingError("--n, --samples, --autoattack and --processes are 1 or more")
    suite = SUITES[options.suite]
    suite = suite.at_most(options.n) if options.n else suite
    suite = replace(suite, samples=options.samples) if options.samples else suite
    return suite if options.autoattack is None else replace(suite, autoattack=options.autoattack)


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()


__all__ = ["PARTS", "SUITES", "eps_name", "evaluate", "evaluate_module"]
