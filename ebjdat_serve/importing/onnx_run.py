"""Run an ONNX graph of somebody else as it is: in its own layout, pixels normalised here, one image after the other."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, helper

from ebjdat_serve.engines import Floats
from ebjdat_serve.errors import first_line
from ebjdat_serve.importing.onnx_graph import PIXELS, Head, Image
from ebjdat_serve.importing.onnx_rewrite import Pixels


def session(model: bytes | Path, threads: int = 1) -> ort.InferenceSession:
    """Return an ONNX Runtime session on the CPU; raise ValueError for a model that it does not open."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ValueError(f"ONNX Runtime does not open it: {first_line(error)}") from error


def exposed(model: ModelProto, head: Head) -> ModelProto:
    """Return the model with its logits and features as outputs beside its own; nothing else of it is changed."""
    done = ModelProto()
    done.CopyFrom(model)
    outputs = [value for value in done.graph.output if value.name == head.output]
    del done.graph.output[:]
    done.graph.output.extend(outputs)
    for name in dict.fromkeys((head.output, head.logits, head.features)):
        if name and name not in [value.name for value in outputs]:
            done.graph.output.append(helper.make_empty_tensor_value_info(name))
    return done


def own_pixels(image: Floats, about: Image, pixels: Pixels) -> NDArray[np.generic]:
    """Return RGB images (N, 3, H, W) in [0,1] as the graph takes them."""
    scaled = image.astype(np.float64) * pixels.scale
    if pixels.channel_order == "BGR":
        scaled = scaled[:, ::-1]
    normal = (scaled - np.reshape(pixels.mean, (3, 1, 1))) / np.reshape(pixels.std, (3, 1, 1))
    if about.layout == "NHWC":
        normal = normal.transpose(0, 2, 3, 1)
    if about.kind == onnx.TensorProto.UINT8:
        normal = np.rint(normal).clip(0, 255)
    return np.ascontiguousarray(normal.astype(PIXELS[about.kind]))


def run(opened: ort.InferenceSession, image: Floats, about: Image, pixels: Pixels, head: Head) -> dict[str, Floats]:
    """Return output, logits and features of images (N, 3, H, W), each (N, …) float32; raise ValueError where the graph fails.

    Images are given one at a time, as often as a graph of a fixed batch wants them.
    """
    names = {"output": head.output, "logits": head.logits, **({"features": head.features} if head.features else {})}
    rows: dict[str, list[Floats]] = {name: [] for name in names}
    for one in own_pixels(image, about, pixels):
        batch = np.repeat(one[None], about.batch or 1, axis=0)
        try:
            found = opened.run(list(names.values()), {about.name: batch})
        except Exception as error:
            raise ValueError(f"ONNX Runtime does not run it: {first_line(error)}") from error
        for name, values in zip(names, found, strict=True):
            if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu" or not values.ndim or len(values) != len(batch):
                raise ValueError(f"its {name} are not one row an image")
            rows[name].append(values[0].astype(np.float32))
    return {name: np.stack(parts) for name, parts in rows.items()}


def served(model: ModelProto, image: Floats) -> dict[str, Floats]:
    """Return the outputs of a rewritten model; raise ValueError where it fails."""
    opened = session(model.SerializeToString())
    names = [output.name for output in opened.get_outputs()]
    try:
        return dict(zip(names, opened.run(names, {"image": image}), strict=True))
    except Exception as error:
        raise ValueError(f"ONNX Runtime does not run it: {first_line(error)}") from error


def off(found: Mapping[str, Floats], expected: Mapping[str, Floats]) -> float:
    """Return the largest difference of any output, relative to its largest value; infinite for another shape or no finite number."""
    worst = 0.0
    for name, values in expected.items():
        if found[name].shape != values.shape or not np.isfinite(found[name]).all():
            return float("inf")
        worst = max(worst, float(np.abs(found[name] - values).max() / max(float(np.abs(values).max()), 1e-12)))
    return worst
