#!/usr/bin/env python3
"""Cross-check of metrics against independent libraries on the same arrays: `python benchmarks/crosscheck.py EVALUATION [--json FILE]`.

EVALUATION is the folder that training/evaluate.py keeps under EBJDAT_RUNS/evaluation. AUROC, AUPR and FPR@95 against scikit-learn and
pytorch-ood (pip install --no-deps pytorch-ood: its metrics do not need its dependency torchvision), ECE and, on ResNet-20's features
of CIFAR-10 images, Frechet distance and KID against torchmetrics, p-values against a direct count. Missing libraries are reported.
"""

import argparse
import importlib
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

from ebjdat_serve.bundle import write_json
from ebjdat_serve.detection import Detector, probabilities
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import Images
from ebjdat_serve.scores import ood_score
from ebjdat_serve.sentences import set_name
from training.data.datasets import load
from training.evaluation.distances import frechet_distance, mmd
from training.evaluation.extractors import RESNET20, opened
from training.evaluation.landscape import clean_of
from training.evaluation.metrics import auroc, average_precision, expected_calibration_error, fpr_at_95
from training.evaluation.resnet20 import load_extractor
from training.evaluation.result_cache import load_arrays

Row = dict[str, Any]
IMAGES = 2000


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    arrays = load_arrays(options.evaluation)
    if clean_of(arrays) is None:
        sys.exit(f"{options.evaluation} holds no arrays: run python training/evaluate.py BUNDLE --part suspicion landscape")
    rows = [*separation(arrays), *calibration(arrays), *features()]
    for row in rows:
        print(f"{row['name']:64}{row['ours']:>12.6f}{row['value']:>12.6f}  difference {abs(row['ours'] - row['value']):.1e}")
    if options.json:
        write_json(options.json, rows)


def compared(name: str, ours: float, other: float, n: int, library: str) -> Row:
    """Return one row with the other library's value and ours."""
    return {
        "name": f"{name}, {library}",
        "value": float(other),
        "unit": "",
        "ours": float(ours),
        "n": n,
        "ratio_to_ours": None,
        "library": library,
    }


def separation(arrays: dict[Images, Any]) -> list[Row]:
    """Return AUROC, AUPR, FPR@95 and p-values of the energy on every set."""
    images = clean_of(arrays)
    assert images is not None
    clean = ood_score("energy", 0.0, arrays[images]["logits"])
    metrics = pytorch_ood()
    rows = []
    for each, found in arrays.items():
        if each == images:
            continue
        name = set_name(each)
        other = ood_score("energy", 0.0, found["logits"])
        value, truth, n = np.r_[clean, other], np.r_[np.zeros(len(clean)), np.ones(len(other))], len(clean) + len(other)
        rows.append(compared(f"auroc {name}", auroc(clean, other), roc_auc_score(truth, value), n, "scikit-learn"))
        rows.append(compared(f"aupr {name}", average_precision(clean, other), average_precision_score(truth, value), n, "scikit-learn"))
        if metrics is not None:
            said = metrics(torch.from_numpy(value), torch.from_numpy(np.where(truth == 1, -1, 1)))
            rows.append(compared(f"auroc {name}", auroc(clean, other), said["AUROC"], n, "pytorch-ood"))
            # in pytorch-ood's FPR95 outliers are the positive class; ours accepts 95 % of clean images
            rows.append(compared(f"fpr95 {name}", fpr_at_95(-other, -clean), said["FPR95TPR"], n, "pytorch-ood, outliers to be found"))
    known = np.sort(clean[: len(clean) // 2]).astype(np.float64)
    asked = clean[len(clean) // 2 :][:200]
    by_hand = [(1 + sum(1 for c in known if c >= float(e))) / (len(known) + 1) for e in asked.astype(np.float64)]
    ours = Detector(known, 0.05).p_value(asked)
    rows.append(compared("p-value, largest difference", float(np.abs(ours - by_hand).max()), 0.0, len(asked), "counted by hand"))
    return rows


def pytorch_ood() -> Callable[[Tensor, Tensor], dict[str, float]] | None:
    """Return pytorch-ood's metrics without its package's import of torchvision, or None when it is not installed."""
    spec = find_spec("pytorch_ood") if "pytorch_ood" not in sys.modules else None
    if spec is not None and spec.submodule_search_locations:
        (home,) = spec.submodule_search_locations
        for name, folder in (("pytorch_ood", home), ("pytorch_ood.utils", f"{home}/utils")):
            sys.modules[name] = types.ModuleType(name)  # a package whose __init__ is not run
            sys.modules[name].__path__ = [folder]
    try:
        metrics = importlib.import_module("pytorch_ood.metrics")
    except ImportError as error:
        print(f"pytorch-ood: not compared, {error}: pip install --no-deps pytorch-ood", file=sys.stderr)
        return None

    def compute(score: Tensor, label: Tensor) -> dict[str, float]:
        found = metrics.OODMetrics()
        found.update(score, label)
        return dict(found.compute())

    return compute


def calibration(arrays: dict[Images, Any]) -> list[Row]:
    """Return the ECE of clean images by torchmetrics."""
    if find_spec("torchmetrics") is None:
        print("torchmetrics: not compared, pip install torchmetrics", file=sys.stderr)
        return []
    from torchmetrics.functional.classification import multiclass_calibration_error

    images = clean_of(arrays)
    assert images is not None
    p, label = probabilities(arrays[images]["logits"], 1.0), arrays[images]["label"]
    other = multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(label), num_classes=p.shape[1], n_bins=15, norm="l1")
    return [compared("ece_uncalibrated clean", expected_calibration_error(p, label), float(other), len(p), "torchmetrics")]


class Given(nn.Module):
    """An extractor for torchmetrics that returns precomputed features."""

    num_features = 64

    def forward(self, features: Tensor) -> Tensor:
        return features.flatten(1)


def features() -> list[Row]:
    """Return Frechet distance and KID of CIFAR-10 test images to training images by torchmetrics."""
    if load_extractor() is None or find_spec("torchmetrics") is None:
        print("Frechet distance and KID: not compared, resnet20-12fca82f.th or torchmetrics is missing", file=sys.stderr)
        return []
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    data, network = load("cifar10"), opened(RESNET20.name, torch.device("cpu"))
    with torch.inference_mode():
        sets = [
            torch.cat([network(x)[0] for x in torch.split(torch.from_numpy(to_unit(part.image[:IMAGES])), 250)])
            for part in (data.test, data.train)
        ]
    a, b = (part.double().clone() for part in sets)
    # it probes its extractor with an image of this shape: features are passed as 64 x 1 x 1
    frechet = FrechetInceptionDistance(feature=Given(), input_img_size=(64, 1, 1), normalize=False).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=IMAGES, normalize=False)
    for metric in (frechet, kernel):
        metric.update(b.float() if metric is kernel else b, real=True)
        metric.update(a.float() if metric is kernel else a, real=False)
    where = f"{IMAGES} CIFAR-10 test images vs {IMAGES} training images, ResNet-20"
    return [
        compared(f"frechet {where}", frechet_distance(a.numpy(), b.numpy()), float(frechet.compute()), IMAGES, "torchmetrics"),
        compared(f"kernel distance {where}", mmd(a.numpy(), b.numpy()), float(kernel.compute()[0]), IMAGES, "torchmetrics"),
    ]


if __name__ == "__main__":
    main()
