"""What numbers and class labels a bundle may hold."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ebjdat_serve.errors import JOINERS, UNSEEN

LONGEST_LABEL = 200
"""Characters of a class label, in a bundle and in a request: the time to normalise one grows with the square of its combining marks."""
SEEN = ("L", "N", "P", "S", "Cs")
"""Unicode's categories of what a reader sees: letters, numbers, punctuation, symbols; and half a character, which is refused as such."""


@dataclass(frozen=True)
class Bounds:
    """The least and the most that a number may be; NaN is neither."""

    least: float
    most: float

    def fault(self, value: float) -> str:
        """Return what is wrong with a number, "" if nothing is."""
        return "" if self.least <= value <= self.most else f"must be {said(self.least)} to {said(self.most)}, not {str(value)[:40]}"


def said(bound: float) -> str:
    """Return a bound as people write it."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


COUNT = Bounds(0, 2**53)
"""What any reader of JSON takes for the same integer."""
NATS = Bounds(-1e12, 1e12)
"""Energies and scores."""


def class_number(text: str, classes: int) -> int | None:
    """Return the class that a text names by its number, None where it is no number of one."""
    try:
        return int(text) if text.isascii() and 0 <= int(text) < classes else None
    except ValueError:
        return None


def seen_as(label: str) -> str:
    """Return a label as readers tell it from others: composed, without joiners."""
    return unicodedata.normalize("NFC", label.translate(dict.fromkeys(map(ord, JOINERS))))


def label_fault(labels: Sequence[str]) -> str:
    """Return what is wrong with the labels of a model's classes, "" if nothing is: each must name its class alone."""
    seen: dict[str, int] = {}
    for index, label in enumerate(labels):
        said = f"the label of class {index}, {label[:40]!r}, "
        if not any(unicodedata.category(one).startswith(SEEN) for one in label):
            return f"{said}shows nothing"
        if label != label.strip():
            return f"{said}has white space at an end"
        if len(label) > LONGEST_LABEL:
            return f"{said}has {len(label)} characters, more than {LONGEST_LABEL}"
        if any(unicodedata.category(one) in UNSEEN and one not in JOINERS for one in label):
            return f"{said}holds a control character, or one that orders text anew"
        if (number := class_number(label, len(labels))) not in (None, index):
            return f"{said}is the number of class {number}: give it a name, or number all classes from 0 in order"
        if (other := seen.setdefault(seen_as(label), index)) != index:
            return f"{said}is that of class {other} too"
    return "" if labels else "there is no label"
