"""Tests that a network, a method and a data set are each added by one registry entry."""

import json
import re
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.methods import table
from ebjdat_serve.bundle import Bundle, network_name
from ebjdat_serve.card import summary
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.errors import BundleError
from ebjdat_serve.networks import FAMILIES, FOREIGN, Architecture, Network, architecture_of, build, network_of
from ebjdat_serve.networks.wideresnet import WideResNetArchitecture
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.scores import SCORES
from ebjdat_serve.server.api_docs import DOCS
from ebjdat_serve.server.endpoints import ENDPOINTS
from export.parity import check
from export.to_onnx import export
from tests.conftest import ROOT
from training import train
from training.calibrate import calibrate
from training.card import licence
from training.config import describe, stages
from training.data.datasets import load
from training.data.image_folders import Split
from training.data.sources import SOURCES, Source, balls
from training.evaluation.rows import ball_of
from training.loop.bundle_writer import Origin, draft_bundle
from training.loop.state import load_position, load_weights
from training.methods import Stateless, accuracy, detached
from training.methods.adversary import Threat
from training.overrides import listing, override
from training.presets import METHODS, preset, scratch


def documented(document, header):
    """Return the rows of the table under ``header``, and the names in back quotes of their first cells."""
    rows = (ROOT / document).read_text(encoding="utf-8").split(f"\n{header}\n")[1].split("\n\n")[0].splitlines()[1:]
    return rows, [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_every_network_data_set_and_endpoint_is_documented():
    assert documented("docs/training.md", "| family | sizes | images | |")[1] == [
        name for name, kind in FAMILIES.items() if kind not in FOREIGN
    ]
    assert documented("docs/training.md", "| `--data` | classes | images | source |")[1] == list(SOURCES)
    paths = re.findall(r"/\w+", " ".join(documented("docs/serving.md", "| path | answer | computed by |")[1]))
    assert set(paths) == {one.path for one in ENDPOINTS if not one.hidden} | {DOCS}


def test_every_score_is_documented_by_its_equation():
    rows, names = documented("docs/evaluation.md", "| name | score | |")
    assert names == list(SCORES)
    for name, row in zip(names, rows, strict=True):
        equation = SCORES[name].equation.split(",")[0].replace("{weight:.2f}", "w")
        assert row.replace("\\|", "|").startswith(f"| `{name}` | {equation} |")


def test_every_method_is_documented_by_its_loss():
    _, names = documented("docs/methods.md", "| method | loss | inner problem | step |")
    on_other_hosts = {f"{name}-{host}" for name in ("ebjdat-paper", "ebjdat-aligned") for host in ("jem", "jem++")}
    assert [name for name in METHODS if name not in on_other_hosts] == names


class Tiny(Network):
    """Three convolutions, written as anybody would, without a folded form of its own."""

    def __init__(self, channels, classes):
        super().__init__(classes)
        self.body = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * channels, 4 * channels, 4),
            nn.GELU(),
        )
        self.head = nn.Linear(4 * channels, classes)

    def features(self, image):
        return self.body(image - 0.5).mean(dim=(2, 3))


@dataclass(frozen=True)
class TinyArchitecture(Architecture):
    family = "tiny"

    channels: int = 16

    def build(self, classes):
        return Tiny(self.channels, classes)


def run_train(monkeypatch, tmp_path, *words):
    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--run", "new", "--only-train", "--threads", "1"])
    train.main()
    return tmp_path / "new"


@pytest.mark.slow
def test_a_network_of_another_family_is_trained_exported_and_served(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "tiny", TinyArchitecture)
    data, sizes = load("digits"), ["channels=8", "eps=0.05", "warm_start.epochs=4", "epochs=0.3", "chains.steps=2", "attack.steps=2"]
    run = run_train(monkeypatch, tmp_path, "ebjdat-aligned", "--data", "digits", "--network", "tiny", "--set", *sizes)
    stage = override(replace(preset("ebjdat-aligned", "digits"), architecture=TinyArchitecture()), sizes)
    config = json.loads((run / "config.json").read_text())
    assert config["stages"] == json.loads(json.dumps([describe(each) for each in stages(stage)]))
    home = run / stage.name
    weights = home / "weights.safetensors"
    bundle = draft_bundle(weights, stage, data, home / "bundle", Origin("git", "now", ""), load_position(home / "state.pt"), 6)
    bundle = calibrate(export(bundle), data)
    assert max(check(bundle).values()) < 1e-4
    bundle = Bundle.load(bundle.path)
    assert bundle.manifest.architecture == {"family": "tiny", "channels": 8}
    assert network_name(bundle.manifest.architecture) == "tiny 8"
    assert "tiny 8, input 8 x 8" in summary(bundle)
    logits, _, _ = OnnxEngine(bundle, "cpu").classify(to_unit(data.test.image))
    with torch.no_grad():
        trained = build(architecture_of(bundle.manifest.architecture), 10, load_weights(weights))
        expected = trained(torch.from_numpy(to_unit(data.test.image))).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert float((logits.argmax(axis=1) == data.test.label).mean()) > 0.7
    with torch.no_grad():
        halved = trained.folded(torch.bfloat16)(torch.from_numpy(to_unit(data.test.image))).numpy()
    assert 0 < np.abs(halved - expected).max() < 0.05 * np.abs(expected).max()


def test_a_family_says_what_it_cannot_be_and_which_weights_are_its_own():
    for described, said in (
        ({"family": "resnet", "depth": 10}, "'resnet' is not a known family"),
        ({"depth": 10, "width": 1}, "None is not a known family"),
        ({"family": "wideresnet", "depth": 12, "width": 1}, r"depth must be 6n \+ 4"),
        ({"family": "wideresnet", "depth": 10}, "missing keys"),
        ({"family": "wideresnet", "depth": 10, "width": "1"}, "is not a int"),
    ):
        with pytest.raises(BundleError, match=said):
            architecture_of(described)
    sizes = WideResNetArchitecture(16, 2)
    found = network_of(sizes.build(7).state_dict())
    assert (found.classes, type(found), len(found.blocks)) == (7, type(sizes.build(7)), 6)
    with pytest.raises(ValueError, match="match no network family: wideresnet"):
        network_of(TinyArchitecture().build(7).state_dict())


@dataclass(frozen=True)
class Smoothed(Stateless):
    """Cross-entropy with smoothed labels."""

    smoothing: float = 0.1

    def loss(self, model, batch, state, context):
        logits = model(batch.image)
        return detached(F.cross_entropy(logits, batch.label, label_smoothing=self.smoothing), accuracy=accuracy(logits, batch.label))


def test_a_method_is_trained_and_listed_before_it_was_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "smoothed", lambda b: scratch(b, Smoothed()))
    run = run_train(monkeypatch, tmp_path, "smoothed", "--data", "digits", "--set", "epochs=1", "smoothing=0.2")
    (stage,) = json.loads((run / "config.json").read_text())["stages"]
    assert stage["method"] == {"kind": "Smoothed", "smoothing": 0.2}
    assert {"weights.safetensors", "report.html"} <= {file.name for file in (run / "digits-smoothed").iterdir()}
    assert "  smoothed              not measured" in listing().splitlines()
    assert table({}).splitlines()[-1].startswith("| `smoothed` | not measured |")


def stripes(_):
    """Two classes, dark above or dark on the left, and noise."""
    draw, images = np.random.default_rng(0), []
    label = np.arange(400) % 2
    for y in label:
        image = np.zeros((8, 8))
        image[(slice(4), slice(None))[:: 1 if y else -1]] = 160
        images.append(image[..., None] + draw.integers(0, 90, (8, 8, 3)))
    split = Split(np.asarray(images, dtype=np.uint8), label.astype(np.int64))
    return ("above", "left"), split.take(slice(0, 300)), split.take(slice(300, None))


@pytest.mark.slow
def test_a_data_set_is_read_split_trained_on_and_measured_in_its_own_ball(monkeypatch, tmp_path):
    source = Source(stripes, held_out=40, flip=False, linf=0.1, l2=0.7, budget="digits", licence="Weights: mine.")
    monkeypatch.setitem(SOURCES, "stripes", source)
    data = load("stripes")
    assert [len(part) for part in (data.train, data.selection, data.calibration, data.test)] == [220, 40, 40, 100]
    assert (data.names, data.size, data.flip) == (("above", "left"), (8, 8), False)
    assert balls("stripes") == (0.1, 0.7)
    assert ball_of("stripes").threats()[0] == Threat("linf", 0.1)
    assert licence("stripes") == "Weights: mine."
    run = run_train(monkeypatch, tmp_path, "standard", "--data", "stripes", "--set", "epochs=5")
    (stage,) = json.loads((run / "config.json").read_text())["stages"]
    assert (stage["dataset"], stage["architecture"]["depth"]) == ("stripes", 10)  # by its budget
    network = network_of(load_weights(run / "stripes-standard" / "weights.safetensors"))
    with torch.no_grad():
        found = network(torch.from_numpy(to_unit(data.test.image))).argmax(dim=1).numpy()
    assert float((found == data.test.label).mean()) > 0.9
