"""`ebjdat-serve quantize`: int8 of an imported bundle, admitted with evidence from images that are held back, or refused."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from ebjdat_serve import cli, folder_quantization
from ebjdat_serve.bundle import Bundle, read_rows, sha256, write_rows
from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.exporting.int8 import fold_norms, unfold
from ebjdat_serve.folder_calibration import calibrate_folder
from ebjdat_serve.folder_quantization import INT8, Parts, quantize_folder
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.precision import rows_of
from ebjdat_serve.selftest import FUNCTIONS
from ebjdat_serve.store import publish
from ebjdat_serve.verification import verified
from tests.classifiers import folder_of, images, without, write
from tests.conftest import DIGITS

LABELS = ("ant", "bee", "cow", "dog")


def quiet(text):
    pass


def digests(folder):
    return {file.name: sha256(file) for file in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("images") / "images", 320, labels=LABELS)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A calibrated bundle, quantised by the command, and what was said."""
    home = tmp_path_factory.mktemp("done") / "bundle"
    calibrate_folder(write(home), folder, say=quiet)
    assert cli.main(["quantize", str(home), str(folder)]) == 0
    return Bundle.load(home)


def test_int8_is_admitted_with_evidence_of_images_that_it_has_not_seen(done):
    rows = {row.metric.removesuffix("_int8"): row for row in rows_of(done.metrics(), "int8")}
    of = done.measured("int8")
    assert all((row.of, row.precision) == (of, "int8") for row in rows.values())
    assert {(row.dataset, row.split) for row in rows.values()} == {("images", "held back"), ("interpolations", None)}
    assert {rows[name].n for name in ("label_disagreement", "logit_error_over_spread", "accuracy_clean_drop", "flag_rate_clean")} == {200}
    assert rows["label_disagreement"].interval[0] <= rows["label_disagreement"].value <= 0.02
    assert 0 < rows["logit_error_over_spread"].value < 0.1
    assert rows["accuracy_clean_drop"].value == pytest.approx(rows["accuracy_clean"].fp32 - rows["accuracy_clean"].value)
    assert abs(rows["auroc_interpolations"].value - rows["auroc_interpolations"].fp32) < 0.1
    assert rows["ratio_classify_batch32"].value > 0 and rows["ratio_classify_batch32"].batch == 32
    assert done.manifest.version == "1.r1"
    card = (done.path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# tiny@1.r1\n") and "label_disagreement_int8" in card


def test_int8_flags_by_its_own_calibration_and_the_views_of_fp32(done):
    own, full = done.calibration("int8"), done.calibration()
    assert own.views == full.views == ["statistics", "logits"]
    assert own.energies != full.energies and own.of != full.of
    found = verified(done.path, INT8, FUNCTIONS)
    assert found.opened.engine.precision == "int8" and found.calibrated.calibration == own
    image = to_unit(images(40, (12, 10), 5))
    low, high = (load_engine(done, "onnx", "cpu", 1, name).classify(image) for name in ("int8", "fp32"))
    assert 0 < np.abs(low.logits - high.logits).max() < 0.1 * np.ptp(high.logits)
    assert low.features.shape == high.features.shape


def test_parts_have_no_image_in_common():
    for n, calibrated in ((300, True), (320, False), (5000, True), (50_000, False)):
        parts = Parts.of(n, calibrated=calibrated)
        split = [parts.split.fit, parts.split.ranks, parts.split.calibration]
        np.testing.assert_array_equal(np.sort(np.concatenate([parts.held, *split])), np.arange(n))
        assert 200 <= len(parts.held) <= 2000
        assert 0 < len(parts.ranges) <= 512
        assert not set(parts.ranges) & set(parts.held)
        if calibrated:
            assert set(parts.ranges) <= set(parts.split.fit)


def test_what_loses_too_much_is_refused_with_its_figures_and_nothing_is_written(folder, tmp_path, monkeypatch, capsys):
    home = tmp_path / "bundle"
    write(home)
    before = digests(home)
    honest = folder_quantization.write_int8_folded
    monkeypatch.setattr(folder_quantization, "write_int8_folded", lambda bundle, parts: honest(bundle, (0.05 * part for part in parts)))
    assert cli.main(["quantize", str(home), str(folder)]) == 2
    said = capsys.readouterr().err
    assert "ebjdat-serve: precision int8 is refused: " in said and said.endswith("; nothing was written\n")
    assert "label_disagreement_int8" in said
    assert "accuracy_clean_drop_int8" in said
    assert digests(home) == before
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


def test_without_labels_agreement_is_the_evidence_and_without_a_calibration_there_is_none_of_int8(tmp_path):
    home, said = tmp_path / "bundle", []
    write(home, output="probabilities", features=False)
    done = quantize_folder(home, folder_of(tmp_path / "flat", 300), say=said.append)
    assert "accuracy is not measured, agreement is the evidence: 0 of the images held back have labels, 200 are needed" in said
    rows = {row.metric for row in rows_of(done.metrics(), "int8")}
    assert "label_disagreement_int8" in rows
    assert not {name for name in rows if name.startswith(("accuracy", "flag", "auroc", "energy"))}
    assert not done.calibrated
    verified(done.path, INT8, FUNCTIONS)


def test_a_server_refuses_int8_whose_evidence_is_gone_or_beyond_its_limit(done, tmp_path):
    shutil.copytree(done.path, tmp_path / "bad")
    rows = read_rows(tmp_path / "bad" / "metrics.json")
    for change, said in (
        (lambda row: None, "no figure label_disagreement_int8 of its current graph"),
        (lambda row: replace(row, n=199), "of 199 images; at least 200"),
        (lambda row: replace(row, value=0.03), r"label_disagreement is 0.03 \(n = 200\), the limit is 0.02"),
    ):
        changed = [change(row) if row.metric == "label_disagreement_int8" else row for row in rows]
        write_rows(tmp_path / "bad" / "metrics.json", [row for row in changed if row])
        bundle = Bundle.draft(tmp_path / "bad").update("metrics.json")
        with pytest.raises(BundleError, match=said):
            verified(bundle.path, INT8)
        with pytest.raises(BundleError, match=said):
            publish(bundle, tmp_path / "store")
    costly = [replace(row, value=0.02) if row.metric == "accuracy_clean_drop_int8" else row for row in rows]
    write_rows(tmp_path / "bad" / "metrics.json", costly)
    with pytest.raises(BundleError, match=r"accuracy_clean_drop is 0\.02"):  # it may be missing, and counts where it is there
        verified(Bundle.draft(tmp_path / "bad").update("metrics.json").path, INT8)


def test_a_bundle_without_int8_names_the_command_that_makes_it(tmp_path):
    home = write(tmp_path / "bundle").path
    with pytest.raises(BundleError, match=r"has no classify\.int8\.onnx; ebjdat-serve quantize BUNDLE DIR creates and measures it"):
        verified(home, INT8)


def test_too_few_images_and_a_model_that_was_trained_here_are_refused_at_once(folder, tmp_path):
    home = write(tmp_path / "bundle").path
    with pytest.raises(EbjdatError, match="few holds 40 images: int8 takes 300 at least, 200 to measure on"):
        quantize_folder(home, folder_of(tmp_path / "few", 40), say=quiet)
    shutil.copytree(DIGITS, tmp_path / "digits")
    with pytest.raises(BundleError, match=r"was trained here: python training/precision\.py .* --precision int8"):
        quantize_folder(tmp_path / "digits", folder, say=quiet)


def test_views_of_features_take_as_many_images_as_fp32_had(done, folder, monkeypatch):
    featured = replace(done.calibration(), views=["statistics", "logits", "features"])
    monkeypatch.setattr(Bundle, "calibration", lambda self, precision="fp32": featured)
    with pytest.raises(EbjdatError, match=r"holds 320 images: fp32 flags by features too, which takes 1,49\d to calibrate int8 alike"):
        folder_quantization.parts_of(without(done), folder, 320)


def test_norms_are_folded_into_convolutions_and_kernels_stay_one_copy():
    random = np.random.default_rng(0)
    arrays = {"w": (8, 3, 3, 3), "scale": (8,), "shift": (8,), "mean": (8,), "w2": (8, 1, 3, 3), "b2": (8,)}
    given = {name: random.normal(0, 1, shape).astype(np.float32) for name, shape in arrays.items()} | {
        "var": random.uniform(0.1, 2, 8).astype(np.float32)
    }
    norm = ["scale", "shift", "mean", "var"]
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", *norm], ["b"], epsilon=1e-3),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "w2", "b2"], ["d"], group=8),
        helper.make_node("BatchNormalization", ["d", *norm], ["e"]),
        helper.make_node("Conv", ["c", "w2"], ["f"], group=8),
        helper.make_node("BatchNormalization", ["f", *norm], ["g"]),
        helper.make_node("Add", ["f", "g"], ["h"]),  # what the norm takes is taken by another: it stays
        helper.make_node("Add", ["e", "h"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8, 6, 6])],
        [numpy_helper.from_array(array, name) for name, array in given.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    image = random.normal(0, 1, (2, 3, 8, 8)).astype(np.float32)

    def run():
        onnx.checker.check_model(model)
        return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]

    expected = run()
    folded = fold_norms(model.graph)
    assert [node.op_type for node in model.graph.node].count("BatchNormalization") == 1 and len(folded) == 2
    np.testing.assert_allclose(run(), expected, rtol=1e-4, atol=1e-4)
    unfold(model.graph, folded)
    np.testing.assert_allclose(run(), expected, rtol=1e-4, atol=1e-4)
    kernels = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) == 4 and np.prod(t.dims) > 8}
    assert set(kernels) == {"w", "w2"} and all(np.array_equal(array, given[name]) for name, array in kernels.items())


def test_pairs_do_not_depend_on_chunks_and_no_image_is_paired_with_itself():
    pictures, none = (
        np.arange(4, dtype=np.uint8)[:, None, None, None] * np.full((4, 2, 2, 3), 20, np.uint8),
        np.empty((0, 2, 2, 3), np.uint8),
    )
    places = np.arange(4)
    whole = folder_quantization.sets_of(pictures, places, none)
    assert whole["mixed"][:, 0, 0, 0].tolist() == [10, 30, 50]
    alone = [folder_quantization.sets_of(pictures[i : i + 1], places[i : i + 1], pictures[max(0, i - 1) : i]) for i in range(4)]
    assert [len(one.get("mixed", none)) for one in alone] == [0, 1, 1, 1]
    for what in ("mixed", "handled"):
        assert np.array_equal(np.concatenate([one[what] for one in alone if what in one]), whole[what])
