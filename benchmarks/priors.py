#!/usr/bin/env python3
"""What imported networks draw from a prior that was fitted to a folder: `python benchmarks/priors.py --json benchmarks/priors.json`.

Each is imported as the command does it, with a folder of CIFAR-10 training images, and its class agreement is that of its bundle. Of the
networks of CIFAR-10 a robust judge that knows neither also says what it sees. `--table` writes docs/import.md and docs/priors.png.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.tables import DOCS, HERE, parsed, placed
from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.engines import load_engine
from ebjdat_serve.folder_prior import Wanted, prior_folder
from ebjdat_serve.generation import generate
from ebjdat_serve.importing import import_model
from ebjdat_serve.networks import network_of
from ebjdat_serve.pixels import Pixels, encode_png, grid, to_unit
from ebjdat_serve.rows import FRESH, PRIOR, Row, first, rows_where, to_json
from ebjdat_serve.sgld import Prior, Sampler
from training.data.datasets import Dataset, load
from training.errors import TrainingError
from training.evaluation.crown import load_crown
from training.evaluation.rows import proportion

JUDGE = "resnet4b"
IMAGENET = {404: 0, 817: 1, 94: 2, 281: 3, 353: 4, 207: 5, 30: 6, 339: 7, 510: 8, 867: 9}
"""Classes of ImageNet by number, each with a class of CIFAR-10 whose images stand for it: airliner, sports car, hummingbird, tabby,
gazelle, golden retriever, bullfrog, sorrel, container ship, trailer truck."""


@dataclass(frozen=True)
class Subject:
    """A network that is imported: what is said of it, its source and contract, and how many images of each class it gets."""

    said: str
    source: str
    contract: Mapping[str, Any]
    images: int
    classes: Mapping[int, int]  # its class: the class of CIFAR-10


def standard() -> nn.Module:
    """Return the kept network that was trained without a defence."""
    return network_of(load_file(HERE / "models" / "standard" / "weights.safetensors"))


def adversarially_trained() -> nn.Module:
    """Return the kept network that was trained on adversarial images."""
    return network_of(load_file(HERE / "models" / "pgd-at" / "weights.safetensors"))


CIFAR = {"height": 32, "width": 32, "resize": "squash", "filter": "bilinear"}
LITE0 = {
    "height": 224, "width": 224, "resize": "shorter", "filter": "bicubic", "crop": 0.875, "scale": 255.0, "mean": [127.0] * 3,
    "std": [128.0] * 3, "channel_order": "RGB",
}  # fmt: skip
SAME = {y: y for y in range(10)}
SUBJECTS = {
    "standard": Subject("WRN-16-2 on CIFAR-10, no defence", "python:benchmarks.priors:standard", CIFAR, 500, SAME),
    "pgd-at": Subject("WRN-16-2 on CIFAR-10, adversarially trained", "python:benchmarks.priors:adversarially_trained", CIFAR, 500, SAME),
    "lite0": Subject("EfficientNet-Lite0 on ImageNet, no defence", "python:benchmarks.import_table:lite0", LITE0, 100, IMAGENET),
}


def measure(name: str, data: Dataset, home: Path, wanted: Wanted) -> tuple[list[dict[str, Any]], dict[str, Pixels]]:
    """Return the rows of one network, and images of the ten classes: where chains start, and where they end."""
    subject = SUBJECTS[name]
    photos = home / f"{name}-photos"
    for y, shown in subject.classes.items():
        (photos / str(y)).mkdir(parents=True)
        for place in np.flatnonzero(data.train.label == shown)[: subject.images]:
            (photos / str(y) / f"{place:05}.png").write_bytes(encode_png(data.train.image[place]))
    (home / f"{name}.json").write_text(json.dumps(subject.contract), encoding="utf-8")
    bundle = import_model(subject.source, home / name, contract=home / f"{name}.json", allow_code=True, say=print)
    bundle = prior_folder(bundle, photos, wanted=wanted, say=print)
    rows, label = bundle.metrics(), np.array(list(subject.classes))
    drawn = {dataset: draw(bundle, dataset, label) for dataset in (PRIOR, FRESH)} if subject.classes == SAME else {}
    if drawn:
        rows += judged(bundle, rows)
    return [{"name": f"{row.metric}, {row.dataset}, {row.steps or 0} steps, {name}", "unit": "share", "model": name, **to_json(row)}
            for row in rows], drawn  # fmt: skip


def draw(bundle: Bundle, dataset: str, label: np.ndarray) -> Pixels:
    """Return one image of each label: of the prior alone, or after all steps; image i by seed i."""
    engine, prior = load_engine(bundle, "auto", "cpu"), Prior.load(bundle.path / "prior.safetensors")
    return generate(engine, prior, bundle.manifest.sampler if dataset == FRESH else Sampler(1, 0.0, 0.0, 0.0), label, seed=0).image


def judged(bundle: Bundle, rows: list[Row]) -> list[Row]:
    """Return the share that the judge labels as asked, of as many chains of the same seeds."""
    judge = load_crown(JUDGE)
    if judge is None:
        raise TrainingError(f"the judge {JUDGE} is not in the data folder: docs/evaluation.md says where it is from")
    found = []
    for row in rows_where(rows, "class_agreement_own"):
        if row.steps in (None, bundle.manifest.sampler.steps):
            label = np.resize(np.random.default_rng(0).permutation(10), row.n)
            image = torch.from_numpy(to_unit(draw(bundle, row.dataset, label)))
            with torch.no_grad():
                good = judge(image).argmax(dim=1).numpy() == label
            found.append(replace(proportion(f"class_agreement_{JUDGE}", int(good.sum()), row.n, row.images, row.of), extractor=JUDGE))
    return found


def document(text: str, rows: list[dict[str, Any]]) -> str:
    """Return ``text`` with the table of ``rows``."""
    lines = ["| network | prior alone | a quarter of the steps | all steps | judge: prior alone | judge: all | chains | sampler |"]
    lines.append("|---" * 8 + "|")
    for name, subject in SUBJECTS.items():
        own = [parsed(row) for row in rows if row["model"] == name]
        if not own:
            continue
        whole, quarter = rows_where(own, "class_agreement_own", dataset=FRESH)
        shown = [first(own, "class_agreement_own", dataset=PRIOR), quarter, whole]
        shown += [first(own, f"class_agreement_{JUDGE}", dataset=dataset) for dataset in (PRIOR, FRESH)]
        sampler = f"{whole.steps} steps of {whole.step_size:g}, clip {whole.grad_clip:g}, noise {whole.noise_std:g}"
        lines.append(f"| {subject.said} | {' | '.join(map(cell, shown))} | {whole.n} | {sampler} |")
    return placed(text, "priors", "\n".join(lines))


def cell(row: Row | None) -> str:
    """Return a share with its interval."""
    return "" if row is None or row.interval is None else f"{row.value:.3f} [{row.interval[0]:.2f}, {row.interval[1]:.2f}]"


def main() -> None:
    """Measure the networks named, keep the rows of others, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--chains", type=int, help="chains of each network (as many as 5 minutes allow)")
    parser.add_argument("--json", type=Path, default=HERE / "priors.json")
    parser.add_argument("--table", action="store_true", help="only write the table of docs/import.md")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else []
    if not options.table:
        data = load("cifar10")
        pictures: list[Pixels] = []
        with tempfile.TemporaryDirectory() as folder:
            for name in options.only:
                print(name, file=sys.stderr)
                found, drawn = measure(name, data, Path(folder), Wanted(chains=options.chains))
                rows = [row for row in rows if row["model"] != name] + found
                write_json(options.json, rows)
                pictures += [drawn[FRESH]] if pictures else list(drawn.values())
        if set(options.only) >= {"standard", "pgd-at"}:
            (DOCS / "priors.png").write_bytes(encode_png(grid(np.concatenate(pictures), 2, columns=10), generated=True))
    text = (DOCS / "import.md").read_text(encoding="utf-8")
    (DOCS / "import.md").write_text(document(text, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
