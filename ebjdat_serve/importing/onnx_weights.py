"""Write a rewritten ONNX graph into a bundle, its larger constants in weights.safetensors, to which they point by byte offset."""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from ebjdat_serve.bundle import sha256

INLINE_BYTES = 1024
"""Constants up to this size (shapes, scalars, normalisation) stay in the graph."""
GRAPH, WEIGHTS = "classify.onnx", "weights.safetensors"


def write_graph(content: bytes, folder: Path, about: Mapping[str, str]) -> list[str]:
    """Write classify.onnx and weights.safetensors into ``folder`` and return their names.

    Equal constants are stored once. The graph's metadata are ``about`` and the sha256 of the weights, which engines check.
    """
    model = ModelProto.FromString(content)
    weights, names = _weights(model)
    save_file(weights, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner may read
    places = _places(folder / WEIGHTS)
    for tensor in model.graph.initializer:
        if tensor.name in names:
            _point(tensor, *places[names[tensor.name]])
    del model.metadata_props[:], model.graph.value_info[:]
    helper.set_model_props(model, {**about, "weights": sha256(folder / WEIGHTS)})
    model.producer_name, model.producer_version, model.doc_string = "ebjdat_serve", "", ""
    (folder / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(folder / GRAPH))
    return [GRAPH, WEIGHTS]


def _weights(model: ModelProto) -> tuple[dict[str, NDArray[np.generic]], dict[str, str]]:
    """Return the arrays to store by name, and the name under which the value of each larger initialiser is stored."""
    stored: dict[str, NDArray[np.generic]] = {}
    names: dict[str, str] = {}
    seen: dict[tuple[str, bytes], str] = {}
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.nbytes <= INLINE_BYTES:
            continue
        key = (f"{values.dtype}{values.shape}", hashlib.sha256(values.tobytes()).digest())
        names[tensor.name] = seen.setdefault(key, tensor.name)
        if names[tensor.name] == tensor.name:
            stored[tensor.name] = np.ascontiguousarray(values)
    return stored, names


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Return {tensor: (offset in the file, length)}."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        name: (8 + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0]) for name, entry in header.items()
    }


def _point(tensor: TensorProto, offset: int, length: int) -> None:
    """Make an initialiser a reference to bytes of the weights."""
    name, kind, dims = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.data_location = name, kind, TensorProto.EXTERNAL
    tensor.dims.extend(dims)
    for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
