"""Bundles of a tiny classifier of ONNX's own operators, of any size, with or without each capability: convolution, pooling, linear.

Outputs and gradient are computed here in NumPy, too: the self-test does not come from the graph that it tests.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from ebjdat_serve.bundle import Bundle, sha256, write_json
from ebjdat_serve.manifest import YES, Capabilities, Input, Licence, Manifest, Provenance
from ebjdat_serve.pixels import encode_png
from ebjdat_serve.selftest import PROBE
from ebjdat_serve.sgld import Sampler, langevin_step

WIDTH = 6
NO_GRADIENT, NO_PRIOR, NO_FEATURES, NO_ENERGY = (
    "it came as an ONNX file, which has no gradient", "no prior was fitted", "no last linear layer was found", "it ends in a softmax",
)  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """conv 3x3, ReLU, mean, linear."""

    kernel: np.ndarray  # (F, 3, 3, 3)
    bias: np.ndarray  # (F,)
    weight: np.ndarray  # (K, F)
    offset: np.ndarray  # (K,)

    @classmethod
    def of(cls, classes: int, seed: int = 0) -> "Tiny":
        noise = np.random.default_rng(seed)
        shapes = [(WIDTH, 3, 3, 3), (WIDTH,), (classes, WIDTH), (classes,)]
        return cls(*(noise.normal(0, scale, shape).astype(np.float32) for shape, scale in zip(shapes, (0.5, 0.1, 6.0, 0.5), strict=True)))

    def before(self, image: np.ndarray) -> np.ndarray:
        """What the convolution gives, (N, F, H, W)."""
        padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = sliding_window_view(padded, (3, 3), axis=(2, 3))
        return np.einsum("nchwij,fcij->nfhw", windows, self.kernel).astype(np.float32) + self.bias[:, None, None]

    def features(self, image: np.ndarray) -> np.ndarray:
        return np.maximum(self.before(image), 0).mean(axis=(2, 3)).astype(np.float32)

    def logits(self, image: np.ndarray) -> np.ndarray:
        return (self.features(image) @ self.weight.T + self.offset).astype(np.float32)

    def score(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        f = self.logits(image).astype(np.float64)
        p = softmax(f)
        own = np.where((label >= 0)[:, None], np.eye(f.shape[1])[label], p)
        slope = (own @ self.weight)[:, :, None, None] / np.prod(image.shape[2:]) * (self.before(image) > 0)
        padded = np.pad(slope, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = sliding_window_view(padded, (3, 3), axis=(2, 3))[..., ::-1, ::-1]
        energy = np.where(label >= 0, -(np.eye(f.shape[1])[label] * f).sum(1), -np.log(np.exp(f).sum(1)))
        return np.einsum("nfhwij,fcij->nchw", windows, self.kernel).astype(np.float32), energy.astype(np.float32)

    def moved(self, image: np.ndarray, label: np.ndarray, sampler: Sampler) -> np.ndarray:
        """After the sampler's steps, without noise."""
        for _ in range(sampler.steps):
            image = langevin_step(image, self.score(image, label)[0], np.float32(0), sampler)
        return image


def softmax(f: np.ndarray) -> np.ndarray:
    e = np.exp(f - f.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def graph(net: Tiny, size: tuple[int, int], about: dict[str, str], outputs: list[str], *, gradient: bool = False) -> bytes:
    """The classify graph with some of its outputs, or the score graph, or the step graph, whose steps are without noise."""
    arrays = {"kernel": net.kernel, "bias": net.bias, "weight": net.weight, "offset": net.offset}
    nodes = [
        helper.make_node("Conv", ["image", "kernel", "bias"], ["before"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["before"], ["rectified"]),
        helper.make_node("GlobalAveragePool", ["rectified"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "weight", "offset"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, *size])]
    classes = len(net.offset)
    if gradient:
        inputs.append(helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]))
        arrays |= {
            "classes": np.arange(classes, dtype=np.int64), "one": np.array([1], np.int64), "area": np.float32(np.prod(size)),
            "zero": np.float32(0), "none": np.array([0], np.int64), "planes": np.array([0, WIDTH, 1, 1], np.int64),
        }  # fmt: skip
        nodes += [
            helper.make_node("Unsqueeze", ["label", "one"], ["column"]),
            helper.make_node("Equal", ["column", "classes"], ["same"]),
            helper.make_node("Cast", ["same"], ["hot"], to=TensorProto.FLOAT),
            helper.make_node("GreaterOrEqual", ["column", "none"], ["joint"]),
            helper.make_node("Where", ["joint", "hot", "probabilities"], ["own"]),
            helper.make_node("MatMul", ["own", "weight"], ["slopes"]),
            helper.make_node("Reshape", ["slopes", "planes"], ["each"]),
            helper.make_node("Greater", ["before", "zero"], ["open"]),
            helper.make_node("Cast", ["open"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["each", "mask"], ["masked"]),
            helper.make_node("Div", ["masked", "area"], ["shared"]),
            helper.make_node("ConvTranspose", ["shared", "kernel"], ["score"], pads=[1, 1, 1, 1]),
            helper.make_node("Mul", ["hot", "logits"], ["picked"]),
            helper.make_node("ReduceSum", ["picked", "one"], ["joint_f"], keepdims=0),
            helper.make_node("ReduceLogSumExp", ["logits", "one"], ["lse"], keepdims=0),
            helper.make_node("GreaterOrEqual", ["label", "none"], ["flat"]),
            helper.make_node("Where", ["flat", "joint_f", "lse"], ["chosen"]),
            helper.make_node("Neg", ["chosen"], ["energy"]),
        ]
    if "next_image" in outputs:
        for name, kind, rest in (
            ("key", TensorProto.INT64, [4, 4]), ("step", TensorProto.INT64, []), ("step_size", TensorProto.FLOAT, []),
            ("grad_clip", TensorProto.FLOAT, []), ("noise_std", TensorProto.FLOAT, []),
        ):  # fmt: skip
            inputs.append(helper.make_tensor_value_info(name, kind, ["N", *rest]))
        arrays |= {"alone": np.array([-1, 1, 1, 1], np.int64), "white": np.float32(1), "next": np.int64(1)}
        nodes += [
            helper.make_node("Reshape", ["step_size", "alone"], ["length"]),
            helper.make_node("Reshape", ["grad_clip", "alone"], ["most"]),
            helper.make_node("Neg", ["most"], ["least"]),
            helper.make_node("Min", ["score", "most"], ["lower"]),
            helper.make_node("Max", ["lower", "least"], ["clipped"]),
            helper.make_node("Mul", ["clipped", "length"], ["drift"]),
            helper.make_node("Add", ["image", "drift"], ["beyond"]),
            helper.make_node("Clip", ["beyond", "zero", "white"], ["next_image"]),
            helper.make_node("Add", ["step", "next"], ["next_step"]),
        ]
    if "energy" in outputs and not gradient:
        arrays["one"] = np.array([1], np.int64)
        nodes += [
            helper.make_node("ReduceLogSumExp", ["logits", "one"], ["lse"], keepdims=0),
            helper.make_node("Neg", ["lse"], ["energy"]),
        ]
    shapes: dict[str, list[Any]] = {
        "logits": ["N", classes], "probabilities": ["N", classes], "energy": ["N"], "features": ["N", WIDTH], "score": ["N", 3, *size]
    }  # fmt: skip
    shapes |= {"next_image": ["N", 3, *size], "next_step": ["N"]}
    kinds = {"next_step": TensorProto.INT64}
    given = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shapes[name]) for name in outputs]
    made = helper.make_graph(nodes, "tiny", inputs, given, [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def write(
    folder: Path,
    *,
    size: tuple[int, int] = (12, 10),
    labels: tuple[str, ...] = ("ant", "bee", "cow", "dog"),
    version: str = "1",
    output: str = "logits",
    features: bool = True,
    gradient: bool = False,
    steps: bool = False,
    seed: int = 0,
) -> Bundle:
    """A finished bundle without calibration and prior; with ``steps``, and a gradient, one that a prior can be fitted for."""
    folder.mkdir(parents=True)
    net, image = Tiny.of(len(labels), seed), images(8, size) / np.float32(255)
    image = np.ascontiguousarray(image.transpose(0, 3, 1, 2))
    save_file({"kernel": net.kernel, "bias": net.bias, "weight": net.weight, "offset": net.offset}, folder / "weights.safetensors")
    can = Capabilities(
        YES if output == "logits" else NO_ENERGY, YES if features else NO_FEATURES, YES if gradient else NO_GRADIENT, NO_PRIOR
    )
    about = {"weights": sha256(folder / "weights.safetensors")}
    outputs = [output, *(["energy"] if output == "logits" else []), *(["features"] if features else [])]
    (folder / "classify.onnx").write_bytes(graph(net, size, about, outputs))
    f = net.logits(image)
    expected = {"image": image, output: f if output == "logits" else softmax(f).astype(np.float32)}
    if output == "logits":
        expected["energy"] = -np.log(np.exp(f.astype(np.float64)).sum(1)).astype(np.float32)
    if features:
        expected["features"] = net.features(image)
    files = ["weights.safetensors", "classify.onnx", "selftest.safetensors"]
    if gradient:
        (folder / "score.onnx").write_bytes(graph(net, size, about, ["score", "energy"], gradient=True))
        expected["label"] = np.arange(-1, 7, dtype=np.int64) % (len(labels) + 1) - 1
        expected["score"], expected["joint_energy"] = net.score(image, expected["label"])
        files.append("score.onnx")
    if steps:
        (folder / "step.onnx").write_bytes(graph(net, size, about, ["next_image", "energy", "next_step"], gradient=True))
        expected["moved"] = net.moved(image, expected["label"], PROBE)
        files.append("step.onnx")
    save_file({name: np.ascontiguousarray(value) for name, value in expected.items()}, folder / "selftest.safetensors")
    manifest = Manifest(
        name="tiny",
        version=version,
        architecture={"family": "onnx", "opset": 18},
        labels=list(labels),
        input=Input(*size),
        sampler=Sampler(1, 0.0, 0.0, 0.0),
        provenance=Provenance("", "imported", 0, "unknown", "", 0, 0, 0, "", "2026-11-26"),
        files={},
        output=output,  # type: ignore[arg-type]
        capabilities=can,
        licence=Licence("MIT", "CC-BY-4.0", "of the owner"),
    )
    write_json(folder / "bundle.json", asdict(manifest))
    return Bundle.draft(folder).update(*files)


def images(n: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Smooth pictures (n, H, W, 3) uint8, of three blobs each: no two are alike."""
    noise, (h, w) = np.random.default_rng(seed), size
    y, x = np.mgrid[:h, :w] / np.array([h, w])[:, None, None]
    out = np.zeros((n, h, w, 3))
    for one in out:
        for _ in range(3):
            centre, colour = noise.random(2), noise.random(3)
            one += np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / noise.uniform(0.02, 0.2))[..., None] * colour
    return np.rint(255 * out / out.max(axis=(1, 2, 3), keepdims=True)).astype(np.uint8)


def folder_of(folder: Path, n: int, size: tuple[int, int] = (20, 26), labels: Sequence[str] = (), seed: int = 1) -> Path:
    """A folder of n PNGs; with labels, in sub-folders in turn."""
    for i, image in enumerate(images(n, size, seed)):
        home = folder / labels[i % len(labels)] if labels else folder
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{i:04}.png").write_bytes(encode_png(image))
    return folder


def without(bundle: Bundle, **capabilities: str) -> Bundle:
    """The same with other capabilities, in memory alone."""
    can = replace(bundle.manifest.capabilities, **capabilities)
    return replace(bundle, manifest=replace(bundle.manifest, capabilities=can))
