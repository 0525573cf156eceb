"""Quantise classify.onnx to int8: convolutions, with ranges from images like those to come (ONNX Runtime's static quantiser).

Weights stay in fp32 in weights.safetensors; the graph holds their quantisation (a scale per output channel), and engines quantise them
once, at load. The head, the pooling and both energies stay in fp32: in int8 they shifted energies by 0.7 standard deviations.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from ebjdat_serve.bundle import Bundle, graph_name
from ebjdat_serve.engines import Floats
from ebjdat_serve.exporting.bundle_graphs import title
from ebjdat_serve.exporting.onnx_files import finish

BATCH = 32
SCALES_BYTES = 16 * 1024
"""Constants up to this size (scales and zero points, one per channel) stay in the graph."""
RECTIFIERS = ("Relu", "Clip")
"""Activations that only cut off what a range does not hold, and so cost nothing where a quantised convolution feeds them."""


class Batches(CalibrationDataReader):  # type: ignore[misc]
    """Calibration batches of images (N, 3, H, W) for the quantiser."""

    def __init__(self, parts: Iterable[Floats]) -> None:
        self._parts: Iterator[Floats] = iter(parts)

    def get_next(self) -> dict[str, Floats] | None:
        part = next(self._parts, None)
        return None if part is None else {"image": part}


def write_int8(bundle: Bundle, image: Floats) -> str:
    """Write classify.int8.onnx, with the ranges of its activations on ``image``, and return its name."""
    parts = (image[i : i + BATCH] for i in range(0, len(image), BATCH))
    return quantised(bundle, parts, onnx.load(bundle.path / "classify.onnx"), ["Conv"])


def write_int8_folded(bundle: Bundle, parts: Iterable[Floats]) -> str:
    """Write classify.int8.onnx with the batch norms that follow convolutions folded into them; ``parts`` are batches of images.

    What a norm multiplies a kernel by stays an operator on the weights, which engines compute once, at load: there is one copy of them.
    """
    model = onnx.load(bundle.path / "classify.onnx")
    folded = fold_norms(model.graph)
    return quantised(bundle, parts, model, ["Conv", *RECTIFIERS], folded)


@dataclass(frozen=True)
class Folded:
    """A kernel and the factor of each of its output channels, whose product a convolution takes."""

    kernel: onnx.TensorProto
    factor: NDArray[np.float32]


def quantised(
    bundle: Bundle,
    parts: Iterable[Floats],
    model: onnx.ModelProto,
    operators: list[str],
    folded: dict[str, Folded] | None = None,
    *,
    reduce_range: bool = True,
) -> str:
    """Write the model with ``operators`` quantised, its products of kernels and factors as operators, and return the file's name.

    ``reduce_range``: weights are of 7 bits. Where a CPU has no VNNI, sums of two products with 8 bits saturate 16 (docs/decisions/0032).
    """
    file = graph_name("classify", "int8")
    # in the folder of the weights that the graph refers to
    with tempfile.NamedTemporaryFile(dir=bundle.path, suffix=".onnx") as temporary, quiet_quantiser():
        quantize_static(
            model,
            temporary.name,
            Batches(parts),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=operators,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=reduce_range,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"AddQDQPairToWeight": True},
        )
        done = onnx.load(temporary.name)
    unfold(done.graph, folded or {})
    finish(done, bundle.path / file, title(bundle, "int8"), inline=SCALES_BYTES)
    return file


def fold_norms(graph: onnx.GraphProto) -> dict[str, Folded]:
    """Fold each batch norm into the convolution whose output nothing else takes; return kernels and factors by the products' names."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    users = Counter(name for node in graph.node for name in node.input) + Counter(value.name for value in graph.output)
    made_by = {name: node for node in graph.node for name in node.output}
    folded: dict[str, Folded] = {}
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization" and len(node.output) == 1]:
        before = made_by.get(norm.input[0])
        if before is None or before.op_type != "Conv" or users[norm.input[0]] > 1:
            continue
        if any(name and name not in constants for name in (*before.input[1:], *norm.input[1:])) or before.output[0] in folded:
            continue
        scale, shift, mean, variance = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in norm.input[1:5])
        epsilon = next((one.f for one in norm.attribute if one.name == "epsilon"), 1e-5)
        factor = (scale / np.sqrt(variance + epsilon)).astype(np.float32)
        kernel = constants[before.input[1]]
        bias = numpy_helper.to_array(constants[before.input[2]]).astype(np.float64) if len(before.input) > 2 and before.input[2] else 0.0
        product, offset = f"{norm.output[0]}.kernel", f"{norm.output[0]}.bias"
        array = numpy_helper.to_array(kernel)
        channels = factor.reshape(-1, *[1] * (array.ndim - 1))
        folded[product] = Folded(kernel, channels)
        graph.initializer.append(numpy_helper.from_array(array * channels, product))
        graph.initializer.append(numpy_helper.from_array(((bias - mean) * factor + shift).astype(np.float32), offset))
        before.input[:] = [before.input[0], product, offset]
        before.output[0] = norm.output[0]
        graph.node.remove(norm)
    drop_unused(graph)
    return folded


def unfold(graph: onnx.GraphProto, folded: dict[str, Folded]) -> None:
    """Put each kernel and its factor in place of their product, which no file of the bundle has."""
    products = [tensor for tensor in graph.initializer if tensor.name in folded]
    known = {tensor.name for tensor in graph.initializer}
    for tensor in products:
        one, factor = folded[tensor.name], f"{tensor.name}.factor"
        graph.initializer.remove(tensor)
        graph.initializer.extend([*([] if one.kernel.name in known else [one.kernel]), numpy_helper.from_array(one.factor, factor)])
        known.add(one.kernel.name)
        graph.node.insert(0, onnx.helper.make_node("Mul", [one.kernel.name, factor], [tensor.name]))


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initialisers that no operator takes."""
    taken = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in taken]:
        graph.initializer.remove(tensor)


@contextmanager
def quiet_quantiser() -> Iterator[None]:
    """Suppress its advice, on the root logger, to pre-process the graph, which would write a second copy of the weights."""
    root = logging.getLogger()

    def errors(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root.addFilter(errors)  # filters only records logged on the root itself
    try:
        yield
    finally:
        root.removeFilter(errors)
