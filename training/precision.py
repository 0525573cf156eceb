#!/usr/bin/env python3
"""Add a lower precision to a bundle, with its figures: `python training/precision.py BUNDLE --precision int8`.

Writes the precision's graphs (fp16: classify and step; int8: classify, ranges from training images; bf16 runs on the torch engine and
needs none), calibrates it on its own energies, and measures what it costs against fp32 on the same images. A precision outside the
limits of ebjdat_serve/precision.py is refused. The bundle gets a new version; where BUNDLE is a store, it is published into it,
with `--force`.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebjdat_serve.bundle import Bundle, write_rows
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.editing import FORCED, check_editable, put
from ebjdat_serve.engines import Engine, Floats, Labels, Outputs, Precision, load_engine
from ebjdat_serve.engines import given as required
from ebjdat_serve.engines.eager import load_model
from ebjdat_serve.errors import BundleError
from ebjdat_serve.exporting.int8 import write_int8
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.precision import FEWEST, FEWEST_ATTACKED, FEWEST_SQUARE, LOWER, rows_of
from ebjdat_serve.precision_figures import ALPHA, costs, differences, flag_rows, flagged, ood_score, right, speed_rows
from ebjdat_serve.rows import Images, Row, first
from ebjdat_serve.selftest import PROBE
from ebjdat_serve.sentences import protocol_words
from ebjdat_serve.sgld import Chains
from ebjdat_serve.store import next_revision, scratch, store_of
from ebjdat_serve.views import Seen
from export.to_onnx import write
from training.calibrate import calibrate
from training.card import baseline_of, renew_card
from training.data.bundle_data import check_data, dataset_of
from training.data.datasets import Dataset
from training.distributed import Noise
from training.evaluation.rows import SEED, ball_of, number
from training.methods.adversary import Attack, Threat, cross_entropy, pgd

RANGE_IMAGES = 512
FIGURES = (
    "logit_error_max", "logit_error_over_spread", "energy_error_max", "energy_error_mean_over_sd", "label_disagreement",
    "accuracy_clean", "accuracy_clean_drop",
    "accuracy_pgd20_transfer", "accuracy_pgd20_transfer_drop", "accuracy_square", "accuracy_square_drop", "step_error_max",
    "flag_rate_clean", "flag_rate_excess", "flag_rate_clean_fp32_threshold", "graph_bytes", "ratio_classify_batch1",
    "ratio_classify_batch32",
)  # fmt: skip
"""Figures of a precision; a row's metric is one of these names, _ and the precision."""


@dataclass(frozen=True)
class Amounts:
    """Numbers of test images: measured, attacked by PGD on the fp32 network, and attacked by Square with ``queries`` each."""

    n: int = 2000
    attacked: int = 1000
    square: int = 100
    queries: int = 1000


@dataclass(frozen=True)
class Reference:
    """The fp32 reference of every precision: engine, test images, logits, energies, and the images that survive each attack."""

    engine: Engine
    image: Floats
    label: Labels
    logits: Floats
    energy: Floats
    adversarial: Floats
    right_adversarial: np.ndarray
    square: np.ndarray
    eps: float


def admit(bundle: Bundle, data: Dataset, precisions: Sequence[Precision], amounts: Amounts) -> Bundle:
    """Return a new version of ``bundle`` with those of ``precisions`` that are within their limits, calibrated and measured.

    Works on a copy in the same folder, which replaces the bundle at the end, or is published if it is in a store. Raises BundleError
    naming the refused precisions, after the others are added; the bundle is untouched when all are refused.
    """
    check_data(bundle, data)
    fp32 = reference(bundle, data, amounts)
    refused: list[str] = []
    with scratch(bundle.path.parent) as folder:
        done = bundle
        for precision in precisions:
            try:
                done = attempt(done, folder / precision, data, precision, fp32, amounts)
            except BundleError as error:
                refused.append(str(error))
        if done is not bundle:
            done = done.update(version=next_revision(bundle, store_of(bundle.path)))
            if "README.md" in done.manifest.files:  # its title and its table
                done = renew_card(done, done.metrics(), baseline_of(done), {}, samples=False)
            bundle = put(done, bundle.path)
    if refused:
        raise BundleError("; ".join(refused))
    return bundle


def attempt(bundle: Bundle, folder: Path, data: Dataset, precision: Precision, fp32: Reference, amounts: Amounts) -> Bundle:
    """Return a copy of ``bundle`` in ``folder`` with ``precision`` added; raise BundleError beyond a limit."""
    shutil.copytree(bundle.path, folder)
    draft = Bundle.draft(folder)
    draft = calibrate(draft.update(*write_graphs(draft, data, precision)), data, precision)
    rows = list(measure(draft, data, precision, fp32, amounts))
    for row in rows:
        print(f"{row.metric:36}{row.value:>12.5g}  n = {row.n:<6} {protocol_words(row)}", flush=True)
    before = draft.metrics()
    stale = rows_of(before, precision)
    kept = [row for row in before if row not in stale and draft.holds(row.of)]  # a card shows only figures of the bundle's files
    write_rows(folder / "metrics.json", [*kept, *rows])
    draft = draft.update("metrics.json")
    draft.check_precision(precision)
    return draft


def reference(bundle: Bundle, data: Dataset, amounts: Amounts) -> Reference:
    """Return fp32's outputs on the first test images and the survivors of both attacks; raise BundleError for too few images."""
    for given, least, what in (
        (amounts.n, FEWEST, "n"),
        (amounts.attacked, FEWEST_ATTACKED, "attacked"),
        (amounts.square, FEWEST_SQUARE, "square"),
    ):
        if min(given, len(data.test)) < least:
            raise BundleError(f"--{what} {given}, of {len(data.test)} test images: at least {least} are needed")
    engine, test = load_engine(bundle, "auto", "cpu", 1), data.test.first(amounts.n)
    image, label, eps = to_unit(test.image), test.label, ball_of(data.name).linf
    logits, energy, _ = classify_in_chunks(engine, image)
    adversarial = transferred(bundle, image[: amounts.attacked], label[: amounts.attacked], eps)
    right_adversarial = right(classify_in_chunks(engine, adversarial).logits, label[: amounts.attacked])
    square = square_survivors(engine, image[: amounts.square], label[: amounts.square], eps, amounts.queries)
    return Reference(engine, image, label, logits, required(energy, "energy"), adversarial, right_adversarial, square, eps)


def write_graphs(bundle: Bundle, data: Dataset, precision: Precision) -> list[str]:
    """Write the graphs of ``precision`` and return their names."""
    if precision == "int8":
        chosen = np.random.default_rng(SEED).permutation(len(data.train))[:RANGE_IMAGES]
        return [write_int8(bundle, to_unit(data.train.image[np.sort(chosen)]))]
    return [write(bundle, function, precision) for function in ("classify", "step")] if precision == "fp16" else []


def measure(bundle: Bundle, data: Dataset, precision: Precision, fp32: Reference, amounts: Amounts) -> Iterator[Row]:
    """Yield the figures of ``precision`` against fp32 on the same test images, each engine on one CPU thread."""
    low, where = load_engine(bundle, "auto", "cpu", 1, precision), Images(dataset=data.name, split="test")
    image, label, f, e = fp32.image, fp32.label, fp32.logits, fp32.energy

    def row(metric: str, value: float, n: int, images: Images = where, of: str = bundle.measured(precision), **more: Any) -> Row:
        return number(f"{metric}_{precision}", value, n, images, of, precision=precision, provider=low.provider, **more)

    found = classify_in_chunks(low, image)
    f_low = found.logits
    yield from differences(row, Outputs(f, e, None), found)
    yield from costs(row, "accuracy_clean", right(f, label), right(f_low, label), where)

    survivors = right(classify_in_chunks(low, fp32.adversarial).logits, label[: len(fp32.adversarial)])
    threat: dict[str, Any] = {"norm": "linf", "eps": fp32.eps}
    images = replace(where, attack="transfer", surrogate="fp32", steps=20, iterate="last", **threat)
    yield from costs(row, "accuracy_pgd20_transfer", fp32.right_adversarial, survivors, images)
    survivors = square_survivors(low, image[: amounts.square], label[: amounts.square], fp32.eps, amounts.queries)
    yield from costs(row, "accuracy_square", fp32.square, survivors, replace(where, attack="square", queries=amounts.queries, **threat))

    if "step" in bundle.functions:
        chains = Chains.at(image[:32], PROBE, label[:32], SEED)
        apart = np.abs(low.advance(chains, PROBE.steps).image - fp32.engine.advance(chains, PROBE.steps).image).max()
        step = "weights.safetensors" if precision == "bf16" else bundle.graph("step", precision).name
        yield row("step_error_max", apart, 32, replace(where, steps=PROBE.steps), of=bundle.manifest.files[step].sha256)

    calibration = bundle.calibration(precision)
    seen = Seen(image, found.features, found.logits)
    rate = flagged(bundle, precision, ood_score(bundle, precision, seen)).mean()
    yield from flag_rows(row, rate, len(e), len(calibration.scores), precision)
    by_fp32 = flagged(bundle, "fp32", ood_score(bundle, "fp32", seen)).mean()
    yield row("flag_rate_clean_fp32_threshold", by_fp32, len(e), alpha=ALPHA, calibration="fp32")
    if precision != "bf16":
        yield row("graph_bytes", bundle.graph("classify", precision).stat().st_size, 1)
    yield from speed_rows(row, fp32.engine, low, image)


def transferred(bundle: Bundle, image: Floats, label: Labels, eps: float) -> Floats:
    """Return PGD-20 adversarial images of the fp32 network, computed by torch."""
    model, noise = load_model(bundle), Noise.seeded(SEED)
    parts = [
        pgd(model, x, y, objective=cross_entropy, threat=Threat("linf", eps), attack=Attack(steps=20), noise=noise).numpy()
        for x, y in zip(torch.split(torch.from_numpy(image), 100), torch.split(torch.from_numpy(label), 100), strict=True)
    ]
    return np.concatenate(parts)


def square_survivors(engine: Engine, image: Floats, label: Labels, eps: float, queries: int) -> np.ndarray:
    """Return the images still right after Square (arXiv 1912.00049, package pyautoattack) on the engine, (N,) bool."""
    from pyautoattack.square import SquareAttack

    def ask(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(classify_in_chunks(engine, x.contiguous().numpy()).logits)

    attack = SquareAttack(ask, "Linf", queries, eps, seed=SEED, device="cpu")
    x, y = torch.from_numpy(image), torch.from_numpy(label)
    return right(ask(attack.perturb(x, y)).numpy(), label)


def table(rows: list[Row]) -> str:
    """Return a Markdown table: a line per figure, a column per precision."""
    found = [precision for precision in LOWER if rows_of(rows, precision)]
    lines = [f"| figure | {' | '.join(found)} | n | protocol |", "|---" * (len(found) + 3) + "|"]
    for name in FIGURES:
        measured = [first(rows, f"{name}_{precision}") for precision in found]
        if row := next((row for row in measured if row), None):
            cells = [f"{each.value:.4g}" if each else "" for each in measured]
            reference = f"; fp32 {row.fp32:.4g}" if row.fp32 is not None else ""
            lines.append(f"| {name} | {' | '.join(cells)} | {row.n} | {protocol_words(row)}{reference} |")
    return "\n".join(lines)


def main() -> None:
    """Add the precisions named on the command line, one after the other."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", nargs="+", required=True, choices=LOWER)
    default = Amounts()
    parser.add_argument("--n", type=int, default=default.n, help="test images for parity, accuracy and flags (%(default)s)")
    parser.add_argument("--attacked", type=int, default=default.attacked, help="test images attacked by PGD on the fp32 net (%(default)s)")
    parser.add_argument("--square", type=int, default=default.square, help="test images attacked by Square (%(default)s)")
    parser.add_argument("--queries", type=int, default=default.queries, help="queries of Square per image (%(default)s)")
    parser.add_argument("--data", help="for a bundle of your own data: the folder, if it has moved")
    parser.add_argument("--force", action="store_true", help=FORCED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with command(parser):
        # the parent folder gets a copy, even when the bundle is the working folder
        bundle = check_editable(options.bundle.resolve(), force=options.force)
        data = dataset_of(bundle, options.data)
        amounts = Amounts(options.n, options.attacked, options.square, options.queries)
        done = admit(bundle, data, options.precision, amounts)
        print(f"{', '.join(options.precision)} admitted to {done.path}, now {done.manifest.version}", flush=True)


if __name__ == "__main__":
    main()
