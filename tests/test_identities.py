"""Tests of identities: PYLD and proximal SGLD, the curriculum on scripted values, DAT's negatives, presets and their papers."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ebjdat_serve.energy import joint_energy
from ebjdat_serve.sgld import Sampler, langevin_step
from training.data.datasets import load
from training.distributed import Noise
from training.loop.start import new_state
from training.loop.stream import Stream
from training.methods import StepContext
from training.methods.adversary import Attack
from training.methods.curriculum import AucGate, auc
from training.methods.jem import pyld
from training.methods.replay import ChainConfig
from training.presets import METHODS, preset

LABEL = torch.tensor([0, 1, 2, 3, 0, 1])


def test_pyld_is_proximal_sgld():
    """JEM++'s M outer gradients at the first layer's output and N inner steps through it, written out, in [-1,1] units."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1)
    rest = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))
    x = 2 * torch.rand(4, 3, 8, 8) - 1
    outer, inner, alpha = 6, 5, 0.2
    y = x.clone()
    for _ in range(outer):
        h = stem(y).detach().requires_grad_()
        (p,) = torch.autograd.grad(20 * torch.logsumexp(rest(h), dim=1).sum(), h)
        for _ in range(inner):
            z = y.detach().requires_grad_()
            (g,) = torch.autograd.grad((stem(z) * p).sum(), z)
            y = (y + alpha * g.clamp(-1, 1)).clamp(-1, 1)

    sampler = pyld(outer, inner, alpha, ChainConfig()).sampler()
    assert sampler == Sampler(steps=6, step_size=0.25, grad_clip=2.0, noise_std=0.0)
    unit = (x + 1) / 2
    for _ in range(sampler.steps):
        z = unit.detach().requires_grad_()
        (score,) = torch.autograd.grad(20 * torch.logsumexp(rest(stem(2 * z - 1)), dim=1).sum(), z)
        unit = langevin_step(unit, score, torch.zeros_like(unit), sampler)
    assert (x - y).abs().max() > 0.1
    torch.testing.assert_close(2 * unit - 1, y, rtol=0, atol=5e-6)


def test_the_auc_gate_follows_a_scripted_sequence():
    gate = AucGate(threshold=0.8, cap=3, window=200)
    script = [(0.9, 0), (0.9, 1), (0.9, 1), (0.6, 1), (0.9, 1), (0.9, 2), (0.7, 2), (0.9, 3), (1.0, 3), (1.0, 3)]
    for area, expected in script:
        gate.update(area, 100)
        assert gate.steps == expected
    restored = AucGate(threshold=0.8, cap=3, window=200)
    gate = AucGate(threshold=0.8, cap=3, window=200)
    gate.update(0.9, 100)
    restored.load_state_dict(gate.state_dict())
    restored.update(0.9, 100)
    assert restored.steps == 1
    patient = AucGate(threshold=0.8, cap=3, window=200, patience=3)
    trace = []
    for _ in range(7):
        patient.update(0.1, 100)
        trace.append(patient.steps)
    assert trace == [0, 0, 1, 1, 1, 2, 2]


def test_auc_is_the_share_of_pairs_in_order():
    assert float(auc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]))) == 1.0
    assert float(auc(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))) == 0.5
    assert float(auc(torch.tensor([0.0, 2.0]), torch.tensor([1.0]))) == 0.5


def test_every_method_has_a_preset_and_attacks_where_it_should():
    for name in METHODS:
        stage = preset(name, "digits")
        assert stage.name == f"digits-{name}"
        warm = stage.warm_start
        assert (warm is not None) == stage.frozen_norm
    paper, ours = preset("ebjdat-paper", "small").method, preset("ebjdat-aligned", "small").method
    assert (paper.w1, paper.w2, paper.w3, paper.alignment, paper.inner) == (1.0, 1.0, 1.0, "paper", "joint_energy")
    assert (ours.alignment, ours.inner) == ("relative", "ce")
    assert preset("fgsm-rs", "small").method.attack == Attack(steps=1, step_over_eps=1.25)


def test_dat_negatives_are_seeds_at_first_and_then_climb_the_class_of_the_data_at_their_place():
    stage = preset("dat", "digits")
    state = new_state(stage, load("digits"), None, torch.device("cpu"))
    batch = Stream(stage, load("digits"), torch.device("cpu"), state.noise).batch(0)
    assert not torch.equal(batch.label, batch.plain_label)
    state.model.eval()
    found = {}
    for steps in (0, 10):
        state.method_state.gate.steps = steps
        noise = Noise.seeded(7)
        found[steps] = stage.method.solve(state.model, batch, state.method_state, StepContext(stage.threat, noise, 0.0)).x_neg
    seeds = Noise.seeded(7)
    torch.testing.assert_close(found[0], state.method_state.seeds.draw(batch.plain_label, seeds))
    with torch.no_grad():
        before, after = (-joint_energy(state.model(found[steps]), batch.plain_label) for steps in (0, 10))
    assert (after > before).float().mean() > 0.95
    uniform = replace(stage, method=replace(stage.method, seeds="noise"))
    drawn = new_state(uniform, load("digits"), None, torch.device("cpu")).method_state.seeds.draw(batch.plain_label, seeds)
    assert abs(float(drawn.std()) - 12**-0.5) < 0.01


def test_dat_takes_its_seeds_from_an_ood_source(tmp_path):
    pool = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "ood.npz", image=pool)
    stage = preset("dat", "digits")
    stage = replace(stage, method=replace(stage.method, seeds=str(tmp_path / "ood.npz")))
    drawn = new_state(stage, load("digits"), None, torch.device("cpu")).method_state.seeds.draw(LABEL, Noise.seeded(0))
    known = {image.transpose(2, 0, 1).tobytes() for image in pool}
    assert {np.rint(255 * image.numpy()).astype(np.uint8).tobytes() for image in drawn} <= known
