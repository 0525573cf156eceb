"""Tests that the evaluation uses the subject's device, on torch's meta device, which accepts no CPU tensor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ebjdat_serve.networks.wideresnet import WideResNet
from training.evaluation import attacks, autoattack, extractors
from training.evaluation.attacks import Transfer
from training.evaluation.evaluated_model import best_device, module_spec, open_weights, weights_spec
from training.evaluation.extractors import RESNET20, Features
from training.evaluation.resnet20 import ResNet20
from training.methods.adversary import Threat

LINF = Threat("linf", 0.1)
META = torch.device("meta")
IMAGE, LABEL = np.random.default_rng(0).random((4, 3, 8, 8), np.float32), np.arange(4)


@pytest.fixture
def elsewhere(monkeypatch):
    """A subject on a device that is not the CPU; what comes back from there is zeros."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros(self.shape, dtype=self.dtype) if self.is_meta else self)
    subject = module_spec(WideResNet(10, 1, 4), "net")()
    network = WideResNet(10, 1, 4).eval().requires_grad_(False).to(META)
    return replace(subject, network=network, device=META)


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "net" / "weights.safetensors"
    file.parent.mkdir()
    save_file(WideResNet(10, 1, 4).state_dict(), file)
    return file


def places(module):
    return {tensor.device for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_square_works_where_it_is_told(device):
    pytest.importorskip("pyautoattack")
    assert torch.device(autoattack.square(torch.nn.Identity(), LINF, 5, device).device) == torch.device(device)


def test_the_surrogate_goes_where_the_subject_is(elsewhere, weights, monkeypatch):
    seen = []
    opened = attacks.surrogate(str(weights), META)
    assert places(opened) == {META}
    assert places(attacks.surrogate(str(weights), torch.device("cpu"))) == {torch.device("cpu")}
    monkeypatch.setattr(attacks, "surrogate", lambda file, device: lambda x: seen.append((x.device, device)) or opened(x))
    found = Transfer(LINF, str(weights), "0").run(elsewhere, IMAGE, LABEL)
    assert set(seen) == {(META, META)}
    assert len(seen) == 20
    assert found["robust_mask"].shape == (4,)


def test_feature_networks_go_where_the_subject_is(elsewhere, monkeypatch):
    kept = ResNet20().eval().requires_grad_(False)
    monkeypatch.setattr(extractors, "load_extractor", lambda: kept)
    extractors.opened.cache_clear()
    try:
        network = extractors.opened("resnet20", META)
        assert places(network) == {META}
        assert places(kept) == {torch.device("cpu")}
        found = Features(RESNET20).run(elsewhere, IMAGE, LABEL)  # the CPU's mean and deviation would stop it
        assert (found["features"].shape, found["logits"].shape) == ((4, 64), (4, 10))
    finally:
        extractors.opened.cache_clear()


@pytest.mark.parametrize("name", ["efficientnet_lite0"])
def test_a_feature_network_behind_a_function_goes_there_too(name):
    pytest.importorskip("efficientnet_lite_pytorch")
    features, logits = extractors.opened(name, META)(torch.zeros(2, 3, 32, 32, device=META))
    assert (features.device, tuple(features.shape), logits) == (META, (2, 1280), None)


def test_controls_are_opened_on_the_subjects_device(weights):
    assert open_weights(weights, META).device == META
    assert weights_spec(weights, META)().device == META
    assert best_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
