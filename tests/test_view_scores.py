"""Tests of the attacked score of the flag against the served one: views, ranks and their sum, and their gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve import views
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.views import DEFAULT_VIEWS, VIEWS, View, rank_term
from tests.conftest import DIGITS
from tests.test_views import FITTED, KNOWN, ranked, seen
from training.data.datasets import load
from training.evaluation.adaptive import Evade, ScoreAttack
from training.evaluation.evaluated_model import bundle_spec
from training.evaluation.view_scores import (
    APART,
    FORMS,
    SPREAD,
    SeenTensors,
    entropy,
    histogram,
    rank_of,
    statistics,
    sum_of_views,
    without_form,
)
from training.methods.adversary import Threat

CPU = torch.device("cpu")


def tensors(found, dtype=torch.float32):
    return SeenTensors(*(torch.from_numpy(part).to(dtype) for part in (found.image, found.features, found.logits)))


def stored_of(name, dtype=torch.float32):
    return {key: torch.from_numpy(np.asarray(array)).to(dtype) for key, array in FITTED.ready[name].items()}


def test_every_view_has_a_differentiable_form():
    assert set(FORMS) == set(VIEWS)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_a_form_is_the_served_view(name, shift):
    asked = seen(40, 5, shift)
    served = views.score_of(VIEWS[name], FITTED.ready[name], asked)
    found = FORMS[name](stored_of(name), tensors(asked)).numpy()
    np.testing.assert_allclose(found, served, rtol=2e-3, atol=2e-3 * np.abs(served).mean() + 1e-12)


@pytest.mark.parametrize("name", VIEWS)
def test_a_forms_gradient_is_its_slope(name):
    """By central differences in double precision; of the statistics the entropy, which is a histogram, is left out."""
    asked = tensors(seen(3, 6), torch.float64)
    stored = stored_of(name, torch.float64)
    if name == "statistics":
        stored["whitening"][4] = 0.0
    rng = torch.Generator().manual_seed(0)
    for part in ("image", "features", "logits"):
        x = getattr(asked, part)

        def score(moved, part=part):
            return FORMS[name](stored, SeenTensors(**{**vars(asked), part: moved})).sum()

        leaf = x.clone().requires_grad_()
        total = score(leaf)
        if not total.requires_grad:
            continue  # the view does not look at this part
        (gradient,) = torch.autograd.grad(total, leaf)
        assert gradient.abs().sum() > 0
        for _ in range(5):
            way = torch.randn(x.shape, generator=rng, dtype=torch.float64)
            slope = (score(x + 1e-7 * way) - score(x - 1e-7 * way)) / 2e-7
            assert float((gradient * way).sum()) == pytest.approx(float(slope), rel=1e-3, abs=1e-3)


def test_the_entropy_is_exact_and_its_gradient_that_of_a_soft_histogram():
    images = seen(6, 7).image
    images[0] = 0.5  # a flat image
    found = statistics(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, views.statistics(images), atol=2e-4)
    x = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    torch.testing.assert_close(histogram(x.round(), 1).sum(dim=1), torch.ones(2, dtype=torch.float64))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(entropy(histogram(leaf, SPREAD)).sum(), leaf)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = (entropy(histogram(x + 1e-6 * way, SPREAD)) - entropy(histogram(x - 1e-6 * way, SPREAD))).sum() / 2e-6
    assert float((gradient * way).sum()) == pytest.approx(float(slope), rel=1e-4)
    image = torch.from_numpy(seen(2, 8).image).requires_grad_()
    (through,) = torch.autograd.grad(statistics(image)[:, 4].sum(), image)
    assert through.abs().sum() > 0


def test_a_flat_image_has_a_finite_gradient():
    image = torch.full((1, 3, 8, 8), 0.25, requires_grad=True)
    (gradient,) = torch.autograd.grad(FORMS["statistics"](stored_of("statistics"), SeenTensors(image, image, image)).sum(), image)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0  # of the brightness


values = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=60)


@given(values, values)
def test_a_rank_is_the_served_term_and_its_stand_in_near_it(clean, asked):
    clean = np.sort(np.array(clean, np.float32))
    score = np.array([*asked, *clean], np.float32)
    rank, n = rank_of(clean, CPU), len(clean)
    exact = rank_term(clean, score)
    np.testing.assert_allclose(rank(torch.from_numpy(score)).numpy(), exact, atol=1e-5)
    np.testing.assert_allclose(rank.exact(torch.from_numpy(score)).numpy(), exact, atol=1e-5)
    smooth = rank.smooth(torch.from_numpy(score)).numpy()
    terms = np.unique(np.append(rank_term(clean, clean), np.log(n + 1)))
    step = np.diff(terms).max(initial=0.0)  # of one rank
    inside = score <= clean[-1]
    assert (np.abs(smooth - exact)[inside] <= APART + step + 1e-4).all()
    assert (smooth[score < clean[0]] == 0).all()
    order = np.argsort(score)
    assert (np.diff(smooth[order]) >= -1e-5).all()


def test_a_rank_has_a_gradient_wherever_it_can_be_lowered():
    clean = np.sort(np.random.default_rng(0).normal(size=500)).astype(np.float32)
    rank = rank_of(clean, CPU)
    x = torch.tensor([-1.0, 0.0, 1.0, 3.0, 50.0, 5000.0], requires_grad=True)
    value = rank(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert (gradient > 0).all()
    assert value[-1].detach().item() == pytest.approx(np.log(501))  # what is served is not larger
    step = torch.tensor(1e-3)
    for at in (-1.0, 0.5, 10.0):
        point = torch.tensor([at], requires_grad=True)
        (slope,) = torch.autograd.grad(rank.smooth(point).sum(), point)
        with torch.no_grad():
            rise = (rank.smooth(point + step) - rank.smooth(point - step)) / (2 * step)
        assert float(slope) == pytest.approx(float(rise), rel=0.05)


def test_the_sum_is_the_served_one():
    combination = ranked(list(DEFAULT_VIEWS))
    asked = seen(60, 8, shift=0.3)
    served = combination.score(combination.terms(asked))
    found = sum_of_views(combination, CPU)(tensors(asked)).numpy()
    assert np.abs(found - served).max() < 0.2  # a rank or two, by rounding
    assert np.median(np.abs(found - served)) < 1e-4


def test_a_view_without_a_form_is_named_and_adds_nothing():
    known = {**VIEWS, "corner": View(lambda stored, seen: seen.image[:, 0, 0, 0].astype(np.float64), "its corner")}
    combination = ranked(["logits", "corner"], KNOWN, known)
    assert without_form(combination) == ["corner"]
    asked = seen(10, 9)
    alone = sum_of_views(ranked(["logits"]), CPU)(tensors(asked))
    torch.testing.assert_close(sum_of_views(combination, CPU)(tensors(asked)), alone)


def test_a_bundles_attacked_score_is_what_it_serves():
    subject = bundle_spec(DIGITS)()
    bundle = Bundle.load(DIGITS)
    image = to_unit(load("digits").test.image[:50])
    served = subject.look(image)
    assert served["terms"].shape == (50, len(bundle.calibration().views))
    with torch.no_grad():
        logits, total = subject.scored("views", 0.0, torch.from_numpy(image))
    np.testing.assert_allclose(logits.numpy(), served["logits"], atol=1e-3)
    assert np.abs(total.numpy() - served["terms"].sum(axis=1)).max() < 0.5
    assert np.median(np.abs(total.numpy() - served["terms"].sum(axis=1))) < 1e-4


def test_attacks_lower_and_raise_the_served_sum_and_every_view_takes_part():
    subject = bundle_spec(DIGITS)()
    digits = load("digits")
    image, label = to_unit(digits.test.image[:20]), digits.test.label[:20]
    noise = np.random.default_rng(0).random(image.shape, np.float32)
    threat = Threat("linf", 51 / 255)
    for up, start in ((True, image), (False, noise)):
        before = subject.look(start)["terms"]
        found = ScoreAttack(threat, "views", 0.0, up, steps=20).run(subject, start, label)
        moved = (found["terms"].sum(axis=1) - before.sum(axis=1)) * (1 if up else -1)
        assert (moved >= -1e-6).all()
        assert moved.mean() > 0.5
    named = subject.views.combination.stored
    x = torch.from_numpy(image).requires_grad_()
    for column, name in enumerate(named):
        seen_ = SeenTensors(x, subject.views.features(x), subject.views.head(subject.views.features(x)))
        term = subject.views.total.ranks[name](FORMS[name](subject.views.total.stored[name], seen_))
        (gradient,) = torch.autograd.grad(term.sum(), x)
        assert gradient.flatten(1).abs().sum(dim=1).min() > 0, (name, column)


def test_evasion_of_the_sum_is_judged_by_the_served_sum():
    subject = bundle_spec(DIGITS)()
    digits = load("digits")
    image, label = to_unit(digits.test.image[:20]), digits.test.label[:20]
    threat = Threat("linf", 51 / 255)
    holds = {
        threshold: Evade(threat, "views", 0.0, threshold, 1.0, "joint", steps=20).run(subject, image, label)["holds"].mean()
        for threshold in (-1.0, 2.0, 100.0)
    }
    assert holds[-1.0] == 1.0  # all are flagged
    assert holds[100.0] < holds[2.0] < 1.0
