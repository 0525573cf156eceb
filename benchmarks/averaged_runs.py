#!/usr/bin/env python3
"""Choose the recipe of decision 0037 and the sampler of 0006 on selection images: `python benchmarks/averaged_runs.py`.

Weights are weighted means of the kept runs of docs/equal_budget.md. Everything is measured on CIFAR-10's selection split, which no run was
trained on, never on test images. Rows go to averaged_runs.json one by one, and an interrupted run continues; --table writes the tables
of both decisions. Needs CIFAR-10 and the judges' weights under EBJDAT_DATA.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.digits_cells import bits
from benchmarks.equal_budget_entries import PREFIX
from benchmarks.tables import DOCS, HERE, pivot, placed
from ebjdat_serve.bundle import sha256, write_json
from ebjdat_serve.networks import Network, architecture_of_weights, build
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.sgld import Sampler
from training.data.datasets import Dataset, load
from training.evaluation.attacks import Pgd
from training.evaluation.distances import frechet_distance, kernel_distance
from training.evaluation.evaluated_model import EvaluatedModel, open_module
from training.evaluation.extractors import RESNET4B, RESNET20, Features
from training.evaluation.generation import Draw
from training.evaluation.metrics import paired_interval
from training.loop.state import load_weights
from training.methods.adversary import Threat
from training.methods.replay import prior_of

RESULTS = HERE / "averaged_runs.json"
KL, GAP, CONTROL = "trades-w1", "ebjdat-light", "pgd7"
Mix = dict[str, float]
"""The weight of each kept run, summing to one."""
CHOSEN: Mix = {KL: 0.5, GAP: 0.5}
MIXES: list[Mix] = [
    {CONTROL: 1.0}, {KL: 1.0}, {GAP: 1.0}, CHOSEN, {KL: 0.75, GAP: 0.25}, {KL: 0.35, GAP: 0.65}, {KL: 0.75, CONTROL: 0.25},
    {KL: 0.4, GAP: 0.4, CONTROL: 0.2},
]  # fmt: skip
ATTACKED = 1_000
"""Images under PGD-10; all of the selection split for the chosen mean and the control."""
CHUNK = 100
"""Images under one attack, as in an evaluation: a batch of all takes ten gigabytes."""
SAMPLES = 200
NOISE, CLIP = 0.005, 2.0


@dataclass(frozen=True)
class Drawing:
    """Steps of one sampler, drawn with one mix."""

    mix: str
    steps: int
    step_size: float


def named(mix: Mix) -> str:
    """Return a mix as text."""
    return " + ".join(run if weight == 1.0 else f"{weight:g} {run}" for run, weight in mix.items())


def title(one: Drawing) -> str:
    """Return the name of a drawing's row."""
    return f"{one.mix}, {one.steps} x {one.step_size:g}"


SAMPLERS = ((1.0, 10), (1.0, 20), (1.0, 40), (0.5, 20), (0.5, 40), (0.25, 20), (0.25, 80), (2.0, 20))
DRAWINGS = [Drawing(named(CHOSEN), steps, size) for size, steps in SAMPLERS]
DRAWINGS += [Drawing(CONTROL, steps, size) for size, steps in ((1.0, 20), (0.25, 20), (0.25, 80))]


def subject_of(mix: Mix) -> EvaluatedModel:
    """Return the network whose weights are the weighted mean of kept ones."""
    kept = {run: load_weights(HERE / "models" / f"{PREFIX}{run}" / "weights.safetensors") for run in mix}
    names = next(iter(kept.values()))
    weights = {name: torch.stack([share * kept[run][name] for run, share in mix.items()]).sum(dim=0) for name in names}
    network: Network = build(*architecture_of_weights(weights), weights)
    return open_module(named(mix), network.requires_grad_(False), named(mix))


def accuracies(mix: Mix, data: Dataset) -> dict[str, Any]:
    """Return clean accuracy and PGD-10 at l-inf 8/255, and per-image results."""
    subject, image, label = subject_of(mix), to_unit(data.selection.image), data.selection.label
    n = len(label) if mix in (CHOSEN, {CONTROL: 1.0}) else ATTACKED
    clean = subject.logits(image).argmax(axis=1) == label
    attack, chunks = Pgd(Threat("linf", 8 / 255), steps=10), [slice(i, i + CHUNK) for i in range(0, n, CHUNK)]
    robust = np.concatenate([attack.run(subject, image[part], label[part])["robust_mask"] for part in chunks])
    figures = {"accuracy_clean": float(clean.mean()), "n_clean": len(label), "clean": bits(clean), "robust": bits(robust)}
    return {"name": named(mix), "unit": "share", "value": float(robust.mean()), "n": n, "seed": 0, **figures}


def features(subject: EvaluatedModel, extractor: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    """Return a judge's features and logits of uint8 images (N, H, W, 3)."""
    return Features(extractor).run(subject, to_unit(image), np.zeros(len(image), np.int64))


def drawn(one: Drawing, data: Dataset) -> dict[str, Any]:
    """Return KID and Frechet distance of fresh samples from selection images, and how often both judges see the class asked for."""
    mix = next(mix for mix in MIXES if named(mix) == one.mix)
    subject, label = subject_of(mix), np.resize(np.arange(len(data.names)), SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prior.safetensors"
        prior_of(data, 48).save(file)
        sampler = Sampler(one.steps, one.step_size, CLIP, NOISE)
        index = np.arange(SAMPLES, dtype=np.float32)[:, None]
        image = Draw(sampler, str(file), sha256(file)).run(subject, index, label)["image"]
    seen, real = (features(subject, RESNET20, every) for every in (image, data.selection.image))
    kid, error, _ = kernel_distance(seen["features"], real["features"])
    robust = features(subject, RESNET4B, image)["logits"]
    return {
        "name": title(one), "unit": "KID", "value": kid, "stderr": error, "n": SAMPLES, "seed": 0,
        "frechet": frechet_distance(seen["features"], real["features"]), **asdict(one),
        "resnet20": float((seen["logits"].argmax(axis=1) == label).mean()), "resnet4b": float((robust.argmax(axis=1) == label).mean()),
    }  # fmt: skip


def mixes_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of decision 0037: differences from the control are paired, with 95 % intervals."""
    found = {row["name"]: row for row in rows}
    lines = []
    for mix in MIXES:
        row, control = found[named(mix)], found[CONTROL]
        robust, other = (np.array(list(each["robust"][: row["n"]])) == "1" for each in (row, control))
        low, high = paired_interval(robust, other)
        paired = "" if mix == {CONTROL: 1.0} else f"{robust.mean() - other.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        name = f"**{named(mix)}**" if mix == CHOSEN else named(mix)
        lines.append([name, f"{row['accuracy_clean']:.3f}", f"{row['value']:.3f}", paired, f"{row['n']:,}"])
    return pivot(["weights", "clean, n = 2,500", "PGD-10 8/255", "minus control", "n"], lines)


def drawings_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of decision 0006."""
    found = {row["name"]: row for row in rows}
    lines = []
    for one in DRAWINGS:
        row = found[title(one)]
        cells = [f"{row['value']:.3f} ± {row['stderr']:.3f}", f"{row['frechet']:.2f}", f"{row['resnet20']:.3f}", f"{row['resnet4b']:.3f}"]
        lines.append([row["mix"], str(one.steps), f"{one.step_size:g}", *cells])
    return pivot(["weights", "steps", "step size", "KID", "Frechet", "ResNet-20 agrees", "ResNet-4b agrees"], lines)


TABLES = {"0037-averaged-runs.md": ("mixes", mixes_table), "0006-sampler.md": ("sampler", drawings_table)}


def main() -> None:
    """Measure the missing rows, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="measure nothing: write the tables of decisions 0037 and 0006")
    options = parser.parse_args()
    try:
        rows: list[dict[str, Any]] = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else []
        known = {str(row["name"]) for row in rows}
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"{options.json} holds no list of rows ({error})")
    if not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")  # before the first row is measured
    if options.table:
        if missing := [name for name in (*map(named, MIXES), *map(title, DRAWINGS)) if name not in known]:
            parser.error(f"{options.json} holds no rows of {', '.join(missing)}: measure them first, without --table")
        for name, (mark, table) in TABLES.items():
            page = DOCS / "decisions" / name
            page.write_text(placed(page.read_text(encoding="utf-8"), mark, table(rows)), encoding="utf-8")
        return
    torch.set_num_threads(1)
    data = load("cifar10")
    todo: list[tuple[str, Any]] = [(named(mix), lambda mix=mix: accuracies(mix, data)) for mix in MIXES]
    todo += [(title(one), lambda one=one: drawn(one, data)) for one in DRAWINGS]
    for name, measure in todo:
        if name not in known:
            rows.append(measure())
            write_json(options.json, rows)
            print({key: value for key, value in rows[-1].items() if key not in ("clean", "robust")}, flush=True)


if __name__ == "__main__":
    main()
