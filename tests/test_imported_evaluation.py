"""`training/evaluate.py` on imported bundles: a folder of labelled images, attacks where there is a torch network, the cost said before."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from ebjdat_serve.bundle import Bundle, read_rows, sha256
from ebjdat_serve.folder_calibration import calibrate_folder
from ebjdat_serve.networks import Normalisation, PythonArchitecture
from ebjdat_serve.pixels import to_unit
from tests.classifiers import Tiny, folder_of, graph, images, write
from training import compare, evaluate
from training.data.bundle_data import dataset_of
from training.data.labelled_folder import labelled_folder
from training.errors import DataError, TrainingError
from training.evaluation import expected
from training.evaluation.attacks import input_gradient
from training.evaluation.context import SUITES, suite_of
from training.evaluation.evaluated_model import open_bundle
from training.evaluation.result_cache import ResultCache
from training.methods.adversary import cross_entropy

LABELS = ("ant", "bee", "cow", "dog")
SMALL = replace(
    SUITES["quick"], test=40, attacked=20, attacked_other=10, strong=6, checked=8, looked=10, hostile=3, shifted=10, samples=50, queries=20
)
CODE = """
from torch import nn


def make():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
"""
STD = [2.0, 4.0, 8.0]


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("EBJDAT_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("labelled") / "animals", 90, labels=LABELS)


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A bundle whose network is Python code of somebody's that takes BGR pixels of 0 to 255 over STD."""
    home, net = tmp_path_factory.mktemp("code"), Tiny.of(4)
    (home / "anybodys_net.py").write_text(CODE)
    bundle = write(home / "bundle")
    kernel = net.kernel[:, ::-1] * (np.float32(STD) / 255).reshape(3, 1, 1)
    weights = {"0.weight": kernel, "0.bias": net.bias, "4.weight": net.weight, "4.bias": net.offset}
    save_file(
        {f"module.{name}": np.ascontiguousarray(value, np.float32) for name, value in weights.items()}, bundle.path / "weights.safetensors"
    )
    about = {"weights": sha256(bundle.path / "weights.safetensors")}
    (bundle.path / "classify.onnx").write_bytes(graph(net, (12, 10), about, ["logits", "energy", "features"]))
    made = PythonArchitecture("anybodys_net:make", normalisation=Normalisation(255.0, [0.0] * 3, STD, "bgr"), head="4")
    sys.path.insert(0, str(home))
    yield bundle.update("weights.safetensors", "classify.onnx", architecture=made.described())
    sys.path.remove(str(home))


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--processes", "1"])
    evaluate.main()


def test_a_labelled_folder_is_split_by_the_bundles_labels_and_contract(folder, tmp_path):
    m = write(tmp_path / "bundle").manifest
    data = labelled_folder(folder, m)
    assert (len(data.train), len(data.selection), len(data.calibration), len(data.test)) == (0, 9, 22, 59)
    assert (data.name, data.names, data.size, data.input) == ("animals", LABELS, (12, 10), m.input)
    every = np.concatenate([data.selection.image, data.calibration.image, data.test.image])
    assert len({one.tobytes() for one in every}) == 90
    label = np.concatenate([data.selection.label, data.calibration.label, data.test.label])
    assert sorted(np.bincount(label)) == [22, 22, 23, 23]
    assert labelled_folder(folder, m).sha256 == data.sha256
    for one, said in ((tmp_path / "none", "is not a folder"), (folder_of(tmp_path / "flat", 70), "0 images without labels")):
        with pytest.raises(DataError, match=said):
            labelled_folder(one, m)
    with pytest.raises(TrainingError, match="--amount nothing=1"):
        suite_of("quick", 5, ["nothing=1"])
    with pytest.raises(DataError, match="its data is not known: name a folder"):
        dataset_of(Bundle.draft(tmp_path / "bundle"))


WITHOUT = "the network came as an ONNX graph: there is none for torch"


def test_what_came_as_a_graph_is_measured_without_attacks_and_says_why(folder, tmp_path, monkeypatch, capsys):
    run(monkeypatch, write(tmp_path / "bundle").path, "--data", folder, "--n", 10, "--part", "clean", "robustness")
    said = capsys.readouterr().out
    assert said.startswith(f"no attack is measured: {WITHOUT}\n")
    assert f"robustness: not measured: {WITHOUT}" in said
    assert "energy of a calibration image" not in said
    (home,) = (tmp_path / "runs" / "evaluation").glob("tiny-*")
    assert {row.part for row in read_rows(home / "metrics.json")} == {"clean"}
    assert WITHOUT in (home / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_flag_of_what_came_as_a_graph_is_measured_on_strange_and_shifted_images(folder, tmp_path, monkeypatch):
    bundle = write(tmp_path / "bundle")
    calibrate_folder(bundle, folder_of(tmp_path / "others", 60, seed=9), say=lambda text: None)
    run(monkeypatch, bundle.path, "--data", folder, "--n", 10, "--part", "suspicion", "shifts")
    (home,) = (tmp_path / "runs" / "evaluation").glob("tiny-*")
    rows = read_rows(home / "metrics.json")
    assert {row.part for row in rows} == {"suspicion", "shifts"}
    assert not [row for row in rows if row.attack or "gradient_norm" in row.metric]
    assert {row.of for row in rows} == {bundle.manifest.files["classify.onnx"].sha256}
    assert {row.score for row in rows if row.metric == "flag_rate_shifted"} == {"views", "max_softmax"}


def test_images_that_the_flag_was_calibrated_on_are_told(folder, tmp_path, monkeypatch, capsys):
    bundle = write(tmp_path / "bundle")
    calibrate_folder(bundle, folder, say=lambda text: None)
    run(monkeypatch, bundle.path, "--data", folder, "--n", 40, "--part", "clean")
    assert "of the test images have the energy of a calibration image" in capsys.readouterr().out


def test_code_is_run_where_it_is_allowed_alone_and_its_gradient_is_of_pixels(code):
    closed = open_bundle(code.path)
    assert closed.no_network.startswith("the network is Python code, anybodys_net:make: --allow-code runs it")
    image, label = np.ascontiguousarray(to_unit(images(3, (12, 10), 4))), np.array([0, 1, 3])
    with pytest.raises(TrainingError, match="--allow-code"):
        closed.network(torch.from_numpy(image))
    subject = open_bundle(code.path, allow_code=True)
    assert subject.no_network == ""
    gradient, logits = input_gradient(subject.network, torch.from_numpy(image), torch.from_numpy(label), cross_entropy)
    np.testing.assert_allclose(logits.numpy(), subject.logits(image), rtol=1e-4, atol=1e-4)
    # of the served graph, which takes pixels in [0,1]: scale, mean, std and channel order are in it
    step = np.random.default_rng(0).normal(0, 1e-3, image.shape).astype(np.float32)

    def loss(x):
        return cross_entropy(torch.from_numpy(subject.logits(x)), torch.from_numpy(label)).numpy().astype(np.float64)

    slope = (gradient.numpy() * step).reshape(3, -1).sum(axis=1)
    np.testing.assert_allclose((loss(image + step) - loss(image - step)) / 2, slope, rtol=0.05, atol=1e-4)
    assert np.abs(gradient.numpy()).max() > 0.01


def test_a_network_that_is_built_otherwise_now_is_not_attacked(code, monkeypatch):
    monkeypatch.setattr("anybodys_net.make", lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.SiLU(), *other()))
    said = open_bundle(code.path, allow_code=True).no_network
    assert said.startswith("the network that is built here is not the one that is served: its logits differ by")
    monkeypatch.setattr("anybodys_net.make", lambda: nn.Sequential(nn.Conv2d(3, 7, 3, 1, 1), nn.ReLU(), *other()))
    assert "its network cannot be built here: RuntimeError" in open_bundle(code.path, allow_code=True).no_network


def other():
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)


@pytest.mark.slow
def test_the_cost_is_said_before_and_is_what_it_comes_to(code, folder, monkeypatch, tmp_path):
    pytest.importorskip("pyautoattack")
    data, spent = dataset_of(code, str(folder)), {}
    compute = ResultCache._compute

    def counted(self, title, missing, files):
        if title == "unmasking":  # which only follows where gradients look masked
            return compute(self, title, missing, files)
        part = contexts[-1].part
        spent[part] = spent.get(part, 0.0) + sum(piece.work.cost * len(piece.label) for piece in missing) / expected.PASSES
        return compute(self, title, missing, files)

    contexts, context = [], evaluate.context
    monkeypatch.setattr(ResultCache, "_compute", counted)
    monkeypatch.setattr(evaluate, "context", lambda *given, **more: contexts.append(context(*given, **more)) or contexts[-1])
    lines = []
    parts = ("clean", "robustness", "masking", "suspicion", "explanation")
    done = evaluate.evaluate(code, data, SMALL, parts=parts, allow_code=True, say=lines.append)
    assert lines[0].startswith("expected of the attacks, less what is kept of before; a gradient of one image takes ")
    assert lines[-1].endswith("in all, and clean; --n and --amount NAME=N bound it")
    for part in parts[1:]:
        n, gradients = expected.gradients(contexts[-1], part)
        assert f"{n:,} images" in next(line for line in lines if line.startswith(f"  {part}"))
        # a later part finds results of an earlier one kept
        assert spent[part] == pytest.approx(gradients) if part == "robustness" else gradients / 2 < spent[part] < gradients * 2, part
    assert {row.part for row in done.rows} == set(parts)
    assert {row.eps for row in done.rows if row.metric == "accuracy_pgd20"} == {8 / 255, 4 / 255}


@pytest.mark.slow
def test_imported_bundles_are_compared_by_what_was_measured_of_them_here(folder, tmp_path, monkeypatch):
    one, two = (write(tmp_path / name, version=name, seed=seed).path for name, seed in (("a", 0), ("b", 1)))
    for home in (one, two):
        run(monkeypatch, home, "--data", folder, "--n", 20, "--part", "clean")
    models = [compare.read(home) for home in (one, two)]
    assert {model.data for model in models} == {"animals"} and models[0].data_sha256 == models[1].data_sha256
    assert "accuracy_clean" in compare.markdown(models)
    other = folder_of(tmp_path / "plants", 90, labels=LABELS, seed=5)
    run(monkeypatch, one, "--data", other, "--n", 20, "--part", "clean")
    with pytest.raises(TrainingError, match="was measured on several folders: name one of"):
        compare.read(one)


def test_figures_are_taken_into_an_imported_bundle_and_its_card(folder, tmp_path, monkeypatch):
    home = write(tmp_path / "bundle").path
    weights = sha256(home / "weights.safetensors")
    run(monkeypatch, home, "--data", folder, "--n", 20, "--part", "clean", "--into", home)
    bundle = Bundle.load(home)
    assert {row.metric for row in bundle.metrics()} == {"accuracy_clean", "energy_mean", "energy_sd"}
    assert "| accuracy_clean |" in (home / "README.md").read_text(encoding="utf-8")
    assert bundle.manifest.files["weights.safetensors"].sha256 == weights
