#!/usr/bin/env python3
"""What each view of the OOD score sees, alone and in sums, and what it costs: `python benchmarks/views.py [BUNDLE] [--json FILE]`.

Views are fitted on the first 20,000 training images, their ranks are of the selection split, sums are calibrated on the calibration
split at alpha .05, and 2,000 test images are the clean ones. Candidates are chosen on the second half of the selection split, with
ranks of the first, against proxies made from it (turned, inverted, shuffled, mixed ...): never on the test images or the OOD sets.
Statistics are fitted on clean training images or on 10,000 lightly handled ones (training/evaluation/shifts.py), and ranks and the
calibration are of clean images or of a mixture in which half were handled: four ways. Seed 0. Needs CIFAR-10, the OOD atlases and
imagenet_500 in the data folder; what is missing is named and left out.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from benchmarks.tables import placed
from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.engines import Floats, Precision
from ebjdat_serve.engines.eager import load_model
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.pixels import Pixels, decode, to_bytes, to_unit
from ebjdat_serve.scores import SCORES, ood_score
from ebjdat_serve.views import (
    DEFAULT_VIEWS,
    LUMA,
    VIEWS,
    Arrays,
    Combination,
    Doubles,
    Known,
    Seen,
    View,
    distance,
    fit,
    gaussian,
    of_logits,
    rank_term,
    score_of,
    statistics,
)
from training.data.bundle_data import dataset_of
from training.data.datasets import Dataset, data_root
from training.evaluation.metrics import auroc, auroc_difference_stderr, auroc_stderr, flag_rate_interval
from training.evaluation.odd import odd_images
from training.evaluation.ood import strange_images
from training.evaluation.shifts import SHIFTS, brightened, handled, shifted

Row = dict[str, Any]
SHIPPED = Path(__file__).parents[1] / "ebjdat_serve" / "models" / "cifar10"
ALPHA, SEED = 0.05, 0
TRAINING, HANDLED, TEST, ODD = 20_000, 10_000, 2000, 500
BENIGN = {
    **{name: SHIFTS[name] for name in ("JPEG q75", "WebP q75", "grey", "resized up x7", "resized up x2", "resized down x0.75 and up")},
    "brightness x1.15": lambda picture: brightened(picture, 1.15),
}

BLURRED = ("resized up x2", "resized down x0.75 and up")

# Candidates that are not in the package ------------------------------------------------------------------------------


def fit_vim(known: Known) -> Arrays:
    """Return ViM's origin, residual space and scale alpha: half of the dimensions are principal (arXiv 2203.10807)."""
    origin = -np.linalg.pinv(known.weight) @ known.bias
    centred = (known.training.features - origin).astype(np.float64)
    residual = np.linalg.eigh(centred.T @ centred)[1][:, : centred.shape[1] // 2]
    alpha = known.training.logits.max(axis=1).mean() / np.linalg.norm(centred @ residual, axis=1).mean()
    return {"origin": origin.astype(np.float32), "residual": (alpha * residual).astype(np.float32)}


def vim(stored: Arrays, seen: Seen) -> Doubles:
    """Return ViM's score: alpha times the norm of the residual, plus E(x)."""
    energy = ood_score("energy", 0.0, seen.logits)
    result: Doubles = np.linalg.norm((seen.features - stored["origin"]) @ stored["residual"], axis=1).astype(np.float64) + energy
    return result


def gen(stored: Arrays, seen: Seen) -> Doubles:
    """Return the generalised entropy sum_y p^g (1 - p)^g, g = .1 (Liu et al., CVPR 2023)."""
    f = seen.logits.astype(np.float64)
    p = np.exp(f - np.logaddexp.reduce(f, axis=1, keepdims=True)).clip(1e-12, 1 - 1e-12)
    result: Doubles = ((p * (1 - p)) ** 0.1).sum(axis=1)
    return result


def fit_react(known: Known) -> Arrays:
    """Return the head, and the 90th percentile of all training features (Sun et al., arXiv 2111.12797)."""
    return {"most": np.quantile(known.training.features, 0.9), "weight": known.weight, "bias": known.bias}  # type: ignore[dict-item]


def react(stored: Arrays, seen: Seen) -> Doubles:
    """Return the energy of the head on features clipped above."""
    clipped = np.minimum(seen.features, stored["most"]) @ stored["weight"].T + stored["bias"]
    return ood_score("energy", 0.0, clipped.astype(np.float32)).astype(np.float64)


def fit_two_sided(known: Known) -> Arrays:
    """Return the median of the selection split's energies and their mean distance to it on either side."""
    energy = ood_score("energy", 0.0, known.selection.logits)
    middle = float(np.median(energy))
    return {
        "middle": np.array(middle),
        "spread": np.array([middle - energy[energy < middle].mean(), energy[energy > middle].mean() - middle]),
    }


def two_sided(stored: Arrays, seen: Seen) -> Doubles:
    """Return how far E(x) lies from its median on either side, in units of that side's spread (typicality)."""
    off = ood_score("energy", 0.0, seen.logits) - stored["middle"]
    result: Doubles = np.where(off < 0, -off / stored["spread"][0], off / stored["spread"][1])
    return result


def fewer(view: View, n: int) -> View:
    """Return a view fitted on the first ``n`` training images."""

    def first(known: Known) -> Known:
        t = known.training
        return replace(known, training=Seen(t.image[:n], t.features[:n], t.logits[:n]))

    return View(view.score, view.words, lambda known: view.fit(first(known)), view.needs_features)


STATISTICS = ("log total variation", "log contrast", "log sd of the Laplacian", "brightness", "entropy")


def with_zlib(image: Floats) -> Floats:
    """Return the statistics with the bytes per difference that zlib needs in place of their entropy."""
    grey = np.rint(255 * np.einsum("nchw,c->nhw", image, LUMA)).astype(np.uint8)
    differences = grey[:, :, 1:] - grey[:, :, :-1]
    size = [len(zlib.compress(one.tobytes(), 1)) / one.size for one in differences]
    return np.column_stack([statistics(image)[:, :4], np.array(size, np.float32)])


def saturation_too(image: Floats) -> Floats:
    """Return the statistics with the mean saturation as a sixth."""
    return np.column_stack([statistics(image), (image.max(axis=1) - image.min(axis=1)).mean(axis=(1, 2))])


def of_statistics(function: Callable[[Floats], Floats]) -> View:
    """Return the view of other statistics."""
    return View(lambda stored, seen: distance(stored, function(seen.image)), "", lambda known: gaussian(function(known.handled)))


def all_but(index: int) -> Callable[[Floats], Floats]:
    """Return four of the five statistics."""
    return lambda image: np.delete(statistics(image), index, axis=1)


OTHERS = {
    **{f"statistics without {name}": of_statistics(all_but(index)) for index, name in enumerate(STATISTICS)},
    "statistics with zlib": of_statistics(with_zlib),
    "statistics and saturation": of_statistics(saturation_too),
}
CANDIDATES: dict[str, View] = {
    **VIEWS,
    **{name: of_logits(name, "") for name in SCORES if name != "energy_entropy"},
    "neighbours of 2,000": fewer(VIEWS["neighbours"], 2000),
    "vim": View(vim, "", fit_vim),
    "gen": View(gen, ""),
    "react": View(react, "", fit_react),
    "two-sided energy": View(two_sided, "", fit_two_sided),
}
MORE = ("max_softmax", "gen", "react", "two-sided energy")
VIEWED = CANDIDATES | OTHERS
SUMS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in CANDIDATES},
    "sum": DEFAULT_VIEWS,
    **{f"without {name}": tuple(other for other in DEFAULT_VIEWS if other != name) for name in DEFAULT_VIEWS},
    **{f"{name} for features": ("logits", name, "statistics") for name in ("neighbours", "neighbours of 2,000", "gaussian", "vim")},
    **{f"{name} for logits": (name, "features", "statistics") for name in ("energy", *MORE)},
    **{name: ("logits", "features", name) for name in OTHERS},
    **{f"sum and {name}": (*DEFAULT_VIEWS, name) for name in ("neighbours", "gaussian", "vim", *MORE)},
}
"""What is measured: views alone, and sums of the terms of several."""
LARGEST = "largest term"
"""The largest of the default views' terms in place of their sum."""
CLOSELY = ("max_softmax", "sum", "neighbours for features", "sum and max_softmax")
"""What is calibrated in all four ways; the rest in the chosen one."""

LOWER = ("max_softmax", *DEFAULT_VIEWS, "sum")
"""What is measured in other precisions than fp32."""

# Images --------------------------------------------------------------------------------------------------------------

SHOWN_SYNSETS = {  # first and last ImageNet synset of a range; every one of these shows the class
    "bird": ((1514668, 1622779), (1795545, 1860187), (2002556, 2058221)),
    "frog": ((1641577, 1644900),),
    "dog": ((2085620, 2113978),),
    "cat": ((2123045, 2124075),),
}
SHOWN_NAMES = [
    "airliner", "wing", "amphibian", "beach_wagon", "cab", "minibus", "minivan", "police_van",
    "half_track", "tow_truck", "motor_scooter", "bow", "canoe", "catamaran", "container_ship", "dock",
    "fireboat", "gondola", "liner", "paddlewheel", "pirate", "schooner", "speedboat", "yawl",
]  # fmt: skip
"""Synsets of aeroplanes, cars, trucks and ships, and three whose one picture shows a car (motor_scooter), a deer (bow) or a ship (dock)."""


def imagenet(height: int, width: int, say: Callable[[str], None]) -> Pixels:
    """Return pictures of imagenet_500 that show no CIFAR-10 class, squashed to the size by the server's decoder."""
    kept: list[Path] = []
    out: list[Path] = []
    for file in sorted((data_root() / "imagenet_500").glob("*.jpg")):
        synset, name = file.stem.split("_", 1)
        shown = any(first <= int(synset[1:]) <= last for ranges in SHOWN_SYNSETS.values() for first, last in ranges)
        (out if shown or name in SHOWN_NAMES else kept).append(file)
    say(f"imagenet_500: {len(kept)} kept; left out {len(out)}: {', '.join(file.stem for file in out)}")
    return np.stack([decode(file.read_bytes(), height, width) for file in kept]) if kept else np.empty((0, height, width, 3), np.uint8)


def proxies(image: Pixels) -> dict[str, Pixels]:
    """Return OOD sets made of images (N, H, W, 3): for choosing between candidates without an OOD set."""
    noise = np.random.default_rng([SEED, 1])
    n, height, width, _ = image.shape
    tile = height // 4
    tiles = image.reshape(n, 4, tile, 4, width // 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, 16, tile, width // 4, 3)
    mixed = np.stack([one[noise.permutation(16)] for one in tiles]).reshape(n, 4, 4, tile, width // 4, 3)
    other = np.roll(image, 1, axis=0)
    phase = np.exp(1j * np.angle(np.fft.fft2(noise.random((n, height, width)), axes=(1, 2))))[..., None]
    spectrum = np.fft.fft2(image.astype(np.float64), axes=(1, 2))
    mean = spectrum[:, :1, :1].copy()
    scrambled = spectrum * phase
    scrambled[:, :1, :1] = mean
    halves = image.copy()
    halves[:, :, width // 2 :] = other[:, :, width // 2 :]
    noisy = image + noise.normal(0, 32, image.shape)
    return {
        "turned by 90 degrees": np.ascontiguousarray(np.rot90(image, axes=(1, 2))),
        "inverted": 255 - image,
        "sixteen tiles shuffled": mixed.transpose(0, 1, 3, 2, 4, 5).reshape(image.shape),
        "means of two": ((image.astype(np.uint16) + other) // 2).astype(np.uint8),
        "halves of two": halves,
        "phases scrambled": np.rint(np.fft.ifft2(scrambled, axes=(1, 2)).real.clip(0, 255)).astype(np.uint8),
        "noise of sd 32": np.rint(noisy.clip(0, 255)).astype(np.uint8),
    }


def image_sets(data: Dataset, say: Callable[[str], None]) -> dict[str, Pixels]:
    """Return all sets by ROLE/NAME: train, selection and calibration, plain and handled; test; ood, odd, benign, proxy, handled."""
    height, width = data.size
    test, second = data.test.image[:TEST], data.selection.image[len(data.selection) // 2 :]
    parts = {"train": data.train.image[:TRAINING], "selection": data.selection.image, "calibration": data.calibration.image}
    sets = {f"clean/{name}": image for name, image in parts.items()} | {"clean/test": test}
    mixed = {"selection": data.selection.image, "calibration": data.calibration.image, "test": test}
    sets |= {f"handled/{name}": handled(image, seed) for seed, (name, image) in enumerate(mixed.items(), 1)}
    for name, image in strange_images(data.name, test[:1000], say):
        role = "odd" if name in ("uniform noise", "blank images") else "ood"
        sets[f"{role}/{name}"] = to_bytes(image[:TEST])
    if len(pictures := imagenet(height, width, say)):
        sets["ood/imagenet_500"] = pictures
    sets |= {"ood/test turned by 90 degrees": np.ascontiguousarray(np.rot90(test, axes=(1, 2))), "ood/test inverted": 255 - test}
    sets |= {f"odd/{name}": image for name, image in odd_images(height, width, ODD).items()}
    sets |= {f"benign/{name}": shifted(test, shift) for name, shift in BENIGN.items()}
    sets |= {f"proxy/{name}": image for name, image in proxies(second).items()}
    return sets | {f"benign selection/{name}": shifted(second, shift) for name, shift in BENIGN.items()}


# Outputs -------------------------------------------------------------------------------------------------------------

Forward = Callable[[Floats], tuple[Floats, Floats]]
"""Images -> pooled features and logits."""


def eager(bundle: Bundle) -> tuple[Forward, Floats, Floats]:
    """Return the fp32 network of the torch engine, and its head's weight and bias."""
    model = load_model(bundle)

    def forward(image: Floats) -> tuple[Floats, Floats]:
        with torch.inference_mode():
            features = model.features(torch.from_numpy(image))
            return features.numpy(), model.head(features).numpy()

    return forward, model.head.weight.numpy(), model.head.bias.numpy()


def by_graph(bundle: Bundle, precision: Precision) -> Forward:
    """Return the classify graph of ``precision`` with one more output: what its head takes."""
    graph = onnx.load(bundle.graph("classify", precision), load_external_data=False)
    head = next(node for node in graph.graph.node if "logits" in node.output)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(head.input[0], onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "classify.onnx"
        onnx.save(graph, file)
        (Path(folder) / "weights.safetensors").write_bytes((bundle.path / "weights.safetensors").read_bytes())
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def forward(image: Floats) -> tuple[Floats, Floats]:
        features, logits = session.run([head.input[0], "logits"], {"image": image})
        return features, logits

    return forward


def looked(image: Pixels, forward: Forward, cache: Path | None, key: str) -> Seen:
    """Return what views see of images, features and logits from the ``cache`` folder where they are there."""
    digest = hashlib.sha256(key.encode() + str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
    file = cache / f"{digest}.npz" if cache else None
    unit = to_unit(image)
    if file and file.is_file():
        with np.load(file) as kept:
            return Seen(unit, kept["features"], kept["logits"])
    parts = [forward(unit[i : i + 100]) for i in range(0, len(unit), 100)]
    features, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
    if file:
        np.savez(file, features=features, logits=logits)
    return Seen(unit, features, logits)


# Figures -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """Whether statistics are fitted on clean or handled images, and whether ranks and calibration are of clean ones or the mixture."""

    fitted: str
    calibrated: str


CHOSEN = "handled fit, mixture"
MODES = {
    "clean fit, clean calibration": Mode("clean", "clean"),
    "handled fit, clean calibration": Mode("handled", "clean"),
    "clean fit, mixture": Mode("clean", "handled"),
    CHOSEN: Mode("handled", "handled"),
}


class Figures:
    """Scores of every view on every set, and rows of sums."""

    def __init__(self, seen: dict[str, Seen], lightly: Floats, weight: Floats, bias: Floats) -> None:
        self.seen = seen
        self.raw: dict[str, dict[str, dict[str, Floats]]] = {}
        self.fits: dict[str, Combination] = {}
        for kind, images in (("clean", seen["clean/train"].image[:HANDLED]), ("handled", lightly)):
            found = fit(list(VIEWED), Known(seen["clean/train"], images, seen["clean/selection"], weight, bias), VIEWED)
            self.fits[kind] = found
            self.raw[kind] = {
                name: {
                    where: score_of(VIEWED[name], found.ready[name], each) for where, each in seen.items() if not where.endswith("/train")
                }
                if kind == "clean" or name.startswith("statistics")
                else self.raw["clean"][name]
                for name in VIEWED
            }

    def terms(self, names: tuple[str, ...], mode: Mode, where: str, part: slice = slice(None)) -> Doubles:
        """Return the terms (N, V) of a set, with ranks among ``part`` of the selection split."""
        raw = self.raw[mode.fitted]
        clean = {name: np.sort(raw[name][f"{mode.calibrated}/selection"][part]) for name in names}
        return np.stack([rank_term(clean[name], raw[name][where]) for name in names], axis=1)

    def score(self, title: str, mode: Mode, where: str, part: slice = slice(None)) -> Doubles:
        """Return the sum of the terms; of a view alone its own score, which has the same order and fewer ties."""
        if title == LARGEST:
            largest: Doubles = self.terms(DEFAULT_VIEWS, mode, where, part).max(axis=1)
            return largest
        names = SUMS[title]
        if len(names) == 1:
            return self.raw[mode.fitted][names[0]][where].astype(np.float64)
        total: Doubles = self.terms(names, mode, where, part).sum(axis=1)
        return total

    def threshold(self, title: str, mode: Mode, part: slice = slice(None)) -> float:
        """Return the least score that is flagged at alpha: (1 + #{calibration >= s}) / (n + 1) < alpha."""
        clean = np.sort(self.score(title, mode, f"{mode.calibrated}/calibration", part))
        allowed = int(np.ceil(ALPHA * (len(clean) + 1) - 1 - 1e-9)) - 1  # scores that may reach a flagged one
        return float(np.nextafter(clean[len(clean) - allowed - 1], np.inf))

    def rows(self, title: str, mode_name: str) -> Iterator[Row]:
        """Yield the clean rate, AUROC and power of every OOD set, and the flag rate of every benign one, on test images."""
        mode = MODES[mode_name]
        least = self.threshold(title, mode)
        clean = self.score(title, mode, "clean/test")
        common = {"score": title, "mode": mode_name}
        interval = flag_rate_interval(len(self.seen["clean/calibration"].logits), len(clean), ALPHA)
        for where in ("clean/test", f"{mode.calibrated}/test"):
            rate = float((self.score(title, mode, where) >= least).mean())
            yield row("flag rate", where, rate, len(clean), **common, expected=interval)
        for where in self.seen:
            role = where.split("/")[0]
            if role not in ("ood", "odd", "benign"):
                continue
            value = self.score(title, mode, where)
            if role == "benign":
                yield row("flag rate", where, float((value >= least).mean()), len(value), **common)
                continue
            yield row("power", where, float((value >= least).mean()), len(value), **common)
            if role == "ood":
                yield row("AUROC", where, auroc(clean, value), len(value), **common, stderr=auroc_stderr(clean, value))

    def choice_rows(self, title: str, mode_name: str) -> Iterator[Row]:
        """Yield the same of the second half of the selection split, with ranks of the first, against proxies: what is chosen by."""
        mode, half = MODES[mode_name], len(self.seen["clean/selection"].logits) // 2
        first = slice(0, half)
        least = self.threshold(title, mode, first)
        clean = self.score(title, mode, "clean/selection", first)[half:]
        common = {"score": title, "mode": mode_name}
        yield row("flag rate", "clean/selection, second half", float((clean >= least).mean()), len(clean), **common)
        areas, powers = [], []
        for where in self.seen:
            value = self.score(title, mode, where, first) if where.startswith(("proxy/", "benign selection/")) else None
            if value is None:
                continue
            if where.startswith("benign"):
                yield row("flag rate", where, float((value >= least).mean()), len(value), **common)
            else:
                areas.append(auroc(clean, value))
                powers.append(float((value >= least).mean()))
        yield row("AUROC", "mean of proxies", float(np.mean(areas)), len(areas), **common)
        yield row("power", "mean of proxies", float(np.mean(powers)), len(powers), **common)

    def paired_rows(self, title: str, mode_name: str) -> Iterator[Row]:
        """Yield AUROC(sum) - AUROC(max softmax) on each OOD set, with DeLong's paired standard error."""
        mode = MODES[mode_name]
        for where in (name for name in self.seen if name.startswith("ood/")):
            a, b = ([self.score(each, mode, at) for at in ("clean/test", where)] for each in (title, "max_softmax"))
            difference = auroc(*a) - auroc(*b)
            yield row(
                "AUROC less max softmax", where, difference, len(a[1]), score=title, mode=mode_name, stderr=auroc_difference_stderr(*a, *b)
            )

    def spoke_rows(self, title: str, mode_name: str) -> Iterator[Row]:
        """Yield the share of each set's flagged images of which a view has the largest term."""
        mode, names = MODES[mode_name], SUMS[title]
        least = self.threshold(title, mode)
        for where in (name for name in self.seen if name.split("/")[0] in ("ood", "odd", "benign") or name == "clean/test"):
            terms = self.terms(names, mode, where)
            flagged = terms[terms.sum(axis=1) >= least]
            for index, name in enumerate(names):
                if len(flagged):
                    share = float((flagged.argmax(axis=1) == index).mean())
                    yield row("share spoken", where, share, len(flagged), score=title, mode=mode_name, view=name)


def row(metric: str, where: str, value: float, n: int, **more: Any) -> Row:
    """Return one figure."""
    title = more.get("score", "")
    by = f", {more['view']}" if "view" in more else ""
    name = f"{metric}, {where}: {title}{by}" + (f", {more['mode']}" if "mode" in more else "")
    return {"name": name, "value": value, "unit": "", "metric": metric, "set": where, "n": n, **more}


def cost_rows(bundle: Bundle, figures: Figures, seconds: float) -> Iterator[Row]:
    """Yield ms an image on one core and bytes stored of each view, and ms of the classify graph, in batches of 1 and 32."""
    engine = OnnxEngine(bundle, "cpu", 1)
    fitted, test = figures.fits["handled"], figures.seen["clean/test"]
    for name, stored in fitted.stored.items():
        kept = sum(array.nbytes for array in stored.values()) + fitted.clean[name].nbytes
        yield {"name": f"bytes stored, {name}", "value": kept, "unit": "bytes", "metric": "bytes", "score": name}
    for batch in (1, 32):
        seen = Seen(test.image[:batch], test.features[:batch], test.logits[:batch])
        works: dict[str, Callable[[], object]] = {"classify graph": lambda seen=seen: engine.classify(seen.image)}  # type: ignore[misc]
        for name, view in CANDIDATES.items():
            works[name] = lambda name=name, view=view, seen=seen: rank_term(  # type: ignore[misc]
                fitted.clean[name], score_of(view, fitted.ready[name], seen)
            )
        best = dict.fromkeys(works, float("inf"))
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:  # rounds alternate, and the best of each counts
            for name, work in works.items():
                began = time.perf_counter()
                work()
                best[name] = min(best[name], time.perf_counter() - began)
        for name, took in best.items():
            about = {"metric": "ms", "score": name, "batch": batch, "ratio_to_classify": took / best["classify graph"]}
            yield {"name": f"ms an image, {name}, batch {batch}", "value": 1e3 * took / batch, "unit": "ms", **about}


# Tables --------------------------------------------------------------------------------------------------------------

SHORT = {
    "ood/svhn_train_first1080": "SVHN",
    "ood/cifar100_test_3000": "CIFAR-100",
    "ood/imagenet_500": "ImageNet",
    "ood/interpolations": "interpolations",
    "ood/test turned by 90 degrees": "turned 90°",
    "ood/test inverted": "inverted",
}
Key = tuple[str, str, str, str]


def tables(rows: list[Row]) -> dict[str, str]:
    """Return the tables of the decision by their markers."""
    by_precision: dict[str, dict[Key, Row]] = {}
    for r in rows:
        if "mode" in r and "view" not in r:
            by_precision.setdefault(r["precision"], {})[r["metric"], r["set"], r["score"], r["mode"]] = r
    rows, found = [r for r in rows if r["precision"] == "fp32"], by_precision["fp32"]
    return {
        "ablation": ablation(found),
        "choice": choice_table(found),
        "odd": odd_table(found),
        "benign": benign_table(found),
        "cost": cost_table(rows),
        "why": why_table(rows),
        "precisions": precision_table(by_precision),
        "paired": paired_table(found),
    }


def table(head: list[str], body: list[list[str]]) -> str:
    """Return a markdown table."""
    return "\n".join("| " + " | ".join(each) + " |" for each in [head, ["---"] * len(head), *body])


def both(found: dict[Key, Row], where: str, title: str, mode: str) -> str:
    """Return AUROC / power as text."""
    area, power = (found[metric, where, title, mode]["value"] for metric in ("AUROC", "power"))
    return f"{area:.3f} / {power:.2f}"


def least_odd(found: dict[Key, Row], title: str, mode: str) -> float:
    """Return the least power on an odd set."""
    return min(
        float(r["value"])
        for (metric, where, *by), r in found.items()
        if metric == "power" and where.startswith("odd/") and by == [title, mode]
    )


def ablation(found: dict[Key, Row]) -> str:
    """Return AUROC / power of every view and sum on test images, calibrated in the chosen way."""
    body = []
    for title in (*SUMS, LARGEST):
        cells = [f"**{title}**" if title == "sum" else title]
        cells += [both(found, where, title, CHOSEN) for where in SHORT]
        body.append([*cells, f"{least_odd(found, title, CHOSEN):.3f}"])
    return table(["score", *SHORT.values(), "least power on an odd set"], body)


def choice_table(found: dict[Key, Row]) -> str:
    """Return what sums were chosen by: proxies and benign flag rates on the selection split, and odd images, which are made."""
    body = []
    for title in (*SUMS, LARGEST):
        if len(SUMS.get(title, DEFAULT_VIEWS)) == 1:
            continue
        for mode in MODES if title in CLOSELY else (CHOSEN,):
            rates = [found["flag rate", f"benign selection/{name}", title, mode]["value"] for name in BENIGN]
            blurred = max(rate for name, rate in zip(BENIGN, rates, strict=True) if name in BLURRED)
            other = max(rate for name, rate in zip(BENIGN, rates, strict=True) if name not in BLURRED)
            cells = [title, mode, both(found, "mean of proxies", title, mode), f"{other:.3f}", f"{blurred:.3f}"]
            body.append([*cells, f"{least_odd(found, title, mode):.3f}"])
    head = ["sum", "calibration", "proxies", "largest benign rate (bar .08)", "of the two blurs (bar .12)", "least odd power (bar .95)"]
    return table(head, body)


def odd_table(found: dict[Key, Row]) -> str:
    """Return the power on every odd set."""
    titles = ("max_softmax", "logits", "features", "statistics", "sum")
    sets = [
        where for (metric, where, score, mode) in found if (metric, score, mode) == ("power", "sum", CHOSEN) and where.startswith("odd/")
    ]
    body = [
        [where.removeprefix("odd/"), str(found["power", where, "sum", CHOSEN]["n"])]
        + [f"{found['power', where, title, CHOSEN]['value']:.3f}" for title in titles]
        for where in sets
    ]
    return table(["set", "n", *titles], body)


def benign_table(found: dict[Key, Row]) -> str:
    """Return flag rates of clean and of benignly shifted test images, and separation, by how the sum is calibrated."""
    body = []
    for title in CLOSELY:
        for mode in MODES:
            kind = MODES[mode].calibrated
            own, clean = found["flag rate", f"{kind}/test", title, mode], found["flag rate", "clean/test", title, mode]
            low, high = own["expected"]
            cells = [title, mode, f"{clean['value']:.3f}", f"{own['value']:.3f} [{low:.3f}, {high:.3f}]"]
            cells += [f"{found['flag rate', f'benign/{name}', title, mode]['value']:.3f}" for name in BENIGN]
            body.append(cells + [both(found, where, title, mode) for where in list(SHORT)[:3]])
    return table(["score", "calibration", "clean", "what it is calibrated on [99 %]", *BENIGN, *list(SHORT.values())[:3]], body)


def cost_table(rows: list[Row]) -> str:
    """Return ms an image and bytes of every view."""
    cost = {(r["metric"], r["score"], r.get("batch")): r for r in rows if r["metric"] in ("ms", "bytes")}
    body = []
    for name in ("classify graph", *CANDIDATES):
        ms = [cost["ms", name, batch] for batch in (1, 32)]
        kept = f"{cost['bytes', name, None]['value']:,}" if ("bytes", name, None) in cost else ""
        body.append([name, kept, *(f"{r['value']:.3f} ({r['ratio_to_classify']:.3f})" for r in ms)])
    return table(["view", "bytes", "ms an image, batch 1 (of classify)", "batch 32"], body)


def why_table(rows: list[Row]) -> str:
    """Return which view spoke of the flagged images of each set."""
    found = {(r["set"], r["view"]): r for r in rows if r.get("view") and r["mode"] == CHOSEN}
    sets = list(dict.fromkeys(where for where, _ in found))
    names = list(dict.fromkeys(name for _, name in found))
    body = [[where, str(found[where, names[0]]["n"]), *(f"{found[where, name]['value']:.2f}" for name in names)] for where in sets]
    return table(["set", "flagged", *names], body)


def precision_table(by_precision: dict[str, dict[Key, Row]]) -> str:
    """Return the figures of the sum in each precision."""
    body = []
    for precision, found in by_precision.items():
        cells = [precision, f"{found['flag rate', 'clean/test', 'sum', CHOSEN]['value']:.3f}", f"{least_odd(found, 'sum', CHOSEN):.3f}"]
        cells += [both(found, where, "sum", CHOSEN) for where in list(SHORT)[:3]]
        body.append(cells + [f"{found['flag rate', f'benign/{name}', 'sum', CHOSEN]['value']:.3f}" for name in BENIGN])
    return table(["precision", "clean", "least power on an odd set", *list(SHORT.values())[:3], *BENIGN], body)


def paired_table(found: dict[Key, Row]) -> str:
    """Return by how much the sum's AUROC is above that of max softmax."""
    metric = "AUROC less max softmax"
    body = [
        [name, f"{r['value']:+.3f}", f"{r['stderr']:.3f}"] for where, name in SHORT.items() for r in [found[metric, where, "sum", CHOSEN]]
    ]
    return table(["set", metric, "standard error, paired"], body)


def document(text: str, rows: list[Row]) -> str:
    """Return ``text`` with the tables of ``rows``."""
    for name, content in tables(rows).items():
        text = placed(text, name, content)
    return text


def measure(bundle: Bundle, precision: Precision, cache: Path | None, seconds: float, only: list[str]) -> list[Row]:
    """Return all rows."""
    data = dataset_of(bundle)
    forward, weight, bias = eager(bundle)
    forward = forward if precision == "fp32" else by_graph(bundle, precision)
    sets = image_sets(data, lambda line: print(line, file=sys.stderr))
    key = f"{bundle.manifest.files['weights.safetensors'].sha256} {precision}"
    lightly = to_unit(handled(data.train.image[:HANDLED], 0, untouched=0.0))
    figures = Figures({where: looked(image, forward, cache, key) for where, image in sets.items()}, lightly, weight, bias)
    rows = []
    for title in only or (*SUMS, LARGEST):
        for mode in MODES if title in CLOSELY else (CHOSEN,):
            rows += [*figures.rows(title, mode), *(figures.choice_rows(title, mode) if len(SUMS.get(title, DEFAULT_VIEWS)) > 1 else [])]
    rows += [*figures.paired_rows("sum", CHOSEN), *figures.spoke_rows("sum", CHOSEN)]
    of = {"precision": precision, "bundle": bundle.manifest.version}
    return [{**each, **of} for each in [*rows, *(cost_rows(bundle, figures, seconds) if seconds else [])]]


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--precision", nargs="*", default=[], help="also these, of which there are classify graphs, each with its own fits")
    parser.add_argument("--only", nargs="*", default=[], choices=[*SUMS, LARGEST], metavar="SCORE", help="measure these views and sums")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--document", type=Path, help="write the tables of --json's rows into this file, and measure nothing")
    parser.add_argument("--cache", type=Path, help="a folder that keeps features and logits")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, per batch size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.document:
        if not options.json:
            parser.error("--document needs --json, the rows that it shows")
        rows = json.loads(options.json.read_text(encoding="utf-8"))
        options.document.write_text(document(options.document.read_text(encoding="utf-8"), rows), encoding="utf-8")
        return
    if options.cache:
        options.cache.mkdir(parents=True, exist_ok=True)
    bundle = Bundle.load(options.bundle)
    rows = measure(bundle, "fp32", options.cache, options.seconds, options.only)
    for precision in options.precision:
        rows += measure(bundle, precision, options.cache, 0.0, options.only or list(LOWER))
    for each in rows:
        if each.get("score") in ("sum", "max_softmax") and each.get("mode", CHOSEN) == CHOSEN:
            print(f"{each['name']:90s} {each['value']:.4f}")
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
