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


def with_features(data: bytes, where: str) -> bytes:
    """Return an ONNX model whose graph also gives ``features``: what the operator that makes ``logits`` takes first.

    The bytes of the model stay as they are but for an operator Identity and an output, both added at the end of the graph. Raises
    BundleError for a graph without such an operator.
    """
    graph = next((value for number, value in fields(memoryview(data)) if number == 7), memoryview(b""))
    for number, node in fields(graph):
        if number == 1:
            said: dict[int, list[str]] = {1: [], 2: []}  # names of inputs and outputs
            for kind, name in fields(node):
                if kind in said:
                    said[kind].append(str(name, "utf-8"))
            if "logits" in said[2] and said[1]:
                identity = field(1, said[1][0].encode()) + field(2, b"features") + field(4, b"Identity")
                output = field(1, b"features") + field(2, field(1, b"\x08\x01"))  # a tensor of floats
                grown = bytes(graph) + field(1, identity) + field(12, output)
                return b"".join(field(7, grown) if number == 7 else raw for number, raw in whole_fields(memoryview(data)))
    raise BundleError(f"{where} has no operator that makes logits")


def field(number: int, content: bytes) -> bytes:
    """Return a field of a protobuf message that has a length."""
    return as_varint(number << 3 | 2) + as_varint(len(content)) + content


def as_varint(value: int) -> bytes:
    """Return a number in seven bits a byte."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def whole_fields(message: memoryview) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each field of a message that ``fields`` has read, in order."""
    at = 0
    while at < len(message):
        begin = at
        tag, at = varint(message, at)
        size = 0
        if tag & 7 in (0, 2):
            size, at = varint(message, at)
        at += {0: 0, 1: 8, 2: size, 5: 4}[tag & 7]
        yield tag >> 3, bytes(message[begin:at])


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
