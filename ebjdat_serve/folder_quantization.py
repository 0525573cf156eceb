"""Add int8 to an imported bundle, with evidence from the images of a folder: `ebjdat-serve quantize BUNDLE DIR`.

A part of the folder is held back: what int8 costs is measured on images that neither the quantiser nor the calibration of int8 has seen.
A bundle beyond the limits of precision.py is refused with its figures, and nothing is written (docs/decisions/0032).
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve.bundle import Bundle, write_rows
from ebjdat_serve.card import figure, write_card
from ebjdat_serve.cpus import threads
from ebjdat_serve.editing import check_editable, copied, put
from ebjdat_serve.engines import Engine, Floats, Outputs, Precision, load_engine
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.exporting.int8 import write_int8_folded
from ebjdat_serve.folder_calibration import Split, calibrated, walkers
from ebjdat_serve.folder_images import SEEDS, FolderImages, Places, Say, handled_each, labels_of, listed_images
from ebjdat_serve.handling import UNTOUCHED
from ebjdat_serve.listing import printable
from ebjdat_serve.measures import auroc
from ebjdat_serve.pixels import Pixels, to_unit
from ebjdat_serve.precision import FEWEST, rows_of
from ebjdat_serve.precision_figures import ALPHA, MakeRow, costs, differences, flag_rows, flagged, right, speed_rows
from ebjdat_serve.rows import SUM, Images, Row
from ebjdat_serve.selftest import FUNCTIONS
from ebjdat_serve.sentences import protocol_words
from ebjdat_serve.store import next_revision, scratch, store_of
from ebjdat_serve.verification import Terms, verified
from ebjdat_serve.views import LEAST_FOR_FEATURES, VIEWS, Combination, Seen

MOST_HELD, OTHERS = 2000, 100
"""Images that are held back, at most, and the fewest that are left for ranges and calibration."""
RANGE_IMAGES = 512
"""Images that the ranges of activations are of, at most."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
INT8 = Terms(engine="onnx", device="cpu", precision="int8")


@dataclass(frozen=True)
class Parts:
    """Places of images in the listing: of those held back, those that ranges are of, and the split that int8 is calibrated on.

    Ranges are of images that views are fitted on, so that those of ranks and p-values are as new to the graph as what it will see.
    """

    held: Places
    ranges: Places
    split: Split

    @classmethod
    def of(cls, n: int, *, calibrated: bool) -> "Parts":
        """Return the parts of n images: a third is held back, from FEWEST to MOST_HELD; the same n is always split alike."""
        order, held = np.random.default_rng(1).permutation(n), max(FEWEST, min(n // 3, MOST_HELD))
        rest, own = order[held:], Split.of(n - held)
        split = Split(rest[own.fit], rest[own.ranks], rest[own.calibration])
        return cls(order[:held], (split.fit if calibrated else rest)[:RANGE_IMAGES], split)


def quantize_folder(
    path: Path,
    folder: Path,
    *,
    folders: Mapping[str, str] | None = None,
    json: Path | None = None,
    force: bool = False,
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
) -> Bundle:
    """Add int8 to the imported bundle at ``path``, a bundle or a store, and return it; ``folders`` tells labels of sub-folders' names.

    ``json`` gets the figures, admitted or not. A calibrated bundle gets a calibration of int8 by the views of fp32. Raises EbjdatError for
    too few images, and BundleError for a model that was trained here or that int8 costs too much: then nothing is written.
    """
    bundle = check_editable(path.resolve(), force=force)
    if not bundle.manifest.imported:
        raise BundleError(
            f"{bundle.path} was trained here: python training/precision.py {path} --precision int8 measures int8 under attack, too"
        )
    listing = listed_images(folder)
    bundle.check_files()
    parts = parts_of(bundle, folder, len(listing.images))
    label, how = labels_of(listing.images, folder, bundle.manifest.labels, folders or {})
    images = FolderImages(listing.images, bundle.manifest.input, say)
    say(f"{len(listing.images):,} images, {how}: {len(parts.ranges):,} for ranges, {len(parts.held):,} held back to measure on")
    images.turns = len(parts.ranges) + len(parts.held) + (sum(map(len, vars(parts.split).values())) if bundle.calibrated else 0)
    with scratch(bundle.path.parent) as trial:
        draft = copied(bundle, trial / "int8")
        draft = draft.update(write_int8_folded(draft, (to_unit(part) for _, part in images.chunks(parts.ranges))))
        name = printable(folder.name or folder.resolve().name)
        if bundle.calibrated:
            draft = calibrated_int8(draft, images, parts.split, label, f"{len(listing.images)} images of {name}")
        rows = list(measured(draft, images, parts.held, label, name))
        for row in rows:
            full = "" if row.fp32 is None else f"; fp32 {row.fp32:.4g}"
            say(f"{row.metric:36}{figure(row):>24}  n = {row.n:<6} {protocol_words(row)}{full}")
        if json:
            write_rows(json, rows)
        write_rows(draft.path / "metrics.json", [*kept(draft), *rows])
        draft = draft.update("metrics.json")
        if images.unread:
            say(f"left out {len(images.unread)} that cannot be read: {images.reasons()}")
        admitted(draft)
        done = write_card(draft.update(version=next_revision(bundle, store_of(bundle.path))))
        return put(done, bundle.path)


def parts_of(bundle: Bundle, folder: Path, n: int) -> Parts:
    """Return the parts of n images; raise EbjdatError where they are too few to measure on, or for the views that fp32 flags by."""
    least = FEWEST + OTHERS
    if n < least:
        raise EbjdatError(
            f"{printable(folder)} holds {n} images: int8 takes {least} at least, {FEWEST} to measure on that were not quantised with"
        )
    parts = Parts.of(n, calibrated=bundle.calibrated)
    views = bundle.calibration().views if bundle.calibrated else []
    featured = [name for name in views if VIEWS[name].needs_features]
    if featured and len(parts.split.calibration) < LEAST_FOR_FEATURES:
        more = next(m for m in range(n, 10 * n) if len(Parts.of(m, calibrated=True).split.calibration) >= LEAST_FOR_FEATURES)
        raise EbjdatError(
            f"{printable(folder)} holds {n} images: fp32 flags by {', '.join(featured)} too, which takes {more:,} to calibrate int8 alike"
        )
    return parts


def calibrated_int8(bundle: Bundle, images: FolderImages, split: Split, label: Places | None, dataset: str) -> Bundle:
    """Record a calibration of int8 by the views of fp32, its walk as fp32 has one."""
    engine, fp32 = load_engine(bundle, "onnx", "cpu", threads(), "int8"), bundle.calibration()
    walking, cost = walkers(engine, bundle, split, None if fp32.reach_steps else 0)
    if walking:
        images.say(cost)
    return calibrated(engine, bundle, images, split, label, dataset, walking, fp32.views)


@dataclass(frozen=True)
class Seeing:
    """What an engine says of a set of images, and their OOD scores by the views of each precision."""

    outputs: Outputs
    scores: dict[str, Floats]

    @classmethod
    def join(cls, parts: list["Seeing"]) -> "Seeing":
        """Return what was said of all parts, in order."""
        scores = {name: np.concatenate([one.scores[name] for one in parts]) for name in parts[0].scores}
        return cls(Outputs.join([one.outputs for one in parts]), scores)


def sets_of(images: Pixels, places: Places, last: Pixels) -> dict[str, Pixels]:
    """Return a chunk of images handled as the calibration's are, and the means of each and the one before it, which show neither.

    ``last`` (0 or 1, H, W, 3) is the image before the chunk: pairs do not depend on chunks, and there is one less than images.
    """
    row = np.concatenate([last, images]).astype(np.uint16)
    found = {"handled": handled_each(images, places, SEEDS["held back"], UNTOUCHED), "mixed": ((row[1:] + row[:-1]) // 2).astype(np.uint8)}
    return {what: pixels for what, pixels in found.items() if len(pixels)}


def look(engine: Engine, images: Pixels, views: Mapping[Precision, Combination]) -> Seeing:
    """Return what an engine says of images, and their scores by the views of each precision."""
    unit = to_unit(images)
    found = engine.classify(unit)
    seen = Seen(unit, found.features, found.logits)
    return Seeing(found, {name: each.score(each.terms(seen)) for name, each in views.items()})


def measured(bundle: Bundle, images: FolderImages, held: Places, label: Places | None, dataset: str) -> Iterator[Row]:
    """Yield the figures of int8 against fp32 on the images held back."""
    engines = {name: load_engine(bundle, "onnx", "cpu", threads(), name) for name in PRECISIONS}
    views = {name: bundle.combination(name) for name in PRECISIONS if bundle.calibrated}
    found: dict[tuple[str, Precision], list[Seeing]] = {}
    there, timed = [], np.empty((0, 3, 0, 0), np.float32)
    last = np.empty((0, bundle.manifest.input.height, bundle.manifest.input.width, 3), np.uint8)
    for places, chunk in images.chunks(held):
        there.append(places)
        timed = to_unit(chunk[:32]) if len(timed) == 0 else timed
        for what, pixels in {"clean": chunk, **(sets_of(chunk, places, last) if views else {})}.items():
            for name, engine in engines.items():
                found.setdefault((what, name), []).append(look(engine, pixels, views))
        last = chunk[-1:]
    seen = {key: Seeing.join(parts) for key, parts in found.items()}
    where, of = Images(dataset=dataset, split="held back"), bundle.measured("int8")

    def row(metric: str, value: float, n: int, images: Images = where, **more: Any) -> Row:
        fixed: dict[str, Any] = {"of": of, "seed": 0, "precision": "int8", "provider": engines["int8"].provider}
        return Row(metric=f"{metric}_int8", value=float(value), n=int(n), **vars(images), **fixed, **more)

    before, after = seen["clean", "fp32"].outputs, seen["clean", "int8"].outputs
    yield from differences(row, before, after)
    yield from accuracy_rows(row, where, before, after, None if label is None else label[np.concatenate(there)], images.say)
    if views:
        yield from score_rows(bundle, row, where, seen)
    yield row("graph_bytes", bundle.graph("classify", "int8").stat().st_size, 1)
    one, other = (load_engine(bundle, "onnx", "cpu", 1, name) for name in PRECISIONS)
    yield from speed_rows(row, one, other, np.resize(timed, (32, *timed.shape[1:])))


def accuracy_rows(row: MakeRow, where: Images, before: Outputs, after: Outputs, label: Places | None, say: Say) -> Iterator[Row]:
    """Yield the accuracy of int8 and its drop, of the images that have a label (not -1); say where too few have one."""
    known = np.empty(0, np.int64) if label is None else np.flatnonzero(label >= 0)
    if label is None or len(known) < FEWEST:
        say(f"accuracy is not measured, agreement is the evidence: {len(known)} of the images held back have labels, {FEWEST} are needed")
        return
    yield from costs(row, "accuracy_clean", right(before.logits[known], label[known]), right(after.logits[known], label[known]), where)


def score_rows(bundle: Bundle, row: MakeRow, where: Images, seen: Mapping[tuple[str, Precision], Seeing]) -> Iterator[Row]:
    """Yield flag rates of images that are handled as the calibration's, and how well the OOD score tells interpolations from clean ones."""
    own = {name: seen["handled", name].scores[name] for name in PRECISIONS}
    rates = {name: float(flagged(bundle, name, scores).mean()) for name, scores in own.items()}
    n = len(own["int8"])
    yield from flag_rows(row, rates["int8"], n, len(bundle.calibration("int8").scores), "int8", rates["fp32"])
    by_fp32 = flagged(bundle, "fp32", seen["handled", "int8"].scores["fp32"]).mean()
    yield row("flag_rate_clean_fp32_threshold", by_fp32, n, alpha=ALPHA, calibration="fp32")
    apart = {name: auroc(seen["clean", name].scores[name], seen["mixed", name].scores[name]) for name in PRECISIONS}
    against = {"against": where.dataset, "against_split": where.split, "against_n": n, "score": SUM}
    yield row("auroc_interpolations", apart["int8"], 2 * n, Images(dataset="interpolations"), fp32=apart["fp32"], **against)


def kept(bundle: Bundle) -> list[Row]:
    """Return the rows that stay: those of other precisions that are of the bundle's files."""
    rows = bundle.metrics()
    old = rows_of(rows, "int8")
    return [row for row in rows if row not in old and bundle.holds(row.of)]


def admitted(bundle: Bundle) -> None:
    """Raise BundleError, which says that nothing was written, for a bundle that no server would serve in int8."""
    try:
        bundle.check_precision("int8")
        verified(bundle.path, INT8, FUNCTIONS)
    except BundleError as error:
        raise BundleError(f"{error}; nothing was written") from error
