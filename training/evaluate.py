#!/usr/bin/env python3
"""Measure a bundle: `python training/evaluate.py BUNDLE [--suite full]`, figures to a folder under EBJDAT_RUNS, the bundle untouched.

`--into BUNDLE` also takes them into a bundle's metrics.json and card, but none of fewer images than the one that is there.

Any torch module is measured in three lines:

    from training.evaluate import evaluate_module
    rows = evaluate_module(my_net, "cifar10", suite="quick", n=500)   # images (N, 3, H, W) in [0,1] -> logits
    print(rows[0].metric, rows[0].value, rows[0].interval)

Work is done in chunks of 100 images, one process a core, each kept on disk: a run that was killed goes on where it stopped. ``--part``
runs some parts alone. What needs a file or a package that is not here is said, and left out. As a module it logs under the name
``training``: a line a part at INFO, every figure at DEBUG.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ebjdat_serve.bundle import Bundle, read_rows, sha256, write_json, write_rows
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.cpus import cpus
from ebjdat_serve.editing import FORCED, check_editable, edit, guarded, tracked
from ebjdat_serve.engines import Floats
from ebjdat_serve.folders import made
from ebjdat_serve.logs import configure
from ebjdat_serve.rows import Row, images_key, to_json
from ebjdat_serve.sentences import data_words, protocol_words
from training.data.bundle_data import check_data, dataset_of
from training.data.datasets import Dataset, load
from training.errors import TrainingError
from training.evaluation.calibration import calibration_rows, clean_rows
from training.evaluation.context import FORM, SUITES, Context, Suite, claim, unit
from training.evaluation.evaluated_model import Spec, best_device, bundle_spec, load_weights, module_sha256, module_spec
from training.evaluation.evidence import Evaluation, take
from training.evaluation.generation import generation_rows
from training.evaluation.landscape import landscape_rows
from training.evaluation.ood import hostile_rows, shift_rows, suspicion_rows
from training.evaluation.report import write_evaluation_report
from training.evaluation.result_cache import ResultCache, load_arrays, load_flat, unflattened, work_root, write
from training.evaluation.robustness import masking_rows, released_rows, robust_rows
from training.evaluation.rows import ball_of

log = logging.getLogger("training")
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
LEAST = {
    "test": 20, "attacked": 1, "attacked_other": 1, "strong": 0, "autoattack": 0, "autoattack_other": 0, "checked": 1, "looked": 2,
    "hostile": 1, "shifted": 2, "samples": 50, "queries": 1,
}  # fmt: skip
USUAL = tuple(name for name in PARTS if name != "released-code")
SURROGATE = Path(__file__).parent.parent / "benchmarks" / "models" / "pgd-at" / "weights.safetensors"


def evaluate(bundle: Bundle, data: Dataset, suite: Suite, *, parts: Sequence[str] = USUAL, processes: int = 1, **more: Any) -> Evaluation:
    """Measure ``parts`` of a bundle; metrics.json and report.html go to ``folder``, by default one under EBJDAT_RUNS named after it.

    The bundle is read and not written: ``evidence.take`` does that. Rows of other parts that the folder holds stay while they are of
    the bundle's files. Raises BundleError for data that the bundle was not trained on.
    """
    check_data(bundle, data)
    c = context(bundle_spec(bundle.path), data, suite, processes=processes, bundle=bundle, **more)
    return Evaluation(c.folder, measured(c, parts, bundle.holds), c.arrays)


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
    if isinstance(suite, str) and suite not in SUITES:
        raise TrainingError(f"suite is one of {', '.join(SUITES)}, not {suite!r}")
    chosen = SUITES[suite] if isinstance(suite, str) else suite
    chosen = chosen if n is None else chosen.at_most(n)
    dataset = load(data) if isinstance(data, str) else data
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        c = context(module_spec(module, name, checked(module, dataset)), dataset, chosen, processes=processes, folder=folder, **more)
        return measured(c, parts)
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


def measured(c: Context, parts: Sequence[str], holds: Callable[[str], bool] = lambda of: True) -> list[Row]:
    """Return the rows of ``parts`` and those of others that the folder has of files that ``holds`` knows; write them and the report."""
    file = c.folder / "metrics.json"
    rows = [row for row in read_rows(file) if holds(row.of)] if file.is_file() else []
    for part in known_parts(parts):
        rows = placed(rows, part, measure(c, part))
        write_rows(file, rows)  # what a later part's failure must not take along
    c.ledger.close()
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
    home = folder or work_root() / folder_name(subject.name, subject.weights, data.sha256)
    made(home, "EBJDAT_RUNS")
    about = {"name": subject.name, "weights": subject.weights, "graph": subject.graph, "data": data.name, "data_sha256": data.sha256}
    claim(home, {**about, "form": FORM})
    if surrogate == SURROGATE and (data.name != "cifar10" or not SURROGATE.is_file()):
        surrogate = None
    digest = ""
    if surrogate is not None:
        network = load_weights(surrogate)
        if network.classes != len(data.names):
            raise TrainingError(
                f"{surrogate} has {network.classes} classes, {data.name} {len(data.names)}", options=("--surrogate WEIGHTS",)
            )
        digest = sha256(surrogate)
        if subject.weights in (digest, module_sha256(network)):
            surrogate = None  # an attack on itself is no transfer
    ledger = ResultCache(work_root() / "chunks", spec, subject, 1 if subject.device.type == "cuda" else processes)
    c = Context(subject, data, suite, ball_of(data.name), ledger, home, bundle, surrogate, digest, tuple(controls), buffer)
    c.warnings.update(json.loads((home / "warnings.json").read_text(encoding="utf-8")) if (home / "warnings.json").is_file() else {})
    c.images.update(load_flat(home / "images.npz"))
    c.arrays.update(load_arrays(home))
    c.drawings.update(unflattened(load_flat(home / "drawings.npz")))
    return c


def folder_name(name: str, weights: str, data_sha256: str) -> str:
    """Return the name of the folder that a subject's evaluation on some data is kept in."""
    return f"{name}-{weights[:12]}-{data_sha256[:8]}"


def known_parts(parts: Sequence[str]) -> Sequence[str]:
    """Return the parts' names; raise TrainingError for what is none."""
    strange = [parts] if isinstance(parts, str) else [name for name in parts if name not in PARTS]
    if strange:
        raise TrainingError(f"parts is a tuple of some of {', '.join(PARTS)}; not {strange[0]!r}")
    return parts


def checked(module: nn.Module, data: Dataset) -> Floats:
    """Return eight test images; raise TrainingError unless the module answers them with finite logits, one a class."""
    probe, _ = unit(data.test.first(8))
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    module.eval()
    with torch.no_grad():
        said = module(torch.from_numpy(probe).to(device))
    wanted = (len(probe), len(data.names))
    if not isinstance(said, torch.Tensor) or tuple(said.shape) != wanted or not said.is_floating_point():
        shown = tuple(said.shape) if isinstance(said, torch.Tensor) else type(said).__name__
        raise TrainingError(
            f"the module must return logits {wanted}, floating, of images (N, 3, H, W) in [0,1]; it returns {shown}: wrap it"
        )
    if not bool(torch.isfinite(said).all()):
        raise TrainingError("the module returns logits that are not finite: its figures would mean nothing")
    return probe


def placed(rows: list[Row], part: str, new: list[Row]) -> list[Row]:
    """Return ``rows`` with those of ``part`` replaced, in the order of the parts."""
    every = [row for row in rows if row.part != part] + new
    return [row for name in PARTS for row in every if row.part == name]


def measure(c: Context, part: str) -> list[Row]:
    """Return the rows of ``part``, logged as they come, and keep what was seen of each image beside them."""
    began, c.part, rows = time.monotonic(), part, []
    c.warnings.pop(part, None)
    log.debug("%s: %s on %s", part, c.subject.name, c.data.name)
    for row in PARTS[part](c):
        if not math.isfinite(row.value):
            c.say(f"{row.metric} on {data_words(row)} is no number and is left out: {protocol_words(row)}")
            continue
        row = with_finite_error(replace(row, part=part))
        interval = " [{:.3f}, {:.3f}]".format(*row.interval) if row.interval else ""
        said = f"  {row.metric:34}{row.value:>10.4f}{interval}  n = {row.n:<6} {data_words(row)}: {protocol_words(row)}"
        log.debug("%s", said, extra={"fields": to_json(row)})
        rows.append(row)
    counts = f"{len(rows)} figures, {len(c.warnings.get(part, []))} notes"
    log.info("measured %s of %s on %s: %s, %.0f s", part, c.subject.name, c.data.name, counts, time.monotonic() - began)
    write(c.folder / "images.npz", dict(c.images))
    for kept, file in (({images_key(key): found for key, found in c.arrays.items()}, "arrays.npz"), (c.drawings, "drawings.npz")):
        write(c.folder / file, {f"{key}|{field}": value for key, found in kept.items() for field, value in found.items()})
    write_json(c.folder / "warnings.json", c.warnings)
    return rows


def with_finite_error(row: Row) -> Row:
    """Return a row without an interval or a standard error that is no number."""
    if row.interval is not None and not np.isfinite(row.interval).all():
        return replace(row, interval=None, interval_kind=None)
    return replace(row, stderr=None) if row.stderr is not None and not math.isfinite(row.stderr) else row


def main() -> None:
    """Evaluate the bundle named on the command line."""
    parser = parser_of(
        __doc__,
        epilog=f"parts: {', '.join(PARTS)}; --protocol released-code is the part of that name alone",
    )
    parser.add_argument("bundle", type=Path, help="a bundle, a store, or a weights.safetensors that the trainer wrote")
    parser.add_argument("--suite", choices=sorted(SUITES), default="quick")
    parser.add_argument("--part", nargs="+", choices=sorted(PARTS), default=None, help="only these; rows of the others stay")
    parser.add_argument(
        "--protocol", choices=("official", "released-code"), default="official", help="released-code: what the published code computes"
    )
    parser.add_argument("--n", type=int, help="no measurement on more test images than this; --amount raises single ones again")
    said = f"single amounts of the suite: {', '.join(LEAST)}"
    parser.add_argument("--amount", nargs="+", default=[], metavar="NAME=N", help=said)
    parser.add_argument("--into", type=Path, metavar="BUNDLE", help="take the rows into this bundle, where none of more images stands")
    parser.add_argument("--force", action="store_true", help=f"with --into: {FORCED}; with --folder: also one whose figures git tracks")
    parser.add_argument("--folder", type=Path, help="where figures and report go (a folder under EBJDAT_RUNS named after the model)")
    parser.add_argument("--baseline", type=Path, help="with --into: metrics.json of the warm start, to stand beside every figure")
    parser.add_argument("--surrogate", type=Path, default=SURROGATE, help="weights that transferred attacks are made on")
    parser.add_argument("--control", type=Path, nargs="+", default=[], help="weights sampled with the same prior, steps and seeds")
    parser.add_argument("--buffer", type=Path, help="state.pt of a stage, whose replay buffer is measured beside fresh samples")
    parser.add_argument("--processes", type=int, default=cpus(), help="worker processes, one thread each (%(default)s)")
    parser.add_argument(
        "--data", help="of weights: the data set (cifar10); of a bundle of a user's own data: the folder, when it has moved"
    )
    parser.add_argument("--size", type=int, help="of weights and a folder: squash its images to SIZE x SIZE")
    options = parser.parse_args()
    configure("text", "%(message)s", sys.stdout)
    log.setLevel(logging.DEBUG)  # its figures are what this command is for
    torch.set_num_threads(1)
    with command(parser, "interrupted; the same command goes on where this stopped"):
        parts = ("released-code",) if options.protocol == "released-code" else options.part or USUAL
        more = {
            "surrogate": options.surrogate,
            "controls": options.control,
            "buffer": options.buffer,
            "processes": options.processes,
            "folder": options.folder,
        }
        if options.baseline and not options.into:
            raise TrainingError("--baseline stands in a bundle's card, which only --into writes: give both or neither")
        if options.folder and not options.force and tracked(options.folder / "metrics.json"):
            raise TrainingError(f"{options.folder / 'metrics.json'} is tracked by git: name another --folder", options=("--force",))
        if options.bundle.suffix == ".safetensors":
            if options.into:
                raise TrainingError(f"--into takes what was measured of a bundle, and {options.bundle} is weights: give the bundle")
            file = options.bundle.resolve()
            data = load(options.data or "cifar10", (options.size, options.size) if options.size else None)
            model, suite = load_weights(file).to(best_device()), amounts(options)
            kept = options.folder or work_root() / folder_name(file.parent.name, module_sha256(model), data.sha256)
            rows = evaluate_module(model, data, suite=suite, parts=parts, name=file.parent.name, **{**more, "folder": kept})
            print(f"{len(rows)} rows in {kept / 'metrics.json'}, {kept / 'report.html'}")
            return
        evaluate_bundle(options, parts, more)


def evaluate_bundle(options: argparse.Namespace, parts: Sequence[str], more: dict[str, Any]) -> None:
    """Evaluate the bundle that the command line names, say where the figures are, and take them into one where --into says so."""
    bundle = Bundle.draft(options.bundle)
    if options.into:
        target = check_editable(options.into, force=options.force)  # not after hours of measuring
        if target.manifest.files.get("weights.safetensors") != bundle.manifest.files["weights.safetensors"]:
            raise TrainingError(f"--into {options.into} is of other weights than {options.bundle}: its figures would be another model's")
    done = evaluate(bundle, dataset_of(bundle, options.data), amounts(options), parts=parts, **more)
    print(f"{len(done.rows)} rows in {done.folder / 'metrics.json'}, {done.folder / 'report.html'}")
    if not options.into:
        if why := guarded(bundle.path):
            into = f"it {why}: copy the folder and give the copy to --into, or --force with it"
        else:
            into = f"--into {options.bundle} takes them into it"
        print(f"{bundle.path} is as it was; {into}")
        return
    said: list[str] = []

    def change(draft: Bundle) -> Bundle:
        taken, merged = take(draft, done, options.baseline)
        said.append(merged.said())
        return taken

    home = edit(options.into, change, force=options.force)
    print(f"{said[0]}\ninto {home.path / 'metrics.json'}")


def amounts(options: argparse.Namespace) -> Suite:
    """Return the suite with the command line's numbers."""
    if options.processes < 1:
        raise TrainingError(f"--processes {options.processes}: give 1 or more")
    suite = SUITES[options.suite]
    suite = suite.at_most(options.n) if options.n is not None else suite
    for setting in options.amount:
        name, _, value = setting.partition("=")
        if name not in LEAST or not value.isdigit() or int(value) < LEAST[name]:
            known = ", ".join(f"{known} from {least} up" for known, least in LEAST.items())
            raise TrainingError(f"--amount {setting}: give NAME=N of {known}")
        changes: dict[str, Any] = {name: int(value)}
        suite = replace(suite, **changes)
    return suite


if __name__ == "__main__":
    main()
