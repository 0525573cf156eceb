"""Tests of the golden path on small real data: digits -> train -> export -> parity -> calibrate -> evaluate -> publish -> serve -> curl."""

import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import torch

from ebjdat_serve import pixels
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.errors import BundleError
from ebjdat_serve.networks import build
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import rows_where
from ebjdat_serve.scores import BASELINE
from tests.conftest import ROOT, serving
from training.calibrate import calibrate
from training.config import stages
from training.data.datasets import load
from training.evaluate import evaluate
from training.evaluation.attacks import survivors
from training.evaluation.context import SUITES
from training.loop.clock import Clock
from training.loop.loop import train
from training.loop.state import load_weights
from training.methods.adversary import cross_entropy
from training.methods.at import Standard
from training.presets import DIGITS


def row(bundle, name, **wanted):
    (found,) = [r for r in rows_where(bundle.metrics(), name, **wanted) if r.score != BASELINE]  # which stands beside the served score
    return found


def metric(bundle, name, **wanted):
    return row(bundle, name, **wanted).value


LINF = {"norm": "linf", "eps": 51 / 255}


def reaches_its_floors(bundle):
    assert bundle.manifest.provenance.preset == "digits"
    assert metric(bundle, "accuracy_clean") >= 0.95
    assert metric(bundle, "accuracy_pgd20", **LINF) >= 0.40
    assert metric(bundle, "flag_rate_mixture_in_interval", alpha=0.05) == 1.0
    assert metric(bundle, "class_agreement_own") >= 0.8


def test_the_kept_digits_bundle_reaches_its_floors_and_is_what_its_figures_say(golden):
    bundle = Bundle.load(golden)
    reaches_its_floors(bundle)
    test = load("digits").test
    logits, _, _ = OnnxEngine(bundle, "cpu").classify(to_unit(test.image))
    assert float((logits.argmax(axis=1) == test.label).mean()) == pytest.approx(metric(bundle, "accuracy_clean"))


def test_training_still_makes_a_bundle_as_good_as_the_kept_one(golden, trained):
    """Each share may be lower by two standard errors of a difference of two models, each on so many images."""
    kept, made = Bundle.load(golden), Bundle.load(trained)
    reaches_its_floors(made)
    assert made.manifest.architecture == kept.manifest.architecture
    for name, wanted in (
        ("accuracy_clean", {}),
        ("accuracy_pgd20", LINF),
        ("accuracy_pgd20_margin", {}),
        ("accuracy_apgd", {}),
        ("accuracy_worst_case", {}),
        ("class_agreement_own", {}),
    ):
        before, after = row(kept, name, **wanted), row(made, name, **wanted)
        p = (before.value + after.value) / 2
        tolerance = 2 * (p * (1 - p) * (1 / before.n + 1 / after.n)) ** 0.5
        print(f"{name}: {after.value:.4f} of {after.n}, kept {before.value:.4f}, tolerance {tolerance:.4f}")
        assert after.value >= before.value - tolerance, name


@pytest.mark.slow
def test_plain_training_fails_the_pgd_floor(tmp_path):
    data = load("digits")
    plain = replace(stages(DIGITS)[0], name="plain", method=Standard(), epochs=10)
    weights = train(plain, data, tmp_path, init=None, clock=Clock(), device=torch.device("cpu"))
    model = build(plain.architecture, 10, load_weights(weights)).requires_grad_(False)
    image, label = torch.from_numpy(to_unit(data.test.image)), torch.from_numpy(data.test.label)
    with torch.no_grad():
        assert float(cross_entropy(model(image), label).mean()) < 0.5
    assert survivors(model, image, label, DIGITS.threat) / len(label) < 0.40


@pytest.mark.slow
def test_it_is_served_and_answers_curl(golden, tmp_path):
    digits = load("digits").test
    with serving(golden, tmp_path / "log") as server:
        right = 0
        for image, label in zip(digits.image[:40], digits.label[:40], strict=True):
            (tmp_path / "digit.png").write_bytes(pixels.encode_png(image))
            command = ["curl", "-fsS", "--data-binary", f"@{tmp_path / 'digit.png'}", f"{server.url}/classify"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            right += f'"class":{label},' in said
        assert right >= 34
        drawn = tmp_path / "three.png"
        subprocess.run(["curl", "-fsS", f"{server.url}/generate?class=3", "-o", str(drawn)], check=True)
        assert httpx2.post(f"{server.url}/classify", content=drawn.read_bytes()).json()["class"] == 3
        assert httpx2.get(f"{server.url}/info").json()["model"].startswith("digits@")


def test_each_step_also_runs_alone(trained, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(trained / "current", folder)
    before = Bundle.load(folder)
    for script, said, *more in (
        ("export/to_onnx.py", "score.onnx"),
        ("export/parity.py", "batch 32 chain"),
        ("training/calibrate.py", "200 energies"),
        ("training/evaluate.py", "accuracy_pgd20", "--into", str(folder), "--part", "clean", "robustness", "--n", "100"),
    ):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "EBJDAT_RUNS": str(tmp_path / "runs")}
        command = [sys.executable, str(ROOT / script), str(folder), *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    again = Bundle.load(folder)
    assert again.manifest.files["classify.onnx"] == before.manifest.files["classify.onnx"]  # an export is reproducible
    np.testing.assert_allclose(again.calibration().energies, before.calibration().energies, rtol=1e-6)


def test_other_data_than_it_was_trained_on_is_refused(golden):
    shuffled = replace(load("digits"), sha256="0" * 64)
    with pytest.raises(BundleError, match="training images"):
        calibrate(Bundle.load(golden), shuffled)
    with pytest.raises(BundleError, match="training images"):
        evaluate(Bundle.load(golden), shuffled, SUITES["quick"])


@pytest.mark.parametrize("script", ["export/to_onnx.py", "export/parity.py", "training/calibrate.py", "training/evaluate.py"])
def test_a_step_that_cannot_run_says_why(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path)])
    with pytest.raises(SystemExit, match="neither a bundle"):  # which Python prints, and ends with 1
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_a_finished_run_is_not_started_again_by_mistake(trained):
    environment = {**os.environ, "EBJDAT_RUNS": str(trained.parent.parent)}
    command = [sys.executable, str(ROOT / "training" / "train.py"), "digits", "--run", "golden"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "--resume" in done.stderr
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, check=False)
    assert resumed.returncode == 0
    assert "published" in resumed.stdout
    other = subprocess.run([*command, "--resume", "--set", "lr=0.5"], capture_output=True, text=True, env=environment, check=False)
    assert other.returncode == 1
    assert "another configuration" in other.stderr
