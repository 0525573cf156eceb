"""The adversary, EB-JDAT's terms, the buffer, and a run that is stopped and goes on."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ebjdat_serve.energy import energy, joint_energy
from ebjdat_serve.sgld import Prior, Sampler
from ebjdat_serve.wideresnet import WideResNet
from training.adversary import INNER, cross_entropy, frozen, pgd
from training.errors import TrainingDiverged, TrainingError
from training.evaluate import autoattack
from training.images import augment, load
from training.methods import Batch
from training.methods.at import AdversarialTraining
from training.methods.ebjdat import EbJdat, alignment, classification, generative
from training.presets import DIGITS, DIGITS_FGSM
from training.refresh import stages
from training.replay import ReplayBuffer, fit_prior
from training.state import save_weights
from training.train import Clock, diverged, learning_rate, new_state, override, train

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = WideResNet(10, 1, 4).train()
    with torch.no_grad():
        net(torch.rand(16, 3, 8, 8))
    return net


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(12, 3, 8, 8, generator=generator)
    return Batch(image, torch.arange(12) % 4, torch.rand(6, 3, 8, 8, generator=generator))


@pytest.fixture
def prior():
    rng = np.random.default_rng(0)
    return Prior(rng.random((4, 3, 8, 8), dtype=np.float32), 0.1 * rng.normal(size=(4, 3, 3, 8, 8)).astype(np.float32))


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("name", sorted(INNER))
def test_pgd_stays_in_ball_and_box_and_raises_its_objective(model, batch, name):
    before = snapshot(model)
    x_adv = pgd(
        model,
        batch.image,
        batch.label,
        objective=INNER[name],
        eps=0.1,
        step_size=0.025,
        steps=8,
        generator=torch.Generator().manual_seed(0),
    )
    assert (x_adv - batch.image).abs().max() <= 0.1 + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    model.eval()
    with torch.no_grad():
        assert INNER[name](model(x_adv), batch.label).mean() > INNER[name](model(batch.image), batch.label).mean() + 1e-3
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_frozen_restores_modes_and_flags_even_after_an_error(model):
    model.norm.eval()
    next(model.parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ZeroDivisionError), frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        _ = 1 / 0
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_generative_lowers_the_data_and_raises_the_chains(model, batch):
    assert float(generative(torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0]))) == -3.0
    model.eval()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    x_neg = torch.rand(6, 3, 8, 8)

    def data_above_chains():
        with torch.no_grad():
            return float(energy(model(batch.plain)).mean() - energy(model(x_neg)).mean())

    before = data_above_chains()
    generative(energy(model(batch.plain)), energy(model(x_neg))).backward()
    optimiser.step()
    assert data_above_chains() < before


@pytest.mark.parametrize("kind", ["relative", "mean", "paired", "paper"])
def test_alignment_is_of_pairs_and_signed_as_the_equation_says(kind):
    energy_x, energy_adv = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    expected = {"mean": abs(2 - 3) / 2, "paired": (2 + 3) / 2, "paper": (2 - 3) / 2, "relative": 0.5 / 0.5**0.5}[kind]
    assert float(alignment(energy_x, energy_adv, kind)) == pytest.approx(expected)


def test_only_the_relative_alignment_cannot_be_lowered_by_shrinking_the_logits():
    energy_x, energy_adv = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 1.0, 6.0])
    for kind in ("relative", "mean", "paired"):
        ratio = float(alignment(energy_x / 2, energy_adv / 2, kind) / alignment(energy_x, energy_adv, kind))
        assert ratio == pytest.approx(1.0 if kind == "relative" else 0.5)


def test_classification_is_a_weighted_mean_of_clean_and_adversarial_cross_entropy():
    logits, logits_adv, label = torch.randn(5, 4), torch.randn(5, 4), torch.arange(5) % 4
    clean = (joint_energy(logits, label) - energy(logits)).mean()
    adversarial = (joint_energy(logits_adv, label) - energy(logits_adv)).mean()
    torch.testing.assert_close(classification(logits, logits_adv, label, 0.25), 0.25 * clean + 0.75 * adversarial)


def test_without_h1_and_h2_ebjdat_is_adversarial_training(model, batch, prior):
    at = replace(DIGITS, method="at", attack_steps=3)
    jdat = replace(at, method="ebjdat", w1=0.0, w2=0.0, energy_penalty=0.0, clean_weight=0.0, buffer_size=40, chain_batch=6)
    model.eval()
    plain = AdversarialTraining(at).terms(model, batch, torch.Generator().manual_seed(3), 0.5).loss
    joint = EbJdat(jdat, prior, CPU).terms(model, batch, torch.Generator().manual_seed(3), 0.5).loss
    torch.testing.assert_close(plain, joint)


def test_a_step_of_ebjdat_leaves_frozen_statistics_alone(model, batch, prior):
    preset = replace(DIGITS, buffer_size=40, chain_batch=6)
    model.train(not preset.frozen_norm)
    before = {name: value.clone() for name, value in model.named_buffers()}
    EbJdat(preset, prior, CPU).terms(model, batch, torch.Generator().manual_seed(0), 0.5).loss.backward()
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_the_buffer_writes_back_and_keeps_its_class_blocks(model, prior):
    buffer = ReplayBuffer(prior, 40, reinit=0.0, seed=0, device=CPU)
    before = buffer.chain.clone()
    x_neg = buffer.advance(model, 8, Sampler(3, 0.5, 1.0, 0.0), torch.Generator().manual_seed(0))
    index = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:8]
    torch.testing.assert_close(buffer.chain[index], x_neg)
    untouched = sorted(set(range(40)) - set(index.tolist()))
    torch.testing.assert_close(buffer.chain[untouched], before[untouched])
    assert buffer.label.tolist() == sorted(buffer.label.tolist())


def test_the_buffer_restarts_chains_at_the_stated_rate_from_their_own_class(model, prior):
    buffer = ReplayBuffer(prior, 2000, reinit=0.3, seed=0, device=CPU)
    buffer.chain.fill_(0.5)
    still = Sampler(1, 0.0, 1.0, 0.0)
    x = buffer.advance(model, 2000, still, torch.Generator().manual_seed(0))
    fresh = (x != 0.5).flatten(1).any(dim=1)
    assert 0.26 < float(fresh.float().mean()) < 0.34
    for chain in x[fresh][:50]:
        matches = (buffer.starts == chain).flatten(1).all(dim=1).nonzero().flatten()
        assert len(matches) == 1
    moved = (buffer.chain != 0.5).flatten(1).any(dim=1)
    for i in moved.nonzero().flatten()[:50].tolist():
        start = (buffer.starts == buffer.chain[i]).flatten(1).all(dim=1).nonzero().flatten()
        assert buffer.label[start[0]] == buffer.label[i]


def test_the_fitted_prior_has_the_mean_and_leading_spread_of_its_class():
    data = load("digits")
    prior = fit_prior(data.train, 10, 5)
    ones = data.train.image[data.train.label == 1].transpose(0, 3, 1, 2).reshape(-1, 192) / 255.0
    np.testing.assert_allclose(prior.mean[1].ravel(), ones.mean(axis=0), atol=1e-5)
    top = np.linalg.eigvalsh(np.cov(ones, rowvar=False))[-1]
    assert (prior.factor[1, 0] ** 2).sum() == pytest.approx(top, rel=1e-3)


def test_augment_crops_and_mirrors_without_inventing_pixels():
    image = torch.arange(2 * 3 * 8 * 8, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(2, 3, 8, 8)
    out = augment(image, torch.Generator().manual_seed(0), padding=2, flip=True)
    assert out.shape == image.shape
    assert out.dtype == torch.uint8
    for one, source in zip(out, image, strict=True):
        assert set(one.unique().tolist()) <= set(source.unique().tolist())
    same = augment(image, torch.Generator().manual_seed(0), padding=0, flip=False)
    torch.testing.assert_close(same, image)


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    assert learning_rate(0.0, 0.4) == 0
    assert learning_rate(0.4, 0.4) == pytest.approx(1.0)
    assert learning_rate(0.2, 0.4) == pytest.approx(0.5)
    assert learning_rate(1.0, 0.4) == pytest.approx(0.0)


def losses(folder):
    import json

    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path, monkeypatch):
    data = load("digits")
    preset = replace(DIGITS, epochs=2.5, buffer_size=100, chain_batch=8)
    whole = train(preset, data, tmp_path / "whole", init=None, clock=Clock(), device=CPU)

    class Interrupting(Clock):
        calls = 0

        def over(self):
            self.calls += 1
            if self.calls > 23:
                os.kill(os.getpid(), signal.SIGINT)
            return super().over()

    with pytest.raises(KeyboardInterrupt):
        train(preset, data, tmp_path / "parts", init=None, clock=Interrupting(), device=CPU)
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    parts = train(preset, data, tmp_path / "parts", init=None, clock=Clock(), device=CPU)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert parts.read_bytes() == whole.read_bytes()


def test_a_run_out_of_time_ends_cleanly_with_weights(tmp_path):
    weights = train(replace(DIGITS_FGSM, epochs=50), load("digits"), tmp_path, init=None, clock=Clock(0.02), device=CPU)
    assert weights.is_file()


def test_divergence_is_rolled_back_counted_and_in_the_end_an_error(tmp_path):
    data = load("digits")
    wild = replace(DIGITS, epochs=30, energy_gap_limit=1e-9, buffer_size=100, chain_batch=8)
    state = new_state(wild, data, None, CPU)
    state.save(tmp_path / "state.pt")
    with pytest.raises(TrainingDiverged, match="diverged 4 times"):
        train(wild, data, tmp_path, init=None, clock=Clock(), device=CPU)
    assert sum("diverged" in line for line in (tmp_path / "log.jsonl").read_text().splitlines()) == 4


def test_what_counts_as_diverged():
    assert diverged({"loss": float("nan")}, DIGITS)
    assert diverged({"energy_gap_neg": -51.0}, DIGITS)
    assert diverged({"saturation": 0.9}, DIGITS)
    assert not diverged({"loss": 2.0, "energy_gap_neg": 3.0, "saturation": 0.1}, DIGITS)


def test_overrides_are_checked():
    assert override(DIGITS, ["lr=0.5", "attack_steps=3", "frozen_norm=false"]).attack_steps == 3
    with pytest.raises(TrainingError, match="fields are"):
        override(DIGITS, ["learning=1"])
    assert override(DIGITS, ["epochs=0.5"]).epochs == 0.5
    for setting, said in (("attack_steps=many", "attack_steps is a int"), ("frozen_norm=yes", "frozen_norm is a bool")):
        with pytest.raises(TrainingError, match=said):
            override(DIGITS, [setting])


def test_the_warm_start_is_of_the_same_network_and_ball():
    warm, joint = stages(override(DIGITS, ["width=2", "eps=0.1"]))
    assert (warm.width, warm.eps, warm.attack_step_size) == (2, 0.1, pytest.approx(0.125))
    assert joint.width == 2


def test_weights_of_another_network_cannot_start_a_run(tmp_path):
    save_weights(WideResNet(10, 2, 10).state_dict(), tmp_path / "wide.safetensors")
    save_weights({"strange": torch.zeros(3)}, tmp_path / "strange.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    for name in ("wide", "strange", "broken", "absent"):
        with pytest.raises(TrainingError, match=name):
            new_state(DIGITS_FGSM, load("digits"), tmp_path / f"{name}.safetensors", CPU)


def test_a_run_without_time_for_a_step_is_an_error_not_a_model(tmp_path):
    with pytest.raises(TrainingError, match="max-minutes"):
        train(DIGITS_FGSM, load("digits"), tmp_path, init=None, clock=Clock(0), device=CPU)
    assert not (tmp_path / "weights.safetensors").exists()


def test_training_and_the_torch_engine_need_no_more_than_torch_numpy_pillow_and_safetensors():
    absent = ("onnx", "onnxruntime", "onnxscript", "scipy", "sklearn", "litserve", "fastapi", "pydantic", "pyautoattack", "tqdm")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import training.train, training.refresh, ebjdat_serve.engines.eager"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_alignment_is_an_error():
    with pytest.raises(ValueError, match="alignment must be"):
        alignment(torch.zeros(2), torch.ones(2), "absolute")


def test_autoattack_runs_stays_in_its_ball_and_leaves_less_than_clean():
    torch.manual_seed(0)
    net = WideResNet(10, 1, 4).eval().requires_grad_(False)
    image = torch.rand(4, 3, 8, 8)
    label = net(image).argmax(dim=1)
    assert autoattack(net, image, label, eps=0.3) < 4


def test_cross_entropy_objective_matches_the_identity():
    logits, label = torch.randn(3, 4), torch.tensor([0, 1, 2])
    torch.testing.assert_close(cross_entropy(logits, label), joint_energy(logits, label) - energy(logits))
