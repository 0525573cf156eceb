"""Merge an evaluation's rows into a bundle; a row of fewer images never replaces one of more."""

from dataclasses import dataclass
from pathlib import Path

from ebjdat_serve.bundle import Bundle, read_rows, write_rows
from ebjdat_serve.card import WARM_START, Baseline
from ebjdat_serve.errors import BundleError
from ebjdat_serve.rows import Images, Row
from ebjdat_serve.sentences import data_words, protocol_words
from training.card import baseline_of, renew_card
from training.evaluation.result_cache import Arrays


@dataclass(frozen=True)
class Evaluation:
    """The rows of one subject, their folder, and the arrays of its figures."""

    folder: Path
    rows: list[Row]
    arrays: dict[Images, Arrays]


@dataclass(frozen=True)
class Merged:
    """A bundle's rows after an evaluation; ``kept``: (its row, the new one of fewer images); ``stale``: of other files, dropped."""

    rows: list[Row]
    taken: list[Row]
    kept: list[tuple[Row, Row]]
    stale: list[Row]

    def summary(self) -> str:
        """Return a summary of the merge, with a line for each kept row."""
        lines = [f"{len(self.taken)} rows taken, {len(self.kept)} kept, of more images, {len(self.stale)} stale ones dropped"]
        for old, new in self.kept:
            lines.append(f"  kept {old.metric} of n = {old.n} (measured now: n = {new.n}): {data_words(old)}: {protocol_words(old)}")
        return "\n".join(lines)


def take(bundle: Bundle, measured: Evaluation, baseline: Path | None = None, title: str = WARM_START) -> tuple[Bundle, Merged]:
    """Write the rows of ``measured`` into the bundle with its card and images; ``baseline``: metrics.json of the one that it compares with.

    Raises BundleError when they are of other weights or graphs than the bundle's, and as ``compared`` does.
    """
    strange = next((row for row in measured.rows if not bundle.holds(row.of)), None)
    if strange is not None or not measured.rows:
        of = f"of {strange.of[:12]}, which it does not hold" if strange else "none"
        raise BundleError(f"{bundle.path} takes no rows {of}: evaluate this bundle first")
    reference = compared(bundle, baseline, title)
    merged = merge(bundle.metrics(), measured.rows, bundle)
    # the image shows the rows that are in the bundle
    arrays = measured.arrays if any(row.part == "landscape" for row in merged.taken) else {}
    write_rows(bundle.path / "metrics.json", merged.rows)
    bundle = bundle.update("metrics.json")
    drawn = "samples.png" in bundle.manifest.files  # samples depend only on the network, which an evaluation does not change
    return renew_card(bundle, merged.rows, reference, arrays, samples=not drawn), merged


def compared(bundle: Bundle, file: Path | None, title: str = WARM_START) -> Baseline:
    """Return what the bundle's card compares with: the rows of ``file``, without one as before.

    Raises BundleError for a file without rows, and for one of the bundle's own weights.
    """
    if file is None:
        return baseline_of(bundle)
    rows, own = read_rows(file), bundle.manifest.files.get("weights.safetensors")
    wrong = "no rows" if not rows else "figures of this bundle itself" if own and any(row.of == own.sha256 for row in rows) else ""
    if wrong:
        raise BundleError(f"{file} holds {wrong}: give the metrics.json of the network to compare with")
    return Baseline(title, rows)


def merge(before: list[Row], new: list[Row], bundle: Bundle | None = None) -> Merged:
    """Return ``before`` with the rows of ``new`` replacing those of the same measurement, unless the old row is of more images.

    Rows are in the order of their parts; those without a part, of lower precisions, come last. Stale rows of a ``bundle`` are dropped.
    """
    stale = [row for row in before if bundle is not None and not bundle.holds(row.of)]
    held = [row for row in before if row not in stale]
    current = {measurement(row): row for row in held}
    kept, taken = [], []
    for row in new:
        old = current.get(measurement(row))
        if old is not None and fewer(row, old):
            kept.append((old, row))
        else:
            current[measurement(row)] = row
            taken.append(row)
    parts = list(dict.fromkeys(row.part for row in (*held, *new)))
    order = {part: (part is None, parts.index(part)) for part in parts}
    return Merged(sorted(current.values(), key=lambda row: order[row.part]), taken, kept, stale)


def measurement(row: Row) -> tuple[str | None, str]:
    """Return the key of a row's measurement, which does not depend on the number of images or the result."""
    return row.part, row.key


def fewer(new: Row, old: Row) -> bool:
    """Return whether ``new`` is of fewer images than ``old``: its own, or those it is compared with."""
    return new.n < old.n or (new.against_n or 0) < (old.against_n or 0)
