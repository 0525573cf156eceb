"""Tests of precisions: graphs on the same weights, each with its own calibration and figures, or refused."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

import training.precision
from ebjdat_serve import pixels
from ebjdat_serve.bundle import Bundle, read_rows, sha256, write_rows
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.errors import BundleError
from ebjdat_serve.exporting.int8 import write_int8
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.precision import LOWER, PrecisionLimits, check, rows_of
from ebjdat_serve.rows import Row
from ebjdat_serve.server.compute.model import Model
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.store import publish
from export.to_onnx import export_again
from tests.conftest import ROOT, serving
from training.calibrate import calibrate
from training.data.datasets import load
from training.precision import Amounts


@pytest.fixture(scope="module")
def precise(golden, tmp_path_factory):
    """The digits bundle with every precision, added as a user adds them: a test that asks for it is slow (conftest.py)."""
    folder = tmp_path_factory.mktemp("precise") / "digits"
    shutil.copytree(golden / "current", folder)
    script, few = ROOT / "training" / "precision.py", ["--n", "300", "--attacked", "100", "--square", "300", "--queries", "20"]
    done = subprocess.run(
        [sys.executable, str(script), str(folder), "--precision", *LOWER, *few],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "int8 admitted" in done.stdout
    return Bundle.load(folder)


@pytest.mark.parametrize("precision", LOWER)
def test_a_precision_has_its_own_calibration_and_figures(precise, precision):
    own, full = precise.calibration(precision), precise.calibration()
    assert own.of == precise.measured(precision)
    assert own.energies != full.energies
    figures = {row.metric.removesuffix(f"_{precision}"): row for row in rows_of(precise.metrics(), precision)}
    wanted = "logit_error_max accuracy_clean accuracy_pgd20_transfer accuracy_square flag_rate_clean ratio_classify_batch1"
    assert set(wanted.split()) <= set(figures)
    step = "weights.safetensors" if precision == "bf16" else precise.graph("step", precision).name
    assert figures.pop("step_error_max").of == precise.manifest.files[step].sha256
    assert all(row.of == own.of and row.n > 0 for row in figures.values())
    assert 0 < figures["energy_error_max"].value < 0.5


def test_every_precision_lives_on_one_copy_of_the_weights(precise):
    for name in ("classify.fp16.onnx", "step.fp16.onnx", "classify.int8.onnx"):
        graph = onnx.load(precise.path / name, load_external_data=False)
        inside = [t for t in graph.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert all(len(t.raw_data) <= 16 * 1024 for t in inside)
        assert {e.value for t in graph.graph.initializer for e in t.external_data if e.key == "location"} == {"weights.safetensors"}
        assert {entry.key: entry.value for entry in graph.metadata_props}["precision"] == name.split(".")[1]


def test_int8_quantises_convolutions_alone(precise):
    graph = onnx.load(precise.path / "classify.int8.onnx", load_external_data=False).graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type == "Conv":
            assert [made_by[name] for name in node.input[:2]] == ["DequantizeLinear"] * 2
        if node.op_type in ("Gemm", "ReduceLogSumExp"):
            assert made_by[node.input[0]] != "DequantizeLinear"


def test_the_server_flags_with_the_precisions_own_threshold(precise, tmp_path):
    image = load("digits").test.image[:8]
    expected = OnnxEngine(precise, "cpu", 1, "fp16").classify(to_unit(image)).energy
    with serving(precise.path, tmp_path / "log", "--precision", "fp16", "--device", "cpu") as server:
        info = httpx2.get(f"{server.url}/info").json()
        assert (info["precision"], info["provider"]) == ("fp16", "CPUExecutionProvider")
        assert info["calibration"]["of"] == precise.measured("fp16")
        scores = sorted(precise.calibration("fp16").scores)
        for one, energy in zip(image, expected, strict=True):
            said = httpx2.post(f"{server.url}/classify", content=pixels.encode_png(one)).json()
            assert said["energy"] == pytest.approx(float(energy), abs=1e-5)
            assert said["p_value"] == pytest.approx((1 + sum(s >= said["suspicion"] for s in scores)) / (len(scores) + 1), abs=2e-3)
        assert httpx2.get(f"{server.url}/generate?class=3&steps=2").status_code == 200


def test_a_precision_that_the_bundle_lacks_stops_the_server_with_the_fix(golden):
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", str(golden), "--precision", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "training/precision.py BUNDLE --precision int8" in done.stderr


def digest(folder):
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


FEW = Amounts(200, 100, 50, 3)


@pytest.fixture
def digits(golden, tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(golden / "current", folder)
    return folder


def blind(bundle, image):
    """Ranges taken on blank images clip everything that a real one holds."""
    return write_int8(bundle, np.zeros_like(image))


def test_a_precision_beyond_its_limits_is_refused_and_leaves_no_trace(digits, monkeypatch):
    before = digest(digits)
    monkeypatch.setattr(training.precision, "write_int8", blind)
    with pytest.raises(BundleError, match="precision int8 is refused: label_disagreement"):
        training.precision.admit(Bundle.draft(digits), load("digits"), ["int8"], FEW)
    assert digest(digits) == before
    assert [path.name for path in digits.parent.iterdir()] == ["digits"]


@pytest.mark.slow
def test_a_refused_precision_does_not_cost_the_others(digits, monkeypatch):
    monkeypatch.setattr(training.precision, "write_int8", blind)
    with pytest.raises(BundleError, match="int8 is refused"):
        training.precision.admit(Bundle.draft(digits), load("digits"), ["bf16", "int8"], FEW)
    bundle = Bundle.load(digits)
    assert [c.precision for c in bundle.calibrations()] == ["bf16", "fp32"]
    assert bundle.manifest.version.endswith(".r1")


@pytest.mark.parametrize(("few", "name"), [(Amounts(0), "n 0"), (Amounts(200, 99), "attacked 99"), (Amounts(200, 100, 1), "square 1")])
def test_too_few_images_are_refused_before_anything_is_measured(digits, few, name):
    with pytest.raises(BundleError, match=f"--{name}, of 300 test images"):
        training.precision.admit(Bundle.draft(digits), load("digits"), ["bf16"], few)


def test_a_bundle_that_cannot_be_put_in_place_leaves_the_old_one(digits, monkeypatch):
    before = digest(digits)
    trial = digits.parent / ".trial" / "new"
    shutil.copytree(digits, trial)
    rename = Path.rename

    def full(self, target):
        if self == trial:
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space"):
        training.precision.put(Bundle.draft(trial), digits)
    assert digest(digits) == before


@pytest.mark.slow
def test_an_interrupted_admission_leaves_the_bundle_as_it_was(digits, monkeypatch):
    before = digest(digits)
    monkeypatch.setattr(training.precision, "put", lambda done, home: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        training.precision.admit(Bundle.draft(digits), load("digits"), ["bf16"], FEW)
    assert digest(digits) == before
    Bundle.load(digits)


@pytest.mark.slow
def test_a_store_gets_a_new_version_and_keeps_the_old_one(golden, tmp_path):
    store = tmp_path / "store"
    publish(Bundle.load(golden), store)
    old = (store / "current").resolve()
    before = digest(old)
    done = training.precision.admit(Bundle.draft(store), load("digits"), ["bf16"], FEW)
    assert (store / "current").resolve() == done.path != old
    assert digest(old) == before
    assert Bundle.load(store).calibration("bf16").precision == "bf16"
    card = (done.path / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# digits@{done.manifest.version}\n")
    assert "accuracy_clean_bf16" in card


def test_a_precision_without_figures_is_not_served(precise, tmp_path):
    shutil.copytree(precise.path, tmp_path / "bare")
    (tmp_path / "bare" / "metrics.json").write_text("[]")
    bare = Bundle.draft(tmp_path / "bare").update("metrics.json")
    with pytest.raises(BundleError, match="has no figure"):
        Model(bare.path, Settings(precision="int8", device="cpu", threads=1))


def test_graphs_of_other_weights_are_dropped_at_the_next_export(precise, tmp_path):
    shutil.copytree(precise.path, tmp_path / "other")
    bundle = Bundle.draft(tmp_path / "other")
    tensors = load_file(bundle.path / "weights.safetensors")
    save_file({name: value * np.asarray(1.001, value.dtype) for name, value in tensors.items()}, bundle.path / "weights.safetensors")
    again = export_again(bundle.update("weights.safetensors"))
    assert not [name for name in again.manifest.files if ".int8." in name or ".fp16." in name]
    with pytest.raises(BundleError, match=r"no classify\.int8\.onnx"):
        again.calibration("int8")
    data = load("digits")
    calibrated = calibrate(again, data)
    assert [row.precision for row in calibrated.calibrations()] == ["fp32"]
    publish(calibrated, tmp_path / "store")


def row(metric, value, of="ab"):
    return Row(metric=metric, value=value, n=200, of=of, seed=0, dataset="d", precision="int8")


WITHIN = [row(f"{name}_int8", 0.0) for name in PrecisionLimits.__dataclass_fields__]


def test_the_gate_wants_every_figure_of_this_very_graph():
    check(WITHIN, "int8", {"ab"})
    with pytest.raises(BundleError, match="no figure"):
        check(WITHIN, "int8", {"cd"})
    for i, missing in enumerate(WITHIN):
        with pytest.raises(BundleError, match=f"no figure {missing.metric}"):
            check(WITHIN[:i] + WITHIN[i + 1 :], "int8", {"ab"})


@pytest.mark.parametrize("name", list(PrecisionLimits.__dataclass_fields__))
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_the_gate_refuses_each_figure_beyond_its_limit(name, value):
    rows = [replace(r, value=value) if r.metric == f"{name}_int8" else r for r in WITHIN]
    with pytest.raises(BundleError, match=f"{name} is"):
        check(rows, "int8", {"ab"})


def test_the_gate_wants_enough_images():
    with pytest.raises(BundleError, match="is of 7 images; at least 50 are needed"):
        check([replace(r, n=7) if r.metric == "accuracy_square_drop_int8" else r for r in WITHIN], "int8", {"ab"})


def test_a_bundle_whose_precision_is_outside_its_limits_is_not_published(precise, tmp_path):
    publish(precise, tmp_path / "store")
    folder = tmp_path / "bad"
    shutil.copytree(precise.path, folder)
    rows = read_rows(folder / "metrics.json")
    write_rows(folder / "metrics.json", [replace(r, value=0.2) if r.metric == "accuracy_square_drop_int8" else r for r in rows])
    bundle = Bundle.draft(folder).update("metrics.json")
    with pytest.raises(BundleError, match="accuracy_square_drop"):
        publish(bundle, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_threshold_of_another_graph_is_stale(precise):
    files = {**precise.manifest.files, "classify.int8.onnx": precise.manifest.files["classify.fp16.onnx"]}
    with pytest.raises(BundleError, match="stale: int8"):
        Bundle(precise.path, replace(precise.manifest, files=files)).calibration("int8")
