"""The quality of fresh samples, by feature distances, compared with a floor, the prior, a replay buffer and control models."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebjdat_serve import pixels
from ebjdat_serve.bundle import sha256
from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.pixels import Pixels, to_unit
from ebjdat_serve.rows import BUFFER, CONTROL, FRESH, PRIOR, Images, Row
from ebjdat_serve.sgld import Chains, Prior, Sampler
from training.data.datasets import Dataset
from training.errors import TrainingError
from training.evaluation.attacks import Predict
from training.evaluation.context import Context
from training.evaluation.distances import frechet_distance, frechet_infinity, inception_score, kernel_distance, nearest, precision_recall
from training.evaluation.evaluated_model import EvaluatedModel, load_weights, module_sha256, open_weights, weights_spec
from training.evaluation.extractors import Extractor, Features, available
from training.evaluation.result_cache import Arrays, ResultCache
from training.evaluation.rows import SEED, compared_with, number, proportion
from training.loop.state import read_state
from training.methods.replay import fit_prior

TOGETHER, TOGETHER_GPU = 20, 256
"""Chains per batch; each chain's noise depends on its own seed, so the batch size does not affect results."""
NEAREST = 3
"""Number of neighbours of precision and recall."""
LabelledImages = tuple[Pixels, Labels]
"""Images and their classes."""


@dataclass(frozen=True)
class Draw:
    """Fresh class-conditional chains from the prior; the "images" are (N, 1): the chain's number, which determines its seed."""

    sampler: Sampler
    prior: str = field(repr=False)  # its path is not part of the key
    prior_sha256: str

    @property
    def cost(self) -> float:
        return 3.0 * max(self.sampler.steps, 0) + 1.0

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return image (N, H, W, 3) uint8, as delivered by the server."""
        start, parts = int(image[0, 0]), []
        together = TOGETHER_GPU if subject.device.type == "cuda" else TOGETHER
        for i in range(0, len(label), together):
            chains = Chains.start(opened_prior(self.prior), self.sampler, label[i : i + together], SEED + start + i)
            parts.append((subject.advance(chains, self.sampler.steps) if self.sampler.steps else chains).image)
        return {"image": pixels.to_bytes(np.concatenate(parts))}


@lru_cache(maxsize=2)
def opened_prior(file: str) -> Prior:
    """Return the prior, read once per process."""
    return Prior.load(Path(file))


def generation_rows(c: Context) -> Iterator[Row]:
    """Yield distances, precision and recall, class agreement and neighbours of fresh samples and of the sets they are compared with."""
    if not c.drawable():
        return
    sampler, prior = start_of(c)
    n, drawn_of = c.suite.samples, opened_prior(str(prior)).labels
    classes, label = len(drawn_of), np.resize(drawn_of, n)
    index = np.arange(n, dtype=np.float32)[:, None]
    work = Draw(sampler, str(prior), sha256(prior))
    by_sampler = Images(dataset=FRESH, **vars(sampler))
    (drawn,) = c.ledger.run("fresh samples", [(work, index, label)])
    (start,) = c.ledger.run("the prior alone", [(Draw(Sampler(0, 0.0, 0.0, 0.0), work.prior, work.prior_sha256), index, label)])
    fresh: Pixels = drawn["image"]
    found = c.look(Images(dataset=FRESH), Predict(), to_unit(fresh), label)
    of = c.subject.graph
    yield c.share("class_agreement_own", found["logits"].argmax(axis=1) == label, by_sampler, of)
    energy = -np.logaddexp.reduce(found["logits"].astype(np.float64), axis=1)
    yield number("energy_samples", energy.mean(), n, by_sampler, of)
    yield seconds_row(c, work, by_sampler)
    sets = {
        by_sampler: (fresh, label),
        Images(dataset=PRIOR): (start["image"], label),
        **controls_and_buffer(c, work, index, label, by_sampler),
    }
    if len(c.data.train):
        yield from distance_rows(c, sets, n)
        yield from neighbour_rows(c, fresh, by_sampler)
    else:
        c.say("distances and neighbours of samples: not measured, the images that the network was trained on are not known")
    c.drawings["fresh"] = {"image": fresh, "label": label}
    c.drawings["samples"] = {"image": fresh[: 10 * classes], "label": label[: 10 * classes]}


def start_of(c: Context) -> tuple[Sampler, Path]:
    """Return the sampler and the prior's file: the bundle's, or the default sampler and a prior fitted to the training split."""
    if c.bundle is not None and "prior.safetensors" in c.bundle.manifest.files:
        return c.bundle.manifest.sampler, c.bundle.path / "prior.safetensors"
    file = c.folder / f"prior-{c.data.sha256[:12]}.safetensors"
    if not file.is_file():
        c.folder.mkdir(parents=True, exist_ok=True)
        fit_prior(c.data.train, len(c.data.names), 48 if c.data.name != "digits" else 24).save(file)
    return Sampler(steps=80, step_size=0.25, grad_clip=2.0, noise_std=0.005), file


def controls_and_buffer(c: Context, work: Draw, index: Floats, label: Labels, by_sampler: Images) -> dict[Images, LabelledImages]:
    """Return the controls' samples, with the same prior, steps and seeds, and the replay buffer's chains if a run's state is given."""
    sets: dict[Images, LabelledImages] = {}
    for file in c.controls:
        control = open_weights(file, c.subject.device)
        ledger = ResultCache(c.ledger.folder, weights_spec(file, c.subject.device), control, c.ledger.processes)
        (drawn,) = ledger.run(f"control {file.parent.name}", [(work, index, label)])
        sets[replace(by_sampler, dataset=CONTROL, control=file.parent.name, control_of=control.weights)] = (drawn["image"], label)
    if c.buffer is not None:
        sets[Images(dataset=BUFFER)] = buffer_images(c.buffer, len(label), len(c.data.names))
    return sets


def check_given(subject: EvaluatedModel, data: Dataset, controls: Sequence[Path], buffer: Path | None) -> None:
    """Raise TrainingError, before hours of measuring, for a control or a replay buffer that is none."""
    for file in controls:
        network = load_weights(file)
        if network.classes != len(data.names):
            raise TrainingError(f"{file} has {network.classes} classes, {data.name} {len(data.names)}: it is no control")
        if subject.weights in (sha256(file), module_sha256(network)):
            raise TrainingError(f"{file} is the model itself: a control is another")
    if buffer is not None and (size := buffer_images(buffer, 1, 1)[0].shape[1:3]) != data.size:
        raise TrainingError(f"{buffer} has chains of {size[0]} x {size[1]} pixels, {data.name} has {data.size[0]} x {data.size[1]}")


def buffer_images(file: Path, n: int, classes: int) -> tuple[Pixels, Labels]:
    """Return n chains spread evenly over a run's replay buffer, which is ordered by class, and their classes.

    Raises TrainingError when the file holds none.
    """
    try:
        stack, found = [read_state(file)], None
    except (TrainingError, ValueError) as error:  # the latter: a path without a name
        raise TrainingError(f"{file} is no state.pt of a stage: give that of one that keeps chains") from error
    while stack and found is None:
        here = stack.pop()
        found = here.get("chain")
        stack += [value for value in here.values() if isinstance(value, dict)]
    if found is None:
        raise TrainingError(f"{file} holds no replay buffer: give the state.pt of a stage that keeps chains")
    # the ranks' parts are interleaved, so that class blocks stay in order
    chains = found.transpose(0, 1).flatten(0, 1)
    chosen = torch.linspace(0, len(chains) - 1, min(n, len(chains))).long()
    return pixels.to_bytes(chains[chosen].float().numpy()), (chosen * classes // len(chains)).numpy()


def distance_rows(c: Context, sets: dict[Images, LabelledImages], n: int) -> Iterator[Row]:
    """Yield, for every available extractor, distances to training images, and the floor: test images at the same n."""
    found, lacking = available(c.data.name)
    for text in lacking:
        c.say(text)
    if not found:
        c.say("no distance, precision or class agreement of samples: there is no extractor for this data")
    real = c.data.train.image[: min(10_000, max(2_000, 5 * n), len(c.data.train))]
    test = c.data.test.first(n)
    floor: dict[Images, LabelledImages] = {Images(dataset=c.data.name, split="test"): (test.image, test.label)}
    for extractor in found:
        known = features(c, extractor, real)["features"] if extractor.distances else None
        for images, (image, label) in {**sets, **floor}.items():
            got = features(c, extractor, image)
            if known is not None:
                yield from rows_of(c, extractor, images, got, known)
            if extractor.classes:
                agree = got["logits"].argmax(axis=1) == label
                yield c.share(f"class_agreement_{extractor.name}", agree, images, c.subject.graph, extractor=extractor.name)


def rows_of(c: Context, extractor: Extractor, images: Images, got: Arrays, known: Floats) -> Iterator[Row]:
    """Yield the rows of one set and one extractor."""
    fake, name = got["features"], extractor.name
    n, real = len(fake), compared_with(c.data.name, "train", len(known))

    def row(metric: str, value: float, **more: Any) -> Row:
        return number(metric, value, n, images, c.subject.graph, extractor=name, **real, **more)

    if name == "inception":
        yield row("fid", frechet_distance(fake, known))
        mean, error, splits = inception_score(probabilities(got["logits"], 1.0))
        yield row("inception_score", mean, splits=splits, stderr=error)
    else:
        yield row(f"frechet_{name}", frechet_distance(fake, known))
    if n // 4 > fake.shape[1]:  # below, the covariance is singular and FD is not linear in 1/n
        value, error = frechet_infinity(fake, known)
        yield row(f"frechet_infinity_{name}", value, stderr=error)
    value, error, blocks = kernel_distance(fake, known)
    yield row(f"kernel_distance_{name}", value, blocks=blocks, stderr=error)
    some = known[: max(n, 1000)]
    precision, recall = precision_recall(fake, some, NEAREST)
    yield row(f"precision_{name}", precision, k=NEAREST, reals=len(some))
    yield row(f"recall_{name}", recall, k=NEAREST, reals=len(some))


def features(c: Context, extractor: Extractor, image: Pixels) -> Arrays:
    """Return an extractor's features of uint8 images (N, H, W, 3)."""
    (found,) = c.ledger.run(f"{extractor.name}", [(Features(extractor), to_unit(image), np.zeros(len(image), np.int64))])
    return found


def neighbour_rows(c: Context, fresh: Pixels, images: Images) -> Iterator[Row]:
    """Yield distances of samples to their nearest training image, relative to those of test images; memorised images are much nearer."""
    known = to_unit(c.data.train.image).reshape(len(c.data.train), -1)
    some, real = fresh[:500], c.data.test.image[:500]
    distance, index = nearest(to_unit(some).reshape(len(some), -1), known)
    test, _ = nearest(to_unit(real).reshape(len(real), -1), known)
    about = compared_with(c.data.name, "train", len(known))
    ratio = float(np.median(distance) / np.median(test))
    yield number("neighbour_distance_ratio", ratio, len(some), images, c.subject.graph, reals=len(real), **about)
    closest = float(test.min())
    hits = int((distance < 0.5 * closest).sum())
    yield proportion("memorised", hits, len(some), images, c.subject.graph, observed={"nearest_test": closest}, **about)
    c.drawings["neighbours"] = {"image": some[:10], "nearest": c.data.train.image[index[:10]], "distance": distance[:10]}


def seconds_row(c: Context, work: Draw, images: Images) -> Row:
    """Return the row of seconds per sample, at ``TOGETHER`` samples per batch."""
    label = np.resize(opened_prior(work.prior).labels, TOGETHER)
    began = time.perf_counter()
    work.run(c.subject, np.zeros((TOGETHER, 1), np.float32), label)
    taken = (time.perf_counter() - began) / TOGETHER
    device = c.subject.device.type
    return number("seconds_per_sample", taken, TOGETHER, images, c.subject.graph, batch=TOGETHER, device=device)
