"""Fit class Gaussians, where chains start, to the labelled images of a folder: `ebjdat-serve prior BUNDLE DIR`, `import --prior DIR`.

They are fitted at a low resolution and enlarged when they are drawn (ebjdat_serve/sgld.py). Then the model's own chains are drawn from
them, and the share that the model labels as asked is measured; only after that anything is written (docs/decisions/0031).
"""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve.atomic import replacing
from ebjdat_serve.bundle import Bundle, write_rows
from ebjdat_serve.card import agreement_words
from ebjdat_serve.cpus import threads
from ebjdat_serve.engines import Engine, Floats, Labels, load_engine
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.folder_images import FolderImages, Places, Say, duration, labels_of, listed_images
from ebjdat_serve.generation import CHUNK, classify_in_chunks
from ebjdat_serve.install import install
from ebjdat_serve.listing import printable
from ebjdat_serve.manifest import YES, FittedPrior
from ebjdat_serve.parsing import parse
from ebjdat_serve.pixels import to_bytes, to_unit
from ebjdat_serve.rows import FRESH, GENERATED, PRIOR, Row
from ebjdat_serve.selftest import verify_step
from ebjdat_serve.sgld import NOISE, STEPS, Chains, Prior, Sampler

LEAST = 10
"""Images of a class below which it has no prior: the error of a mean of ten is a third of the spread of the images."""
FITTED, ALL = 1000, 20_000
"""Images that one class, and that all classes, are fitted to at most."""
RANK, LEAST_RANK = 48, 4
"""Principal components of a class at most, and those for which the resolution is lowered where there is no room for them."""
SIDES = (32, 24, 16, 12, 8, 4)
"""Pixels of the longer side that the Gaussians are of; the first at which they fit into the bytes that they may take."""
BYTES, HEADER = 3_000_000, 1024
"""What a prior may take, or a tenth of the weights where that is more; and what of it is for names and shapes."""
MOVE, FARTHEST = 0.007, 0.5
"""How far a step at the prior moves a pixel (root mean square), and the farthest that any step moves any, in pixels of [0,1]: what the
sampler of the model that ships does (docs/decisions/0031)."""
CHAINS, FEWEST_CHAINS, SECONDS = 200, 20, 300.0
"""Chains that class agreement is measured on: as many as this time allows, by the time of one step."""
PIXELS = 2**18
"""Pixels of the chains that are moved together: five of 224 x 224."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for of the sampler and the measurement; None: what fits the model."""

    steps: int = STEPS
    step_size: float | None = None
    grad_clip: float | None = None
    noise_std: float = NOISE
    chains: int | None = None


AS_FITS = Wanted()


@dataclass(frozen=True)
class Labelled:
    """The images of a folder by class: files, and the places of those to fit to, class after class, with their labels."""

    files: list[Path]
    places: Places
    label: Labels  # of every file; -1: not fitted to
    dataset: str


def refuse_without_steps(bundle: Bundle) -> None:
    """Raise BundleError for a model whose chains cannot take steps, with the reason, and for one whose prior training has fitted."""
    can = bundle.manifest.capabilities
    for reason in (can.energy, can.gradient):
        if reason != YES:
            raise BundleError(f"{bundle.manifest.name} draws nothing, with a prior or without: {reason}")
    if "step.onnx" not in bundle.manifest.files:
        raise BundleError(f"{bundle.path} has no step.onnx, by which chains take steps: import it again")
    if not bundle.manifest.imported:
        raise BundleError(f"{bundle.path} was trained here: its prior is of its training set, and its figures are of that prior")


def labelled(folder: Path, labels: list[str], folders: Mapping[str, str]) -> Labelled:
    """Return the images of ``folder`` that Gaussians are fitted to; raise EbjdatError where no class has LEAST of them."""
    listing = listed_images(folder, "prior", LEAST)
    label, how = labels_of(listing.images, folder, labels, folders)
    if label is None:
        raise EbjdatError(f"{printable(folder)}: a prior takes labelled images; these are {how}")
    counts = np.bincount(label[label >= 0], minlength=len(labels))
    enough = np.flatnonzero(counts >= LEAST)
    if not len(enough):
        raise EbjdatError(
            f"{printable(folder)}: no class has {LEAST} images, which a prior takes at least: "
            f"{labels[counts.argmax()]!r} has most, {counts.max()}"
        )
    noise, each = np.random.default_rng(0), max(LEAST, min(FITTED, ALL // len(enough)))
    chosen = [np.sort(noise.permutation(np.flatnonzero(label == y))[:each]) for y in enough]
    name = printable(folder.name or folder.resolve().name)
    return Labelled(listing.images, np.concatenate(chosen), label, name)


def fit_prior(bundle: Bundle, given: Labelled, say: Say) -> tuple[Prior, list[int]]:
    """Return the Gaussians of the classes that have LEAST readable images, and the number of images that each class was fitted to."""
    size, classes = bundle.manifest.input, np.unique(given.label[given.places])
    budget = max(BYTES, bundle.manifest.files["weights.safetensors"].bytes // 10) - HEADER
    most = int(np.bincount(given.label[given.places]).max()) - 1
    height, width, rank = room(budget, len(classes), size.height, size.width, most)
    images = FolderImages(given.files, size, say, turns=len(given.places))
    counts, means, factors = [0] * len(bundle.manifest.labels), [], []
    for y, low in by_class(images, given, height, width):
        if len(low) >= LEAST:
            mean, factor = gaussian(low, rank)
            means.append(mean)
            factors.append(factor)
            counts[y] = len(low)
    if images.unread:
        say(f"left out {len(images.unread)} that cannot be read: {images.reasons()}")
    if not means:
        raise EbjdatError(f"no class has {LEAST} images that can be read, which a prior takes at least: {images.reasons()}")
    drawn = np.flatnonzero(counts)
    low_size = None if (height, width) == (size.height, size.width) else (size.height, size.width)
    return Prior(np.stack(means), np.stack(factors), None if len(drawn) == len(counts) else drawn, low_size), counts


def room(budget: int, classes: int, height: int, width: int, most: int) -> tuple[int, int, int]:
    """Return the height, width and rank of the Gaussians of so many classes that fit into ``budget`` bytes; ``most`` is the most rank.

    Raises EbjdatError where not even the smallest fit.
    """
    for side in SIDES:
        scale = min(1.0, side / max(height, width))
        h, w = max(1, round(height * scale)), max(1, round(width * scale))
        values = classes * 3 * h * w
        rank = min(RANK, most, (budget - 4 * values) // (2 * values))  # means take 4 bytes, factors 2
        if rank >= min(LEAST_RANK, most) or (side == SIDES[-1] and rank > 0):
            return h, w, rank
    raise EbjdatError(
        f"a prior of {classes} classes does not fit into {budget:,} bytes, a tenth of the weights or 3 MB: give images of fewer"
    )


def by_class(images: FolderImages, given: Labelled, height: int, width: int) -> Iterator[tuple[int, Floats]]:
    """Yield each class with its readable images (n, 3, h, w), averaged over areas; one class is held at a time."""
    rows, columns = areas(images.contract.height, height), areas(images.contract.width, width)
    held: list[Floats] = []
    now = -1
    for where, part in images.chunks(given.places):
        low, label = rows @ to_unit(part) @ columns.T, given.label[where]
        for y in np.unique(label):
            if y != now and held:
                yield now, np.concatenate(held)
                held = []
            now = int(y)
            held.append(low[label == y])
    if held:
        yield now, np.concatenate(held)


def areas(size: int, cells: int) -> Floats:
    """Return the matrix (cells, size) of means over equal parts of ``size`` pixels."""
    edges, pixel = np.arange(cells + 1)[:, None] * size / cells, np.arange(size)
    return ((np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)).clip(0) * cells / size).astype(np.float32)


def gaussian(image: Floats, rank: int) -> tuple[Floats, Floats]:
    """Return the mean (3, h, w) of images (n, 3, h, w), and the ``rank`` leading principal components, scaled by their deviations.

    Of fewer images the last components are 0.
    """
    flat = image.reshape(len(image), -1).astype(np.float64)
    mean = flat.mean(axis=0)
    x = flat - mean
    _, vectors = np.linalg.eigh(x @ x.T)  # the leading ones last
    leading = vectors[:, ::-1][:, : min(rank, len(x) - 1)].T @ x / np.sqrt(len(x) - 1)
    factor = np.zeros((rank, x.shape[1]), np.float32)
    factor[: len(leading)] = leading
    return mean.astype(np.float32).reshape(image.shape[1:]), factor.reshape(rank, *image.shape[1:])


def sampler_for(engine: Engine, prior: Prior, wanted: Wanted) -> Sampler:
    """Return the sampler: lengths that nobody says are those of the model that ships, in units of this model's own score at its prior."""
    label = prior.labels[np.linspace(0, len(prior.labels) - 1, CHUNK).astype(np.int64)]
    start = Chains.start(prior, Sampler(1, 0.0, 0.0, 0.0), label, seed=0).image
    together = together_of(prior, start.shape[2:])
    score = np.concatenate([engine.score(start[i : i + together], label[i : i + together])[0] for i in range(0, len(label), together)])
    scale = float(np.sqrt(np.mean(np.square(score, dtype=np.float64))))
    step_size = wanted.step_size
    if step_size is None:
        if not np.isfinite(scale) or scale < MOVE / 1e3:
            raise EbjdatError(f"the score at the prior is {scale:.1e}, by which no step size can be chosen", options=("--step-size X",))
        step_size = float(f"{MOVE / scale:.3g}")
    grad_clip = float(f"{FARTHEST / step_size:.3g}") if wanted.grad_clip is None and step_size else wanted.grad_clip or 0.0
    told = {"steps": wanted.steps, "step_size": step_size, "grad_clip": grad_clip, "noise_std": wanted.noise_std}
    return parse(Sampler, told, "the sampler")


def together_of(prior: Prior, size: tuple[int, ...]) -> int:
    """Return how many chains are moved together."""
    return max(1, min(CHUNK, PIXELS // int(np.prod(size))))


def agreement(engine: Engine, prior: Prior, sampler: Sampler, label: Labels, say: Say) -> dict[int, np.ndarray]:
    """Return, by steps taken, which of the chains (N,) the model labels as asked: of the prior alone, after a quarter, after all.

    The pixels are those that a server delivers, of 8 bits; start and noise of chain i depend on i alone. Raises EbjdatError for chains
    that are not finite.
    """
    marks = sorted({0, max(1, sampler.steps // 4), sampler.steps})
    right: dict[int, list[np.ndarray]] = {steps: [] for steps in marks}
    size = prior.size or prior.mean.shape[2:]
    together, began, told = together_of(prior, size), time.monotonic(), time.monotonic()
    for i in range(0, len(label), together):
        chains = Chains.start(prior, sampler, label[i : i + together], i)
        for before, steps in zip([0, *marks], marks, strict=False):
            if steps > before:
                chains = engine.advance(chains, steps - before)
            if not np.isfinite(chains.image).all():
                raise EbjdatError(f"chains are not finite after {steps} steps: the model's score is not", options=("--step-size X",))
            found = classify_in_chunks(engine, to_unit(to_bytes(chains.image)))
            right[steps].append(found.logits.argmax(axis=1) == chains.label)
        if (now := time.monotonic()) - told >= 10:
            told, done = now, min(i + together, len(label))
            say(f"{done} of {len(label)} chains, about {duration((now - began) / done * (len(label) - done))} left")
    return {steps: np.concatenate(parts) for steps, parts in right.items()}


def chains_of(engine: Engine, prior: Prior, sampler: Sampler, wanted: int | None, say: Say) -> Labels:
    """Return the class of each chain to measure on: as many of each, and in all as SECONDS allow; say beforehand what they cost."""
    if wanted is not None and wanted < FEWEST_CHAINS:
        raise EbjdatError(f"class agreement takes {FEWEST_CHAINS} chains at least, not {wanted}")
    n = together_of(prior, prior.size or prior.mean.shape[2:])
    chains = Chains.start(prior, sampler, np.resize(prior.labels, n), 0)
    engine.advance(chains, 1)
    began = time.perf_counter()
    engine.advance(chains, 1)
    each = sampler.steps * (time.perf_counter() - began) / n
    count = wanted or max(FEWEST_CHAINS, min(CHAINS, int(SECONDS / each)))
    say(f"class agreement: {count} chains of {sampler.steps} steps, about {duration(count * each)}; --chains sets how many")
    return np.resize(np.random.default_rng(0).permutation(prior.labels), count)


def rows_of(right: Mapping[int, np.ndarray], sampler: Sampler, of: str) -> list[Row]:
    """Return class agreement as rows: after all steps, after some, of the prior alone."""
    from ebjdat_serve.measures import wilson  # SciPy's, of the extra [calibrate]: a server does without

    rows = []
    for steps, good in sorted(right.items(), reverse=True):
        about: dict[str, Any] = {"dataset": FRESH, **asdict(replace(sampler, steps=steps))} if steps else {"dataset": PRIOR}
        rows.append(
            Row(
                metric="class_agreement_own",
                value=float(good.mean()),
                n=len(good),
                of=of,
                seed=0,
                interval=wilson(int(good.sum()), len(good)),
                interval_kind="wilson",
                part="generation",
                **about,
            )
        )
    return rows


def prior_folder(
    bundle: Bundle,
    folder: Path,
    *,
    folders: Mapping[str, str] | None = None,
    wanted: Wanted = AS_FITS,
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
) -> Bundle:
    """Record a prior fitted to the labelled images of ``folder``, its sampler and class agreement, and return the bundle, which draws.

    ``folders`` tells labels of sub-folders' names. Raises EbjdatError where chains cannot take steps, where no class has LEAST images,
    and for a sampler that cannot be; then nothing is written.
    """
    refuse_without_steps(bundle)
    m = bundle.manifest
    given = labelled(folder, m.labels, folders or {})
    bundle.check_files()
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise EbjdatError(f"intervals are computed by SciPy, which is not installed: {install('calibrate')}") from error
    engine = load_engine(bundle, "auto", "cpu", threads())
    verify_step(bundle, engine)
    say(f"fitting {len(np.unique(given.label[given.places]))} of {len(m.labels)} classes to {len(given.places):,} images")
    prior, counts = fit_prior(bundle, given, say)
    sampler = sampler_for(engine, prior, wanted)
    label = chains_of(engine, prior, sampler, wanted.chains, say)
    rows = rows_of(agreement(engine, prior, sampler, label, say), sampler, bundle.measured("fp32"))
    kept = [row for row in bundle.metrics() if row.dataset not in GENERATED]  # those were of the prior before
    with replacing(bundle.path / "prior.safetensors") as file:
        prior.save(file)
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    write_rows(bundle.path / "metrics.json", [*kept, *rows])
    dataset = f"{sum(counts)} images of {given.dataset}"
    return bundle.update(
        "prior.safetensors",
        "metrics.json",
        capabilities=replace(m.capabilities, generate=YES),
        sampler=sampler,
        prior=FittedPrior(dataset, counts),
    )


def told(bundle: Bundle) -> list[str]:
    """Return what the prior is of, and class agreement, in lines."""
    prior, m = Prior.load(bundle.path / "prior.safetensors"), bundle.manifest
    _, _, *low = prior.mean.shape
    assert m.prior
    size = m.files["prior.safetensors"].bytes
    return [
        f"class Gaussians of {len(prior.labels)} of {len(m.labels)} classes, fitted to {m.prior.dataset} at {low[0]} x {low[1]} pixels, "
        f"rank {prior.factor.shape[1]}, {size / 1e6:.1f} MB",
        agreement_words(bundle.metrics()),
    ]
