"""The energy landscape of a classifier: energies of clean, adversarial, generated and OOD images, and a slice around one image."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.bundle import sha256
from ebjdat_serve.engines import Floats
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import FRESH, SUM, Images, Row
from training.distributed import Noise
from training.evaluation.attacks import Pgd, Predict, tensors
from training.evaluation.context import Context
from training.evaluation.generation import Draw, opened_prior, start_of
from training.evaluation.metrics import mean_interval, overlap, wasserstein
from training.evaluation.ood import attacked, strange
from training.evaluation.ood_sets import NEAR, NOISE
from training.evaluation.result_cache import Arrays
from training.evaluation.rows import SEED, compared_with, estimate, number
from training.methods.adversary import Threat, begin

SIDE = 41
DRAWN = Images(dataset=FRESH)
TITLES = {"energy": "E(x)", "joint_energy": "E(x, y)", SUM: "OOD score"}
"""The scores of a landscape by their names in rows; the OOD score is the sum of views, which only a calibrated bundle has."""
REACH = 2.0
"""The half-width of the slice, in lengths of the attack."""


def landscape_rows(c: Context) -> Iterator[Row]:
    """Yield gaps, distances and overlaps of every set's energies with the clean ones, in standard deviations of the clean energies."""
    image, label = c.test(max(c.suite.test, c.suite.looked, c.suite.autoattack))
    clean = c.look(c.where, Predict(gradient=True), image, label)
    sets = {**attacked(c), **({DRAWN: generated(c)} if c.suite.samples and c.drawable() else {}), **strange(c)}
    yield from floor_rows(c, clean)
    for images, found in sets.items():
        yield from gap_rows(c, images, clean, found)
    c.drawings["slice"] = around(c)


def generated(c: Context) -> Arrays:
    """Return the model's outputs on up to 200 fresh samples; their labels are the requested classes."""
    sampler, prior = start_of(c)
    n = min(200, c.suite.samples)
    label = np.resize(opened_prior(str(prior)).labels, n)
    work = Draw(sampler, str(prior), sha256(prior))
    (drawn,) = c.ledger.run("generated", [(work, np.arange(n, dtype=np.float32)[:, None], label)])
    return c.look(DRAWN, Predict(), to_unit(drawn["image"]), label)


def floor_rows(c: Context, clean: Arrays) -> Iterator[Row]:
    """Yield the overlap of two halves of the clean images, the upper limit of an overlap at this n."""
    n = min(c.suite.looked, len(clean["label"])) // 2
    for kind, values in energies(clean).items():
        images, other = replace(c.where, subset="one half"), compared_with(c.data.name, "test", n)
        yield number(f"{kind}_overlap", overlap(values[:n], values[n : 2 * n]), n, images, c.subject.graph, **other)


def gap_rows(c: Context, images: Images, clean: Arrays, found: Arrays) -> Iterator[Row]:
    """Yield one set's rows; an attack is compared with the clean energies of the images it started from."""
    n, of = len(found["label"]), c.subject.graph
    about = compared_with(c.data.name, "test", len(clean["label"]))
    for kind in ("energy", "joint_energy"):
        before, after = energies(clean)[kind], energies(found)[kind]
        spread = float(before.std()) or 1.0
        if images.attack:
            moved = after - before[:n]
            yield estimate(f"{kind}_gap", moved.mean(), mean_interval(moved), n, images, of, **about)
            before = before[:n]
        else:
            moved = np.asarray([after.mean() - before.mean()])
            yield number(f"{kind}_gap", moved.mean(), n, images, of, **about)
        yield number(f"{kind}_gap_over_sd", abs(float(moved.mean())) / spread, n, images, of, **about)
        yield number(f"{kind}_w1_over_sd", wasserstein(before, after) / spread, n, images, of, **about)
        yield number(f"{kind}_overlap", overlap(before, after), n, images, of, **about)


def energies(found: Arrays) -> dict[str, NDArray[np.float64]]:
    """Return E(x) and E(x, y) of each image; OOD images, which have no class, get the predicted one."""
    label = found["label"]
    logits = found["logits"].astype(np.float64)
    return {"energy": -np.logaddexp.reduce(logits, axis=1), "joint_energy": -logits[np.arange(len(logits)), label]}


def scored(found: Arrays) -> dict[str, NDArray[np.float64]]:
    """Return what a landscape shows of each image: its energies and, of a calibrated bundle, the sum of its views."""
    return {**energies(found), **({SUM: found["terms"].astype(np.float64).sum(axis=1)} if "terms" in found else {})}


def kinds_shown(models: Sequence[dict[Images, Arrays]], eps: float) -> dict[str, str]:
    """Return the title of each score that every set shown of every model has."""
    every = [set(scored(found)) for arrays in models for _, _, found in sets_shown(arrays, eps)]
    return {kind: title for kind, title in TITLES.items() if all(kind in kinds for kinds in every)}


def around(c: Context) -> Arrays:
    """Return E(x + a u + b v) on a grid: u is the direction of PGD, v a random sign pattern orthogonal to u and of the same length.

    The image is the first clean test image that the model classifies correctly.
    """
    image, label = c.test(min(200, c.suite.test))
    right = c.subject.logits(image).argmax(axis=1) == label
    chosen = int(right.argmax())
    x, y = image[chosen : chosen + 1], label[chosen : chosen + 1]
    threat = Threat("linf", c.ball.linf)
    start, target = tensors(c.subject, x, y)
    moved = Pgd(threat, leave=False).search(
        c.subject, start, target, begin(start.cpu(), threat, "uniform", Noise.seeded(SEED)).to(start.device)
    )
    u: Floats = moved.cpu().numpy() - x
    v = np.random.default_rng(SEED).choice(np.asarray([-1.0, 1.0], np.float32), x.shape)
    v -= (v * u).sum() / max(float((u * u).sum()), 1e-12) * u
    v *= np.linalg.norm(u) / np.linalg.norm(v)
    step = np.linspace(-REACH, REACH, SIDE, dtype=np.float32)
    b, a = np.meshgrid(step, step, indexing="ij")
    places = zip(a.reshape(SIDE, SIDE, 1, 1, 1), b.reshape(SIDE, SIDE, 1, 1, 1), strict=True)  # a row at a time: images may be large
    logits = np.concatenate([c.subject.logits((x + s * u + t * v).clip(0, 1).astype(np.float32)) for s, t in places]).astype(np.float64)
    energy = -np.logaddexp.reduce(logits, axis=1).reshape(SIDE, SIDE)
    where = np.asarray([chosen, int(y[0])])
    return {"energy": energy, "class": logits.argmax(axis=1).reshape(SIDE, SIDE), "step": step, "image": where}


def clean_of(sets: Iterable[Images]) -> Images | None:
    """Return the clean test images among ``sets``, or None."""
    return next((images for images in sets if images.split == "test" and images.attack is None), None)


def sets_shown(arrays: dict[Images, Arrays], eps: float) -> list[tuple[Images, str, Arrays]]:
    """Return (set, short name, outputs) of the sets in the plot, in order: at most six."""
    names: dict[str, Callable[[Images], bool]] = {
        "clean": lambda images: images == clean_of(arrays),
        "PGD-20": lambda images: images.attack == "pgd" and images.eps == eps,
        "transferred": lambda images: images.attack == "transfer",
        "AutoAttack": lambda images: images.attack == "autoattack",
        "drawn by the model": lambda images: images.dataset == FRESH,
        "SVHN": lambda images: images.dataset == "svhn_train_first1080",
        "CIFAR-100": lambda images: images.dataset == NEAR,
        "noise": lambda images: images.dataset == NOISE,
    }
    return [(images, short, found) for short, fits in names.items() for images, found in arrays.items() if fits(images)][:6]
