"""Write exported programs as ONNX files whose weights stay in weights.safetensors: their initialisers point into it by byte offset."""

import json
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx_ir.passes import Sequential, common
from onnxscript import optimizer

from ebjdat_serve.errors import EbjdatError

INLINE_BYTES = 1024
"""Constants up to this size (shapes, scalars) stay in the graph; larger ones must be tensors of the weights file."""
OPSET = 20
KEEP = ("Transpose", "Slice", "Add", "Sub", "Mul", "Div", "Sqrt", "Unsqueeze", "Reshape", "Cast")
"""Operators on weights that stay in the graph, so that all graphs share one copy of the weights; engines fold them at load."""


def write_graph(program: torch.export.ExportedProgram, file: Path, inputs: list[str], outputs: list[str], about: dict[str, str]) -> None:
    """Convert ``program`` and write it with its weights left in weights.safetensors."""
    with quiet_exporter():
        converted = torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs, optimize=False, verbose=False
        )
    assert converted is not None
    # Not optimize(): it would write folded weights, a second copy.
    optimizer.fold_constants(converted.model, onnx_shape_inference=True, should_fold=lambda node: False if node.op_type in KEEP else None)
    passes = (
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True),
        common.RemoveUnusedNodesPass(),
    )
    Sequential(*passes)(converted.model)
    finish(converted.model_proto, file, about)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Suppress the exporter's warnings about its own internals and about a torchvision that nothing here needs."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def finish(model: onnx.ModelProto, file: Path, about: dict[str, str], inline: int = INLINE_BYTES) -> None:
    """Write ``model`` with external weights and without traces of the exporting machine, and check it."""
    point_into(model, file.with_name("weights.safetensors"), inline)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, about)
    model.producer_name = "ebjdat_serve"
    clear_traces(model.graph)
    file.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(file))


def clear_traces(graph: onnx.GraphProto) -> None:
    """Remove stack traces and tracing notes, which name files of the exporting machine."""
    graph.doc_string = ""
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


def point_into(model: onnx.ModelProto, weights: Path, inline: int) -> None:
    """Replace every larger initialiser by a reference to the same bytes in ``weights``."""
    places = safetensors_places(weights)
    for tensor in model.graph.initializer:
        data = onnx.numpy_helper.to_array(tensor)
        if data.nbytes <= inline and (data.dtype != np.float32 or data.tobytes() not in places):
            continue
        place = places.get(data.tobytes())
        if place is None:
            raise EbjdatError(
                f"graph constant {tensor.name} {data.dtype}{list(data.shape)} is not a tensor of {weights.name}: the exporter changed it"
            )
        offset, length = place
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", weights.name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)


def safetensors_places(file: Path) -> dict[bytes, tuple[int, int]]:
    """Return {tensor bytes: (offset in the file, length)}."""
    content = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    spans = [(8 + header_bytes + begin, 8 + header_bytes + end) for begin, end in (entry["data_offsets"] for entry in header.values())]
    return {content[begin:end]: (begin, end - begin) for begin, end in spans}
