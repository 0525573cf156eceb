"""Tests of the equations of energy.py."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ebjdat_serve.energy import MARGINAL, energy, energy_of, joint_energy, logit_weights, score
from ebjdat_serve.networks.wideresnet import WideResNet

logits_of = arrays(np.float64, st.tuples(st.integers(1, 5), st.just(4)), elements=st.floats(-30, 30)).map(torch.from_numpy)


@given(logits_of)
def test_cross_entropy_is_joint_minus_marginal(logits):
    label = torch.arange(len(logits)) % 4
    torch.testing.assert_close(F.cross_entropy(logits, label, reduction="none"), joint_energy(logits, label) - energy(logits))


@given(logits_of, st.floats(-10, 10))
def test_energy_shifts_with_the_logits(logits, c):
    torch.testing.assert_close(energy(logits + c), energy(logits) - c)


@given(logits_of)
def test_energy_lies_below_the_lowest_joint_energy_by_at_most_log_k(logits):
    lowest = (-logits).min(dim=1).values
    assert (energy(logits) <= lowest + 1e-9).all()
    assert (energy(logits) >= lowest - np.log(4) - 1e-9).all()


@given(logits_of)
def test_energy_of_is_joint_for_a_class_and_marginal_for_minus_one(logits):
    label = torch.arange(len(logits)) % 4
    torch.testing.assert_close(energy_of(logits, label), joint_energy(logits, label))
    torch.testing.assert_close(energy_of(logits, torch.full_like(label, MARGINAL)), energy(logits))
    torch.testing.assert_close(logit_weights(logits, label).sum(dim=1), torch.ones(len(logits), dtype=logits.dtype))


def test_score_is_minus_the_gradient_of_the_energy_by_finite_differences():
    torch.manual_seed(0)
    model = WideResNet(10, 1, 4).double().eval()
    image = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    label = torch.tensor([2, MARGINAL])
    gradient, value = score(model, image, label)
    h = 1e-6
    for place in ((0, 0, 3, 4), (1, 2, 5, 1), (1, 1, 0, 7)):
        up, down = image.clone(), image.clone()
        up[place] += h
        down[place] -= h
        with torch.no_grad():
            slope = (energy_of(model(up), label) - energy_of(model(down), label))[place[0]] / (2 * h)
        assert abs(float(gradient[place] + slope)) < 1e-6 * max(1.0, abs(float(slope)))
    with torch.no_grad():
        torch.testing.assert_close(value, energy_of(model(image), label))


def test_score_leaves_parameters_without_gradient():
    model = WideResNet(10, 1, 3).eval()
    score(model, torch.rand(1, 3, 8, 8), torch.tensor([0]))
    assert all(parameter.grad is None for parameter in model.parameters())
