"""Read an ONNX file's references without the onnx package: external data files, and operators that load engines.

A protobuf message is a row of (field number, wire type, value); only the fields that lead to tensors and operators are followed.
https://protobuf.dev/programming-guides/encoding/, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ebjdat_serve.errors import BundleError

FOLLOWED = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {4: "op_type", 5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
FOREIGN = ("EPContext",)
"""Operators that run a compiled engine, embedded or in another file, whose code cannot be checked."""
DEEPEST = 64


@dataclass(frozen=True)
class References:
    """The names of the external data files and of the operators used."""

    files: frozenset[str]
    operators: frozenset[str]


def references(data: bytes) -> References:
    """Return the references of the ONNX model in ``data``; raise ValueError when it is not an ONNX model."""
    files: set[str] = set()
    operators: set[str] = set()

    def walk(kind: str, message: memoryview, depth: int) -> None:
        if depth > DEEPEST:
            raise ValueError("nested too deep")
        for number, value in fields(message):
            follow = FOLLOWED[kind].get(number)
            if follow == "op_type":
                operators.add(str(value, "utf-8"))
            elif follow == "entry":
                entry = {n: str(text, "utf-8") for n, text in fields(value)}
                if entry.get(1) == "location":
                    files.add(entry.get(2, ""))
            elif follow:
                walk(follow, value, depth + 1)

    walk("model", memoryview(data), 0)
    return References(frozenset(files), frozenset(operators))


def fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and content of each field that has a length; skip numbers."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        if not 8 <= tag < 2**32:  # other readers truncate longer ones, and read another field
            raise ValueError("no such field")
        match tag & 7:
            case 0:
                _, at = varint(message, at)
            case 1:
                at += 8
            case 2:
                length, at = varint(message, at)
                if at + length > len(message):
                    raise ValueError("a field goes beyond the end")
                yield tag >> 3, message[at : at + length]
                at += length
            case 5:
                at += 4
            case kind:
                raise ValueError(f"wire type {kind}")


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the varint at ``at``, seven bits a byte, and the offset after it."""
    if at < len(message) and message[at] < 128:  # nearly all of them
        return message[at], at + 1
    value = shift = 0
    while shift < 70:
        if at >= len(message):
            raise ValueError("a number goes beyond the end")
        byte = message[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number is too long")


def check_graph(file: Path, allowed: Collection[str]) -> None:
    """Raise BundleError when a graph takes tensors from a file not in ``allowed``, or runs a compiled engine."""
    try:
        found = references(file.read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{file} is not an ONNX graph: {error}") from error
    strange = sorted(found.files - set(allowed))
    if strange:
        raise BundleError(f"{file} takes its weights from {strange[0]!r}, which is not a file of the bundle")
    foreign = sorted(found.operators & set(FOREIGN))
    if foreign:
        raise BundleError(f"{file} holds a compiled engine ({foreign[0]}), which is never loaded from a bundle: export the graph itself")
