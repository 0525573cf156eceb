"""Write exported programs as ONNX files whose weights stay in weights.safetensors: their initialisers point into it by byte offset."""

import hashlib
import json
import logging
import struct
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import Sequential, common
from onnxscript import optimizer

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.networks import CONSTANT

INLINE_BYTES = 1024
"""Constants up to this size (shapes, scalars) stay in the graph; larger ones must be tensors of the weights file."""
OPSET = 20
KEEP = ("Transpose", "Slice", "Add", "Sub", "Mul", "Div", "Sqrt", "Unsqueeze", "Reshape", "Cast")
"""Operators on weights that stay in the graph, so that all graphs share one copy of the weights; engines fold them at load."""


def converted(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """Return ``program`` as an ONNX model, its weights inside, with every operator on large weights left in it."""
    with quiet_exporter():
        done = torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs, optimize=False, verbose=False
        )
    assert done is not None
    # Not optimize(): it would write folded weights, a second copy.
    optimizer.fold_constants(done.model, onnx_shape_inference=True, should_fold=lambda node: False if kept(node) else None)
    passes = (
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True),
        common.RemoveUnusedNodesPass(),
    )
    Sequential(*passes)(done.model)
    model: onnx.ModelProto = done.model_proto
    return model


def chained(first: onnx.ModelProto, second: onnx.ModelProto, link: str, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """Return the model of both: ``second`` takes the output ``link`` of ``first``, and what else it takes by the names of its inputs."""
    model = onnx.ModelProto()
    model.CopyFrom(first)
    shared = {link, *(value.name for value in second.graph.input)}
    told = {value.name: value for graph in (second.graph, first.graph) for value in (*graph.input, *graph.output)}
    # names of the second graph's own values: they may be those of the first
    graph = onnx.compose.add_prefix_graph(second.graph, "move/", rename_inputs=False, rename_outputs=False, rename_value_infos=True)
    strangers = {name for node in graph.node for name in node.input if name.removeprefix("move/") in shared}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in strangers:
                node.input[i] = name.removeprefix("move/")
    model.graph.node.extend(graph.node)
    model.graph.initializer.extend(graph.initializer)
    for values, names in ((model.graph.input, inputs), (model.graph.output, outputs)):
        kept_ = [told[name] for name in names]
        del values[:]
        values.extend(kept_)
    return model


def kept(node: onnx_ir.Node) -> bool:
    """Return whether an operator stays in the graph: folding it would change what is shared, or write a second copy of a weight."""
    return node.op_type in KEEP or any(
        value is not None and value.const_value is not None and value.const_value.nbytes > INLINE_BYTES for value in node.inputs
    )


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


def constants(models: Iterable[onnx.ModelProto], known: Collection[bytes]) -> dict[str, NDArray[Any]]:
    """Return the larger initialisers of ``models`` whose bytes are not ``known``, each once, under a name of its own."""
    found: dict[str, NDArray[Any]] = {}
    for model in models:
        for tensor in model.graph.initializer:
            data = onnx.numpy_helper.to_array(tensor)
            if data.nbytes > INLINE_BYTES and (content := data.tobytes()) not in known:
                found[f"{CONSTANT}{hashlib.sha256(content).hexdigest()[:16]}"] = np.array(data, order="C")
    return found


def safetensors_places(file: Path) -> dict[bytes, tuple[int, int]]:
    """Return {tensor bytes: (offset in the file, length)}."""
    content = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    spans = [(8 + header_bytes + begin, 8 + header_bytes + end) for begin, end in (entry["data_offsets"] for entry in header.values())]
    return {content[begin:end]: (begin, end - begin) for begin, end in spans}
