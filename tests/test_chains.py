"""Tests of training's persistent chains: their start, which of them move, and the replay buffer."""

import numpy as np
import pytest
import torch

from ebjdat_serve.sgld import Prior
from training.data.datasets import load
from training.distributed import Noise
from training.errors import TrainingError
from training.methods.replay import SHARDS, ChainConfig, ReplayBuffer, Starts, fit_prior

CPU = torch.device("cpu")


@pytest.fixture
def starts():
    rng = np.random.default_rng(0)
    prior = Prior(rng.random((4, 3, 8, 8), dtype=np.float32), 0.1 * rng.normal(size=(4, 3, 3, 8, 8)).astype(np.float32))
    return Starts(prior, (3, 8, 8), CPU)


def buffer(starts, **changes):
    settings = {"batch": 16, "buffer_size": 80, "steps": 3, "step_size": 0.5, "grad_clip": 1.0, "reinit": 0.0, **changes}
    return ReplayBuffer(ChainConfig(**settings), starts, 4, Noise.seeded(0), CPU)


def test_the_buffer_writes_back_and_moves_no_chain_twice(model, starts):
    held = buffer(starts)
    before, noise = held.chain.clone(), Noise.seeded(5)
    part, place = held.draw(Noise.seeded(5))
    assert len({(int(i), int(j)) for i, j in zip(part, place, strict=True)}) == 16
    assert part.bincount().tolist() == [2] * SHARDS
    x_neg = held.advance(model, noise)
    torch.testing.assert_close(held.chain[part, place], x_neg)
    moved = torch.zeros(held.label.shape, dtype=torch.bool)
    moved[part, place] = True
    torch.testing.assert_close(held.chain[~moved], before[~moved])
    assert (held.chain[moved] != before[moved]).any()


def test_sampling_leaves_statistics_mode_and_gradients_alone(model, starts):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffer(starts, conditional=True, noise_std=0.1).advance(model, Noise.seeded(0))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(w.grad is None and w.requires_grad for w in model.parameters())


@pytest.mark.parametrize(("size", "classes"), [(320, 10), (2000, 100), (480, 100)])
def test_every_class_has_its_equal_share_of_chains(size, classes):
    held = ReplayBuffer(ChainConfig(batch=16, buffer_size=size), Starts(None, (3, 4, 4), CPU), classes, Noise.seeded(0), CPU)
    count = held.label.flatten().bincount(minlength=classes)
    assert count.max() - count.min() <= 1
    for part in held.label:
        assert part.tolist() == sorted(part.tolist())  # in blocks
        assert len(part.unique()) >= min(classes, size // SHARDS)


def test_chains_restart_at_the_stated_rate_from_their_own_class(model, starts):
    held = buffer(starts, batch=2000, buffer_size=2000, steps=1, step_size=0.0, reinit=0.3)
    held.chain.fill_(0.5)
    held.advance(model, Noise.seeded(0))
    chain, label = held.chain.flatten(0, 1), held.label.flatten()
    fresh = (chain != 0.5).flatten(1).any(dim=1)
    assert 0.26 < float(fresh.float().mean()) < 0.34
    # each class has its own mean, far from the others' compared with the spread
    nearest = torch.cdist(chain[fresh].flatten(1), starts.mean).argmin(dim=1)
    assert (nearest == label[fresh]).float().mean() > 0.99


def test_starts_follow_the_prior_on_the_device_as_they_do_in_numpy(starts):
    label = torch.arange(4).repeat_interleave(3000)
    drawn = starts.draw(label, Noise.seeded(1)).flatten(1)
    for y in range(4):
        mean, spread = drawn[label == y].mean(dim=0), drawn[label == y].std(dim=0)
        expected = starts.factor[y].square().sum(dim=0).sqrt()
        free = (starts.mean[y] > 0.4) & (starts.mean[y] < 0.6)  # far from 0 and 1, where clipping bends the law
        assert free.sum() > 20
        torch.testing.assert_close(mean[free], starts.mean[y][free], rtol=0.1, atol=0.02)
        torch.testing.assert_close(spread[free], expected[free], rtol=0.15, atol=0.02)
    uniform = Starts(None, (3, 8, 8), CPU).draw(label, Noise.seeded(1))
    assert uniform.shape == (12000, 3, 8, 8)
    assert abs(float(uniform.std()) - 12**-0.5) < 1e-3


def test_conditional_chains_climb_their_own_class_and_marginal_ones_the_marginal(model, starts):
    from ebjdat_serve.energy import energy, joint_energy

    for conditional in (True, False):
        held = buffer(starts, batch=80, steps=6, step_size=1.0, grad_clip=1e6, conditional=conditional)
        part, place = held.draw(Noise.seeded(2))
        label, before = held.label[part, place], held.chain[part, place]
        after = held.advance(model, Noise.seeded(2))
        model.eval()
        with torch.no_grad():
            f, g = model(before), model(after)
        model.train()
        value = (lambda z, y=label: joint_energy(z, y)) if conditional else energy
        assert value(g).mean() < value(f).mean() - 1e-3


def test_chains_that_cannot_be_divided_are_refused(starts):
    for changes in ({"batch": 12}, {"buffer_size": 100}, {"batch": 160}):
        with pytest.raises(TrainingError, match="multiples of 8"):
            buffer(starts, **changes)
    with pytest.raises(TrainingError, match="cannot hold 100 classes"):
        ReplayBuffer(ChainConfig(batch=8, buffer_size=80), Starts(None, (3, 4, 4), CPU), 100, Noise.seeded(0), CPU)
    with pytest.raises(ValueError, match="prior must be"):
        ChainConfig(prior="gauss")


def test_the_fitted_prior_has_the_mean_and_leading_spread_of_its_class():
    data = load("digits")
    prior = fit_prior(data.train, 10, 5)
    ones = data.train.image[data.train.label == 1].transpose(0, 3, 1, 2).reshape(-1, 192) / 255.0
    np.testing.assert_allclose(prior.mean[1].ravel(), ones.mean(axis=0), atol=1e-5)
    top = np.linalg.eigvalsh(np.cov(ones, rowvar=False))[-1]
    assert (prior.factor[1, 0] ** 2).sum() == pytest.approx(top, rel=1e-3)


def test_a_class_of_few_images_still_has_a_prior():
    data = load("digits")
    few = data.train.take(np.concatenate([np.flatnonzero(data.train.label == y)[:3] for y in range(10)]))
    prior = fit_prior(few, 10, 24)
    assert prior.factor.shape == (10, 24, 3, 8, 8)
    assert np.isfinite(prior.factor).all()
