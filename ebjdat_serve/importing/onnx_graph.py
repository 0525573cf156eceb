"""What an ONNX graph of a classifier is made of: its image, its logits, and the features that its last layer takes."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

FLOATS = {1: "float32", 10: "float16", 11: "float64"}
PIXELS = {**FLOATS, 2: "uint8"}
"""Element types of an image input."""
PASSING = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Dropout")
"""Operators that hand on what they take, in another shape or type."""
AFTER = ("Sigmoid", "Add", "Sub", "Mul", "Div", "Relu", "GlobalAveragePool", "ReduceMean", "Transpose")
"""Operators between the last layer and its logits, or probabilities, that may lie there too."""
SIZED = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "Resize": (1, 2, 3), "Upsample": (1,),
    "Pad": (1, 3), "Slice": (1, 2, 3, 4), "OneHot": (1,), "TopK": (1,), "Squeeze": (1,), "Unsqueeze": (1,), "Split": (1,),
    "CenterCropPad": (1,), "AffineGrid": (1,), "MaxUnpool": (2,), "HannWindow": (0,), "HammingWindow": (0,), "BlackmanWindow": (0,),
    "MelWeightMatrix": (0, 1), "Col2Im": (1, 2), "STFT": (1, 3), "DFT": (1, 2),
}  # fmt: skip
"""Inputs of operators that say how large the result is."""


@dataclass(frozen=True)
class Image:
    """The image input of a graph; sizes that the graph leaves open are None."""

    name: str
    layout: Literal["NCHW", "NHWC"]
    height: int | None
    width: int | None
    batch: int | None
    kind: int  # element type, a key of PIXELS


@dataclass(frozen=True)
class Head:
    """Where a classifier ends. ``features`` is pooled before it is flattened where ``pooled``."""

    output: str  # of the graph as it is
    logits: str  # the same, or what the softmax takes
    ending: str  # softmax, log-softmax, sigmoid or ""
    features: str
    pooled: bool


def image_of(graph: GraphProto, layout: str = "") -> Image:
    """Return the image input, channels where 3 is, unless ``layout`` says so; raise ValueError unless there is exactly one."""
    known = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in known]
    if len(inputs) != 1:
        raise ValueError(f"it takes {len(inputs)} inputs{some([value.name for value in inputs])}; a classifier takes one, the image")
    value = inputs[0]
    kind, sizes = value.type.tensor_type.elem_type, sizes_of(value)
    if kind not in PIXELS:
        raise ValueError(f"its input {value.name[:40]!r} is not of numbers that pixels can be ({', '.join(PIXELS.values())})")
    if sizes is None or len(sizes) != 4:
        raise ValueError(
            f"its input {value.name[:40]!r} is of shape {shape(sizes)}; an image is of 4 sizes, N x 3 x H x W or N x H x W x 3"
        )
    fits = [name for name, place in (("NCHW", 1), ("NHWC", 3)) if sizes[place] in (3, None) and layout in ("", name)]
    certain = [name for name in fits if sizes[1 if name == "NCHW" else 3] == 3] or fits
    if len(certain) != 1:
        why = "either layout is possible: give layout in the contract" if fits else "it takes no image of 3 channels"
        raise ValueError(
            f"its input {value.name[:40]!r} is of shape {shape(sizes)}{f', not {layout}' if layout and not fits else ''}: {why}"
        )
    height, width = sizes[2:] if certain[0] == "NCHW" else sizes[1:3]
    for name, size in (("height", height), ("width", width), ("batch", sizes[0])):
        if size is not None and not 1 <= size <= 4096:
            raise ValueError(f"its input {value.name[:40]!r} has a {name} of {size}")
    return Image(value.name, "NCHW" if certain[0] == "NCHW" else "NHWC", height, width, sizes[0], kind)


def sizes_of(value: ValueInfoProto) -> list[int | None] | None:
    """Return the sizes that a graph gives an input or output, None for those it leaves open; None where it gives none."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]


def shape(sizes: list[int | None] | None) -> str:
    """Return sizes as text."""
    return "nothing that it says" if sizes is None else " x ".join("?" if size is None else str(size) for size in sizes[:8]) or "a number"


def some(names: list[str]) -> str:
    """Return the first of several names, in brackets."""
    return f" ({', '.join(repr(name[:40]) for name in names[:6])}{', …' if len(names) > 6 else ''})" if names else ""


def output_of(graph: GraphProto, wished: str = "") -> str:
    """Return the output that holds the classes, by name where ``wished``; raise ValueError unless it is clear which one."""
    names = [value.name for value in graph.output]
    if not names:
        raise ValueError("it has no outputs")
    if wished:
        if wished not in names and not any(wished in node.output for node in graph.node):
            raise ValueError(f"it has no output {wished[:40]!r}; it has{some(names)}")
        return wished
    fit = [v.name for v in graph.output if v.type.tensor_type.elem_type in (0, *FLOATS) and one_row_of_classes(sizes_of(v))]
    if len(fit) != 1:
        found = (
            f"which of its outputs{some(fit)} holds the classes is not clear" if fit else f"none of its outputs{some(names)} is N x classes"
        )
        raise ValueError(f"{found}: give output in the contract")
    return str(fit[0])


def one_row_of_classes(sizes: list[int | None] | None) -> bool:
    """Return whether an output of these sizes can be classes: N x K, or with sizes of 1 besides; open ones may be anything."""
    return sizes is None or (len(sizes) >= 2 and sum(size != 1 for size in sizes[1:]) <= 1)


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """Return the operator that makes each value."""
    return {name: node for node in graph.node for name in node.output if name}


def ordered(graph: GraphProto, image: str, wanted: Collection[str]) -> list[NodeProto]:
    """Return the operators that ``wanted`` needs, each after those it takes from.

    Raises ValueError for a circle, a value that is made twice or nowhere, and values that do not depend on the image.
    """
    given = {image, *(tensor.name for tensor in graph.initializer)}
    made: dict[str, NodeProto] = {}
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made or name in given:
                raise ValueError(f"{name[:40]!r} is made twice")
            made[name] = node
    done: list[NodeProto] = []
    state: dict[int, bool] = {}  # of a node's id: False while what it takes is looked at
    stack = [made[name] for name in wanted if name in made]
    while stack:
        node = stack[-1]
        if state.get(id(node)):
            stack.pop()
            continue
        missing = [name for name in node.input if name and name not in given and not (name in made and state.get(id(made[name])))]
        if not missing:
            state[id(node)] = True
            done.append(stack.pop())
            continue
        if state.get(id(node)) is False and any(name in made and state.get(id(made[name])) is False for name in missing):
            raise ValueError(f"its operators form a circle at {node.output[0][:40]!r}")
        state[id(node)] = False
        for name in missing:
            if name not in made:
                raise ValueError(f"{name[:40]!r} is taken by an operator and made nowhere")
            stack.append(made[name])
    return done


def dependent(nodes: list[NodeProto], image: str) -> set[str]:
    """Return the values that depend on pixels, not on the image's size alone, of operators in order.

    Raises ValueError where the size of a result does: such a graph could take any memory, for some image.
    """
    found = {image}
    for node in nodes:
        for place in SIZED.get(node.op_type, ()):
            if place < len(node.input) and node.input[place] in found:
                raise ValueError(f"the size of what its operator {node.op_type} makes depends on pixels")
        if node.op_type not in ("Shape", "Size") and not found.isdisjoint(node.input):
            found.update(filter(None, node.output))
    return found


def head_of(graph: GraphProto, output: str, pixels: set[str]) -> Head:
    """Return where the classifier ends, ``pixels`` the values that depend on the image."""
    made = producers(graph)

    def back(name: str, ways: Collection[str]) -> Iterator[NodeProto]:
        while (node := made.get(name)) is not None:
            yield node
            if node.op_type not in ways or sum(taken in pixels for taken in node.input) != 1:
                return
            name = next(taken for taken in node.input if taken in pixels)

    logits, ending = output, ""
    for node in back(output, PASSING):
        if node.op_type in ("Softmax", "LogSoftmax"):
            logits, ending = node.input[0], {"Softmax": "softmax", "LogSoftmax": "log-softmax"}[node.op_type]
        elif node.op_type == "Sigmoid":
            ending = "sigmoid"
        elif (written := softmax_by_hand(node, made)) is not None:
            logits, ending = written, "softmax"
    pooled = False
    for node in back(logits, (*PASSING, *AFTER)):
        pooled = pooled or node.op_type in ("GlobalAveragePool", "ReduceMean")
        if node.op_type in ("Gemm", "MatMul", "Conv") and node.input[0] in pixels and node.input[1] not in pixels:
            return Head(output, logits, ending, node.input[0], pooled and node.op_type == "Conv")
    return Head(output, logits, ending, "", False)


def softmax_by_hand(node: NodeProto, made: dict[str, NodeProto]) -> str | None:
    """Return x of exp(x) / sum(exp(x)), also where its maximum was subtracted from x before, or None."""
    if node.op_type != "Div":
        return None
    top, below = made.get(node.input[0]), made.get(node.input[1])
    if top is None or below is None or top.op_type != "Exp" or below.op_type != "ReduceSum" or below.input[0] != top.output[0]:
        return None
    shifted = made.get(top.input[0])
    if shifted is not None and shifted.op_type == "Sub":
        most = made.get(shifted.input[1])
        if most is not None and most.op_type == "ReduceMax" and most.input[0] == shifted.input[0]:
            return str(shifted.input[0])
    return str(top.input[0])


def opset(model: ModelProto) -> int:
    """Return the version of ONNX's operators that a model is written in."""
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))


def constants_lifted(graph: GraphProto) -> None:
    """Turn Constant operators into initialisers; raise ValueError for one of another kind than numbers."""
    nodes = []
    for node in graph.node:
        if node.op_type != "Constant":
            nodes.append(node)
            continue
        if len(node.attribute) != 1:
            raise ValueError(f"its constant {node.output[0][:40]!r} is not one value")
        value = node.attribute[0]
        match value.name:
            case "value":
                tensor = onnx.TensorProto()
                tensor.CopyFrom(value.t)
            case "value_float" | "value_floats" | "value_int" | "value_ints":
                found = onnx.helper.get_attribute_value(value)
                several = isinstance(found, list | tuple)
                kind = onnx.TensorProto.FLOAT if "float" in value.name else onnx.TensorProto.INT64
                tensor = onnx.helper.make_tensor("", kind, [len(found)] if several else [], found if several else [found])
            case _:
                raise ValueError(f"its constant {node.output[0][:40]!r} is no number")
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(nodes)
