"""Calibrate a bundle on the images of a folder: `ebjdat-serve calibrate BUNDLE DIR`.

The folder is split, always alike: a quarter to fit the views on, a quarter for their ranks, the rest for p-values. Fewer than SPLIT images
all go to the p-values of one score that needs no fit (docs/decisions/0029). Half of the images are lightly handled, as in training's
calibration.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.calibrating import (
    FITTED,
    FITTED_BYTES,
    REACHED,
    fit_temperature,
    fit_views,
    look,
    reached,
    record,
    refuse_not_finite,
    view_names,
)
from ebjdat_serve.cpus import threads
from ebjdat_serve.detection import flag_range
from ebjdat_serve.engines import Engine, Floats, Outputs, load_engine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.folder_images import (
    FEWEST,
    SEEDS,
    WALK_PIXELS,
    FolderImages,
    Places,
    Say,
    duration,
    handled_each,
    labels_of,
    listed_images,
)
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.handling import UNTOUCHED
from ebjdat_serve.listing import printable
from ebjdat_serve.manifest import YES
from ebjdat_serve.pixels import Pixels, to_unit
from ebjdat_serve.reach import STEPS
from ebjdat_serve.scores import uncalibrated
from ebjdat_serve.views import statistics

SPLIT = 60
"""Images from which views are fitted: 15 to fit, 15 for ranks and 30 for p-values."""
VARIANTS = 200
"""Handled pictures that the view of statistics is fitted on at least, several of each image where there are few."""
LABELLED = 10_000
"""Images that the temperature is fitted on, at most."""
REACH_SECONDS = 300.0
"""Time that the walks of check=reach may take, by the time that one gradient takes; beyond it fewer images walk."""


@dataclass(frozen=True)
class Split:
    """Places of images in the listing: of those that views are fitted on, that their ranks are of, and that p-values are of.

    Each part is in random order, since the first of one may be all that walk: a listing is sorted, by classes where there are any.
    """

    fit: Places
    ranks: Places
    calibration: Places

    @classmethod
    def of(cls, n: int, most: int = FITTED) -> "Split":
        """Return the split of n images, ``most`` of which are to fit on; the same n is always split alike."""
        order, none = np.random.default_rng(0).permutation(n), np.empty(0, np.int64)
        if n < SPLIT:
            return cls(none, none, order)
        fit, ranks = min(n // 4, most), min(n // 4, FITTED)
        return cls(*np.split(order, [fit, fit + ranks]))


def told(bundle: Bundle) -> list[str]:
    """Return what a calibration promises, its views, and the views that it is without, in lines."""
    c = bundle.calibration()
    lines = [promise(len(c.scores)), f"views {', '.join(c.views)}; temperature {c.temperature:.3f}"]
    return [*lines, *(f"without the view {name}: {why}" for name, why in c.left_out.items())]


def calibrate_folder(
    bundle: Bundle,
    folder: Path,
    *,
    folders: Mapping[str, str] | None = None,
    reach_images: int | None = None,
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
) -> Bundle:
    """Record a calibration on the images of ``folder``, in fp32, and return the bundle; ``folders`` tells labels of sub-folders' names.

    ``reach_images`` walk for check=reach; by default as many as REACH_SECONDS allow. Raises EbjdatError for fewer than FEWEST images,
    counted and named, and for sub-folders of which only some name a label; then nothing is written.
    """
    listing = listed_images(folder)
    bundle.check_files()  # p-values of damaged weights would be of another model
    n, m = len(listing.images), bundle.manifest
    label, how = labels_of(listing.images, folder, m.labels, folders or {})
    if label is not None:
        fit_temperature(np.zeros((1, 2), np.float32), np.zeros(1, np.int64))  # without SciPy it is to fail now
    if listing.skipped:
        say(f"note: {listing.note()}")
    engine = load_engine(bundle, "auto", "cpu", threads())
    warm = engine.classify(np.full((1, 3, m.input.height, m.input.width), 0.5, np.float32))
    width = 0 if warm.features is None else warm.features.shape[1]
    split, images = Split.of(n, min(FITTED, FITTED_BYTES // (4 * max(1, width)))), FolderImages(listing.images, m.input, say)
    walking, cost = walkers(engine, bundle, split, reach_images)
    say(f"{n:,} images, {how}: {len(split.fit):,} to fit views on, {len(split.ranks):,} for ranks, {len(split.calibration):,} for p-values")
    say(cost)
    images.turns = n + walking
    done = calibrated(engine, bundle, images, split, label, f"{n} images of {printable(folder.name or folder.resolve().name)}", walking)
    if images.unread:
        say(f"left out {len(images.unread)} that cannot be read: {images.reasons()}")
    return done


def calibrated(
    engine: Engine,
    bundle: Bundle,
    images: FolderImages,
    split: Split,
    label: Places | None,
    dataset: str,
    walking: int,
    names: Sequence[str] = (),
) -> Bundle:
    """Look at the three parts in turn, and record what they say in the engine's precision; ``names`` are views to fit, if not the usual."""
    can, n = bundle.manifest.capabilities, len(split.calibration)
    fitting = len(split.fit) > 0
    names = names or (view_names(can) if fitting else (uncalibrated(energy=can.energy == YES),))
    training, lightly, labelled = fitted(engine, images, split.fit)
    combination, out = fit_views(names, training, lightly, training.logits, bundle=bundle, calibration_n=n)
    if fitting:
        ranks = look(engine, combination, (part for _, part in images.mixed(split.ranks, "ranks")))
        combination = combination.with_ranks_of(ranks.raw)
    seen: list[Places] = []
    found = look(engine, combination, pixels_of(images.mixed(split.calibration, "calibration"), seen), LABELLED)
    if not fitting:  # a rank among the very scores that p-values are of is monotone in the score, of which there is one
        combination = combination.with_ranks_of(found.raw)
        out = {name: f"{n} images; {SPLIT} are needed to fit views" for name in view_names(can) if name not in names} | out
    there = np.concatenate(seen)
    if len(there) < FEWEST:
        raise EbjdatError(
            f"{len(there)} images for p-values can be read, {len(images.unread)} cannot; a calibration takes {FEWEST} at least"
        )
    walked = np.empty(0, np.float32)
    if walking:
        walked = reached(engine, (part for _, part in images.mixed(there[:walking], "calibration", WALK_PIXELS)), STEPS)
    logits = np.concatenate([training.logits, found.logits])[:LABELLED]
    places = np.concatenate([labelled, there])[: len(logits)]
    temperature = temperature_of(logits, None if label is None else label[places], images.say)
    return record(
        bundle,
        engine.precision,
        combination,
        found,
        walked,
        dataset=dataset,
        handled=1 - UNTOUCHED,
        temperature=temperature,
        left_out=out,
        reach_steps=STEPS,
    )


def pixels_of(chunks: Iterator[tuple[Places, Pixels]], seen: list[Places]) -> Iterator[Pixels]:
    """Yield the images of chunks, and note the places of those that were read."""
    for places, images in chunks:
        seen.append(places)
        yield images


def fitted(engine: Engine, images: FolderImages, places: Places) -> tuple[Outputs, Floats, Places]:
    """Return what the engine says of the images to fit on, the statistics of them when handled, and their places."""
    found: list[Outputs] = []
    lightly: list[Floats] = []
    there: list[Places] = []
    variants = -(-VARIANTS // max(1, len(places)))
    for where, part in images.chunks(places):
        found.append(classify_in_chunks(engine, to_unit(part)))
        refuse_not_finite(found[-1], sum(map(len, there)))
        lightly.extend(statistics(to_unit(handled_each(part, where, SEEDS["fit"], 0.0, variant))) for variant in range(variants))
        there.append(where)
    if not found:
        blank = np.full((1, 3, images.contract.height, images.contract.width), 0.5, np.float32)
        none = Outputs(*(None if part is None else part[:0] for part in engine.classify(blank)))  # type: ignore[arg-type]
        return none, np.empty((0, 5), np.float32), np.empty(0, np.int64)
    return Outputs.join(found), np.concatenate(lightly), np.concatenate(there)


def walkers(engine: Engine, bundle: Bundle, split: Split, wanted: int | None) -> tuple[int, str]:
    """Return how many images walk for check=reach, and what is said of it beforehand."""
    if "score" not in bundle.functions or wanted == 0:
        why = "--reach-images 0" if wanted == 0 else bundle.manifest.capabilities.gradient
        return 0, f"check=reach is not calibrated: {why}"
    m = bundle.manifest
    grey, label = np.full((1, 3, m.input.height, m.input.width), 0.5, np.float32), np.zeros(1, np.int64)
    engine.score(grey, label)
    began = time.perf_counter()
    engine.score(grey, label)
    each = 2 * STEPS * (time.perf_counter() - began)
    most = min(REACHED, len(split.calibration))
    n = min(most, int(REACH_SECONDS / each)) if wanted is None else min(most, wanted)
    if n < FEWEST:
        return (
            0,
            f"check=reach is not calibrated: an image's walk takes {each:.1f} s here; --reach-images {FEWEST} has it done all the same",
        )
    return n, f"check=reach: {n} images walk {STEPS} steps towards another label, about {duration(n * each)}; --reach-images sets how many"


def temperature_of(logits: Floats, label: Places | None, say: Say) -> float:
    """Return the temperature of p(y|x) by the images that have a label (not -1), 1 without enough of them."""
    known = np.empty(0, np.int64) if label is None else np.flatnonzero(label >= 0)
    if label is None or len(known) < FEWEST:
        if label is not None:
            say(f"temperature 1: {len(known)} of these images have labels, {FEWEST} are needed")
        return 1.0
    return fit_temperature(logits[known], label[known])


def promise(n: int, alpha: float = 0.05) -> str:
    """Return what n calibration images promise of the flag at ``alpha``."""
    mean, low, high = flag_range(n, alpha)
    if not mean:
        return f"n = {n}: no p-value is below alpha {alpha:g}; the smallest is 1/{n + 1}"
    return (
        f"n = {n}: p-values down to 1/{n + 1}; at alpha {alpha:g} it flags {mean:.1%} of images like these on average, "
        f"and {low:.1%} to {high:.1%} by 95 of 100 such calibrations"
    )
