"""Quantise classify.onnx to int8: convolutions, with ranges from training images (ONNX Runtime's static quantiser).

Weights stay in fp32 in weights.safetensors; the graph holds their quantisation (a scale per output channel), and engines quantise them
once, at load. The head, the pooling and both energies stay in fp32: in int8 they shifted energies by 0.7 standard deviations.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from ebjdat_serve.bundle import Bundle, graph_name
from ebjdat_serve.engines import Floats
from ebjdat_serve.exporting.bundle_graphs import title
from ebjdat_serve.exporting.onnx_files import finish

BATCH = 32
SCALES_BYTES = 16 * 1024
"""Constants up to this size (scales and zero points, one per channel) stay in the graph."""


class Batches(CalibrationDataReader):  # type: ignore[misc]
    """Calibration batches of images (N, 3, H, W) for the quantiser."""

    def __init__(self, image: Floats) -> None:
        self._parts: Iterator[Floats] = (image[i : i + BATCH] for i in range(0, len(image), BATCH))

    def get_next(self) -> dict[str, Floats] | None:
        part = next(self._parts, None)
        return None if part is None else {"image": part}


def write_int8(bundle: Bundle, image: Floats) -> str:
    """Write classify.int8.onnx, with the ranges of its activations on ``image``, and return its name."""
    file = graph_name("classify", "int8")
    # in the folder of the weights that the graph refers to
    with tempfile.NamedTemporaryFile(dir=bundle.path, suffix=".onnx") as temporary, quiet_quantiser():
        quantize_static(
            bundle.path / "classify.onnx",
            temporary.name,
            Batches(image),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"AddQDQPairToWeight": True},
        )
        model = onnx.load(temporary.name)
    finish(model, bundle.path / file, title(bundle, "int8"), inline=SCALES_BYTES)
    return file


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
