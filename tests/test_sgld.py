"""Tests of Langevin sampling and the prior."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve.energy import score as energy_score
from ebjdat_serve.engines import Outputs
from ebjdat_serve.generation import generate
from ebjdat_serve.networks.wideresnet import WideResNet
from ebjdat_serve.sgld import Chains, Prior, Sampler, langevin_step, noises, sgld


@given(st.integers(0, 2**31), st.floats(0, 2), st.floats(0, 1))
def test_a_step_stays_in_the_box(seed, step_size, noise_std):
    rng = np.random.default_rng(seed)
    x, drift, noise = (rng.normal(size=(2, 3, 4, 4)).astype(np.float32) * scale for scale in (1, 50, 5))
    y = langevin_step(x.clip(0, 1), drift, noise, Sampler(1, step_size, 2.0, noise_std))
    assert y.min() >= 0
    assert y.max() <= 1


def test_no_step_and_no_noise_is_the_identity():
    x = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)
    np.testing.assert_array_equal(sgld(np.ones_like, x, lambda: np.ones_like(x), Sampler(5, 0.0, 1.0, 0.0)), x)


def test_numpy_and_torch_walk_the_same_chain():
    torch.manual_seed(0)
    model = WideResNet(10, 1, 3).eval()
    x = np.random.default_rng(1).random((2, 3, 8, 8), dtype=np.float32)
    noise = np.random.default_rng(2).standard_normal((20, *x.shape), dtype=np.float32)
    label = torch.tensor([0, 2])
    sampler = Sampler(20, 0.5, 1.0, 0.01)

    def torch_score(image):
        return energy_score(model, image, label)[0]

    a, b = iter(noise), iter(noise)
    by_torch = sgld(torch_score, torch.from_numpy(x), lambda: torch.from_numpy(next(a)), sampler)
    by_numpy = sgld(lambda image: torch_score(torch.from_numpy(image)).numpy(), x, lambda: next(b), sampler)
    np.testing.assert_allclose(by_numpy, by_torch.numpy(), atol=1e-6)


def test_the_inner_steps_of_pyld_are_one_proximal_step_when_the_first_layer_is_affine():
    # JEM++ repeats N clipped steps with the first layer's gradient held fixed; that gradient is constant in x
    x = np.random.default_rng(0).random((1, 3, 4, 4))
    gradient = np.random.default_rng(1).normal(size=x.shape) * 3
    by_inner = x
    for _ in range(5):
        by_inner = langevin_step(by_inner, gradient, 0.0, Sampler(1, 0.05, 2.0, 0.0))
    at_once = langevin_step(x, gradient, 0.0, Sampler(1, 0.25, 2.0, 0.0))
    np.testing.assert_allclose(by_inner, at_once, atol=1e-12)


def test_langevin_on_a_quadratic_energy_has_the_right_mean_and_spread():
    # E = (x - m)^2 / (2 s^2), step h and noise sqrt(2 h): stationary N(m, about s^2)
    m, s, h = 0.5, 0.05, 1e-4
    rng = np.random.default_rng(0)
    x = np.full((4000, 1, 1, 1), 0.3)
    sampler = Sampler(400, h, 1e9, float(np.sqrt(2 * h)))
    x = sgld(lambda x: (m - x) / s**2, x, lambda: rng.standard_normal(x.shape), sampler)
    assert abs(x.mean() - m) < 0.004
    assert abs(x.std() - s / np.sqrt(1 - h / (2 * s**2))) < 0.003


def test_image_i_depends_on_its_own_seed_only():
    prior, sampler = Prior(np.full((3, 3, 2, 2), 0.5, np.float32), np.ones((3, 2, 3, 2, 2), np.float32)), Sampler(3, 0.1, 1.0, 0.01)
    together = Chains.start(prior, sampler, np.array([0, 2, 1]), seed=7)
    alone = Chains.start(prior, sampler, np.array([2]), seed=8)
    for name, array in alone.arrays().items():
        np.testing.assert_array_equal(together.rows(slice(1, 2)).arrays()[name], array)


def test_chains_are_parted_and_joined_again():
    prior = Prior(np.full((3, 3, 2, 2), 0.5, np.float32), np.ones((3, 2, 3, 2, 2), np.float32))
    chains = Chains.start(prior, Sampler(3, 0.1, 1.0, 0.01), np.arange(3), seed=0)
    again = Chains.join([chains.rows([2]), chains.rows(np.array([True, True, False]))])
    np.testing.assert_array_equal(again.label, [2, 0, 1])
    np.testing.assert_array_equal(again.rows([1, 2, 0]).key, chains.key)
    assert chains.moved(chains.image, 5).step.tolist() == [5, 5, 5]


def test_the_prior_round_trips_and_draws_within_the_box(tmp_path):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(3, 5, 3, 4, 4)).astype(np.float16).astype(np.float32)
    prior = Prior(np.asfortranarray(rng.random((3, 3, 4, 4), dtype=np.float32)), np.asfortranarray(factor))
    prior.save(tmp_path / "prior.safetensors")
    again = Prior.load(tmp_path / "prior.safetensors")
    label = np.array([0, 2, 1])
    drawn = again.sample(label, noises(0, 3))
    np.testing.assert_array_equal(drawn, prior.sample(label, noises(0, 3)))
    assert drawn.min() >= 0
    assert drawn.max() <= 1


class Downhill:
    """An engine whose score points to a class's grey level."""

    name, provider = "fake", "none"

    def classify(self, image):
        mean = image.mean(axis=(1, 2, 3))[:, None]
        logits = -np.abs(mean - np.linspace(0, 1, 3)[None]).astype(np.float32)
        return Outputs(logits, -np.log(np.exp(logits).sum(axis=1)), mean)

    def advance(self, chains, steps):
        x = chains.image
        for step in range(steps):
            noise = np.stack([np.random.default_rng((int(key[0, 0]), step)).standard_normal(x.shape[1:]) for key in chains.key])
            each = [value[:, None, None, None] for value in (chains.step_size, chains.grad_clip, chains.noise_std)]
            x = langevin_step(x, chains.label[:, None, None, None] / 2 - x, noise, Sampler(1, *each)).astype(np.float32)
        return chains.moved(x, steps)


def test_generation_is_reproducible_and_does_not_depend_on_the_company():
    prior = Prior(np.full((3, 3, 4, 4), 0.5, np.float32), np.full((3, 2, 3, 4, 4), 0.2, np.float32))
    sampler = Sampler(30, 0.2, 1.0, 0.01)
    many = generate(Downhill(), prior, sampler, np.full(20, 2), seed=5)
    one = generate(Downhill(), prior, sampler, np.full(1, 2), seed=5 + 17)
    np.testing.assert_array_equal(many.image[17], one.image[0])
    assert many.image.mean() > 240
    assert (many.logits.argmax(axis=1) == 2).all()
