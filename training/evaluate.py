#!/usr/bin/env python3
"""Measure a bundle and write its metrics.json and model card: `python training/evaluate.py BUNDLE [--suite full]`.

`quick` takes 1,000 test images and no AutoAttack; `full` is what a released card shows. Energies, flags and probabilities
come from the served graph; attacks need gradients and run on torch with the same weights, in eval mode.
OOD sets are read from the data folder when they are there: svhn_train_first1080.webp, cifar100_test_3000.webp.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebjdat_serve.bundle import Bundle, read_json, write_json
from ebjdat_serve.detection import Detector, probabilities
from ebjdat_serve.engines import Engine, Floats
from ebjdat_serve.engines.eager import load_model
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.generation import classify_in_chunks, generate
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.precision import LOWER, rows_of
from ebjdat_serve.sgld import Prior
from training.adversary import Attack, Threat, ascent, begin, cross_entropy, pgd, project
from training.calibrate import check_data, dataset_of
from training.card import write_card
from training.errors import DataError
from training.extractor import features, load_extractor
from training.images import Dataset, data_root, read_atlas
from training.measures import auroc, expected_calibration_error, flag_rate_interval, frechet_distance, wilson
from training.ranks import Noise

OOD_ATLASES = ("svhn_train_first1080", "cifar100_test_3000")
ALPHA = 0.05
EPS, EPS_DIGITS = 8 / 255, 51 / 255  # l-inf, of the data set, whatever the model was trained with
EPS_L2, EPS_L2_DIGITS = 0.5, 1.0
SEED = 0
Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """How much of each measurement is made."""

    test: int
    attacked: int
    energies: int
    samples: int
    autoattack: int


SUITES = {
    "quick": Suite(test=1_000, attacked=500, energies=500, samples=500, autoattack=0),
    "full": Suite(test=10_000, attacked=10_000, energies=2_000, samples=2_000, autoattack=200),
}


def evaluate(bundle: Bundle, data: Dataset, suite: Suite, baseline: Path | None = None) -> Bundle:
    """Measure everything in ``suite``, write metrics.json, the pictures and the card, and record them in the bundle."""
    check_data(bundle, data)
    beside: list[Row] = read_json(baseline or bundle.path / "baseline.json") if baseline or "baseline.json" in bundle.manifest.files else []
    rows: list[Row] = []
    for part in (served_rows, robust_rows, generation_rows):
        for row in part(bundle, data, suite):
            print(f"{row['metric']:32}{row['value']:>10.4f}  n = {row['n']:<6} {row['dataset']}: {row['protocol']}", flush=True)
            rows.append(row)
    rows += [row for p in LOWER for row in rows_of(bundle.metrics(), p) if bundle.holds(row["of"])]  # what training/precision.py measured
    write_json(bundle.path / "metrics.json", rows)
    written = write_card(bundle, rows, beside)
    return bundle.update("metrics.json", *written)


def served_rows(bundle: Bundle, data: Dataset, suite: Suite) -> Iterator[Row]:
    """Yield accuracy, calibration and flag figures, all from the served graph."""
    engine, calibration = OnnxEngine(bundle, "cpu"), bundle.calibration()
    detector = Detector(np.asarray(calibration.energies), ALPHA)
    graph = bundle.manifest.files["classify.onnx"].sha256
    weights = bundle.manifest.files["weights.safetensors"].sha256
    test, n = data.test.first(suite.test), len(data.test.first(suite.test))
    where = f"{data.name} test"

    logits, energy = through(engine, to_unit(test.image))
    correct = int((logits.argmax(axis=1) == test.label).sum())
    yield proportion("accuracy_clean", correct, n, where, "served graph", weights)
    yield number(
        "ece",
        expected_calibration_error(probabilities(logits, calibration.temperature), test.label),
        n,
        where,
        "15 bins, fitted temperature",
        graph,
    )
    yield number("temperature", calibration.temperature, len(data.selection), f"{data.name} selection split", "fitted to p(y|x)", graph)
    yield number(
        "ece_uncalibrated", expected_calibration_error(probabilities(logits, 1.0), test.label), n, where, "15 bins, temperature 1", graph
    )
    yield number("energy_mean", float(energy.mean()), n, where, "nats", graph)
    yield number("energy_sd", float(energy.std()), n, where, "nats", graph)

    flagged = int(detector.suspicious(detector.p_value(energy)).sum())
    low, high = flag_rate_interval(len(calibration.energies), n, ALPHA)
    yield proportion("flag_rate_clean", flagged, n, where, f"alpha {ALPHA}", graph)
    inside = f"alpha {ALPHA}, Beta-binomial 99 % interval [{low:.4f}, {high:.4f}]"
    yield number("flag_rate_clean_in_interval", float(low <= flagged / n <= high), n, where, inside, graph)

    for name, image in ood_sets(data):
        _, other = through(engine, image)
        yield number("auroc_energy", auroc(energy, other), n + len(other), f"{where} vs {name}", "E(x), positives are the other set", graph)
        power = int(detector.suspicious(detector.p_value(other)).sum())
        yield proportion("flag_power", power, len(other), name, f"alpha {ALPHA}", graph)


def robust_rows(bundle: Bundle, data: Dataset, suite: Suite) -> Iterator[Row]:
    """Yield PGD-20 and AutoAttack accuracy and what the energy says of adversarial images."""
    model = load_model(bundle).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = bundle.manifest.files["weights.safetensors"].sha256
    eps8, eps_l2 = (EPS_DIGITS, EPS_L2_DIGITS) if data.name == "digits" else (EPS, EPS_L2)
    where = f"{data.name} test"
    attacked = data.test.first(suite.attacked)
    image, label = torch.from_numpy(to_unit(attacked.image)), torch.from_numpy(attacked.label)

    for eps, name in ((eps8, eps_name(eps8)), (eps8 / 2, eps_name(eps8 / 2))):
        robust = survivors(model, image, label, Threat("linf", eps))
        protocol = f"PGD-20 on cross-entropy, l-inf {name}, step eps/4, 1 random start, each iterate counts"
        yield proportion("accuracy_pgd20", robust, len(label), where, protocol, weights)
    robust = survivors(model, image, label, Threat("l2", eps_l2))
    protocol = f"PGD-20 on cross-entropy, l2 {eps_l2:g}, step eps/4, 1 random start, each iterate counts"
    yield proportion("accuracy_pgd20_l2", robust, len(label), where, protocol, weights)

    yield from adversarial_energy_rows(bundle, model, data, suite, eps8)
    if suite.autoattack:
        robust = autoattack(model, image[: suite.autoattack], label[: suite.autoattack], eps8)
        protocol = f"official standard AutoAttack, l-inf {eps_name(eps8)}, first {suite.autoattack} images"
        yield proportion("accuracy_autoattack", robust, suite.autoattack, where, protocol, weights)


def survivors(model: torch.nn.Module, image: torch.Tensor, label: torch.Tensor, threat: Threat, steps: int = 20) -> int:
    """Return how many images no iterate of one PGD run fools: images that are fooled, or wrong to begin with, leave the run.

    Never above the usual figure, which looks at the last iterate alone, and half the work.
    """
    noise = Noise.seeded(SEED)
    standing = 0
    for x, y in zip(torch.split(image, 500), torch.split(label, 500), strict=True):
        left = predict(model, x) == y
        clean, y = x[left], y[left]
        x_adv = begin(clean, threat, "uniform", noise)
        for _ in range(steps):
            x_adv.requires_grad_()
            logits = model(x_adv)
            (gradient,) = torch.autograd.grad(cross_entropy(logits, y).sum(), x_adv)
            left = logits.argmax(dim=1) == y
            x_adv = x_adv.detach() + threat.eps / 4 * ascent(gradient, threat.norm)
            clean, y = clean[left], y[left]
            x_adv = project(x_adv[left], clean, threat)
        standing += int((predict(model, x_adv) == y).sum())
    return standing


def predict(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Return the predicted class of each image."""
    with torch.no_grad():
        prediction: torch.Tensor = model(image).argmax(dim=1)
        return prediction


def adversarial_energy_rows(bundle: Bundle, model: torch.nn.Module, data: Dataset, suite: Suite, eps: float) -> Iterator[Row]:
    """Yield the energy gap, AUROC and flag power on PGD-20 images, energies from the served graph."""
    engine, calibration = OnnxEngine(bundle, "cpu"), bundle.calibration()
    detector = Detector(np.asarray(calibration.energies), ALPHA)
    graph = bundle.manifest.files["classify.onnx"].sha256
    some = data.test.first(suite.energies)
    image, label = torch.from_numpy(to_unit(some.image)), torch.from_numpy(some.label)
    noise = Noise.seeded(SEED)
    parts = [
        pgd(model, x, y, objective=cross_entropy, threat=Threat("linf", eps), attack=Attack(steps=20), noise=noise)
        for x, y in zip(torch.split(image, 500), torch.split(label, 500), strict=True)
    ]
    _, energy = through(engine, image.numpy())
    _, energy_adv = through(engine, torch.cat(parts).numpy())
    np.savez_compressed(bundle.path / ".energies.npz", clean=energy, adversarial=energy_adv)
    name = f"PGD-20 {eps_name(eps)} on {data.name} test"
    protocol = f"PGD-20 on cross-entropy, l-inf {eps_name(eps)}, all images"
    gap = float((energy_adv - energy).mean())
    yield number("energy_gap_adv", gap, len(energy), name, "mean E(x_adv) - E(x), nats", graph)
    yield number("energy_gap_adv_over_sd", abs(gap) / float(energy.std()), len(energy), name, "|mean E(x_adv) - E(x)| / sd E(x)", graph)
    yield number("auroc_energy", auroc(energy, energy_adv), 2 * len(energy), f"{data.name} test vs {name}", protocol, graph)
    power = int(detector.suspicious(detector.p_value(energy_adv)).sum())
    yield proportion("flag_power", power, len(energy), name, f"alpha {ALPHA}", graph)


def autoattack(model: torch.nn.Module, image: torch.Tensor, label: torch.Tensor, eps: float) -> int:
    """Return how many images the standard AutoAttack (arXiv 2003.01690, package pyautoattack) leaves standing."""
    from pyautoattack import AutoAttack

    contiguous = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    attack = AutoAttack(contiguous, norm="Linf", eps=eps, version="standard", device="cpu", seed=SEED)
    x_adv, _ = attack.run_standard_evaluation(image.contiguous(), label, batch_size=200)
    worst = float((x_adv - image).abs().max())
    if worst > eps + 1e-6:
        raise EbjdatError(f"AutoAttack left its ball: {worst} > {eps}")
    return int((predict(contiguous, x_adv) == label).sum())


def generation_rows(bundle: Bundle, data: Dataset, suite: Suite) -> Iterator[Row]:
    """Yield figures of fresh samples, drawn as the server draws them, equally many of each class."""
    engine, prior, sampler = OnnxEngine(bundle, "cpu"), Prior.load(bundle.path / "prior.safetensors"), bundle.manifest.sampler
    graph = bundle.manifest.files["step.onnx"].sha256
    classes = len(bundle.manifest.labels)
    label = np.arange(suite.samples, dtype=np.int64) % classes
    samples = generate(engine, prior, sampler, label, seed=SEED)
    where = f"{suite.samples} fresh samples"
    how = f"{sampler.steps} SGLD steps of {sampler.step_size}, noise {sampler.noise_std}, from the prior"
    own = int((samples.logits.argmax(axis=1) == label).sum())
    yield proportion("class_agreement_own", own, len(label), where, how, graph)
    yield number("energy_samples", float(samples.energy.mean()), len(label), where, how, graph)
    extractor = load_extractor() if data.name == "cifar10" else None
    if extractor is None:
        print("frechet_resnet20: not measured, resnet20-12fca82f.th is not in the data folder, or the data is not CIFAR-10", flush=True)
        return
    real, _ = features(extractor, to_unit(data.train.image[:10_000]))
    fake, logits = features(extractor, to_unit(samples.image))
    independent = int((logits.argmax(axis=1) == label).sum())
    yield proportion("class_agreement_resnet20", independent, len(label), where, how, graph)
    yield number(
        "frechet_resnet20",
        frechet_distance(fake, real),
        len(label),
        f"{where} vs 10,000 training images",
        f"64 features of ResNet-20; {how}",
        graph,
    )
    start, _ = features(
        extractor,
        np.concatenate(
            [
                prior.sample(label[i : i + 100], [np.random.default_rng(SEED + j) for j in range(i, min(i + 100, len(label)))])
                for i in range(0, len(label), 100)
            ]
        ),
    )
    yield number(
        "frechet_resnet20_prior",
        frechet_distance(start, real),
        len(label),
        f"{len(label)} prior draws vs 10,000 training images",
        "64 features of ResNet-20; no step",
        bundle.manifest.files["prior.safetensors"].sha256,
    )


def ood_sets(data: Dataset) -> Iterator[tuple[str, Floats]]:
    """Yield (name, images) of what is not like the data."""
    height, width = data.test.image.shape[1:3]
    noise = np.random.default_rng(SEED).integers(0, 256, (1000, height, width, 3), dtype=np.uint8)
    yield "uniform noise", to_unit(noise)
    for name in OOD_ATLASES:
        if name.startswith(f"{data.name}_"):
            continue  # a data set is not out of its own distribution
        file = data_root() / f"{name}.webp"
        if (height, width) == (32, 32) and file.is_file():
            yield name, to_unit(read_atlas(file, 32))
        else:
            print(f"{name}: not measured, {name}.webp is not in the data folder or the model's size is not 32 x 32", flush=True)


def through(engine: Engine, image: Floats) -> tuple[Floats, Floats]:
    """Return logits and energies of images (N, 3, H, W) from the served graph."""
    logits, energy = (np.concatenate(part) for part in zip(*classify_in_chunks(engine, image), strict=True))
    return logits, energy


def number(metric: str, value: float, n: int, dataset: str, protocol: str, of: str) -> Row:
    """Return one row of metrics.json."""
    return {"metric": metric, "value": value, "n": n, "dataset": dataset, "protocol": protocol, "seed": SEED, "of": of}


def proportion(metric: str, successes: int, n: int, dataset: str, protocol: str, of: str) -> Row:
    """Return one row of metrics.json with Wilson's 95 % interval."""
    return {**number(metric, successes / n, n, dataset, protocol, of), "interval": list(wilson(successes, n))}


def eps_name(eps: float) -> str:
    """Return eps as the field writes it: 8/255."""
    units = eps * 255
    return f"{units:.0f}/255" if abs(units - round(units)) < 1e-6 else f"{eps:g}"


def main() -> None:
    """Evaluate the bundle named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--suite", choices=sorted(SUITES), default="quick")
    parser.add_argument("--baseline", type=Path, help="metrics.json of the warm start, to stand beside every figure")
    parser.add_argument("--data", help="the folder that a bundle of a user's own data was trained on, when it has moved")
    options = parser.parse_args()
    try:
        bundle = Bundle.draft(options.bundle)
        evaluate(bundle, dataset_of(bundle, options.data), SUITES[options.suite], options.baseline)
    except (EbjdatError, DataError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
