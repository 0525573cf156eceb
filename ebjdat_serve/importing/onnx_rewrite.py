"""Rewrite a classifier's ONNX graph to the form that is served: RGB N x 3 x H x W in [0,1] in; logits, energy and features out."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import ModelProto, NodeProto, helper, numpy_helper

from ebjdat_serve.importing.onnx_graph import Head, Image, constants_lifted, dependent, opset, ordered

OLDEST, TARGET = 13, 17
"""Versions of ONNX's operators: of a graph as it is served at least, and that older ones are converted to."""
IR = 10
AXES_ARE_AN_INPUT = 18
"""Since this version ReduceLogSumExp takes its axes as an input."""


@dataclass(frozen=True)
class Pixels:
    """How a model wants its pixels: ``(pixel in [0,1] * scale - mean) / std``, channels, mean and std in ``channel_order``."""

    channel_order: Literal["RGB", "BGR"]
    scale: float
    mean: list[float]
    std: list[float]


def served_form(
    model: ModelProto, image: Image, head: Head, pixels: Pixels, size: tuple[int, int], outputs: Sequence[str], *, freed: bool
) -> ModelProto:
    """Return a new model with the input ``image`` and the ``outputs``: logits or probabilities, energy, features.

    ``freed``: a batch that is written into shapes is taken from the image instead. Raises ValueError for a graph that cannot be brought to
    an operator version that is served.
    """
    done = ModelProto()
    done.CopyFrom(model)
    graph = done.graph
    constants_lifted(graph)
    wanted = [head.logits, *([head.features] if "features" in outputs else [])]
    nodes = ordered(graph, image.name, wanted)
    varying = dependent(nodes, image.name)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    used = {name for node in kept for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    body = helper.make_graph(kept, "classifier", [], [], tensors)
    if freed:
        free_batch(body, varying, image.batch or 1)
    names = renamed(body, image.name)
    height, width = size
    laid = [None, 3, height, width] if image.layout == "NCHW" else [None, height, width, 3]
    body.input.append(helper.make_tensor_value_info(names[image.name], image.kind, laid))
    for name in dict.fromkeys(wanted):
        body.output.append(helper.make_empty_tensor_value_info(names[name]))
    plain = converted(helper.make_model(body, opset_imports=[helper.make_opsetid("", opset(model))], ir_version=IR))
    del plain.graph.value_info[:], plain.graph.input[:], plain.graph.output[:]
    plain.graph.input.append(helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["N", 3, height, width]))
    front = in_front(image, pixels, names[image.name], plain.graph)
    behind = at_the_end(names[head.logits], outputs[0])
    if "energy" in outputs:
        behind += energy_of(outputs[0], plain)
    if "features" in outputs:
        behind += at_the_end(pooled(names[head.features], behind) if head.pooled else names[head.features], "features")
    nodes = [*front, *plain.graph.node, *behind]
    del plain.graph.node[:]
    plain.graph.node.extend(nodes)
    for name in outputs:
        sizes = ["N"] if name == "energy" else ["N", None]
        plain.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes))
    return plain


def converted(model: ModelProto) -> ModelProto:
    """Return the model in version TARGET of ONNX's operators, or as it is from OLDEST on; raise ValueError where that cannot be done."""
    if (version := opset(model)) >= OLDEST:
        return model
    try:
        done: ModelProto = onnx.version_converter.convert_version(model, TARGET)
    except (RuntimeError, ValueError, IndexError) as error:  # what its adapters raise
        raise ValueError(
            f"it is written in version {version} of ONNX's operators and cannot be converted to {TARGET} "
            f"({str(error).splitlines()[0][:160]}): export it in a newer version"
        ) from error
    done.ir_version = IR
    return done


def renamed(graph: onnx.GraphProto, image: str) -> dict[str, str]:
    """Give every value and operator of ``graph`` a plain name of its own; return the new names of values by the old ones."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    turns: dict[str, Iterator[int]] = {}

    def plain(name: str) -> str:
        if not name:
            return name  # an input that is left out
        if name not in names:
            cut = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:]
            unique = f"net.{cut}"
            while unique in taken:
                unique = f"net.{cut}.{next(turns.setdefault(cut, count()))}"
            taken.add(unique)
            names[name] = unique
        return names[name]

    plain(image)
    for tensor in graph.initializer:
        tensor.name = plain(tensor.name)
        tensor.doc_string = ""
    for number, node in enumerate(graph.node):
        taken_from, made = [plain(name) for name in node.input], [plain(name) for name in node.output]
        del node.input[:], node.output[:], node.metadata_props[:]
        node.input.extend(taken_from)
        node.output.extend(made)
        node.name, node.doc_string, node.domain = f"{node.op_type}.{number}", "", ""
    return names


def constant(graph: onnx.GraphProto, name: str, value: ArrayLike) -> str:
    """Add an initialiser to ``graph`` and return its name."""
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def in_front(image: Image, pixels: Pixels, target: str, graph: onnx.GraphProto) -> list[NodeProto]:
    """Return the operators from RGB N x 3 x H x W in [0,1] to what the graph takes as ``target``."""
    nodes: list[NodeProto] = []
    value = "image"

    def then(kind: str, *more: str, **attributes: Any) -> None:
        nonlocal value
        made = f"input.{len(nodes)}"
        nodes.append(helper.make_node(kind, [value, *more], [made], name=f"input.{kind}.{len(nodes)}", **attributes))
        value = made

    def a_channel(name: str, values: Sequence[float]) -> str:
        return constant(graph, f"input.{name}", np.asarray(values, np.float32).reshape(1, 3, 1, 1))

    if pixels.scale != 1:
        then("Mul", constant(graph, "input.scale", np.float32(pixels.scale)))
    if pixels.channel_order == "BGR":
        then("Gather", constant(graph, "input.order", np.array([2, 1, 0])), axis=1)
    if any(pixels.mean):
        then("Sub", a_channel("mean", pixels.mean))
    if any(std != 1 for std in pixels.std):
        then("Div", a_channel("std", pixels.std))
    if image.layout == "NHWC":
        then("Transpose", perm=[0, 2, 3, 1])
    if image.kind == onnx.TensorProto.UINT8:
        then("Round")
        then("Clip", constant(graph, "input.least", np.float32(0)), constant(graph, "input.most", np.float32(255)))
    if image.kind != onnx.TensorProto.FLOAT:
        then("Cast", to=image.kind)
    nodes.append(helper.make_node("Identity", [value], [target], name="input.Identity"))
    return nodes


def at_the_end(value: str, name: str) -> list[NodeProto]:
    """Return the operators that make ``value`` the output ``name`` (N, K) in float32."""
    return [
        helper.make_node("Flatten", [value], [f"output.{name}"], axis=1, name=f"output.Flatten.{name}"),
        helper.make_node("Cast", [f"output.{name}"], [name], to=onnx.TensorProto.FLOAT, name=f"output.Cast.{name}"),
    ]


def pooled(value: str, nodes: list[NodeProto]) -> str:
    """Add the operator that averages ``value`` (N, F, H, W) over its places to ``nodes`` and return what it makes."""
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["output.pooled"], name="output.GlobalAveragePool"))
    return "output.pooled"


def energy_of(logits: str, model: ModelProto) -> list[NodeProto]:
    """Return the operators that make the energy -logsumexp (N,) of logits (N, K)."""
    if opset(model) >= AXES_ARE_AN_INPUT:
        axes = constant(model.graph, "output.axes", np.array([1]))
        total = helper.make_node("ReduceLogSumExp", [logits, axes], ["output.sum"], keepdims=0, name="output.ReduceLogSumExp")
    else:
        total = helper.make_node("ReduceLogSumExp", [logits], ["output.sum"], axes=[1], keepdims=0, name="output.ReduceLogSumExp")
    return [total, helper.make_node("Neg", ["output.sum"], ["energy"], name="output.Neg")]


def free_batch(graph: onnx.GraphProto, varying: set[str], batch: int) -> None:
    """Let a graph written for ``batch`` images take any number, as far as shapes say: whether it does is tried afterwards.

    A constant shape of Reshape whose first size is a multiple of the batch gets -1 there, or 0, the size that is given, where another is
    -1 already; a constant that is concatenated with values of the image, as a class token, is repeated for each image.
    """
    known = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[0] in varying and node.input[1] in known:
            target = numpy_helper.to_array(known[node.input[1]]).astype(np.int64)
            if target.ndim == 1 and len(target) and target[0] > 0 and target[0] % batch == 0 and target.all():
                del node.attribute[:]  # allowzero, by which a 0 is no size that is given
                new = target.copy()
                new[0] = 0 if -1 in target[1:] and target[0] == batch else -1
                if (new == -1).sum() <= 1:
                    node.input[1] = constant(graph, f"{node.output[0]}.free", new)
        elif node.op_type == "Concat" and (like := [name for name in node.input if name in varying]):
            for place, name in enumerate(node.input):
                if name not in varying:
                    nodes += repeated(graph, name, like[0], f"{node.output[0]}.{place}")
                    node.input[place] = f"{node.output[0]}.{place}.all"
        nodes.append(NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(nodes)


def repeated(graph: onnx.GraphProto, name: str, like: str, prefix: str) -> list[NodeProto]:
    """Return the operators that repeat the first row of a constant as often as ``like`` has rows, as PREFIX.all."""
    start, one = constant(graph, f"{prefix}.start", np.array([0])), constant(graph, f"{prefix}.one", np.array([1]))
    end = constant(graph, f"{prefix}.end", np.array([np.iinfo(np.int64).max]))
    return [
        helper.make_node("Slice", [name, start, one], [f"{prefix}.first"]),
        helper.make_node("Shape", [like], [f"{prefix}.like"]),
        helper.make_node("Slice", [f"{prefix}.like", start, one], [f"{prefix}.rows"]),
        helper.make_node("Shape", [name], [f"{prefix}.shape"]),
        helper.make_node("Slice", [f"{prefix}.shape", one, end], [f"{prefix}.rest"]),
        helper.make_node("Concat", [f"{prefix}.rows", f"{prefix}.rest"], [f"{prefix}.size"], axis=0),
        helper.make_node("Expand", [f"{prefix}.first", f"{prefix}.size"], [f"{prefix}.all"]),
    ]
