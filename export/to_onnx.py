#!/usr/bin/env python3
"""Write classify.onnx and score.onnx of a bundle: `python export/to_onnx.py BUNDLE`.

    classify.onnx   image (N, 3, H, W) -> logits (N, K), energy (N,)
    score.onnx      image, label (N,)  -> score (N, 3, H, W) = -dE(x,y)/dx, energy (N,); label -1 is the marginal

The graphs hold no weights: their initialisers point into weights.safetensors by byte offset.
"""

import argparse
import json
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import optimizer
from safetensors.torch import load_file
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.energy import energy, score
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.wideresnet import WideResNet, build

INLINE_BYTES = 1024
"""Constants up to this size (shapes, scalars) stay in the graph; a larger one must be found in the weights file."""
OPSET = 20
aten = torch.ops.aten


def export(bundle: Bundle) -> Bundle:
    """Write both graphs into ``bundle`` and record them; raise EbjdatError when a constant is not in the weights file."""
    m = bundle.manifest
    weights = bundle.path / "weights.safetensors"
    model = build(m.architecture.depth, m.architecture.width, len(m.labels), load_file(weights))
    image = torch.rand(2, 3, m.input.height, m.input.width)
    label = torch.tensor([0, -1])
    batch = torch.export.Dim("batch", min=1, max=4096)

    classify = torch.export.export(Classify(model), (image,), dynamic_shapes=({0: batch},), strict=False)
    traced = trace_score(model, image, label)
    gradient = torch.export.export(traced, (image, label), dynamic_shapes=({0: batch}, {0: batch}), strict=False)
    title = {"name": m.name, "version": m.version, "weights": m.files["weights.safetensors"].sha256}
    write_graph(classify, bundle.path / "classify.onnx", ["image"], ["logits", "energy"], title)
    write_graph(gradient, bundle.path / "score.onnx", ["image", "label"], ["score", "energy"], title)
    return bundle.update("classify.onnx", "score.onnx")


class Classify(torch.nn.Module):
    """image -> (f(x), E(x))."""

    def __init__(self, model: WideResNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(image)
        return logits, energy(logits)


def trace_score(model: WideResNet, image: Tensor, label: Tensor) -> torch.fx.GraphModule:
    """Return the graph of (image, label) -> (score, energy): autograd traced, then written in forward operators alone.

    torch.export cannot trace autograd.grad, and ONNX has no convolution_backward: see docs/decisions/0003.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    decompositions: dict[Any, Callable[..., Any]] = get_decompositions(
        [aten.silu_backward, aten.native_batch_norm_backward, aten.native_batch_norm, aten.cudnn_batch_norm, aten.detach]
    )
    decompositions[aten.convolution_backward.default] = convolution_backward

    def both(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return score(model, image, label)

    trace: Callable[..., torch.fx.GraphModule] = make_fx(
        both, tracing_mode="symbolic", decomposition_table=decompositions, _allow_non_fake_inputs=True
    )
    return trace(image, label)


def convolution_backward(
    gradient: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    mask: list[bool],
) -> tuple[Tensor, None, None]:
    """Return the gradient of a convolution in its input, as a transposed convolution."""
    missing = [
        int(inputs.shape[2 + i])
        - ((int(gradient.shape[2 + i]) - 1) * stride[i] - 2 * padding[i] + dilation[i] * (int(weight.shape[2 + i]) - 1) + 1)
        for i in (0, 1)
    ]
    return aten.convolution.default(gradient, weight, None, stride, padding, dilation, True, missing, groups), None, None


def write_graph(program: torch.export.ExportedProgram, file: Path, inputs: list[str], outputs: list[str], title: dict[str, str]) -> None:
    """Convert ``program`` and write it with its weights left in weights.safetensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        converted = torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs, optimize=False, verbose=False
        )
    assert converted is not None
    # Not optimize(): it would fuse batch norm into new convolution weights, and the one copy of the weights would be two.
    optimizer.fold_constants(
        converted.model, onnx_shape_inference=True, should_fold=lambda node: False if node.op_type == "Transpose" else None
    )
    optimizer.remove_unused_nodes(converted.model)
    model = converted.model_proto
    point_into(model, file.with_name("weights.safetensors"))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, title)
    model.producer_name = "ebjdat_serve"
    clear_traces(model.graph)
    file.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(file))


def clear_traces(graph: onnx.GraphProto) -> None:
    """Remove stack traces and tracing notes, which name files of the machine that exported."""
    graph.doc_string = ""
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


def point_into(model: onnx.ModelProto, weights: Path) -> None:
    """Replace every larger initialiser by a reference to the same bytes in ``weights``."""
    places = safetensors_places(weights)
    for tensor in model.graph.initializer:
        data = onnx.numpy_helper.to_array(tensor)
        if data.nbytes <= INLINE_BYTES and (data.dtype != np.float32 or data.tobytes() not in places):
            continue
        place = places.get(data.tobytes())
        if place is None:
            raise EbjdatError(
                f"graph constant {tensor.name} {data.dtype}{list(data.shape)} is not a tensor of {weights.name}: the exporter rewrote it"
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    try:
        bundle = export(Bundle.draft(parser.parse_args().bundle))
    except EbjdatError as error:
        sys.exit(str(error))
    for name in ("classify.onnx", "score.onnx"):
        print(f"{bundle.path / name}  {bundle.manifest.files[name].bytes / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
