#!/usr/bin/env python3
"""Write the graphs of a bundle: `python export/to_onnx.py BUNDLE`.

    classify.onnx   image (N, 3, H, W) -> logits (N, K), energy (N,), features (N, F), which the head takes
    score.onnx      image, label (N,)  -> score (N, 3, H, W) = -dE(x,y)/dx, energy (N,); label -1 is the marginal
    step.onnx       image, label, key (N, 4, 4), step, step_size, grad_clip, noise_std (N,)
                    -> next_image, energy = E(x,y) before the step, next_step: one Langevin step, its noise made in the graph

The graphs hold no weights: their initialisers point into weights.safetensors by byte offset.
"""

import json
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx_ir.passes import Sequential, common
from onnxscript import optimizer
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ebjdat_serve.bundle import GRAPHS, Bundle, graph_name
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.cpus import threads
from ebjdat_serve.editing import FORCED, edit
from ebjdat_serve.engines import Precision
from ebjdat_serve.engines.eager import load_model
from ebjdat_serve.errors import EbjdatError
from export.reference import write_selftest
from export.tracing import Classify, Function, Score, Step, program

log = logging.getLogger("export")
INLINE_BYTES = 1024
"""Constants up to this size (shapes, scalars) stay in the graph; larger ones must be tensors of the weights file."""
OPSET = 20
KINDS: dict[str, type[Function]] = {"classify": Classify, "score": Score, "step": Step}
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
NAMES: dict[type[Function], tuple[list[str], list[str]]] = {
    Classify: (["image"], ["logits", "energy", "features"]),
    Score: (["image", "label"], ["score", "energy"]),
    Step: (["image", "label", "key", "step", "step_size", "grad_clip", "noise_std"], ["next_image", "energy", "next_step"]),
}
KEEP = ("Transpose", "Slice", "Add", "Sub", "Mul", "Div", "Sqrt", "Unsqueeze", "Reshape", "Cast")
"""Operators on weights that stay in the graph, so that all graphs share one copy of the weights; engines fold them at load."""


def export(bundle: Bundle) -> Bundle:
    """Write the graphs into ``bundle`` and record them; raise EbjdatError when a constant is not in the weights file."""
    bundle = without_strangers(bundle)
    return bundle.update(*(write(bundle, function, "fp32") for function in KINDS))


def export_again(bundle: Bundle) -> Bundle:
    """Write the graphs, and what torch says of the self-test's images by the weights that the bundle has now."""
    file = bundle.path / "selftest.safetensors"
    if not file.is_file():
        raise EbjdatError(f"{bundle.path} has no {file.name}, which training writes: train again")
    try:
        image = load_file(file)["image"]
    except (SafetensorError, KeyError) as error:
        raise EbjdatError(f"{file} cannot be read ({error}): train again") from error
    exported = export(bundle)
    write_selftest(exported, image)
    return exported.update(file.name)


def without_strangers(bundle: Bundle) -> Bundle:
    """Return ``bundle`` without lower-precision graphs of other weights, which would silently run with the new ones."""
    weights, strangers = bundle.manifest.files["weights.safetensors"].sha256, []
    for name in bundle.manifest.files:
        if name.endswith(".onnx") and name not in GRAPHS:
            model = onnx.load(bundle.path / name, load_external_data=False)
            if weights not in (entry.value for entry in model.metadata_props):
                strangers.append(name)
                log.warning("%s is of other weights and is dropped: training/precision.py creates it again", name)
    files = {name: entry for name, entry in bundle.manifest.files.items() if name not in strangers}
    return Bundle(bundle.path, replace(bundle.manifest, files=files))


def write(bundle: Bundle, function: str, precision: Precision) -> str:
    """Write the graph of one function, its blocks in fp32 or fp16, the rest in fp32, and return the file's name."""
    kind, file = KINDS[function], graph_name(function, precision)
    m = bundle.manifest
    model = load_model(bundle)
    inputs, outputs = NAMES[kind]
    n = 2
    example = {
        "image": torch.rand(n, 3, m.input.height, m.input.width),
        "label": torch.tensor([0, -1]),
        "key": torch.zeros(n, 4, 4, dtype=torch.int64),
        "step": torch.zeros(n, dtype=torch.int64),
    }
    arguments = tuple(example.get(name, torch.ones(n)) for name in inputs)
    write_graph(program(kind(model, DTYPES[precision]), arguments), bundle.path / file, inputs, outputs, title(bundle, precision))
    return file


def title(bundle: Bundle, precision: str) -> dict[str, str]:
    """Return a graph's metadata."""
    m = bundle.manifest
    return {"name": m.name, "version": m.version, "weights": m.files["weights.safetensors"].sha256, "precision": precision}


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


def main() -> None:
    """Export the bundle named on the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--force", action="store_true", help=FORCED)
    options = parser.parse_args()
    torch.set_num_threads(threads())
    with command(parser):
        bundle = edit(options.bundle, export_again, force=options.force)
        for name in GRAPHS:
            print(f"{bundle.path / name}  {bundle.manifest.files[name].bytes / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
