"""ONNX files that nobody vouches for: each is refused in one line, with bounded memory, before anything of it runs."""

import os
import tracemalloc

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.graphs import as_varint, field
from ebjdat_serve.importing import import_model, onnx_file, onnx_reader
from ebjdat_serve.importing.onnx_file import read, survey
from ebjdat_serve.importing.onnx_reader import look, looked_at
from tests.onnx_graphs import CLASSES, SIZE, WEIGHT, classifier, constant, graph_of, saved
from tests.test_importing import contract_in, in_this_process  # noqa: F401 (a fixture)

IMAGE = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])
ROWS = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])
INNER = helper.make_graph([helper.make_node("Identity", ["x"], ["i"])], "inner", [], [helper.make_empty_tensor_value_info("i")])


def tail(*nodes, given=()):
    """Return a classifier whose logits z go through ``nodes`` to y."""
    model = classifier()
    del model.graph.node[-2:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(given)
    return model


def tensor(**fields):
    model = classifier()
    weights = model.graph.initializer[0]
    for name, value in fields.items():
        if name == "dims":
            weights.dims[:] = value
        else:
            setattr(weights, name, value)
    return model


def outside(**places):
    model = tensor(data_location=TensorProto.EXTERNAL)
    model.graph.initializer[0].ClearField("raw_data")
    for key, value in places.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    return model


def text():
    model = classifier()
    model.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"a"]))
    return model


def functions():
    model = classifier()
    model.functions.append(helper.make_function("d", "F", ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], []))
    return model


def sparse():
    model = classifier()
    model.graph.sparse_initializer.add()
    return model


def trained():
    model = classifier()
    model.training_info.add()
    return model


def opsets(*entries):
    model = classifier()
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*entry) for entry in entries)
    return model


HOSTILE = {
    "custom operator": (tail(helper.make_node("Run", ["z"], ["y"], domain="evil.ops")), "'Run' is of the domain 'evil.ops'"),
    "Microsoft's": (tail(helper.make_node("Gelu", ["z"], ["y"], domain="com.microsoft")), "of the domain 'com.microsoft'"),
    "compiled": (tail(helper.make_node("EPContext", ["z"], ["y"])), "'EPContext' is unknown"),
    "unknown operator": (tail(helper.make_node("Rot13", ["z"], ["y"])), "'Rot13' is unknown in version 17"),
    "if": (tail(helper.make_node("If", ["z"], ["y"], then_branch=INNER, else_branch=INNER)), "control flow"),
    "loop": (tail(helper.make_node("Loop", ["", "", "z"], ["y"], body=INNER)), "control flow"),
    "loop without a body": (tail(helper.make_node("Loop", ["", "", "z"], ["y"])), "'Loop' is not run: control flow"),
    "functions": (functions(), "functions of its own"),
    "training": (trained(), "training steps"),
    "sparse": (sparse(), "sparse tensors"),
    "text": (text(), "tensors of strings"),
    "text by type": (tensor(data_type=TensorProto.STRING), "elements of type 8"),
    "random": (tail(helper.make_node("RandomNormalLike", ["z"], ["y"])), "its result is random"),
    "sequence": (tail(helper.make_node("SequenceConstruct", ["z"], ["s"]), helper.make_node("SequenceAt", ["s", "z"], ["y"])), "sequences"),
    "image files": (tail(helper.make_node("ImageDecoder", ["z"], ["y"])), "'ImageDecoder' is not run"),
    "huge": (tensor(dims=[2**40, 2**40]), "all tensors together may have"),
    "huge product": (tensor(dims=[2**20] * 16), "all tensors together may have"),
    "negative": (tensor(dims=[-3, -3]), "says it is of shape"),
    "many dimensions": (tensor(dims=[1] * 100), "says it is of shape"),
    "too few values": (tensor(raw_data=b"\0" * 8), r"of shape \[3, 3\] and has 2 values"),
    "odd bytes": (tensor(raw_data=b"\0" * 37), "has 9.25 values"),
    "a file above": (outside(location="../../etc/passwd"), r"'../../etc/passwd', which is no file in the folder"),
    "an absolute file": (outside(location="/etc/passwd"), "is no file in the folder"),
    "no file": (outside(), "kept in '', which is no file"),
    "a null": (outside(location="a\0b"), "is no file in the folder"),
    "a long name": (outside(location="a" * 5000), "is no file in the folder"),
    "the folder": (outside(location="."), "is no file in the folder"),
    "beyond the end": (outside(location="data", offset="99999999999"), "does not lie within 'data'"),
    "before the start": (outside(location="data", offset="-4"), "does not lie within 'data'"),
    "another length": (outside(location="data", length="4000000000"), "does not lie within 'data'"),
    "no number": (outside(location="data", offset="many"), "is no number"),
    "cycle": (
        graph_of(
            helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Relu", ["b"], ["y"])
        ),
        "form a circle",
    ),
    "itself": (graph_of(helper.make_node("Add", ["x", "y"], ["y"])), "form a circle"),
    "twice": (graph_of(helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])), "'y' is made twice"),
    "the image again": (graph_of(helper.make_node("Relu", ["x"], ["x"]), helper.make_node("Relu", ["x"], ["y"])), "'x' is made twice"),
    "from nowhere": (graph_of(helper.make_node("Add", ["x", "ghost"], ["y"])), "'ghost' is taken by an operator and made nowhere"),
    "no outputs": (graph_of(helper.make_node("Relu", ["x"], ["y"]), outputs=[]), "it has no outputs"),
    "no operators": (graph_of(), "it has no operators"),
    "no inputs": (
        graph_of(
            helper.make_node("Relu", ["w"], ["y"]),
            given=[constant("w", WEIGHT, np.float32)],
            inputs=[helper.make_tensor_value_info("w", 1, [3, 3])],
        ),
        "it takes 0 inputs",
    ),
    "two inputs": (graph_of(helper.make_node("Relu", ["x"], ["y"]), inputs=[IMAGE, ROWS]), r"it takes 2 inputs \('x', 'y'\)"),
    "text in": (
        graph_of(helper.make_node("Relu", ["x"], ["y"]), inputs=[helper.make_tensor_value_info("x", TensorProto.STRING, [1, 3, 8, 8])]),
        "not of numbers that pixels can be",
    ),
    "a row in": (
        graph_of(helper.make_node("Relu", ["x"], ["y"]), inputs=[helper.make_tensor_value_info("x", 1, ["N", 784])]),
        r"of shape \? x 784; an image is of 4 sizes",
    ),
    "grey": (
        graph_of(helper.make_node("Relu", ["x"], ["y"]), inputs=[helper.make_tensor_value_info("x", 1, ["N", 1, 28, 28])]),
        "takes no image of 3 channels",
    ),
    "either layout": (
        graph_of(helper.make_node("Relu", ["x"], ["y"]), inputs=[helper.make_tensor_value_info("x", 1, [1, 3, 3, 3])]),
        "either layout is possible: give layout",
    ),
    "a constant out": (
        graph_of(helper.make_node("Relu", ["w"], ["y"]), given=[constant("w", WEIGHT, np.float32)]),
        "does not depend on the image",
    ),
    "pictures out": (
        graph_of(helper.make_node("Relu", ["x"], ["y"]), outputs=[helper.make_tensor_value_info("y", 1, ["N", 3, 16, 16])]),
        r"none of its outputs \('y'\) is N x classes",
    ),
    "old": (opsets(("", 1)), "version 1 of ONNX's operators; 7 to"),
    "from the future": (opsets(("", 999)), "version 999 of ONNX's operators"),
    "of no version": (opsets(("evil", 1)), "says not once which version"),
    "of two versions": (opsets(("", 17), ("ai.onnx", 12)), "says not once which version"),
    "size from pixels": (
        tail(
            helper.make_node("Cast", ["z"], ["n"], to=7),
            helper.make_node("ConstantOfShape", ["n"], ["c"]),
            helper.make_node("Identity", ["c"], ["y"]),
        ),
        "ConstantOfShape makes depends on pixels",
    ),
    "shape from pixels": (
        tail(helper.make_node("Cast", ["z"], ["n"], to=7), helper.make_node("Expand", ["z", "n"], ["y"])),
        "Expand makes depends on pixels",
    ),
    "as many as pixels": (tail(helper.make_node("NonZero", ["z"], ["y"])), "depends on pixels"),
    "names of files": (
        graph_of(helper.make_node("Identity", ["../../etc/passwd\nsecond line\x1b[31m"], ["y"])),
        r"'../../etc/passwd\\nsecond line\\x1b\[31m' is taken by an operator",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused_in_one_line(tmp_path, name, in_this_process):  # noqa: F811
    model, said = HOSTILE[name]
    (tmp_path / "data").write_bytes(b"\0" * 16)
    with pytest.raises(EbjdatError, match=said) as refused:
        looked_at(saved(model, tmp_path))
    assert len(str(refused.value).splitlines()) == 1 and "\x1b" not in str(refused.value)


def test_which_of_two_outputs_is_asked_for(tmp_path):
    model = tail(helper.make_node("Relu", ["z"], ["y"]), helper.make_node("Neg", ["z"], ["v"]))
    model.graph.output.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, ["N", CLASSES]))
    with pytest.raises(ValueError, match=r"which of its outputs \('y', 'v'\) holds the classes is not clear: give output in the contract"):
        look(model)
    assert look(model, output="v").head.output == "v"


def test_data_beside_the_model_is_read_and_links_out_of_the_folder_are_not(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    (tmp_path / "net" / "data").write_bytes(b"1234" + WEIGHT.tobytes())
    found = read(saved(outside(location="data", offset="4", length="36"), tmp_path / "net"))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(found.graph.initializer[0]), WEIGHT)
    (tmp_path / "net" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(EbjdatError, match="'link', which is no file in the folder of the model"):
        read(saved(outside(location="link"), tmp_path / "net"))


def test_tensors_that_share_data_beside_the_model_are_counted_together(tmp_path, monkeypatch):
    model = outside(location="data")
    for i in range(9):
        model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
        model.graph.initializer[-1].name = f"again {i}"
    (tmp_path / "data").write_bytes(WEIGHT.tobytes())
    read(saved(model, tmp_path))
    monkeypatch.setattr(onnx_file, "LARGEST", 200)
    monkeypatch.setattr(onnx_file, "_content", lambda file, where: file.read_bytes())
    with pytest.raises(EbjdatError, match="all tensors together may have 200 bytes"):
        read(saved(model, tmp_path))


BYTES = classifier(layout="NHWC", metadata={"names": "{0: 'a', 1: 'b', 2: 'c'}"}).SerializeToString()


def accepted_or_refused(file):
    """Read and look as the importer does; whatever is refused is so by an error of ours."""
    try:
        model = read(file)
    except EbjdatError as error:
        return str(error)
    try:
        return look(model)
    except ValueError as error:
        return str(error)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_off_or_changed_bytes_are_refused_or_read(tmp_path, data):
    content = bytearray(BYTES)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    (tmp_path / "net.onnx").write_bytes(content[:cut])
    accepted_or_refused(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04 not a graph", "cannot be read|is not an ONNX model"),
        (b'{"ir_version": 8}', "is not an ONNX model"),
        (BYTES[: len(BYTES) // 2], "it is cut off"),
        (b"\x3a\xff\xff\xff\xff\x07" + BYTES, "it is cut off"),  # a graph that claims 2 GB
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "is not an ONNX model"),  # and one that claims 16 EB
    ],
)
def test_what_is_no_model_is_said_so(tmp_path, content, said):
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(EbjdatError, match=said):
        read(tmp_path / "net.onnx")


@pytest.mark.parametrize("one", [b"\x0a\x00", b"\x2a\x00", b"\x62\x00"], ids=["operators", "tensors", "outputs"])
def test_millions_of_empty_messages_take_no_memory(one, monkeypatch):
    monkeypatch.setattr(onnx_file, "MOST_VALUES", 20_000)
    monkeypatch.setattr(onnx_file, "MOST_NODES", 5_000)
    graph = one * 4_000_000
    content = b"\x3a" + as_varint(len(graph)) + graph
    tracemalloc.start()
    with pytest.raises(ValueError, match="more operators, names and numbers than any classifier"):
        survey(content)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_packed_integers_that_a_parser_makes_eight_times_as_large_are_bounded(monkeypatch):
    monkeypatch.setattr(onnx_file, "PACKED_BYTES", 1000)
    model = classifier()
    model.graph.initializer.append(helper.make_tensor("many", TensorProto.INT64, [2000], [0] * 2000))
    with pytest.raises(ValueError, match="more operators, names and numbers"):
        survey(model.SerializeToString())


def test_packed_numbers_of_an_attribute_are_read(tmp_path):
    """Writers of proto3 pack them; Python's package does not, but reads both."""
    name, numbers = field(1, b"value_floats"), np.float32([0.5, 2.0]).tobytes()
    survey(field(7, field(1, field(4, b"Constant") + field(5, name + field(7, numbers)))))


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    make(tmp_path / "net.onnx")
    with pytest.raises(EbjdatError, match="is not a file"):
        read(tmp_path / "net.onnx")


def test_a_graph_that_takes_any_memory_ends_its_reader_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_reader, "MEMORY", 2 * 2**30)
    model = tail(
        helper.make_node("Expand", ["z", "size"], ["large"]),
        helper.make_node("ReduceSum", ["large", "axis"], ["y"], keepdims=0),
        given=[constant("size", [200_000, 200_000, 1, 1]), constant("axis", [0, 1])],
    )
    with pytest.raises(EbjdatError) as refused:
        import_model(str(saved(model, tmp_path)), tmp_path / "out", contract=contract_in(tmp_path))
    assert len(str(refused.value).splitlines()) == 1 and str(tmp_path / "net.onnx") in str(refused.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".importing-*"))


def test_weights_that_are_no_numbers_are_refused(tmp_path, in_this_process):  # noqa: F811
    weight = WEIGHT.copy()
    weight[0, 0] = np.nan
    with pytest.raises(EbjdatError, match="for some image its output is not finite"):
        import_model(str(saved(classifier(weight=weight), tmp_path)), tmp_path / "out", contract=contract_in(tmp_path))
