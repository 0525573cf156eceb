"""Tests of counterfactuals: the step's equations, the ball, and the same results in any company and engine."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve import counterfactual, pixels
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.counterfactual import BISECTIONS, LONGEST, REACH, STEPS, Searches, advance, counterfactuals, in_levels, length, project
from ebjdat_serve.engines import load_engine
from ebjdat_serve.scheduling import ChainGroup, Policy, Scheduler
from ebjdat_serve.server.compute.explain_task import SearchGroup
from ebjdat_serve.sgld import Chains, Prior
from tests.conftest import DIGITS

SIZE = (3, 4, 4)


class Linear:
    """f(x) = A x + b: a counterfactual of it is known in closed form."""

    provider = "CPUExecutionProvider"

    def __init__(self, weight, bias):
        self.weight, self.bias, self.images = weight.astype(np.float32), bias.astype(np.float32), 0

    def classify(self, image):
        logits = image.reshape(len(image), -1) @ self.weight.T + self.bias
        return logits, -np.logaddexp.reduce(logits, axis=1)

    def score(self, image, label):
        self.images += len(image)
        return self.weight[label].reshape(len(image), *SIZE), -self.classify(image)[0][np.arange(len(label)), label]


@pytest.fixture
def linear():
    rng = np.random.default_rng(0)
    return Linear(rng.normal(size=(3, 48)), rng.normal(size=3))


@pytest.fixture
def images(test_images):
    return pixels.to_unit(test_images[0][4::50])


@pytest.fixture(scope="module")
def engine(shipped):
    return load_engine(shipped, "onnx", "cpu")


def grey(n, seed=0):
    return np.rint(255 * np.random.default_rng(seed).uniform(0.4, 0.6, (n, *SIZE))).astype(np.float32) / np.float32(255)


def norms(s):
    return length(s.best - s.origin, s.linf)


deltas = st.integers(0, 10**6).map(lambda seed: np.random.default_rng(seed).normal(0, 0.2, (5, *SIZE)).astype(np.float32))


@given(deltas, st.floats(0.01, 3), st.booleans())
def test_a_projection_is_in_the_ball_moves_nothing_within_and_is_the_nearest(delta, radius, is_linf):
    linf, radii = np.full(5, is_linf), np.full(5, radius, np.float32)
    found = project(delta, radii, linf)
    assert (length(found, linf) <= radii * (1 + 1e-5)).all()
    inside = length(delta, linf) <= radii
    np.testing.assert_allclose(found[inside], delta[inside], rtol=1e-6)
    np.testing.assert_allclose(project(found, radii, linf), found, rtol=1e-5)
    for other in project(found + np.random.default_rng(1).normal(0, 0.05, delta.shape).astype(np.float32), radii, linf)[None]:
        distance, others = (np.linalg.norm((delta - one).reshape(5, -1), axis=1) for one in (found, other))
        assert (distance <= others + 1e-4).all()


@given(deltas, st.floats(0.01, 3), st.booleans())
def test_whole_levels_stay_in_the_ball_and_are_what_eight_bits_hold(delta, radius, is_linf):
    linf, radii = np.full(5, is_linf), np.full(5, radius, np.float32)
    inside = project(delta, radii, linf)
    levels = in_levels(inside, radii, linf)
    assert (length(levels, linf) <= radii + 1e-6).all()
    np.testing.assert_allclose(levels * 255, np.rint(levels * 255), atol=1e-4)
    assert np.abs(levels - inside).max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(("norm", "radius", "unit"), [("l2", 2.0, np.linalg.norm), ("linf", 0.3, lambda g: 1.0)])
def test_a_step_climbs_the_difference_of_two_logits(linear, norm, radius, unit):
    """x + eta g / ||g||, in l-inf x + eta sign(g), with g = grad f_t - grad f_r."""
    x = grey(4)
    logits, *_ = linear.classify(x)
    target = logits.argmin(axis=1)
    s = Searches.start(x, logits, target, norm=norm, radius=radius)
    moved = counterfactual.ascend(linear, s)
    for i in range(4):
        others = [y for y in np.argsort(-logits[i]) if y != target[i]]
        g = (linear.weight[target[i]] - linear.weight[others[0]]).reshape(SIZE)
        direction = g / unit(g) if norm == "l2" else np.sign(g)
        np.testing.assert_allclose(moved[i], (x[i] + REACH * radius / STEPS * direction).clip(0, 1), atol=1e-5)


def test_of_a_linear_model_the_nearest_is_found_to_a_64th_of_the_way():
    """With two classes the boundary is a plane, at |f_t - f_r| / ||w_t - w_r||."""
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(2, 48)) * 0.05
    model = Linear(weight, np.zeros(2))
    x = grey(20)
    logits, *_ = model.classify(x)
    s = counterfactuals(model, x, norm="l2", radius=3.0)
    plane = (np.abs(logits[:, 0] - logits[:, 1]) + counterfactual.MARGIN) / np.linalg.norm(model.weight[0] - model.weight[1])
    assert s.found.all()
    eta = REACH * 3.0 / STEPS
    assert (norms(s) >= plane - 1e-3).all()
    assert (norms(s) <= plane + (plane + eta) / 2**BISECTIONS + 0.05).all()  # eight bits move it by up to half a level a pixel


def test_what_is_found_is_of_the_target_in_the_ball_and_no_farther_than_the_ascent_went(engine, images):
    s = counterfactuals(engine, images, norm="l2", radius=4.0)
    delivered = pixels.to_unit(pixels.to_bytes(s.best))
    np.testing.assert_array_equal(delivered, s.best)
    logits, *_ = engine.classify(delivered)
    assert s.found.mean() >= 0.9
    assert (logits.argmax(axis=1) == s.target)[s.found].all()
    assert (s.source != s.target).all()
    assert (norms(s) <= s.radius).all()
    for i in np.flatnonzero(s.found):
        ascent = s.path[i, : STEPS + 1, 2]
        ascent = ascent[~np.isnan(ascent)]
        assert (np.diff(ascent) > 0).all()  # in this ball none came to its surface
        assert norms(s)[i] <= ascent[-1]
        tried = s.path[i, STEPS + 1 :]
        assert not np.isnan(tried).any()
        assert np.isclose(s.path[i, :, 2], norms(s)[i]).any()
    assert (
        norms(s)[s.found] < s.path[s.found, : STEPS + 1, 2].max(axis=1, initial=0, where=~np.isnan(s.path[s.found, : STEPS + 1, 2]))
    ).mean() > 0.5


@pytest.mark.parametrize(("norm", "radius"), [("l2", 0.05), ("linf", 1 / 255)])
def test_where_none_is_in_the_ball_the_last_that_was_tried_is_returned(engine, images, norm, radius):
    images = images[:1]
    logits, *_ = engine.classify(images)
    s = counterfactuals(engine, images, logits.argmin(axis=1), norm=norm, radius=radius)
    assert not s.found.any()
    assert (s.step == LONGEST).all()
    assert (norms(s) <= s.radius + 1e-7).all()
    assert np.isnan(s.path[:, STEPS + 1 :]).all()
    np.testing.assert_allclose(s.path[:, STEPS, 3 if norm == "linf" else 2], norms(s), atol=1e-6)


def test_of_its_own_class_an_image_is_its_own_counterfactual(engine, images):
    logits, *_ = engine.classify(images)
    sure = np.sort(logits, axis=1)[:, -1] - np.sort(logits, axis=1)[:, -2] > 0.1
    s = counterfactuals(engine, images, logits.argmax(axis=1), norm="l2", radius=4.0)
    assert s.found[sure].all()
    np.testing.assert_array_equal(s.best[sure], images[sure])


def test_a_larger_probability_is_farther_away(engine, images):
    images = images[:4]
    near, far = (counterfactuals(engine, images, norm="l2", radius=4.0, least=least) for least in (0.0, 0.5))
    both = near.found & far.found
    assert both.sum() >= 2
    assert (norms(far)[both] >= norms(near)[both]).all()
    probability = np.exp(engine.classify(far.best)[0])
    probability /= probability.sum(axis=1, keepdims=True)
    assert (probability[np.arange(len(images)), far.target][far.found] >= 0.5 - 1e-4).all()


@pytest.mark.parametrize("where", ["shipped", "digits"])
def test_engines_find_the_same(shipped, images, where):
    bundle = shipped if where == "shipped" else Bundle.load(DIGITS)
    x = images[:2] if where == "shipped" else pixels.to_unit(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    by = [counterfactuals(load_engine(bundle, kind, "cpu"), x, norm="l2", radius=4.0) for kind in ("onnx", "torch")]
    np.testing.assert_array_equal(by[0].found, by[1].found)
    np.testing.assert_array_equal(by[0].target, by[1].target)
    np.testing.assert_allclose(norms(by[0]), norms(by[1]), atol=0.05)


def searches(engine, images, n=None):
    x = images[:n]
    logits, *_ = engine.classify(x)
    return Searches.start(x, logits, counterfactual.rivals(logits, logits.argmax(axis=1)), norm="l2", radius=4.0)


def test_searches_and_chains_share_turns_and_are_as_alone(engine, images, shipped):
    """Bit for bit on a CPU: searches that join at different times are moved together, in turns beside chains."""
    prior, sampler = Prior.load(shipped.path / "prior.safetensors"), shipped.manifest.sampler
    alone = advance(engine, searches(engine, images, 4), LONGEST)
    chains = ChainGroup(engine, Chains.start(prior, sampler, np.arange(3), 0), 12)
    drawn = engine.advance(chains.chains, 12).image
    groups = [SearchGroup(engine, searches(engine, images[i : i + 1]), LONGEST) for i in range(4)]
    scheduler, together = Scheduler(), 0
    scheduler.join(chains)
    for group in groups:
        scheduler.join(group)
        together = max(together, len({type(one.group) for one in scheduler.advance()}))
    while scheduler.groups:
        together = max(together, len({type(one.group) for one in scheduler.advance()}))
    assert together == 2
    for i, group in enumerate(groups):
        np.testing.assert_array_equal(group.chains.best[0], alone.best[i])
        assert group.left == 0
    np.testing.assert_allclose(chains.chains.image, drawn, atol=1e-6)


def test_steps_of_several_searches_share_their_gradients(linear):
    """A turn is one run of the score graph for each of the two classes, whatever the number of searches."""

    class Counted(Linear):
        calls = 0

        def score(self, image, label):
            self.calls += 1
            return super().score(image, label)

    model = Counted(linear.weight, linear.bias)
    logits, *_ = model.classify(x := grey(6))
    scheduler = Scheduler()
    for i in range(6):
        start = Searches.start(x[i : i + 1], logits[i : i + 1], logits[i : i + 1].argmin(axis=1), norm="l2", radius=0.01)
        scheduler.join(SearchGroup(model, start, LONGEST))
    moved, turns = 0, 0
    while scheduler.groups:
        moved += sum(len(one.rows) for one in scheduler.advance())
        turns += 1
    assert moved == 6 * STEPS
    assert model.calls == 2 * turns
    assert turns < moved / 4


def test_a_search_counts_for_as_many_chain_steps_as_it_costs_and_what_is_saved_is_not_owed(engine, images):
    group = SearchGroup(engine, searches(engine, images, 1), LONGEST)
    assert group.left == counterfactual.STEP_COST * LONGEST
    scheduler = Scheduler()
    scheduler.join(group)
    (moved,) = scheduler.advance()
    assert moved.work == counterfactual.STEP_COST
    while scheduler.groups:
        (moved,) = scheduler.advance()
    assert group.left == 0
    assert moved.finished.tolist() == [0]


def test_a_gpus_turns_of_several_steps_go_no_further_than_a_search(engine, images, monkeypatch):
    """What test_gpu runs on a GPU, by the policy for one on the CPU."""
    monkeypatch.setattr(Policy, "of", lambda engine: Policy(256, False))
    several_steps_a_turn(engine, images[:3], monkeypatch)


def several_steps_a_turn(engine, images, monkeypatch):
    """Assert that searches that end at different steps are as alone where a turn holds several steps."""
    monkeypatch.setattr("ebjdat_serve.scheduling.TURN_SECONDS", 10.0)
    alone = advance(engine, searches(engine, images), LONGEST)
    scheduler, group = Scheduler(), SearchGroup(engine, searches(engine, images), LONGEST)
    scheduler.join(group)
    turns = 0
    while scheduler.groups:
        scheduler.advance()
        turns += 1
    assert turns < LONGEST
    np.testing.assert_array_equal(group.chains.found, alone.found)
    np.testing.assert_allclose(length(group.chains.best - alone.best, alone.linf), 0, atol=0.05)


def test_what_a_search_was_given_stays_as_it_was(engine, images):
    start = searches(engine, images, 3)
    before = replace(start, **{name: array.copy() for name, array in start.arrays().items()})
    advance(engine, start, 4)
    for name, array in before.arrays().items():
        np.testing.assert_array_equal(getattr(start, name), array, err_msg=name)
    start.put([0], advance(engine, start.rows([0]), 2))
    np.testing.assert_array_equal(start.origin, images[:3])
