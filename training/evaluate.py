#!/usr/bin/env python3
"""Evaluate a bundle: `python training/evaluate.py BUNDLE [--suite full]`. Figures go to a folder under EBJDAT_RUNS, not into the bundle.

`--into BUNDLE` also takes them into a bundle's metrics.json and card, except figures of fewer images than the bundle's own.

To evaluate any torch module:

    from training.evaluate import evaluate_module
    rows = evaluate_module(my_net, "cifar10", suite="quick", n=500)   # images (N, 3, H, W) in [0,1] -> logits
    print(rows[0].metric, rows[0].value, rows[0].interval)

Results are computed in chunks of 100 images, one process per core, and kept on disk: a killed run continues where it stopped.
``--part`` runs some parts. What lacks a file or package is reported. Logger ``training``: a line per part at INFO, every figure at DEBUG.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebjdat_serve.bundle import Bundle, read_rows, sha256, write_json, write_rows
from ebjdat_serve.card import BASELINES, WARM_START
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.contract import Input
from ebjdat_serve.cpus import cpus
from ebjdat_serve.editing import FORCED, check_editable, edit, guarded, tracked
from ebjdat_serve.engines import Floats
from ebjdat_serve.folder_images import read_folders
from ebjdat_serve.folders import ensure_folder
from ebjdat_serve.logs import configure
from ebjdat_serve.rows import Row, images_key, to_json
from ebjdat_serve.sentences import data_words, protocol_words
from training.data.bundle_data import check_data, dataset_of
from training.data.datasets import Dataset, load
from training.errors import TrainingError
from training.evaluation.calibration import calibration_rows, clean_rows
from training.evaluation.context import FORM, LEAST, SUITES, Context, Suite, claim, suite_of, unit
from training.evaluation.evaluated_model import Spec, best_device, bundle_spec, load_weights, module_sha256, module_spec
from training.evaluation.evidence import Evaluation, compared, take
from training.evaluation.expected import expected
from training.evaluation.explanation import explanation_rows
from training.evaluation.generation import check_given, generation_rows
from training.evaluation.hostile import hostile_rows
from training.evaluation.landscape import landscape_rows
from training.evaluation.ood import shift_rows, suspicion_rows
from training.evaluation.reach_rows import reach_rows
from training.evaluation.report import write_evaluation_report
from training.evaluation.result_cache import ResultCache, load_arrays, load_flat, unflattened, work_root, write
from training.evaluation.robustness import masking_rows, released_rows, robust_rows
from training.evaluation.rows import ball_of, with_finite_error

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
    "explanation": explanation_rows,
    "landscape": landscape_rows,
    "reach": reach_rows,
    "released-code": released_rows,
}
USUAL = tuple(name for name in PARTS if name not in ("reach", "released-code"))
"""``reach`` takes ten gradients of every calibration image."""
ATTACKS = ("robustness", "masking", "hostile", "generation", "explanation", "landscape", "reach", "released-code")
"""Parts that take gradients, and are left out where there is no network."""
SURROGATE = Path(__file__).parent.parent / "benchmarks" / "models" / "pgd-at" / "weights.safetensors"


def evaluate(
    bundle: Bundle,
    data: Dataset,
    suite: Suite,
    *,
    parts: Sequence[str] = USUAL,
    processes: int = 1,
    allow_code: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **more: Any,
) -> Evaluation:
    """Evaluate ``parts`` of a bundle; write metrics.json and report.html to ``folder``, by default under EBJDAT_RUNS.

    The bundle is not changed: ``evidence.take`` writes rows into it. Rows of other parts in the folder are kept while they are of the
    bundle's files; ``say`` gets what it will cost, before it begins. Raises BundleError for data that the bundle was not trained on, unless
    it is an imported one, of which nobody knows; the network of one that is Python code is run with ``allow_code``.
    """
    check_data(bundle, data)
    c = context(bundle_spec(bundle.path, allow_code=allow_code), data, suite, processes=processes, bundle=bundle, **more)
    for line in expected(c, parts):
        say(line)
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

    Writes metrics.json and report.html to ``folder``, by default one under EBJDAT_RUNS named after its sha256. More than one
    process needs a picklable module and a caller guarded by ``if __name__ == "__main__"``.
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
    """Measure ``parts``, keep the folder's other rows whose file ``holds`` accepts, and write all rows and the report; return them."""
    file = c.folder / "metrics.json"
    rows = [row for row in read_rows(file) if holds(row.of)] if file.is_file() else []
    for part in known_parts(parts):
        rows = placed(rows, part, measure(c, part))
        write_rows(file, rows)  # kept even if a later part fails
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
    """Return the context of the parts, without a surrogate that is of another data set or the subject itself."""
    subject = spec()
    check_given(subject, data, controls, buffer)
    home = folder or work_root() / folder_name(subject.name, subject.weights, data.sha256)
    ensure_folder(home, "EBJDAT_RUNS")
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
            surrogate = None  # an attack on the model itself does not transfer
    ledger = ResultCache(work_root() / "chunks", spec, subject, 1 if subject.device.type == "cuda" else processes)
    c = Context(subject, data, suite, ball_of(data.name), ledger, home, bundle, surrogate, digest, tuple(controls), buffer)
    c.warnings.update(json.loads((home / "warnings.json").read_text(encoding="utf-8")) if (home / "warnings.json").is_file() else {})
    c.images.update(load_flat(home / "images.npz"))
    c.arrays.update(load_arrays(home))
    c.drawings.update(unflattened(load_flat(home / "drawings.npz")))
    return c


def folder_name(name: str, weights: str, data_sha256: str) -> str:
    """Return the folder name of a subject's evaluation on a data set."""
    return f"{name}-{weights[:12]}-{data_sha256[:8]}"


def known_parts(parts: Sequence[str]) -> Sequence[str]:
    """Return ``parts``; raise TrainingError for an unknown part."""
    strange = [parts] if isinstance(parts, str) else [name for name in parts if name not in PARTS]
    if strange:
        raise TrainingError(f"unknown part {strange[0]!r}: parts is a tuple of names from {', '.join(PARTS)}")
    return parts


def checked(module: nn.Module, data: Dataset) -> Floats:
    """Return eight test images; raise TrainingError unless the module returns finite logits for them, one per class."""
    probe, _ = unit(data.test.first(8))
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    module.eval()
    with torch.no_grad():
        logits = module(torch.from_numpy(probe).to(device))
    wanted = (len(probe), len(data.names))
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != wanted or not logits.is_floating_point():
        returned = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise TrainingError(
            f"the module must return logits {wanted}, floating, of images (N, 3, H, W) in [0,1]; it returns {returned}: wrap it"
        )
    if not bool(torch.isfinite(logits).all()):
        raise TrainingError("the module returns logits that are not finite: its figures would be meaningless")
    return probe


def placed(rows: list[Row], part: str, new: list[Row]) -> list[Row]:
    """Return ``rows`` with those of ``part`` replaced, in the order of the parts."""
    every = [row for row in rows if row.part != part] + new
    return [row for name in PARTS for row in every if row.part == name]


def measure(c: Context, part: str) -> list[Row]:
    """Measure ``part``, log its rows, write its per-image results and return the rows."""
    began, c.part, rows = time.monotonic(), part, []
    c.warnings.pop(part, None)
    log.debug("%s: %s on %s", part, c.subject.name, c.data.name)
    lacking = c.subject.no_network if part in ATTACKS else ""
    if lacking:
        c.say(f"{part}: not measured: {lacking}")
    for row in () if lacking else PARTS[part](c):
        if not math.isfinite(row.value):
            c.say(f"{row.metric} on {data_words(row)} is not a number and is left out: {protocol_words(row)}")
            continue
        row = with_finite_error(replace(row, part=part))
        interval = " [{:.3f}, {:.3f}]".format(*row.interval) if row.interval else ""
        line = f"  {row.metric:34}{row.value:>10.4f}{interval}  n = {row.n:<6} {data_words(row)}: {protocol_words(row)}"
        log.debug("%s", line, extra={"fields": to_json(row)})
        rows.append(row)
    counts = f"{len(rows)} figures, {len(c.warnings.get(part, []))} notes"
    log.info("measured %s of %s on %s: %s, %.0f s", part, c.subject.name, c.data.name, counts, time.monotonic() - began)
    write(c.folder / "images.npz", dict(c.images))
    for kept, file in (({images_key(key): found for key, found in c.arrays.items()}, "arrays.npz"), (c.drawings, "drawings.npz")):
        write(c.folder / file, {f"{key}|{field}": value for key, found in kept.items() for field, value in found.items()})
    write_json(c.folder / "warnings.json", c.warnings)
    return rows


def main() -> None:
    """Evaluate the bundle named on the command line."""
    parser = parser_of(__doc__, epilog=f"parts: {', '.join(PARTS)}; --protocol released-code is the part of that name only")
    parser.add_argument("bundle", type=Path, help="a bundle, a store, or a weights.safetensors that the trainer wrote")
    parser.add_argument("--suite", choices=sorted(SUITES), default="quick")
    parser.add_argument("--part", nargs="+", choices=sorted(PARTS), default=None, help="measure only these parts; rows of others are kept")
    parser.add_argument(
        "--protocol", choices=("official", "released-code"), default="official", help="released-code: the protocol of the published code"
    )
    parser.add_argument("--n", type=int, help="maximum test images of every measurement; --amount overrides single ones")
    amounts_help = f"numbers of images of the suite: {', '.join(LEAST)}"
    parser.add_argument("--amount", nargs="+", default=[], metavar="NAME=N", help=amounts_help)
    parser.add_argument("--into", type=Path, metavar="BUNDLE", help="take the rows into this bundle, but none of fewer images than its own")
    parser.add_argument(
        "--force", action="store_true", help=f"with --into: {FORCED}; with --folder: also a folder whose figures git tracks"
    )
    parser.add_argument("--folder", type=Path, help="output folder of figures and report (under EBJDAT_RUNS, named after the model)")
    parser.add_argument("--baseline", type=Path, help="with --into: metrics.json to compare with, for a column of the card")
    parser.add_argument("--baseline-is", choices=tuple(BASELINES.values()), help="what --baseline is of; the warm start by default")
    parser.add_argument("--surrogate", type=Path, default=SURROGATE, help="weights of the surrogate of transferred attacks")
    parser.add_argument("--control", type=Path, nargs="+", default=[], help="control weights, sampled with the same prior, steps and seeds")
    parser.add_argument("--buffer", type=Path, help="state.pt of a stage, whose replay buffer is measured for comparison")
    parser.add_argument("--processes", type=int, default=cpus(), help="worker processes, one thread each (%(default)s)")
    parser.add_argument("--data", help="for weights: the data set (cifar10); for an imported bundle: a folder; else the folder, if moved")
    parser.add_argument("--folders", type=Path, metavar="FILE", help="of an imported bundle: JSON object, labels by names of sub-folders")
    parser.add_argument("--allow-code", action="store_true", help="of an imported bundle that is Python code: run it, for its gradients")
    parser.add_argument("--size", type=int, help="for weights and a folder: resize its images to SIZE x SIZE")
    options = parser.parse_args()
    configure("text", "%(message)s", sys.stdout)
    log.setLevel(logging.DEBUG)  # every figure is logged at DEBUG
    torch.set_num_threads(1)
    with command(parser, "interrupted; run the same command to continue"):
        if options.processes < 1:
            raise TrainingError(f"--processes {options.processes}: give 1 or more")
        parts = ("released-code",) if options.protocol == "released-code" else options.part or USUAL
        more = {name: getattr(options, name) for name in ("surrogate", "buffer", "processes", "folder")} | {"controls": options.control}
        if options.baseline and not options.into:
            raise TrainingError("--baseline is for a bundle's card, which only --into writes: give both or neither")
        if options.baseline_is and not options.baseline:
            raise TrainingError("--baseline-is says what --baseline is of: add --baseline FILE, or leave it out")
        if options.size is not None and options.bundle.suffix != ".safetensors":
            raise TrainingError("--size is of weights and a folder, and a bundle says its own size: leave it out")
        if options.folder and not options.force and tracked(options.folder / "metrics.json"):
            raise TrainingError(f"{options.folder / 'metrics.json'} is tracked by git: name another --folder", options=("--force",))
        suite = suite_of(options.suite, options.n, options.amount)
        if options.bundle.suffix == ".safetensors":
            if options.into:
                raise TrainingError(f"--into takes rows of a bundle, and {options.bundle} is a weights file: give the bundle")
            file = options.bundle.resolve()
            data = load(options.data or "cifar10", Input(options.size, options.size) if options.size is not None else None)
            model = load_weights(file).to(best_device())
            kept = options.folder or work_root() / folder_name(file.parent.name, module_sha256(model), data.sha256)
            rows = evaluate_module(model, data, suite=suite, parts=parts, name=file.parent.name, **{**more, "folder": kept})
            print(f"{len(rows)} rows in {kept / 'metrics.json'}, {kept / 'report.html'}")
            return
        evaluate_bundle(options, suite, parts, more)


def evaluate_bundle(options: argparse.Namespace, suite: Suite, parts: Sequence[str], more: dict[str, Any]) -> None:
    """Evaluate the bundle named on the command line, print where the figures are, and take them into the bundle of --into."""
    bundle = Bundle.draft(options.bundle)
    if options.into:
        target = check_editable(options.into, force=options.force)  # checked before hours of measuring
        target.check_files(without=("README.md",))
        compared(target, options.baseline)
        if target.manifest.files["weights.safetensors"] != bundle.manifest.files.get("weights.safetensors"):
            raise TrainingError(
                f"--into {options.into} has other weights than {options.bundle}: figures of one are not valid for the other"
            )
    data = dataset_of(bundle, options.data, read_folders(options.folders))
    done = evaluate(bundle, data, suite, parts=parts, allow_code=options.allow_code, say=partial(print, flush=True), **more)
    print(f"{len(done.rows)} rows in {done.folder / 'metrics.json'}, {done.folder / 'report.html'}")
    if not options.into:
        if why := guarded(bundle.path):
            into = f"it {why}: copy the folder and give the copy to --into, or --force with it"
        else:
            into = f"--into {options.bundle} takes them into it"
        print(f"{bundle.path} is unchanged; {into}")
        return
    summaries: list[str] = []

    def change(draft: Bundle) -> Bundle:
        taken, merged = take(draft, done, options.baseline, options.baseline_is or WARM_START)
        summaries.append(merged.summary())
        return taken

    home = edit(options.into, change, force=options.force, renews=("README.md",))
    print(f"{summaries[0]}\ninto {home.path / 'metrics.json'}")


if __name__ == "__main__":
    main()
