"""Tests of every method against its equations: float64 NumPy, signs by finite differences, and the identities between methods."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, logsumexp, softmax
from torch import nn

from ebjdat_serve.energy import energy
from training.distributed import Noise
from training.loop.loop import descend
from training.methods import Batch, NoState, StepContext
from training.methods.adversary import Attack, Threat, cross_entropy
from training.methods.at import AdversarialTraining, Mart, Standard, Trades, Weat, divergence, mart, weat
from training.methods.curriculum import AucGate
from training.methods.dat import Dat, support
from training.methods.ebjdat import EbJdat, alignment, classification
from training.methods.jem import Jeat, Jem, generative, penalty, ramp
from training.methods.las import LasAt
from training.methods.sharpness import Asam, Awp, perturbed
from training.presets import preset

NOW = StepContext(Threat("linf", 0.1), Noise.seeded(0), 0.5)
LABEL = torch.tensor([0, 1, 2, 3, 0, 1])


class Toy(nn.Module):
    """A smooth float64 network on (N, 3, 2, 2)."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Linear(12, 7).double(), nn.Linear(7, 4).double()

    def forward(self, x):
        return self.head(torch.tanh(self.stem(x.double().flatten(1))))


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(3)
    image, plain, x_neg = (torch.rand(6, 3, 2, 2, generator=draw) for _ in range(3))
    x_adv = (image + 0.1 * (2 * torch.rand(6, 3, 2, 2, generator=draw) - 1)).clamp(0, 1)
    return Batch(image, LABEL, plain, LABEL.flip(0), x_adv, x_neg)


class Still:
    """Chains that are watched and not moved."""

    def saturation(self):
        return torch.tensor(0.0)


class Chained(Still):
    """Chains of no step."""

    def walk(self, noise):
        return torch.rand(6, 3, 2, 2)
        yield


# the losses in NumPy ------------------------------------------------------------------------------------------------


def numpy_logits(net, x):
    w = {name: value.detach().numpy() for name, value in net.named_parameters()}
    hidden = np.tanh(x.double().flatten(1).numpy() @ w["stem.weight"].T + w["stem.bias"])
    return hidden @ w["head.weight"].T + w["head.bias"]


def numpy_losses(f, g, y):
    """Losses of clean logits f and adversarial logits g, by their papers, beta = 5."""
    p, q, rows = softmax(f, axis=1), softmax(g, axis=1), np.arange(len(y))
    ce, ce_adv = (-np.log(part[rows, y]) for part in (p, q))
    kl = (p * (np.log(p) - np.log(q))).sum(axis=1)
    rival = np.where(np.eye(4, dtype=bool)[y], -np.inf, q).max(axis=1)
    weight = 1 / np.log(1 + np.exp(np.abs(-logsumexp(f, axis=1))))
    return {
        "standard": ce.mean(),
        "at": ce_adv.mean(),
        "trades": ce.mean() + 5 * kl.mean(),
        "mart": (ce_adv - np.log(1.0001 - rival)).mean() + 5 * (kl * (1.0000001 - p[rows, y])).mean(),
        "weat": (weight * ce).mean() + 5 * (weight * kl).mean(),
        "weat adversarial": (weight * ce_adv).mean() + 5 * (weight * kl).mean(),
    }


ROBUST = {
    "standard": Standard(),
    "at": AdversarialTraining(),
    "trades": Trades(beta=5.0),
    "mart": Mart(beta=5.0),
    "weat": Weat(beta=5.0),
    "weat adversarial": Weat(beta=5.0, adversarial=True),
}


@pytest.mark.parametrize("name", ROBUST)
def test_robust_losses_equal_an_independent_float64_computation(name, batch):
    net = Toy()
    expected = numpy_losses(numpy_logits(net, batch.image), numpy_logits(net, batch.x_adv), LABEL.numpy())[name]
    assert ROBUST[name].loss(net, batch, NoState(), NOW).loss.item() == pytest.approx(expected, rel=1e-9)


def test_ebjdat_and_jem_losses_equal_an_independent_float64_computation(batch):
    net = Toy()
    f, g, plain, neg = (numpy_logits(net, x) for x in (batch.image, batch.x_adv, batch.plain, batch.x_neg))
    e, e_adv, e_plain, e_neg = (-logsumexp(z, axis=1) for z in (f, g, plain, neg))
    ce, ce_adv = (-np.log(softmax(z, axis=1)[np.arange(6), LABEL]) for z in (f, g))
    squares = (e_plain**2).mean() + (e_neg**2).mean()
    common = {"w1": 0.7, "w2": 1.3, "w3": 0.9, "w1_ramp": 0.0, "clean_weight": 0.25, "energy_penalty": 0.01}
    h1, h3 = e_plain.mean() - e_neg.mean(), 0.25 * ce.mean() + 0.75 * ce_adv.mean()
    gaps = {
        "paper": (e_adv - e).mean(),
        "mean": abs((e_adv - e).mean()),
        "absolute": abs(e_adv - e).mean(),
        "relative": abs((e_adv - e).mean()) / e.std(ddof=1),
        "kl": (softmax(f, axis=1) * (log_softmax(f, axis=1) - log_softmax(g, axis=1))).sum(axis=1).mean(),
        "released": e_plain.mean() - e_adv.mean(),
    }
    for kind, h2 in gaps.items():
        loss = EbJdat(alignment=kind, **common).loss(net, batch, Still(), NOW).loss
        assert loss.item() == pytest.approx(0.7 * h1 + 1.3 * h2 + 0.9 * h3 + 0.01 * squares, rel=1e-9)
    squares_adv = (e_adv**2).mean() + (e_neg**2).mean()
    loss = Jeat(w1=0.7, w1_ramp=0.0, energy_penalty=0.01).loss(net, batch, Still(), NOW).loss
    assert loss.item() == pytest.approx(ce_adv.mean() + 0.7 * (e_adv.mean() - e_neg.mean()) + 0.01 * squares_adv, rel=1e-9)
    loss = Jem(w1=0.7, w1_ramp=0.0, energy_penalty=0.01).loss(net, batch, Still(), NOW).loss
    assert loss.item() == pytest.approx(ce.mean() + 0.7 * h1 + 0.01 * squares, rel=1e-9)


def test_ebjdat_that_climbs_kl_finds_the_x_adv_of_trades(batch):
    """Recipe 3, TRADES with a likelihood: w1 = 0, w2 = beta, the clean cross-entropy alone."""
    net, attack, generator = Toy(), Attack(start="gaussian"), torch.Generator()
    found = []
    for method in (EbJdat(inner="kl", attack=attack), Trades(attack=attack)):
        now = StepContext(Threat("linf", 0.1), Noise(generator.manual_seed(1)), 0.5)
        found.append(method.solve(net, batch, Chained() if isinstance(method, EbJdat) else NoState(), now).x_adv)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    joint = EbJdat(w1=0.0, w2=6.0, alignment="kl", inner="kl", clean_weight=1.0, energy_penalty=0.0)
    expected = Trades(beta=6.0).loss(net, batch, NoState(), NOW).loss
    torch.testing.assert_close(joint.loss(net, batch, Still(), NOW).loss, expected)


def test_the_released_inner_loop_raises_the_labels_logit_and_is_not_brought_back_into_the_ball(batch):
    """Five sign steps of eps/4 from a uniform start in the ball, clipped to the box alone."""
    net, eps, seed = Toy(), 0.1, torch.Generator()
    now = StepContext(Threat("linf", eps), Noise(seed.manual_seed(1)), 0.5)
    found = EbJdat(inner="released", attack=Attack(steps=5)).solve(net, batch, Chained(), now).x_adv
    clean, rows = net(batch.image).detach(), torch.arange(6)
    x = (batch.image + eps * (2 * Noise(seed.manual_seed(1)).uniform(*batch.image.shape) - 1)).clamp(0, 1)
    for _ in range(5):
        x = x.detach().requires_grad_()
        logits = net(x)
        turn = 2 - 2 * F.cosine_similarity(logits, clean, dim=1)
        (gradient,) = torch.autograd.grad((logits[rows, LABEL] + turn).sum(), x)
        x = (x + eps / 4 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(found, x.detach())
    assert (found - batch.image).abs().max() > 1.2 * eps
    assert net(found)[rows, LABEL].mean() > clean[rows, LABEL].mean()  # easier images, not harder ones


def test_dat_loss_equals_an_independent_float64_computation(batch):
    net = Toy()
    s, s_neg = (logsumexp(numpy_logits(net, x), axis=1) for x in (batch.plain, batch.x_neg))
    ce_adv = -np.log(softmax(numpy_logits(net, batch.x_adv), axis=1)[np.arange(6), LABEL]).mean()
    bce = 0.5 * (np.log1p(np.exp(-s)).mean() + np.log1p(np.exp(s_neg)).mean())
    method, memory = Dat(bce_weight=0.6), type("MethodState", (), {"gate": AucGate(0.8, 5, 100)})()
    assert method.loss(net, batch, memory, NOW).loss.item() == pytest.approx(ce_adv + 0.6 * bce, rel=1e-9)


def test_las_smooths_labels_as_its_paper_does(batch):
    net = Toy()
    g = numpy_logits(net, batch.x_adv)
    target = np.where(np.eye(4, dtype=bool)[LABEL], 0.7, 0.1)
    assert LasAt(smoothing=0.3).loss(net, batch, None, NOW).loss.item() == pytest.approx(
        -(target * np.log(softmax(g, axis=1))).sum(axis=1).mean(), rel=1e-9
    )


@pytest.mark.parametrize("name", ["at", "trades"])
def test_awp_takes_its_gradient_where_numpy_says_and_restores_exactly(name, batch):
    """v = gamma ||w|| g / ||g|| per weight matrix, g by central differences of the NumPy loss."""
    net, gamma = Toy(), 0.05
    kept = {key: value.detach().clone() for key, value in net.named_parameters()}

    def loss_at(weights):
        with torch.no_grad():
            for key, value in net.named_parameters():
                value.copy_(weights[key])
        return numpy_losses(numpy_logits(net, batch.image), numpy_logits(net, batch.x_adv), LABEL.numpy())[name]

    moved = dict(kept)
    for key in ("stem.weight", "head.weight"):
        gradient = np.zeros(kept[key].shape)
        for i in np.ndindex(*gradient.shape):
            ends = []
            for sign in (1, -1):
                shifted = kept[key].clone()
                shifted[i] += sign * 1e-6
                ends.append(loss_at({**kept, key: shifted}))
            gradient[i] = (ends[0] - ends[1]) / 2e-6
        w = kept[key].numpy()
        moved[key] = torch.from_numpy(w + gamma * np.linalg.norm(w) * gradient / np.linalg.norm(gradient))
    expected = loss_at(moved)
    loss_at(kept)

    stage = replace(preset("pgd-at", "digits"), sharpness=Awp(gamma=gamma))
    terms = descend(net, lambda: ROBUST[name].loss(net, batch, NoState(), NOW), stage, 0.5)
    assert terms.loss.item() == pytest.approx(expected, rel=1e-6)
    for key, value in net.named_parameters():
        assert torch.equal(value.detach(), kept[key])
        assert value.grad is not None


# sharpness ----------------------------------------------------------------------------------------------------------


def test_asam_climbs_by_its_formula_restores_exactly_and_keeps_the_second_gradient(batch):
    net, rho = Toy(), 0.5
    kept = [w.detach().clone() for w in net.parameters()]

    def loss():
        return cross_entropy(net(batch.image), LABEL).mean()

    gradient = torch.autograd.grad(loss(), list(net.parameters()))
    length = torch.cat([(w.abs() * g).flatten() for w, g in zip(kept, gradient, strict=True)]).norm()
    with perturbed(net, lambda: loss().backward(), Asam(rho=rho)):
        for w, before, g in zip(net.parameters(), kept, gradient, strict=True):
            torch.testing.assert_close(w.detach(), before + rho * before**2 * g / length)
            assert w.grad is None
        loss().backward()
        second = [w.grad.clone() for w in net.parameters()]
    for w, before, g, first in zip(net.parameters(), kept, second, gradient, strict=True):
        assert torch.equal(w.detach(), before)
        assert torch.equal(w.grad, g)
        assert not torch.equal(g, first)


def test_weights_come_back_even_after_an_error_and_statistics_follow_one_forward():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    x = torch.rand(5, 3, 8, 8)
    kept = [w.detach().clone() for w in net.parameters()]

    def climb():
        net(x).square().mean().backward()

    with pytest.raises(ZeroDivisionError), perturbed(net, climb, Asam(rho=0.1)):
        after_first = net[1].running_mean.clone()
        net(x + 1)
        assert torch.equal(net[1].running_mean, after_first)
        _ = 1 / 0
    assert all(torch.equal(w.detach(), before) for w, before in zip(net.parameters(), kept, strict=True))
    assert net[1].momentum == 0.1


# signs --------------------------------------------------------------------------------------------------------------


def energies(net, batch):
    return {name: energy(net(getattr(batch, name))) for name in ("image", "x_adv", "plain", "x_neg")}


TERMS = {
    # term: (loss, what one small step against its gradient must lower)
    "h1": (lambda n, b, e: generative(e["plain"], e["x_neg"]), lambda n, b, e: e["plain"].mean() - e["x_neg"].mean()),
    "h2 relative": (lambda n, b, e: alignment(e["image"], e["x_adv"], "relative"), lambda n, b, e: (e["x_adv"] - e["image"]).mean().abs()),
    "h2 absolute": (lambda n, b, e: alignment(e["image"], e["x_adv"], "absolute"), lambda n, b, e: (e["x_adv"] - e["image"]).abs().mean()),
    "h2 paper": (lambda n, b, e: alignment(e["image"], e["x_adv"], "paper"), lambda n, b, e: (e["x_adv"] - e["image"]).mean()),
    "h3": (
        lambda n, b, e: classification(n(b.image), n(b.x_adv), LABEL, 0.5),
        lambda n, b, e: -F.softmax(n(b.x_adv), dim=1).gather(1, LABEL[:, None]).log().mean(),
    ),
    "penalty": (lambda n, b, e: penalty(e["plain"], e["x_neg"]), lambda n, b, e: e["plain"].square().mean() + e["x_neg"].square().mean()),
    "bce data": (lambda n, b, e: support(e["plain"], e["x_neg"]), lambda n, b, e: e["plain"].mean() - e["x_neg"].mean()),
    "kl": (lambda n, b, e: divergence(n(b.image), n(b.x_adv)).mean(), lambda n, b, e: divergence(n(b.image), n(b.x_adv)).mean()),
    "mart": (lambda n, b, e: sum(mart(n(b.image), n(b.x_adv), LABEL)), lambda n, b, e: cross_entropy(n(b.x_adv), LABEL).mean()),
    "weat": (
        lambda n, b, e: sum(weat(n(b.image), n(b.x_adv), LABEL, adversarial=False)),
        lambda n, b, e: cross_entropy(n(b.image), LABEL).mean(),
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_of_every_term_is_its_finite_difference_and_descent_does_what_the_equation_is_for(name, batch):
    net = Toy(seed=1)
    term, purpose = TERMS[name]
    weights = list(net.parameters())
    gradient = torch.autograd.grad(term(net, batch, energies(net, batch)), weights)
    squared = float(sum((g**2).sum() for g in gradient))

    def after(step):
        with torch.no_grad():
            for w, g in zip(weights, gradient, strict=True):
                w.sub_(step * g)
            values = float(term(net, batch, energies(net, batch))), float(purpose(net, batch, energies(net, batch)))
            for w, g in zip(weights, gradient, strict=True):
                w.add_(step * g)
        return values

    step = 1e-6 / squared**0.5
    slope = (after(step)[0] - after(-step)[0]) / (2 * step)
    if name != "weat":  # its weights are held constant, so its gradient is not that of the whole expression
        assert slope == pytest.approx(-squared, rel=1e-4)
    assert after(100 * step)[1] < after(0.0)[1]


def test_bce_weighs_the_likelihood_gradient_by_one_minus_sigma_and_sigma():
    e, e_neg = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    support(e, e_neg).backward()
    s, s_neg = -e.detach(), -e_neg.detach()
    torch.testing.assert_close(e.grad, 0.5 * (1 - torch.sigmoid(s)) / 5)
    torch.testing.assert_close(e_neg.grad, -0.5 * torch.sigmoid(s_neg) / 5)


def test_a_shift_of_all_logits_changes_bce_and_not_cross_entropy():
    logits = torch.randn(6, 4)
    torch.testing.assert_close(cross_entropy(logits + 3.0, LABEL), cross_entropy(logits, LABEL))
    assert support(energy(logits + 3.0), energy(logits)) < support(energy(logits), energy(logits))


def test_only_the_relative_alignment_cannot_be_lowered_by_shrinking_the_logits():
    energy_x, energy_adv = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 1.0, 6.0])
    for kind in ("relative", "mean", "absolute"):
        ratio = float(alignment(energy_x / 2, energy_adv / 2, kind) / alignment(energy_x, energy_adv, kind))
        assert ratio == pytest.approx(1.0 if kind == "relative" else 0.5)


def test_an_unknown_alignment_is_an_error():
    with pytest.raises(ValueError, match="alignment must be"):
        alignment(torch.zeros(2), torch.ones(2), "squared")


def test_w1_rises_from_zero():
    at = [ramp(0.4, 0.2, replace(NOW, progress=progress)) for progress in (0.0, 0.1, 0.2, 1.0)]
    assert at == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert ramp(0.4, 0.0, replace(NOW, progress=0.0)) == 0.4
