"""Measure the columns of docs/equal_budget.md that a kept row lacks: `python benchmarks/equal_budget.py OUT --evaluate ROW …`.

The composite score is of a calibrated bundle, so the row's weights are exported and calibrated as a refresh does it, in a folder under
EBJDAT_RUNS. Only the figures of the tables are measured, not whole parts of `training/evaluate.py`; results are kept in chunks, so a
killed run continues.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from benchmarks.equal_budget_entries import AVERAGES, PREFIX
from ebjdat_serve.bundle import MANIFEST, Bundle, read_rows, sha256, write_rows
from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.networks import architecture_of_weights
from ebjdat_serve.rows import SUM, Images, Row
from ebjdat_serve.scores import BASELINE
from export.parity import check
from export.to_onnx import export
from training.calibrate import calibrate
from training.data.datasets import Dataset, load
from training.data.image_folders import spread
from training.evaluate import context
from training.evaluation.attacks import Pgd, Predict
from training.evaluation.autoattack import APGD, AutoAttack
from training.evaluation.calibration import clean_rows, quality
from training.evaluation.context import Context, Suite
from training.evaluation.evaluated_model import bundle_spec
from training.evaluation.evidence import merge
from training.evaluation.flags import Flag, calibration_of, flags_of
from training.evaluation.generation import generation_rows
from training.evaluation.metrics import auroc, auroc_stderr, negative_log_likelihood
from training.evaluation.ood import auroc_row, ood_sets
from training.evaluation.ood_sets import OOD_ATLASES
from training.evaluation.reach_rows import attacks, classes, made_by
from training.evaluation.reach_rows import measured as walked
from training.evaluation.result_cache import Arrays, load_flat, work_root, write
from training.evaluation.robustness import under, under_pgd
from training.evaluation.rows import compared_with, number, with_finite_error
from training.loop.bundle_writer import Origin, draft_bundle, git_commit
from training.loop.state import Position, load_weights, mean_weights, save_weights
from training.presets import CIFAR10_WRN16


def likelihood_rows(c: Context) -> Iterator[Row]:
    """Yield NLL, Brier score and ECE on clean test images, at temperature 1 and at the calibrated one."""
    logits, label, temperature = clean_logits(c)
    yield from quality(c, [(logits, label)], c.where, {"1": 1.0, "fitted": temperature})


def likelihood_values(c: Context) -> Arrays:
    """Return the NLL of each clean test image at the calibrated temperature."""
    logits, label, temperature = clean_logits(c)
    return {"nll": negative_log_likelihood(probabilities(logits.astype(np.float32), temperature), label).astype(np.float32)}


def clean_logits(c: Context) -> tuple[Floats, Labels, float]:
    """Return logits and labels of the clean test images, and the calibrated temperature."""
    image, label = c.test(c.suite.test)
    (found,) = c.ledger.run("calibration", [(Predict(), image, label)])
    calibration = calibration_of(c)
    assert calibration is not None
    return found["logits"], label, calibration.temperature


def pgd_rows(c: Context) -> Iterator[Row]:
    """Yield the accuracy under PGD-20."""
    linf, _, _ = c.ball.threats()
    (found,) = c.run("PGD-20", Pgd(linf), n=c.suite.attacked)
    yield c.share("accuracy_pgd20", found["robust_mask"], under_pgd(c, "ce", linf), c.subject.weights)


def margin_rows(c: Context) -> Iterator[Row]:
    """Yield the accuracy under PGD-20 on the margin with 5 starts."""
    linf, _, _ = c.ball.threats()
    (found,) = c.run("PGD-20, margin, 5 starts", Pgd(linf, objective="margin", restarts=5, eot=c.eot), n=c.suite.strong)
    yield c.share("accuracy_pgd20_restarts", found["robust_mask"], under_pgd(c, "margin", linf, 5), c.subject.weights)


def apgd_rows(c: Context) -> Iterator[Row]:
    """Yield the accuracy under APGD-CE and APGD-T."""
    linf, _, _ = c.ball.threats()
    if c.attackers():
        (found,) = c.run("APGD", AutoAttack(linf, APGD), n=c.suite.strong)
        yield c.share("accuracy_apgd", found["robust_mask"], under(c, "apgd", linf), c.subject.weights)


def autoattack_rows(c: Context) -> Iterator[Row]:
    """Yield the accuracy under official AutoAttack."""
    linf, _, _ = c.ball.threats()
    if c.suite.autoattack and c.attackers():
        (found,) = c.run("AutoAttack", AutoAttack(linf), n=c.suite.autoattack)
        images = replace(under(c, "autoattack", linf), version="standard")
        yield c.share("accuracy_autoattack", found["robust_mask"], images, c.subject.weights)


def ood_rows(c: Context) -> Iterator[Row]:
    """Yield the AUROC of SVHN and CIFAR-100 against clean test images, by energy, the composite score and max softmax."""
    for flag, images, clean, found in ood_scores(c):
        yield auroc_row(c, f"auroc_{flag.score}", flag, images, clean, found)


def ood_values(c: Context) -> Arrays:
    """Return these scores of each image: "score|data set", with those of the clean test images as "score|clean"."""
    values: Arrays = {}
    for flag, images, clean, found in ood_scores(c):
        values |= {f"{flag.score}|clean": clean.astype(np.float32), f"{flag.score}|{images.dataset}": found.astype(np.float32)}
    return values


def ood_scores(c: Context) -> Iterator[tuple[Flag, Images, Floats, Floats]]:
    """Yield the flag, the set, and the score of clean test images and of the set's."""
    _, every = flags_of(c)
    image, label = c.test(c.suite.test)
    clean = c.look(c.where, Predict(), image, label)
    for name, strange in ood_sets(c):
        if name in OOD_ATLASES:
            images = Images(dataset=name)
            found = c.look(images, Predict(), strange[spread(len(strange), c.suite.test)])
            for flag in every:
                if flag.score in (SUM, "energy", BASELINE):
                    yield flag, images, flag.value(clean), flag.value(found)


def reach_rows(c: Context) -> Iterator[Row]:
    """Yield the AUROC of images that PGD-20 fooled against all clean ones, by reach score and margin."""
    flag, _ = flags_of(c)
    images, attack, n = next(attacks(c))
    image, label = c.test(n)
    clean, made = walked(c, flag, image, label, "clean"), made_by(c, images, attack, image, label)
    fooled = (classes(c, image, label) == label) & (made["logits"].argmax(axis=1) != label)
    if not fooled.any():
        c.say("reach: no image is fooled, so nothing is separated")
        return
    found = walked(c, flag, made["image"][fooled], label[fooled], "fooled")
    where, against = replace(images, subset="fooled"), compared_with(c.data.name, "test", n)
    for score in ("reach_score", "margin"):
        a, b = clean[score], found[score]
        about = {"stderr": auroc_stderr(a, b), "score": score, **against}
        yield number("reach_auroc", auroc(a, b), len(a) + len(b), where, c.subject.graph, **about)


MEASURES: dict[str, tuple[str, Callable[[Context], Iterator[Row]]]] = {
    "clean": ("clean", clean_rows),
    "nll": ("calibration", likelihood_rows),
    "ood": ("suspicion", ood_rows),
    "reach": ("reach", reach_rows),
    "samples": ("generation", generation_rows),
    "pgd": ("robustness", pgd_rows),
    "margin": ("robustness", margin_rows),
    "apgd": ("robustness", apgd_rows),
    "autoattack": ("robustness", autoattack_rows),
}
"""The figures of each name of ``MEASURED``, and the part of an evaluation that they belong to."""
VALUES = {"nll": likelihood_values, "ood": ood_values}
"""Values of each image, kept in values.npz: a difference between two rows is paired on them."""


def complete(out: Path, name: str, measures: Sequence[str], suite: Suite) -> None:
    """Measure ``measures`` of a kept row of ``out`` and take the figures into its metrics.json and images.npz as they come.

    An average's weights are made, under EBJDAT_RUNS. Raises FileNotFoundError for a row whose weights are not kept.
    """
    row, data = out / f"{PREFIX}{name}", load("cifar10")
    weights = row / "weights.safetensors"
    if name in AVERAGES:
        weights = work_root() / "equal-budget" / row.name / "weights.safetensors"
        weights.parent.mkdir(parents=True, exist_ok=True)
        parts = [kept_weights(out / f"{PREFIX}{part}" / "weights.safetensors") for part in AVERAGES[name]]
        save_weights(mean_weights(parts), weights)
    bundle = bundle_of(weights, data)
    c = context(bundle_spec(bundle.path), data, suite, processes=1, bundle=bundle, folder=bundle.path.parent / "measured")
    for measure in measures:
        part, rows_of = MEASURES[measure]
        c.part = part
        found = [with_finite_error(replace(one, part=part)) for one in rows_of(c) if np.isfinite(one.value)]
        keep(row, found, {one.key: c.images[one.key] for one in found if one.key in c.images})
        if measure in VALUES:
            keep_longer(row / "values.npz", VALUES[measure](c))
        for text in c.warnings.pop(part, []):
            print(f"{name}, {measure}: {text}", flush=True)
        for one in found:
            print(f"{name}: {one.metric} {one.value:.4f} of {one.n}", flush=True)
    c.ledger.close()


def keep(row: Path, rows: list[Row], images: dict[str, np.ndarray]) -> None:
    """Take figures and per-image results into a row's folder; none of fewer images replaces one of more."""
    file, results = row / "metrics.json", row / "images.npz"
    write_rows(file, merge(read_rows(file) if file.is_file() else [], rows).rows)
    keep_longer(results, images)


def keep_longer(file: Path, arrays: Arrays) -> None:
    """Take arrays into a file of per-image results; none of fewer images replaces one of more."""
    known = load_flat(file)
    write(file, known | {key: found for key, found in arrays.items() if len(found) >= len(known.get(key, ()))})


def kept_weights(file: Path) -> Path:
    """Return the weights of a row; raise FileNotFoundError for one whose weights are not kept."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not kept: only rows with weights can be measured")
    return file


def bundle_of(weights: Path, data: Dataset) -> Bundle:
    """Return a calibrated draft bundle of kept weights, made unless it exists.

    Its sampler, 80 steps of 0.25, is that of all rows.
    """
    kept_weights(weights)
    home = work_root() / "equal-budget" / f"{weights.parent.name}-{sha256(weights)[:12]}" / "bundle"
    if (home / MANIFEST).is_file() and Bundle.draft(home).calibrated:
        return Bundle.load(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    wide = home.parent / "weights.safetensors"
    state = load_weights(weights)
    save_file(state, wide)
    stage = replace(CIFAR10_WRN16, name=weights.parent.name, architecture=architecture_of_weights(state)[0])
    origin = Origin(git_commit(), datetime.now(UTC).isoformat(timespec="seconds"), "")
    bundle = export(draft_bundle(wide, stage, data, home, origin, Position(0, 0.0, 0), 0))
    check(bundle)
    return calibrate(bundle, data, reach_steps=0)
