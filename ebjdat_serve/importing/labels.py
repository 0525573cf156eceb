"""Class labels of somebody else's model: from a file, or from what an ONNX graph says of itself."""

import ast
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebjdat_serve import strict_json
from ebjdat_serve.bounds import label_fault
from ebjdat_serve.bundle import read_bytes
from ebjdat_serve.errors import EbjdatError

LARGEST = 2**20
KEYS = ("labels", "classes", "class_names", "names", "character", "id2label")
"""Keys of an ONNX file's metadata under which exporters write labels: ours, Ultralytics' names, PaddleOCR's character, transformers'."""


def read_labels(file: Path) -> list[str]:
    """Return the labels in a file: one a line, a JSON list, or a JSON object from class number to label.

    Raises EbjdatError for a file that is none of these or not UTF-8.
    """
    try:
        text = read_bytes(file, LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EbjdatError(f"{file} is not UTF-8: {error.reason}") from error
    found = parsed(text)
    if found is None and text.lstrip()[:1] in ("[", "{"):
        raise EbjdatError(f"{file} is neither a JSON list of labels nor an object from class number, 0 to K - 1, to label")
    labels = found or [line.strip() for line in text.splitlines() if line.strip()]
    if not labels:
        raise EbjdatError(f"{file} holds no labels")
    return labels


def of_metadata(metadata: Mapping[str, str], classes: int) -> tuple[list[str] | None, str]:
    """Return the labels that a graph's metadata has for ``classes`` classes, or None, and where they are or why they are not used."""
    refused = ""
    for key in KEYS:
        text = metadata.get(key, "")
        if not text or len(text) > LARGEST:
            continue
        found = parsed(text)
        if found is None and not text.lstrip().startswith(("[", "{")):
            found = [part.strip() for part in (text.split("\n") if "\n" in text else text.split(","))]
        labels = distinct([label for label in found or [] if label])
        if len(labels) == classes and not label_fault(labels):
            return labels, f"labels from its metadata key {key!r}"
        refused = f"its metadata key {key!r} has {len(labels)} labels for {classes} classes"
        if len(labels) == classes:
            refused = f"its metadata key {key!r}: {label_fault(labels)}"
    return None, refused


def parsed(text: str) -> list[str] | None:
    """Return the labels in a JSON list or object, or in Python's notation of one, None for any other text."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        found: Any = strict_json.loads(text)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is no literal of Python
                found = ast.literal_eval(text)  # Ultralytics writes the repr of a dict; literals alone are read
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return None
    if isinstance(found, dict):
        found = [found.get(number, found.get(str(number))) for number in range(len(found))]
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        return None
    return [label.strip() for label in found]


def distinct(labels: list[str]) -> list[str]:
    """Return labels that each name their class alone: those of several classes with the class number (ImageNet has two cranes)."""
    count = Counter(labels)
    return [label if count[label] == 1 else f"{label} ({number})" for number, label in enumerate(labels)]


def numbered(classes: int) -> list[str]:
    """Return the labels of classes that nobody has named."""
    return [str(number) for number in range(classes)]


def checked(labels: list[str], classes: int, where: str) -> list[str]:
    """Return distinct labels; raise EbjdatError unless there is one a class, and each can be shown."""
    if len(labels) != classes:
        raise EbjdatError(f"{where} has {len(labels)} labels, the model {classes} classes")
    if any("\ud800" <= letter <= "\udfff" for label in labels for letter in label):
        raise EbjdatError(f"{where}: a label holds half of a character, which nothing can show")
    if fault := label_fault(done := distinct(labels)):
        raise EbjdatError(f"{where}: {fault}")
    return done


def listed(labels: list[str], most: int = 6) -> str:
    """Return the first of several labels as text."""
    more = f", … {json.dumps(labels[-1], ensure_ascii=False)}" if len(labels) > most else ""
    return ", ".join(json.dumps(label, ensure_ascii=False) for label in labels[:most]) + more
