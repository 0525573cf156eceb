"""Tests of `ebjdat-serve import` on hand-made ONNX classifiers: what is served is what the file computes, and nothing is guessed."""

import json
import logging
import shutil
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file

import ebjdat_serve
from ebjdat_serve import cli, logs
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import EbjdatError, first_line
from ebjdat_serve.importing import import_model, labels, onnx_reader, onnx_source
from ebjdat_serve.importing.contract_file import read_contract
from ebjdat_serve.importing.images import made
from ebjdat_serve.importing.onnx_graph import opset
from ebjdat_serve.importing.onnx_reader import SERVED, attempt, look, size_of
from ebjdat_serve.importing.onnx_rewrite import Pixels, renamed
from ebjdat_serve.importing.onnx_run import served
from ebjdat_serve.listing import printable
from ebjdat_serve.manifest import YES
from ebjdat_serve.pixels import decode, encode_png, to_unit
from ebjdat_serve.verification import USUAL, verified
from tests.onnx_graphs import BIAS, CLASSES, CONTRACT, MEAN, SIZE, STD, WEIGHT, by_hand, classifier, constant, graph_of, saved, softmax

PIXELS = Pixels("BGR", 255.0, MEAN, STD)
IMAGES = to_unit(made(SIZE, SIZE, 5))


def tried(model, folder, size=(SIZE, SIZE), layout="", output=""):
    """Return what a model turns out to be, and what its served form gives."""
    found = attempt(model, look(model, layout, output), PIXELS, size, folder)
    return found, served(onnx.load(folder / SERVED), IMAGES)


def contract_in(folder, **changes):
    file = folder / "contract.json"
    file.write_text(json.dumps({name: value for name, value in {**CONTRACT, **changes}.items() if value != "absent"}))
    return file


def near(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def in_this_process(monkeypatch):
    """Requests are answered here, which takes a second less than a process of their own."""

    def answer(source, folder, **request):
        try:
            return json.loads(json.dumps(onnx_reader._answer(request, source, folder)))
        except ValueError as error:
            raise EbjdatError(f"{source}: {error}") from error

    monkeypatch.setattr(onnx_reader, "_asked", answer)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("ending", ["", "Softmax", "LogSoftmax", "by hand"])
def test_logits_energy_and_features_are_those_computed_by_hand(tmp_path, layout, ending):
    about, found = tried(classifier(layout=layout, ending=ending), tmp_path)
    features, logits = by_hand(IMAGES)
    near(found["features"], features)
    near(found["logits"], logits)
    near(found["energy"], -np.log(np.exp(logits).sum(axis=1)))
    assert (about.output, about.energy, about.features, about.looked.image.layout) == ("logits", "", 3, layout)


def test_rgb_is_not_turned_round(tmp_path):
    model = classifier()
    attempt(model, look(model), Pixels("RGB", 255.0, MEAN, STD), (SIZE, SIZE), tmp_path)
    near(served(onnx.load(tmp_path / SERVED), IMAGES)["logits"], by_hand(IMAGES, "RGB")[1])


def test_probabilities_that_no_softmax_ends_have_no_energy(tmp_path):
    about, found = tried(classifier(ending="scaled"), tmp_path)
    assert set(found) == {"probabilities"}
    near(found["probabilities"], softmax(by_hand(IMAGES)[1]))
    assert about.output == "probabilities" and "cannot be cut off" in about.energy


def test_classes_that_do_not_exclude_each_other_are_refused(tmp_path):
    """Of an image of nothing every sigmoid may be small; shares of their sum would say that it is something."""
    with pytest.raises((EbjdatError, ValueError), match="do not exclude each other"):
        tried(classifier(ending="Sigmoid"), tmp_path)


def test_names_that_become_alike_stay_apart():
    graph = helper.make_graph([helper.make_node("Relu", [a], [b]) for a, b in pairwise(["x_.3", "x*", "x+", "x ", "y"])], "g", [], [])
    names = renamed(graph, "image")
    assert len(set(names.values())) == len(names) == 6


def test_log_probabilities_by_hand_have_no_energy(tmp_path):
    nodes = [helper.make_node("Softmax", ["z"], ["p"], axis=1), helper.make_node("Log", ["p"], ["y"])]
    model = classifier()
    del model.graph.node[-2:]
    model.graph.node.extend(nodes)
    about, found = tried(model, tmp_path)
    near(found["logits"], np.log(softmax(by_hand(IMAGES)[1])))
    assert about.output == "logits" and "always 0" in about.energy and "energy" not in found


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("flat", ["Flatten", [1, 3], [1, -1], [4, 3], [4, -1]])
def test_a_fixed_batch_becomes_any(tmp_path, batch, flat):
    if flat != "Flatten" and flat[0] != batch:
        flat = [batch, flat[1]]
    model = classifier(batch=batch, flat=flat)
    if flat != "Flatten":  # as torch's newer exporter writes it
        model.graph.node[1].attribute.append(helper.make_attribute("allowzero", 1))
    about, found = tried(model, tmp_path)
    near(found["logits"], by_hand(IMAGES)[1])
    assert about.looked.image.batch == batch and about.freed == (flat != "Flatten")


def test_a_class_token_is_repeated_for_each_image(tmp_path):
    model = graph_of(
        helper.make_node("GlobalAveragePool", ["x"], ["pool"]),
        helper.make_node("Reshape", ["pool", "as_token"], ["token"]),
        helper.make_node("Expand", ["one", "size"], ["class"]),
        helper.make_node("Concat", ["class", "token"], ["tokens"], axis=1),
        helper.make_node("ReduceMean", ["tokens"], ["mixed"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mixed", "w"], ["y"]),
        given=[
            constant("as_token", [1, 1, 3]),
            constant("one", np.ones((1, 1, 3)), np.float32),
            constant("size", [1, 1, 3]),
            constant("w", WEIGHT, np.float32),
        ],
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CLASSES])],
    )
    about, found = tried(model, tmp_path)
    near(found["logits"], (by_hand(IMAGES)[0] + 1) / 2 @ WEIGHT)
    assert about.freed


def test_a_batch_that_images_share_is_refused(tmp_path):
    model = graph_of(  # the largest mean of the batch, which one image alone has for itself
        helper.make_node("GlobalAveragePool", ["x"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["f"], axis=1),
        helper.make_node("ReduceMax", ["f"], ["most"], axes=[0], keepdims=1),
        helper.make_node("Add", ["f", "most"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["y"]),
        given=[constant("w", WEIGHT, np.float32)],
    )
    with pytest.raises(ValueError, match=r"of several images at once it answers otherwise, off by .*: export it with a dynamic batch"):
        tried(model, tmp_path)


def test_old_operators_are_converted(tmp_path):
    model = classifier(opset=9, layout="NHWC")
    about, found = tried(model, tmp_path)
    near(found["logits"], by_hand(IMAGES)[1])
    assert about.looked.opset == 9 and about.opset == opset(onnx.load(tmp_path / SERVED)) == 17


def test_weights_that_are_listed_as_inputs_are_no_inputs(tmp_path):
    model = classifier(opset=7)
    for tensor in model.graph.initializer:  # as ONNX wrote it before 2019
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.dims)))
    model.ir_version = 3
    about, found = tried(model, tmp_path)
    near(found["logits"], by_hand(IMAGES)[1])
    assert about.looked.image.name == "x"


def test_a_quantised_network_keeps_its_integers(tmp_path):
    model = classifier()
    scale = np.abs(WEIGHT).max() / 127
    model.graph.initializer[0].CopyFrom(constant("w8", np.rint(WEIGHT / scale), np.int8))
    model.graph.initializer.extend([constant("s", scale, np.float32), constant("zero", 0, np.int8)])
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w8", "s", "zero"], ["w"]))
    about, found = tried(model, tmp_path)
    # ONNX Runtime multiplies by integers in its own way; the file's own answer is the measure
    np.testing.assert_allclose(found["logits"], by_hand(IMAGES)[0] @ (np.rint(WEIGHT / scale) * scale) + BIAS, atol=2e-2)
    assert about.features == 3 and about.error < 1e-5
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / SERVED).graph.initializer}
    assert kinds["net.w8"] == TensorProto.INT8


def test_new_operators_are_kept(tmp_path):
    about, found = tried(classifier(opset=20), tmp_path)
    near(found["energy"], -np.log(np.exp(by_hand(IMAGES)[1]).sum(axis=1)))
    assert about.opset == 20


def test_bytes_and_halves_are_taken(tmp_path):
    bytes_in = Pixels("BGR", 255.0, [0.0] * 3, [1.0] * 3)
    model = classifier(kind=TensorProto.UINT8)
    attempt(model, look(model), bytes_in, (SIZE, SIZE), tmp_path)
    logits = (IMAGES[:, ::-1].astype(np.float64) * 255).mean(axis=(2, 3)) @ WEIGHT + BIAS
    near(served(onnx.load(tmp_path / SERVED), IMAGES)["logits"], logits)
    model = classifier(kind=TensorProto.FLOAT16)
    attempt(model, look(model), PIXELS, (SIZE, SIZE), tmp_path)
    np.testing.assert_allclose(served(onnx.load(tmp_path / SERVED), IMAGES)["logits"], by_hand(IMAGES)[1], atol=2e-2)


def test_a_convolution_that_classifies_gives_pooled_features(tmp_path):
    model = graph_of(
        helper.make_node("Conv", ["x", "k"], ["maps"], kernel_shape=[1, 1]),
        helper.make_node("GlobalAveragePool", ["maps"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["y"], axis=1),
        given=[constant("k", WEIGHT.T.reshape(CLASSES, 3, 1, 1), np.float32)],
    )
    about, found = tried(model, tmp_path)
    near(found["features"], by_hand(IMAGES)[0])
    near(found["logits"], by_hand(IMAGES)[0] @ WEIGHT)
    assert about.looked.head.pooled


def test_without_a_last_layer_there_are_no_features(tmp_path):
    model = graph_of(helper.make_node("GlobalAveragePool", ["x"], ["pool"]), helper.make_node("Flatten", ["pool"], ["y"], axis=1))
    about, found = tried(model, tmp_path)
    near(found["logits"], by_hand(IMAGES)[0])
    assert about.features == 0 and set(found) == {"logits", "energy"}


def test_names_of_a_graph_never_reach_the_bundle_as_they_are(tmp_path):
    model = classifier()
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["../../etc/passwd\nb" if name == "features" else name for name in names]
    model.graph.node[0].name = "image"  # a name that the served graph has itself
    _, found = tried(model, tmp_path)
    near(found["logits"], by_hand(IMAGES)[1])
    text = (tmp_path / SERVED).read_bytes()
    assert b"\n/etc" not in text and b"../.." not in text


# --- from the file to the bundle


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> tuple[Path, list[str]]:
    """A bundle of an NHWC classifier of ten classes, with weights that are stored outside the graph, and what was said of it."""
    folder, lines = tmp_path_factory.mktemp("imported"), []
    wide = np.random.default_rng(2).normal(0, 1, (3, 200)).astype(np.float32)
    model = classifier(layout="NHWC", weight=wide)
    model.graph.initializer[1].CopyFrom(constant("b", np.zeros(200), np.float32))
    metadata = json.dumps({str(i): f"kind {i % 199}" for i in range(200)})
    model.metadata_props.add(key="id2label", value=metadata)
    contract = contract_in(folder, licence={"weights": "BSD-2-Clause"}, crop=0.8, crop_offset="floor", jpeg_quality=80)
    import_model(str(saved(model, folder, "a net.onnx")), folder / "bundle", contract=contract, say=lines.append)
    return folder / "bundle", lines


def test_an_imported_bundle_is_verified_and_answers_as_computed_by_hand(imported):
    bundle = Bundle.load(imported[0])
    found = verified(bundle.path, USUAL, ("classify",))
    assert found.opened and max(found.opened.errors.values()) < 1e-5
    picture = encode_png(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))
    image = to_unit(decode(picture, bundle.manifest.input)[None])
    logits, energy, features = load_engine(bundle, "onnx", "cpu").classify(image)
    near(features, by_hand(image)[0])
    wide = np.random.default_rng(2).normal(0, 1, (3, 200)).astype(np.float32)
    near(logits, by_hand(image)[0] @ wide)
    near(energy, -np.log(np.exp(logits.astype(np.float64)).sum(axis=1)))


def test_the_manifest_says_what_was_found(imported):
    m = Bundle.load(imported[0]).manifest
    assert (m.name, m.architecture, m.output) == ("a-net", {"family": "onnx", "opset": 17}, "logits")
    assert (m.input.height, m.input.filter, m.input.crop, m.input.jpeg_quality) == (SIZE, "bilinear", 0.8, 80)
    assert m.labels[0] == "kind 0 (0)" and m.labels[199] == "kind 0 (199)" and m.labels[5] == "kind 5"
    assert (m.capabilities.energy, m.capabilities.features) == (YES, YES) and "ONNX" in m.capabilities.gradient
    assert (m.licence.weights, m.licence.code, m.licence.data) == ("BSD-2-Clause", "unknown", "unknown")
    assert m.provenance.configuration["source"] == "a net.onnx"
    assert str(imported[0].parent) not in (imported[0] / "bundle.json").read_text()


def test_larger_constants_are_stored_once_beside_the_graph(imported):
    weights = load_file(imported[0] / "weights.safetensors")
    assert [value.shape for value in weights.values()] == [(3, 200)]
    graph = onnx.load(imported[0] / "classify.onnx", load_external_data=False)
    outside = [tensor for tensor in graph.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert [list(tensor.dims) for tensor in outside] == [[3, 200]]
    whole = onnx.load(imported[0] / "classify.onnx")
    held = next(tensor for tensor in whole.graph.initializer if tensor.name == outside[0].name)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(held), next(iter(weights.values())))


def test_the_self_test_is_the_files_own_answer(imported):
    expected = load_file(imported[0] / "selftest.safetensors")
    features, _ = by_hand(expected["image"])
    near(expected["features"], features)
    assert len(expected["image"]) == 8


def test_what_was_found_is_said_before_anything_is_written(imported):
    lines = imported[1]
    said, written = lines.index("not known:"), lines.index("writing weights and graphs")
    assert said < written
    text = "\n".join(lines)
    for part in ("N x 16 x 16 x 3, BGR", "its softmax is cut off", "licence of the weights: BSD-2-Clause", "the licence of its code"):
        assert part in text


def test_the_command_imports_says_how_to_serve_and_overwrites_nothing(tmp_path, capsys):
    file, out = saved(classifier(metadata={"names": "{0: 'a', 1: 'b', 2: 'c'}"}), tmp_path), tmp_path / "out"
    words = ["import", str(file), str(out), "--contract", str(contract_in(tmp_path)), "--license", "MIT", "--license", "data=CC0-1.0"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"serve it: ebjdat-serve serve {out}"
    m = Bundle.load(out).manifest
    assert (m.labels, m.licence.weights, m.licence.data, m.licence.code) == (["a", "b", "c"], "MIT", "CC0-1.0", "unknown")
    before = (out / "bundle.json").read_bytes()
    assert cli.main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert (out / "bundle.json").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["contract.json", "net.onnx", "out"]


def test_probabilities_are_imported_and_served_without_an_energy(tmp_path, in_this_process):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nÅland\n", encoding="utf-8")
    file = saved(classifier(ending="scaled"), tmp_path)
    bundle = import_model(str(file), tmp_path / "out", contract=contract_in(tmp_path), labels=names)
    assert bundle.manifest.labels == ["cat", "dog", "Åland"]
    assert bundle.manifest.output == "probabilities" and bundle.manifest.capabilities.energy != YES
    found = load_engine(bundle, "onnx", "cpu").classify(IMAGES)
    near(np.exp(found.logits), softmax(by_hand(IMAGES)[1]))
    assert found.energy is None


def pictures(folder, n):
    """Return a folder of ``n`` images of several sizes."""
    folder.mkdir()
    for i, image in enumerate(made(40, 30, n)):
        (folder / f"{i}.png").write_bytes(encode_png(image[: 20 + i % 20]))
    return folder


@pytest.mark.parametrize("resize", ["squash", "shorter"])
def test_an_import_is_held_against_the_sources_own_pipeline(tmp_path, monkeypatch, in_this_process, resize):
    file, contract = saved(classifier(), tmp_path), contract_in(tmp_path, resize="squash", filter="bilinear")
    find = onnx_source.find

    def with_pipeline(*given, **asked):
        found = find(*given, **asked)
        own = replace(found.input, resize=resize)
        return replace(found, reference=lambda data: by_hand(to_unit(decode(data, own)[None]))[1][0])

    monkeypatch.setattr(onnx_source, "find", with_pipeline)
    if resize == "squash":
        assert import_model(str(file), tmp_path / "out", contract=contract).path.is_dir()
    else:
        with pytest.raises(EbjdatError, match="as no contract says: on images of other sizes"):
            import_model(str(file), tmp_path / "out", contract=contract)
        assert not (tmp_path / "out").exists()


def test_a_folder_of_images_gives_p_values_and_the_self_test(tmp_path, in_this_process):
    file, contract = saved(classifier(), tmp_path), contract_in(tmp_path)
    folder = pictures(tmp_path / "images", 24)
    bundle = import_model(str(file), tmp_path / "out", contract=contract, calibration=folder)
    answer = ebjdat_serve.load(tmp_path / "out").classify((folder / "3.png").read_bytes())
    assert 0 < answer.p_value <= 1 and answer.label == str(answer.class_)
    tested = load_file(bundle.path / "selftest.safetensors")["image"]
    np.testing.assert_array_equal(tested, to_unit(made(*tested.shape[2:])))  # nobody's own images are published with the bundle
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert "24 images of images" in card and "- the licence of its weights" in card and "its softmax is cut off" in card


def test_too_few_images_are_refused_and_leave_nothing(tmp_path, in_this_process):
    file, contract = saved(classifier(), tmp_path), contract_in(tmp_path)
    with pytest.raises(EbjdatError, match="20"):
        import_model(str(file), tmp_path / "out", contract=contract, calibration=pictures(tmp_path / "images", 19))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".importing-*"))


def test_an_onnx_file_draws_nothing_with_a_prior_or_without(tmp_path, in_this_process):
    """It is said before anything is written, and before the folder is looked at."""
    file, contract = saved(classifier(), tmp_path), contract_in(tmp_path)
    with pytest.raises(EbjdatError, match=r"draws nothing, with a prior or without: .*no gradient"):
        import_model(str(file), tmp_path / "out", contract=contract, prior=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["onnx", "torch"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, capsys, missing):
    for module in ("ebjdat_serve.import_command", "ebjdat_serve.importing"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name == missing else find_spec(name))
    source = saved(classifier(), tmp_path) if missing == "onnx" else "timm:resnet18"
    assert cli.main(["import", str(source), str(tmp_path / "out")]) == 2
    assert "[import]" in capsys.readouterr().err


def test_a_template_tells_what_the_graph_tells_and_asks_for_the_rest(tmp_path, capsys, in_this_process):
    file = saved(classifier(layout="NHWC"), tmp_path)
    begun = tmp_path / "begun.json"
    assert cli.main(["import", str(file), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "N x 16 x 16 x 3" in error and f"import {file} --write-contract FILE" in error and len(error.splitlines()) == 1
    assert cli.main(["import", str(file), "--write-contract", str(begun)]) == 0
    template = json.loads(begun.read_text())
    assert (template["height"], template["layout"], template["output"], template["mean"]) == (SIZE, "NHWC", "y", None)
    assert read_contract(begun).missing() == ["resize", "filter", "channel_order", "scale", "mean", "std"]
    begun.write_text(json.dumps(template | CONTRACT))
    assert not read_contract(begun).missing() and read_contract(begun).layout == "NHWC"
    assert cli.main(["import", str(file), "--write-contract", str(begun)]) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean": "absent"}, r'the contract lacks what it was trained with, such as \{"mean"'),
        ({"mean": [1, 2]}, "mean must be of 3 numbers"),
        ({"std": [1, 0, 1]}, "std must be 1e-06 to"),
        ({"std": [-1, 1, 1]}, "std must be 1e-06 to"),
        ({"scale": 0}, "scale must be 1e-06 to"),
        ({"scale": -255}, "scale must be 1e-06 to"),
        ({"std": [1, "a", 1]}, "std: 'a' is not a float"),
        ({"scale": 1e300}, "scale must be"),
        ({"filter": "cubic"}, "filter: 'cubic' is not"),
        ({"crop": 2}, "crop must be"),
        ({"height": 99}, "a height of 99, the graph takes 16"),
        ({"height": "tall"}, "height must be 1 to 4096"),
        ({"layout": "NHWC"}, "not NHWC"),
        ({"layout": "CHW"}, "layout: 'CHW' is not"),
        ({"output": "other"}, "has no output 'other'"),
        ({"labels": ["a", "b"]}, "has 2 labels, the model 3 classes"),
        ({"labels": ["a", "b", "\u202ec"]}, "holds a control character"),
        ({"colour": "red"}, r"unknown keys \['colour'\]"),
        ({"licence": {"weights": 3}}, "licence: weights"),
        ({"channel_order": "GBR"}, "channel_order: 'GBR' is not"),
    ],
)
def test_a_contract_that_cannot_be_is_refused(tmp_path, changes, said, in_this_process):
    with pytest.raises(EbjdatError, match=said):
        import_model(str(saved(classifier(), tmp_path)), tmp_path / "out", contract=contract_in(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_a_contract_file_is_strict_json(tmp_path):
    file = tmp_path / "c.json"
    for text, said in (("[1]", "expected an object"), ("{", "cannot be read"), ('{"scale": NaN}', "NaN is not JSON")):
        file.write_text(text)
        with pytest.raises(EbjdatError, match=said):
            read_contract(file)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"character": "0\n90\n180"}, ["0", "90", "180"]),
        ({"names": "{0: 'a', 1: 'b', 2: \"c's\"}"}, ["a", "b", "c's"]),
        ({"classes": '["a", "b", "b"]'}, ["a", "b (1)", "b (2)"]),
        ({"id2label": '{"0": "a", "2": "c", "1": "b"}'}, ["a", "b", "c"]),
        ({"class_names": "a, b, c"}, ["a", "b", "c"]),
        ({"names": "['a', 'b']"}, None),
        ({"names": "{0: 'a', 1: 'b', 3: 'c'}"}, None),
        ({"names": "__import__('os').system('true')"}, None),
        ({"labels": "[" * 10_000}, None),
        ({"labels": '["a", "b", "\\u202e"]'}, None),
    ],
)
def test_labels_are_read_from_metadata_and_never_run(metadata, expected):
    assert labels.of_metadata(metadata, 3)[0] == expected


def test_sources_of_no_known_kind_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bundle").mkdir()
    for file in ("bundle/bundle.json", "net.tflite"):
        (tmp_path / file).write_text("{}")
    known = {"net.tflite": "no source that is known", "nowhere": "does not exist", "folder": "a folder without config.json"}
    for source, said in [(str(tmp_path / name), said) for name, said in {**known, "bundle": "a bundle already"}.items()]:
        with pytest.raises(EbjdatError, match=said):
            import_model(source, tmp_path / "out")


def test_a_key_of_a_file_is_given_once(tmp_path):
    (tmp_path / "contract.json").write_text('{"scale": 1, "scale": 255}')
    with pytest.raises(EbjdatError, match="the key 'scale' is given twice"):
        read_contract(tmp_path / "contract.json")


def test_answers_that_depend_on_how_many_images_there_are_are_refused(tmp_path):
    """As for one image and for eight, and otherwise between."""
    model = classifier(ending="")
    (logits,) = [value.name for value in model.graph.output]
    nodes = [
        helper.make_node("Shape", [logits], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["n"]),
        helper.make_node("Sub", ["n", "one"], ["less"]),
        helper.make_node("Sub", ["n", "eight"], ["more"]),
        helper.make_node("Mul", ["less", "more"], ["both"]),
        helper.make_node("Cast", ["both"], ["off"], to=TensorProto.FLOAT),
        helper.make_node("Add", [logits, "off"], ["wrong"]),
    ]
    model.graph.node.extend(nodes)
    for name, value in (("first", 0), ("one", 1), ("eight", 8)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [], [value]))
    model.graph.output[0].name = "wrong"
    with pytest.raises(ValueError, match="of several images at once it answers otherwise"):
        tried(model, tmp_path)


def test_open_sizes_are_asked_for(tmp_path):
    model = classifier(size="S")
    with pytest.raises(ValueError, match="it takes images of any height: give height in the contract"):
        size_of(look(model).image, None, 32)
    about, _ = tried(model, tmp_path)
    assert about.size == (SIZE, SIZE)


def test_words_of_a_bundle_and_of_a_store_are_shown_and_not_obeyed(imported, tmp_path, capsys):
    hostile = "MIT\x1b[2J\x9b31m\n  files         none\u202e"
    home = shutil.copytree(imported[0], tmp_path / "store" / "a-net-1")
    data = json.loads((home / "bundle.json").read_text())
    data["licence"]["code"] = data["capabilities"]["gradient"] = data["provenance"]["dataset"] = hostile
    (home / "bundle.json").write_text(json.dumps(data))
    held = tmp_path / "store" / "candidates" / "b\x1b]0;x"
    held.mkdir(parents=True)
    (held / "candidate.json").write_text(json.dumps({"reason": hostile, "comparison": []}))
    (tmp_path / "store" / "current").symlink_to(home.name)
    assert cli.main(["inspect", str(home)]) == 0 and cli.main(["list", str(tmp_path / "store")]) == 0
    assert cli.main(["inspect", str(tmp_path / "no\x1b[2Jwhere")]) == 2
    said = capsys.readouterr()
    shown = said.out + said.err
    assert (
        shown.count("MIT\\x1b[2J\\x9b31m\\n  files         none\\u202e") == 4 and "b\\x1b]0;x: MIT" in shown and "no\\x1b[2Jwhere" in shown
    )
    assert all(letter.isprintable() for line in shown.split("\n") for letter in line)
    record = logging.LogRecord("ebjdat_serve", logging.WARNING, "", 0, "refused: %s", (hostile,), None)
    assert logs.TextLines("%(message)s").format(record) == "refused: MIT\\x1b[2J\\x9b31m\n  files         none\\u202e"
    assert printable("name\x1b[2J\u3000e\u0301") == "name\\x1b[2J\u3000e\u0301"  # what people write stays
    assert first_line(ValueError("a\x1bb\nc")) == "a\\x1bb"
