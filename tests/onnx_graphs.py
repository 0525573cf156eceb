"""Hand-made ONNX classifiers, small enough to be computed by hand: mean over the places of each channel, then a linear layer."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE, CLASSES = 16, 3
WEIGHT = np.random.default_rng(1).normal(0, 1, (3, CLASSES)).astype(np.float32)
BIAS = np.array([0.3, -0.2, 0.1], np.float32)
MEAN, STD = [104.0, 117.0, 123.0], [58.0, 57.0, 57.5]
CONTRACT = {"resize": "squash", "filter": "bilinear", "channel_order": "BGR", "scale": 255, "mean": MEAN, "std": STD}


def by_hand(image, order="BGR"):
    """Return features and logits of RGB images (N, 3, H, W) in [0,1], in float64."""
    pixels = image.astype(np.float64) * 255
    pixels = pixels[:, ::-1] if order == "BGR" else pixels
    features = ((pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))).mean(axis=(2, 3))
    return features, features @ WEIGHT + BIAS


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def constant(name, values, kind=np.int64):
    return numpy_helper.from_array(np.asarray(values, kind), name)


def classifier(
    *, layout="NCHW", batch="N", size=SIZE, ending="Softmax", opset=17, flat="Flatten", kind=TensorProto.FLOAT, metadata=(), weight=WEIGHT
):
    """Return a model; ``flat``: Flatten, or the constant shape of a Reshape; ``ending``: an operator, "by hand", "scaled" or ""."""
    nodes, given = [], [constant("w", weight, np.float32), constant("b", BIAS[: weight.shape[1]], np.float32)]
    value = "x"
    if kind != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [value], ["as_float"], to=TensorProto.FLOAT))
        value = "as_float"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", [value], ["nchw"], perm=[0, 3, 1, 2]))
        value = "nchw"
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pool"]))
    if flat == "Flatten":
        nodes.append(helper.make_node("Flatten", ["pool"], ["features"], axis=1))
    else:
        given.append(constant("shape", flat))
        nodes.append(helper.make_node("Reshape", ["pool", "shape"], ["features"]))
    nodes.append(helper.make_node("Gemm", ["features", "w", "b"], ["z"]))
    nodes += ended(ending, given)
    laid = [batch, 3, size, size] if layout == "NCHW" else [batch, size, size, 3]
    graph = helper.make_graph(
        nodes,
        "hand-made",
        [helper.make_tensor_value_info("x", kind, laid)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, weight.shape[1]])],
        given,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    for key, text in dict(metadata).items():
        model.metadata_props.add(key=key, value=text)
    return model


def ended(ending, given):
    """Return the operators from the logits z to the output y."""
    match ending:
        case "":
            return [helper.make_node("Identity", ["z"], ["y"])]
        case "by hand":
            given.append(constant("axis", [1]))
            return [
                helper.make_node("ReduceMax", ["z"], ["most"], axes=[1]),
                helper.make_node("Sub", ["z", "most"], ["shifted"]),
                helper.make_node("Exp", ["shifted"], ["e"]),
                helper.make_node("ReduceSum", ["e", "axis"], ["sum"]),
                helper.make_node("Div", ["e", "sum"], ["y"]),
            ]
        case "scaled":  # a softmax in the middle of something
            given.append(constant("half", 0.5, np.float32))
            return [
                helper.make_node("Softmax", ["z"], ["p"], axis=1),
                helper.make_node("Mul", ["p", "half"], ["h"]),
                helper.make_node("Add", ["h", "h"], ["y"]),
            ]
        case "Sigmoid":
            return [helper.make_node("Sigmoid", ["z"], ["y"])]
    return [helper.make_node(ending, ["z"], ["p"], axis=1), helper.make_node("Identity", ["p"], ["y"])]


def saved(model, folder, name="net.onnx"):
    """Return the file that a model was written to."""
    file = folder / name
    file.write_bytes(model.SerializeToString())
    return file


def graph_of(*nodes, given=(), inputs=None, outputs=None, opset=17):
    """Return a model of the given operators from x to y."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        inputs or [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        outputs if outputs is not None else [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])],
        list(given),
    )
    return helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
