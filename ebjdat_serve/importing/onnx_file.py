"""Read an ONNX file that nobody vouches for: bounded memory, no code, no file outside its folder.

The file is walked before protobuf makes an object of every message (docs/decisions/0020): what it holds is counted, and what an image
classifier has no use for is refused. ``read`` returns a model without control flow, functions, foreign operators and external data.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from ebjdat_serve.errors import EbjdatError, cause
from ebjdat_serve.graphs import DEEPEST, varint
from ebjdat_serve.listing import printable

LARGEST = 2**31 - 1
"""Bytes of a file, and of one tensor: protobuf's own limit."""
MOST_VALUES, MOST_NODES = 500_000, 50_000
"""Messages, names and numbers outside tensors' raw bytes; operators. A ViT-L/16 has 2,300 operators and 30,000 values."""
MOST_DIMS = 16
PACKED_BYTES = 2**26
"""Bytes of integers in seven bits a byte, of which a parser makes eight times as many."""
PLAIN = ("", "ai.onnx")
KINDS = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16,
    11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip
"""Element types of tensors that are read."""

FLOW, SPARSE = "!control flow", "!sparse tensors"
FOLLOWED = {
    "model": {7: "graph", 8: "opset", 14: "entry", 20: "!training steps", 25: "!functions of its own"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value", 15: SPARSE},
    "node": {5: "attribute", 9: "entry"},
    "attribute": {5: "tensor", 6: FLOW, 7: "#floats", 8: "#integers", 10: "tensor", 11: FLOW, 22: SPARSE, 23: SPARSE},
    "tensor": {1: "#integers", 5: "#integers", 6: "!tensors of strings", 7: "#integers", 11: "#integers", 13: "entry"},
    "value": {2: "type"},
    "type": {1: "dims", 4: "!sequences", 5: "!maps", 8: SPARSE, 9: "!optional values"},
    "dims": {2: "shape"},
    "shape": {1: "size"},
    "size": {},
    "opset": {},
    "entry": {},
}
"""Fields of onnx.proto that are followed: the message, #integers for packed ones, ! for what no image classifier needs."""


def read(file: Path) -> onnx.ModelProto:
    """Return the model in ``file``, its external data read into it.

    Raises EbjdatError: not an ONNX model, too large, with control flow, functions, operators of other domains, or data elsewhere.
    """
    where = printable(file)
    content = _content(file, where)
    try:
        survey(content)
        model: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except (ValueError, DecodeError) as error:
        raise EbjdatError(f"{where} is not an ONNX model that can be read: {error}") from error
    del content
    try:
        check_operators(model)
        left = LARGEST
        for tensor in tensors(model):
            left -= check_tensor(tensor, file.parent, left)
    except ValueError as error:
        raise EbjdatError(f"{where}: {error}") from error
    return model


def _content(file: Path, where: str) -> bytes:
    try:
        if not file.is_file():
            raise EbjdatError(f"{where} is not a file")
        if (size := file.stat().st_size) > LARGEST:
            raise EbjdatError(f"{where} has {size} bytes, more than {LARGEST}: save it with external data beside it")
        return file.read_bytes()
    except OSError as error:
        raise EbjdatError(f"{where} cannot be read: {cause(error)}") from error


def survey(content: bytes) -> None:
    """Raise ValueError for bytes that are no ONNX model, of which a parser would make much more, or that hold what is refused."""
    left = {"values": MOST_VALUES, "node": MOST_NODES, "packed": PACKED_BYTES}

    def spend(what: str, n: int = 1) -> None:
        left[what] -= n
        if left[what] < 0:
            raise ValueError("it has more operators, names and numbers than any classifier")

    def walk(kind: str, message: memoryview, depth: int) -> None:
        if depth > DEEPEST:
            raise ValueError("nested too deep")
        for number, value in every_field(message):
            spend("values")
            follow = FOLLOWED[kind].get(number)
            if follow is None or value is None:
                continue
            if follow[0] == "!":
                raise ValueError(f"it has {follow[1:]}, which no image classifier needs")
            if follow[0] == "#":  # packed numbers
                spend("packed", len(value))
                continue
            if follow == "node":
                spend("node")
            walk(follow, value, depth + 1)

    if not content:
        raise ValueError("it is empty")
    walk("model", memoryview(content), 0)


def every_field(message: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """Yield the number of each field, and its content where it has a length; raise ValueError for what is no protobuf message."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        if not 8 <= tag < 2**32:
            raise ValueError("no such field")
        length = {0: 0, 1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 2:
            length, at = varint(message, at)
        elif length is None:
            raise ValueError(f"wire type {tag & 7}")
        elif not length:
            _, at = varint(message, at)
        if at + length > len(message):
            raise ValueError("it is cut off: a field goes beyond the end")
        yield tag >> 3, message[at : at + length] if tag & 7 == 2 else None
        at += length


def check_operators(model: onnx.ModelProto) -> None:
    """Raise ValueError for operators of another domain than ONNX's own, those unknown here, and those that a classifier has no use for."""
    domains = {entry.domain: entry.version for entry in model.opset_import}
    versions = [version for domain, version in domains.items() if domain in PLAIN]
    if len(versions) != 1:
        raise ValueError("it says not once which version of ONNX's operators it is written in")
    newest = onnx.defs.onnx_opset_version()
    if not 7 <= versions[0] <= newest:
        raise ValueError(f"it is written in version {versions[0]} of ONNX's operators; 7 to {newest} can be read: export it again")
    if not model.graph.node:
        raise ValueError("it has no operators")
    for node in model.graph.node:
        name = repr(node.op_type[:40])
        if node.domain not in PLAIN:
            raise ValueError(f"operator {name} is of the domain {node.domain[:40]!r}: only ONNX's own operators are run")
        if node.op_type in REFUSED:
            raise ValueError(f"operator {name} is not run: {REFUSED[node.op_type]}")
        if not onnx.defs.has(node.op_type, versions[0], ""):
            raise ValueError(f"operator {name} is unknown in version {versions[0]} of ONNX's operators")


_SEQUENCES = (
    "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SplitToSequence",
    "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement",
)  # fmt: skip
_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
_TEXTS = ("StringNormalizer", "StringConcat", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "ImageDecoder")
REFUSED = {
    **dict.fromkeys(("If", "Loop", "Scan", "SequenceMap"), "control flow"),
    **dict.fromkeys(_RANDOM, "its result is random"),
    **dict.fromkeys(("NonZero", "Unique", "Compress", "NonMaxSuppression"), "the size of its result depends on pixels"),
    **dict.fromkeys(_TEXTS, "it is of text or files"),
    **dict.fromkeys(_SEQUENCES, "sequences are no images"),
}
"""Operators of ONNX that are not run, and why."""


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model without sub-graphs."""
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def check_tensor(tensor: onnx.TensorProto, folder: Path, most: int) -> int:
    """Read a tensor's external data, which must lie in ``folder``, and return its bytes.

    Raises ValueError unless it has as many values as it says, in ``most`` bytes.
    """
    name = repr(tensor.name[:40])
    kind = KINDS.get(tensor.data_type)
    if kind is None:
        raise ValueError(f"tensor {name} has elements of type {tensor.data_type}, which are not read")
    width, size = np.dtype(kind).itemsize, math.prod(tensor.dims)
    if len(tensor.dims) > MOST_DIMS or any(n < 0 for n in tensor.dims):
        raise ValueError(f"tensor {name} says it is of shape {list(tensor.dims)[:8]}")
    if size * width > most:
        raise ValueError(f"tensor {name} says it is of shape {list(tensor.dims)[:8]}: all tensors together may have {LARGEST} bytes")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        tensor.raw_data = external(tensor, folder, size * width)
        tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]
    there = len(tensor.raw_data) / width if tensor.HasField("raw_data") else _stored(tensor)
    if there != size:
        raise ValueError(f"tensor {name} says it is of shape {list(tensor.dims)[:8]} and has {there:g} values")
    return int(size * width)


def _stored(tensor: onnx.TensorProto) -> int:
    """Return the number of values in a tensor's typed fields."""
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    return sum(len(values) for values in fields)


def external(tensor: onnx.TensorProto, folder: Path, wanted: int) -> bytes:
    """Return the ``wanted`` bytes that a tensor keeps in a file of ``folder``; raise ValueError for another place."""
    name, said = repr(tensor.name[:40]), {entry.key: entry.value for entry in tensor.external_data}
    location = said.get("location", "")
    file = folder / location
    if not _lies_in(file, folder, location):
        raise ValueError(f"tensor {name} is kept in {location[:80]!r}, which is no file in the folder of the model")
    try:
        offset, length = int(said.get("offset", "0")), int(said.get("length", wanted))
    except ValueError as error:
        raise ValueError(f"tensor {name}: offset or length of its data is no number") from error
    if length != wanted or not 0 <= offset <= file.stat().st_size - length:
        raise ValueError(f"tensor {name}: its data does not lie within {location[:80]!r}")
    with file.open("rb") as opened:
        opened.seek(offset)
        content: bytes = opened.read(length)
    return content


def _lies_in(file: Path, folder: Path, location: str) -> bool:
    """Return whether a file, named by ``location``, lies in ``folder`` when links are followed."""
    if not location or "\0" in location or os.path.isabs(location):
        return False
    try:
        return file.resolve().is_relative_to(folder.resolve()) and file.is_file()
    except (OSError, RuntimeError):  # a name that is too long, a circle of links
        return False
