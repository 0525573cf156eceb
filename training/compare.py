#!/usr/bin/env python3
"""Compare evaluated models: `python training/compare.py A B … [--out comparison.html]`.

Each model is a bundle, or a folder written by ``evaluate_module``. Figures of the same metric, data and protocol are compared;
proportions on the same images are tested in pairs against the first model (exact McNemar); the landscapes share one axis, in standard
deviations of each model's clean energies.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.bundle import MANIFEST, Bundle, read_rows
from ebjdat_serve.card import figure
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.rows import GENERATED, Images, Row
from ebjdat_serve.sentences import data_words, protocol_words
from training.card import refuse_stale
from training.errors import TrainingError
from training.evaluate import PARTS, folder_name
from training.evaluation.evidence import merge
from training.evaluation.landscape import clean_of
from training.evaluation.metrics import mcnemar
from training.evaluation.report import HEADINGS
from training.evaluation.result_cache import Arrays, load_arrays, load_flat, work_root
from training.evaluation.rows import ball_of
from training.pages import render

IN_SHORT = (
    "accuracy_clean",
    "accuracy_pgd20",
    "accuracy_autoattack",
    "accuracy_apgd",
    "accuracy_worst_case",
    "masking_suspected",
    "energy_gap_over_sd",
    "joint_energy_w1_over_sd",
    "attack_success",
    "auroc_views",
    "auroc_energy",
    "auroc_energy_entropy",
    "auroc_max_softmax",
    "accuracy_with_rejection",
    "class_agreement_resnet20",
    "class_agreement_resnet4b",
    "frechet_resnet20",
    "kernel_distance_efficientnet_lite0",
    "nll",
    "ece",
)
Key = tuple[str, tuple[int, int | None] | None]


@dataclass(frozen=True)
class Evaluated:
    """One model's rows and its per-image results."""

    name: str
    data: str
    data_sha256: str
    rows: dict[Key, Row]
    images: dict[str, NDArray[np.bool_]]
    arrays: dict[Images, Arrays]


def read(path: Path) -> Evaluated:
    """Return an evaluated bundle or folder; raise TrainingError when it was not evaluated, BundleError when its figures are stale."""
    if (path / MANIFEST).is_file() or (path / "current").exists():
        bundle = Bundle.draft(path)
        m = bundle.manifest
        rows, name, data, digest = bundle.metrics(), m.name, m.provenance.dataset, m.provenance.data_sha256
        refuse_stale(bundle, rows)
        weights = m.files["weights.safetensors"].sha256
        folder = work_root() / folder_name(name, weights, digest)
        if m.imported:
            folder, data, digest = measured_on(path, name, weights)
        if (folder / "metrics.json").is_file():  # measured here, perhaps never taken into the bundle
            rows = merge(rows, [row for row in read_rows(folder / "metrics.json") if bundle.holds(row.of)]).rows
        name = f"{name}@{m.version}"
    elif (path / "subject.json").is_file() and (path / "metrics.json").is_file():
        subject = json.loads((path / "subject.json").read_text(encoding="utf-8"))
        rows, name, data, digest, folder = read_rows(path / "metrics.json"), subject["name"], subject["data"], subject["data_sha256"], path
    else:
        raise TrainingError(f"{path} is neither a bundle nor the folder of an evaluation: run python training/evaluate.py on it first")
    rows = [row for row in rows if row.part in PARTS]
    if not rows:
        raise TrainingError(f"{path} has no figures: run python training/evaluate.py {path}")
    images, arrays = load_flat(folder / "images.npz"), load_arrays(folder)
    if not images:
        print(f"{name}: evaluated on another machine, so it has no paired tests and no landscape", file=sys.stderr)
    return Evaluated(name, data, digest, {key(row): row for row in rows}, images, arrays)


def measured_on(path: Path, name: str, weights: str) -> tuple[Path, str, str]:
    """Return the folder of an imported bundle's evaluation here, its data and their sha256; its bundle does not say them.

    Raises TrainingError where it was measured on several folders of images.
    """
    found = sorted(file.parent for file in work_root().glob(f"{folder_name(name, weights, '')}*/subject.json"))
    if len(found) > 1:
        raise TrainingError(f"{path} was measured on several folders: name one of {', '.join(map(str, found))}")
    if not found:
        return work_root() / "none", "unknown", ""
    subject = json.loads((found[0] / "subject.json").read_text(encoding="utf-8"))
    return found[0], subject["data"], subject["data_sha256"]


def key(row: Row) -> Key:
    """Return the key of a measurement; of generated images it includes n, since their figures are biased by it."""
    return row.key, (row.n, row.against_n) if row.part == "generation" else None


def shared(models: Sequence[Evaluated], short: bool) -> list[Key]:
    """Return the measurements shared by two or more models, in the order of the parts."""
    every = list(dict.fromkeys(known for model in models for known in model.rows))
    common = [known for known in every if sum(known in model.rows for model in models) > 1]
    order = {name: i for i, name in enumerate(PARTS)}
    rows = {known: next(model.rows[known] for model in models if known in model.rows) for known in common}
    fooled = {replace(row.images, subset=None) for row in rows.values() if row.subset == "fooled"}
    chosen = [known for known in common if not short or (rows[known].metric in IN_SHORT and not diluted(rows[known], fooled))]
    return sorted(chosen, key=lambda known: (order[rows[known].part or ""], common.index(known)))


def diluted(row: Row, fooled: set[Images]) -> bool:
    """Return whether an AUROC includes images that the attack did not fool, when the fooled images have an AUROC of their own."""
    return row.metric == f"auroc_{row.score}" and (row.images in fooled or row.subset == "not fooled")


def paired(first: Evaluated, other: Evaluated, known: Key) -> float | None:
    """Return the p-value of equal performance on the images that both saw, or None if there are none.

    The first n images of a test set are the same for both models; generated images are not.
    """
    if known not in first.rows or known not in other.rows or first.rows[known].dataset in GENERATED:
        return None
    a, b = (model.images.get(model.rows[known].key) for model in (first, other))
    if a is None or b is None or len(a) != first.rows[known].n or len(b) != other.rows[known].n:  # of another run than the row
        return None
    n = min(len(a), len(b))
    return mcnemar(a[:n].astype(bool), b[:n].astype(bool))


def common(rows: Iterable[Row]) -> Row:
    """Return the first row of one measurement, for rendering, without counts that differ between models."""
    first, *others = rows
    return first if all(row.against_n == first.against_n for row in others) else replace(first, against_n=None)


@dataclass(frozen=True)
class Line:
    """A table row: a value per model, a p-value per model but the first, and n."""

    metric: str
    values: list[str]
    data: str
    protocol: str


def line(models: Sequence[Evaluated], known: Key) -> Line:
    """Return one measurement of all models, empty for models without it."""
    rows = [model.rows.get(known) for model in models]
    values = [figure(row) if row else "" for row in rows]
    p = [paired(models[0], model, known) for model in models[1:]]
    amounts = sorted({row.n for row in rows if row})
    some = common(row for row in rows if row)
    values += ["" if value is None else f"{value:.2g}" for value in p]
    return Line(some.metric, [*values, ", ".join(map(str, amounts))], data_words(some), protocol_words(some))


def markdown(models: Sequence[Evaluated], short: bool = True) -> str:
    """Return the comparison as a Markdown table."""
    tested = [f"p, {model.name}" for model in models[1:]]
    head = ["figure", *(model.name for model in models), *tested, "n", "data", "protocol"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in (line(models, known) for known in shared(models, short)):
        cells = (one.metric, *one.values, one.data, one.protocol)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def page(models: Sequence[Evaluated]) -> str:
    """Return the comparison as a self-contained page."""
    from training.evaluation import figures as draw

    seen = [(model.name, model.arrays) for model in models if clean_of(model.arrays)]
    sections = []
    for part in PARTS:
        found = [known for known in shared(models, False) if next(m.rows[known] for m in models if known in m.rows).part == part]
        if found:
            sections.append((HEADINGS[part], [line(models, known) for known in found]))
    landscapes = draw.png(draw.landscapes(seen, ball_of(models[0].data).linf), 110) if seen else None
    return render("comparison.html", names=[model.name for model in models], landscapes=landscapes, sections=sections)


def main() -> None:
    """Compare the models named on the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="bundles, or folders of evaluations")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"))
    parser.add_argument("--picture", type=Path, help="also write the landscapes as PNG")
    parser.add_argument("--all", action="store_true", help="print every shared figure, not only the main ones")
    options = parser.parse_args()
    with command(parser):
        models = [read(path) for path in options.models]
        if len(models) < 2:
            raise TrainingError("name two or more models")
        if len({model.data_sha256 for model in models}) > 1:
            raise TrainingError(
                f"the models were trained on different data: {', '.join(f'{model.name} of {model.data}' for model in models)}"
            )
        if not shared(models, False):
            raise TrainingError("the models share no figure: evaluate them with the same suite and n")
    options.out.write_text(page(models), encoding="utf-8")
    if options.picture:
        from training.evaluation.figures import landscapes, png

        if not any(clean_of(model.arrays) for model in models):
            sys.exit("no landscape: none of the models was evaluated on this machine")
        options.picture.write_bytes(
            png(landscapes([(m.name, m.arrays) for m in models if clean_of(m.arrays)], ball_of(models[0].data).linf))
        )
    print(markdown(models, not options.all))
    print(f"\n{options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
