"""classify.int8.onnx from classify.onnx: convolutions quantised with ranges taken on training images (ONNX Runtime's static quantiser).

Weights stay the fp32 ones of weights.safetensors; the graph says how they are rounded (a scale per output channel), and engines round
them once, at load. The head, the pooling and both energies stay in fp32: with them in int8 energies moved by 0.7 of their deviation.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from ebjdat_serve.bundle import Bundle, graph_name
from ebjdat_serve.engines import Floats
from export.to_onnx import finish, title

BATCH = 32
SCALES_BYTES = 16 * 1024
"""Scales and zero points, one a channel, are the graph's own."""


class Batches(CalibrationDataReader):  # type: ignore[misc]
    """Hands the quantiser images (N, 3, H, W) a batch at a time."""

    def __init__(self, image: Floats) -> None:
        self._parts: Iterator[Floats] = (image[i : i + BATCH] for i in range(0, len(image), BATCH))

    def get_next(self) -> dict[str, Floats] | None:
        part = next(self._parts, None)
        return None if part is None else {"image": part}


def write_int8(bundle: Bundle, image: Floats) -> str:
    """Write classify.int8.onnx, its activations' ranges the smallest and largest seen on ``image``, and return its name."""
    file = graph_name("classify", "int8")
    # beside the weights that the graph points into
    with tempfile.NamedTemporaryFile(dir=bundle.path, suffix=".onnx") as aside, quiet_quantiser():
        quantize_static(
            bundle.path / "classify.onnx",
            aside.name,
            Batches(image),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"AddQDQPairToWeight": True},
        )
        model = onnx.load(aside.name)
    finish(model, bundle.path / file, title(bundle, "int8"), inline=SCALES_BYTES)
    return file


@contextmanager
def quiet_quantiser() -> Iterator[None]:
    """Keep back its advice to pre-process the graph, given twice on the root logger: that would write the weights a second time."""
    root = logging.getLogger()

    def errors(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root.addFilter(errors)  # of what is logged on the root itself alone
    try:
        yield
    finally:
        root.removeFilter(errors)
