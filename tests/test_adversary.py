"""Tests of the inner maximisation: it stays in the ball and the box, raises its objective, and does not change the network."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve.energy import energy, joint_energy
from ebjdat_serve.networks.wideresnet import WideResNet
from training.distributed import Noise
from training.evaluation.attacks import survivors
from training.evaluation.autoattack import AutoAttack
from training.evaluation.evaluated_model import open_module
from training.methods.adversary import INNER, Attack, Threat, ascent, begin, climb, cross_entropy, divergence, frozen, pgd, project


@pytest.fixture
def image():
    return torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LABEL = torch.arange(12) % 4
THREATS = [Threat("linf", 0.1), Threat("l2", 0.7)]


def length(delta, norm):
    return delta.flatten(1).abs().max(dim=1).values if norm == "linf" else delta.flatten(1).norm(dim=1)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
@pytest.mark.parametrize("name", sorted(INNER))
def test_pgd_stays_in_ball_and_box_raises_its_objective_and_leaves_the_network_alone(model, image, name, threat):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x_adv = pgd(model, image, LABEL, objective=INNER[name], threat=threat, attack=Attack(steps=8), noise=Noise.seeded(0))
    assert length(x_adv - image, threat.norm).max() <= threat.eps + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not x_adv.requires_grad
    assert model.training
    model.eval()
    with torch.no_grad():
        assert INNER[name](model(x_adv), LABEL).mean() > INNER[name](model(image), LABEL).mean() + 1e-3
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@given(
    st.floats(0.01, 2.0),
    st.sampled_from(["linf", "l2"]),
    st.integers(0, 2**31),
)
def test_projection_lands_in_ball_and_box_and_moves_nothing_that_is_there(eps, norm, seed):
    generator = torch.Generator().manual_seed(seed)
    image, far = torch.rand(3, 3, 4, 4, generator=generator), 3 * torch.randn(3, 3, 4, 4, generator=generator)
    threat = Threat(norm, eps)
    x = project(far, image, threat)
    assert length(x - image, norm).max() <= eps * (1 + 1e-5)
    assert 0 <= x.min() <= x.max() <= 1
    torch.testing.assert_close(project(x, image, threat), x, rtol=1e-5, atol=1e-6)


def test_an_infinite_radius_leaves_only_the_box(image):
    far = image + 3.0 * torch.randn(image.shape)
    torch.testing.assert_close(project(far, image, Threat("l2", torch.inf)), far.clamp(0, 1))


def test_starts_are_where_they_say(image):
    image = 0.25 + 0.5 * image
    linf, l2, noise = Threat("linf", 0.1), Threat("l2", 0.7), Noise.seeded(0)
    assert torch.equal(begin(image, linf, "image", noise), image)
    assert 0 < (begin(image, linf, "gaussian", noise) - image).abs().max() < 0.01
    spread = (begin(image, linf, "uniform", noise) - image) / 0.1
    assert spread.abs().max() <= 1 + 1e-5
    assert 0.45 < spread.abs().mean() < 0.55
    radius = length(begin(image, l2, "uniform", noise) - image, "l2")
    assert radius.max() <= 0.7 + 1e-5
    assert radius.min() > 0.5  # in 192 dimensions nearly all of a ball is near its surface
    with pytest.raises(ValueError, match="start must be"):
        begin(image, linf, "zero", noise)
    with pytest.raises(ValueError, match="norm must be"):
        Threat("l1", 0.1)


def test_an_l2_step_has_unit_length_and_no_nan_without_a_gradient():
    gradient = torch.randn(5, 3, 4, 4)
    gradient[0] = 0
    step = ascent(gradient, "l2")
    torch.testing.assert_close(length(step, "l2")[1:], torch.ones(4), rtol=1e-4, atol=1e-4)
    assert torch.equal(step[0], torch.zeros(3, 4, 4))


def test_climbing_no_step_returns_the_seed_and_more_steps_climb_higher(model, image):
    objective, box = INNER["class_logit"], Threat("l2", torch.inf)
    with frozen(model), torch.no_grad():
        values = []
        for steps in (0, 2, 8):
            with torch.enable_grad():
                x = climb(model, image, LABEL, objective, box, steps, 0.2)
            values.append(float(objective(model(x), LABEL).mean()))
            if steps == 0:
                assert torch.equal(x, image)
    assert values[0] < values[1] < values[2]


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


def test_cross_entropy_is_the_difference_of_energies():
    logits, label = torch.randn(3, 4), torch.tensor([0, 1, 2])
    torch.testing.assert_close(cross_entropy(logits, label), joint_energy(logits, label) - energy(logits))


def test_divergence_is_zero_at_home_and_positive_elsewhere():
    logits = torch.randn(5, 4)
    torch.testing.assert_close(divergence(logits, logits), torch.zeros(5))
    assert (divergence(logits, torch.randn(5, 4)) > 0).all()


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
def test_survivors_are_no_more_than_what_pgd_leaves(model, image, threat):
    model.eval().requires_grad_(False)
    label = model(image).argmax(dim=1)
    x_adv = pgd(model, image, label, objective=cross_entropy, threat=threat, attack=Attack(steps=20), noise=Noise.seeded(0))
    assert survivors(model, image, label, Threat(threat.norm, 0.0)) == 12
    assert survivors(model, image, label, threat) <= int((model(x_adv).argmax(dim=1) == label).sum())


def test_autoattack_runs_stays_in_its_ball_and_leaves_less_than_clean():
    torch.manual_seed(0)
    net = WideResNet(10, 1, 4).eval().requires_grad_(False)
    image = torch.rand(4, 3, 8, 8)
    label = net(image).argmax(dim=1)
    found = AutoAttack(Threat("linf", 0.3)).run(open_module("net", net, ""), image.numpy(), label.numpy())
    assert found["robust_mask"].sum() < 4
    with torch.no_grad():
        right = found["logits"].argmax(axis=1) == label.numpy()
    assert (right == found["robust_mask"]).all()
    assert any(note.startswith("apgd-ce left") for note in found["notes"])


@pytest.mark.parametrize("depth", [10, 16])
def test_folded_norms_are_the_same_function_with_the_same_gradient(depth, image):
    torch.manual_seed(0)
    net = WideResNet(depth, 2, 4).train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(32, 3, 8, 8))
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    net.eval().requires_grad_(False)
    x, y = image.clone().requires_grad_(), image.clone().requires_grad_()
    f, g = net(x), net.folded()(y)
    torch.testing.assert_close(g, f, rtol=1e-4, atol=1e-4)
    f.square().sum().backward()
    g.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-3 * float(x.grad.abs().max()))
