"""Tests of margin, walk, search and policy against models whose boundary is known, and on exchangeable data."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from torch import nn

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.detection import Detector
from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.reach import Checks, Policy, Review, advance, cut, margin, p_values, reach_score, search, two_likeliest, walk
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.views import Seen
from training.evaluation.attacks import Pgd
from training.evaluation.evaluated_model import open_module
from training.evaluation.metrics import flag_rate_interval
from training.evaluation.reach import EvadeReach, Points, Rejecter, Searched, Slope, Walk, aurc, evades, rankings
from training.methods.adversary import Threat

SHAPE = (3, 2, 2)
R = 2 / 255


class Linear:
    """f(x) = W x + b, with the interface of an engine, counting the images it is asked for."""

    def __init__(self, weight, bias):
        self.weight, self.bias = np.float32(weight), np.float32(bias)
        self.forward = self.backward = 0

    def classify(self, image):
        self.forward += len(image)
        logits = image.reshape(len(image), 12) @ self.weight.T + self.bias
        return logits, -np.logaddexp.reduce(logits, axis=1)

    def score(self, image, label):
        self.backward += len(image)
        logits = image.reshape(len(image), 12) @ self.weight.T + self.bias
        return self.weight[label].reshape(len(image), *SHAPE), -logits[np.arange(len(image)), label]


def linear(classes, seed=0):
    """Return a linear model whose logits are 0 at the middle of the cube, and images around it."""
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(classes, 12))
    image = np.float32(0.5 + draw.uniform(-0.1, 0.1, (40, *SHAPE)))
    return Linear(weight, -0.5 * weight.sum(axis=1)), image


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_checks_step_by_step_find_what_walk_and_search_find(steps):
    """However they are split and joined: a worker moves the rows of several jobs together."""
    engine, image = linear(4, seed=3)
    logits = engine.classify(image)[0]
    radius = np.quantile(margin(logits), 0.5) / 30
    checks = Checks.start(image, logits, radius=radius, steps=steps)
    for step in range(steps):
        parts = [advance(engine, checks.rows(slice(0, 7 + step)), 1), advance(engine, checks.rows(slice(7 + step, None)), 1)]
        checks = Checks.join(parts)
    stable = search(engine, image, radius, steps)
    assert 0 < stable.sum() < len(stable)
    np.testing.assert_array_equal(checks.stable, stable)
    np.testing.assert_allclose(checks.reach, reach_score(engine, image, steps), atol=1e-5)
    assert checks.step.tolist() == [steps] * len(image)


def test_the_margin_is_between_the_two_largest_logits_and_0_where_they_tie():
    logits = np.float32([[1, 5, 3], [2, 2, -1], [-7, -9, -8]])
    assert margin(logits).tolist() == [2, 0, 1]
    first, second = two_likeliest(logits)
    assert (first.tolist(), second.tolist()) == ([1, 0, 0], [2, 1, 2])
    assert logits.tolist() == [[1, 5, 3], [2, 2, -1], [-7, -9, -8]]


def test_the_walk_of_a_linear_model_climbs_by_the_l1_norm_and_its_runner_up_is_fixed():
    model, image = linear(4)
    logits, _ = model.classify(image)
    a, b = two_likeliest(logits)
    rise = np.abs(model.weight[b] - model.weight[a]).sum(axis=1)
    found = walk(model, image, steps=3, step_size=0.01)
    assert found == pytest.approx(-margin(logits)[:, None] + 0.01 * np.arange(4) * rise[:, None], abs=1e-5)
    assert walk(model, image, 3, 0.01, logits) == pytest.approx(found, abs=1e-6)
    assert reach_score(model, image, 3, 0.01) == pytest.approx(-margin(logits) + 0.015 * rise, abs=1e-5)


def test_the_walk_stays_in_the_box():
    model, image = linear(2)
    a, b = two_likeliest(model.classify(image)[0])
    w = model.weight[b] - model.weight[a]
    corner = np.where(w > 0, 1.0, 0.0)  # where a walk without end arrives
    assert walk(model, image, steps=4, step_size=0.5)[:, -1] == pytest.approx(((corner - 0.5) * w).sum(axis=1), abs=1e-5)


def test_the_walk_takes_two_gradients_a_step_and_one_forward_pass_when_it_has_the_logits():
    model, image = linear(3)
    logits, _ = model.classify(image)
    model.forward = 0
    reach_score(model, image, 5, R, logits)
    assert (model.forward, model.backward) == (len(image), 2 * 5 * len(image))


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_the_search_of_two_linear_classes_is_exact(steps):
    model, image = linear(2)
    rise = np.abs(model.weight[1] - model.weight[0]).sum()
    distance = margin(model.classify(image)[0]) / rise  # to the boundary, l-inf
    for radius in np.quantile(distance, [0.1, 0.5, 0.9]):
        assert (search(model, image, float(radius) * 0.999, steps) >= (distance >= radius)).all()
        assert (search(model, image, float(radius) * 1.001, steps) == (distance > radius * 1.001)).all()


def test_what_another_label_was_found_for_in_a_ball_it_is_found_for_in_a_larger_one():
    model, image = linear(2, seed=3)
    found = [search(model, image, radius) for radius in (0.25 * R, R, 4 * R, 16 * R)]
    assert all((larger <= smaller).all() for smaller, larger in pairwise(found))
    assert found[0].sum() > found[-1].sum()


def test_the_search_goes_for_the_class_that_is_likeliest_where_it_stands():
    # f = 1, 0.9, 0.5 at the image. The runner-up b cannot reach a, but where it is raised to 0.94 c has 0.95 and can go on
    weight = np.zeros((3, 12))
    weight[1, 1], weight[2, 1], weight[2, 2] = 0.8, 9.0, 9.0
    image = np.full((1, *SHAPE), 0.5, np.float32)
    model = Linear(weight, [1.0, 0.5, -8.5])
    assert two_likeliest(model.classify(image)[0])[1].tolist() == [1]
    assert search(model, image, 0.05, steps=1).tolist() == [True]
    assert search(model, image, 0.05, steps=5).tolist() == [False]
    assert search(Linear(weight[:2], [1.0, 0.5]), image, 0.05, steps=5).tolist() == [True]


def test_the_search_stays_in_ball_and_box_and_leaves_images_whose_label_changed():
    model, image = linear(3)
    image[:20] = np.where(image[:20] > 0.5, 1.0, 0.0)
    seen = []

    class Watched(Linear):
        def classify(self, image):
            seen.append(image)
            return super().classify(image)

    watched = Watched(model.weight, model.bias)
    stable = search(watched, image, 0.1, 4)
    assert 0 < stable.sum() < len(image)
    first, *later = seen
    assert np.array_equal(first, image)
    assert len(later[0]) == len(image) > len(later[-1])
    assert all(x.min() >= 0 and x.max() <= 1 for x in later)
    assert np.abs(later[0] - image).max() <= 0.1 + 1e-6
    whole = seen[-1][:, None] - image[None]
    assert (np.abs(whole).max(axis=(2, 3, 4)).min(axis=1) <= 0.1 + 1e-6).all()


def test_no_images_are_no_answers():
    model, image = linear(3)
    assert reach_score(model, image[:0]).shape == search(model, image[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (lambda model, image: reach_score(model, image, steps=0), "walk takes 1 or more steps"),
        (lambda model, image: reach_score(model, image, step_size=0.0), "size above 0"),
        (lambda model, image: search(model, image, radius=0.0), "radius above 0"),
        (lambda model, image: search(model, image, steps=0), "search takes 1 or more steps"),
    ],
)
def test_steps_and_sizes_that_go_nowhere_are_refused(what, named):
    with pytest.raises(EbjdatError, match=named):
        what(*linear(2))


def answers_alike(bundle, engine, other, image):
    """Fail unless two engines give images the same features, views, walk and search, within rounding."""
    seen = [Seen(image, found.features, found.logits) for found in (engine.classify(image), other.classify(image))]
    assert seen[0].features == pytest.approx(seen[1].features, abs=1e-3 * float(np.abs(seen[1].features).max()))
    raw = [bundle.combination().raw(one) for one in seen]
    assert raw[0] == pytest.approx(raw[1], abs=1e-3 * float(np.abs(raw[1]).max()))
    assert reach_score(engine, image, 2) == pytest.approx(reach_score(other, image, 2), abs=1e-3)
    assert search(engine, image, 4 / 255, 2).tolist() == search(other, image, 4 / 255, 2).tolist()


def test_the_torch_engine_gives_the_same_views_walk_and_search(shipped_images):
    bundle = Bundle.load(SHIPPED)
    answers_alike(bundle, load_engine(bundle, "torch", "cpu", 1), load_engine(bundle, "onnx", "cpu", 1), shipped_images)


@pytest.fixture
def shipped_images():
    """Return images of the shipped size."""
    return np.float32(np.random.default_rng(0).uniform(0, 1, (4, 3, 8, 8))).repeat(4, axis=2).repeat(4, axis=3)


# Policy --------------------------------------------------------------------------------------------------------------


def correlated(draw, n, views):
    """Return scores of n exchangeable images that have most of their spread in common."""
    common = draw.normal(size=n)
    return {view: common + 0.5 * draw.normal(size=n) + 0.3 * i * common**2 for i, view in enumerate(views)}


@pytest.mark.parametrize("views", [("ood",), ("ood", "margin"), ("ood", "margin", "reach")])
@pytest.mark.parametrize(("n", "share"), [(199, 0.05), (60, 0.2)])
def test_the_share_of_clean_images_is_the_one_asked_for_and_beta_given_the_calibration_set(views, n, share):
    draw, rates = np.random.default_rng(0), []
    for _ in range(300):
        clean, fresh = correlated(draw, n, views), correlated(draw, 4_000, views)
        policy = Policy.calibrated(clean, share)
        rates.append(policy.review(p_values(clean, fresh)).mean())
    cuts = int(share * (n + 1))
    assert (policy.cuts, policy.expected) == (cuts, cuts / (n + 1))
    spread = beta(cuts, n + 1 - cuts)
    assert np.mean(rates) == pytest.approx(policy.expected, abs=4 * spread.std() / np.sqrt(len(rates)))
    assert kstest(rates, spread.cdf).pvalue > 1e-3


def test_the_smaller_of_two_p_values_would_send_more_and_a_union_bound_fewer():
    draw = np.random.default_rng(1)
    clean, fresh = (correlated(draw, n, ("ood", "margin")) for n in (2_000, 20_000))
    p = p_values(clean, fresh)
    least = np.minimum(p["ood"], p["margin"])
    sent = Policy.calibrated(clean, 0.1).review(p).mean()
    low, high = flag_rate_interval(2_000, 20_000, 0.1)
    assert low <= sent <= high
    assert (least <= 0.05).mean() < low
    assert (least <= 0.1).mean() > high


def test_a_policy_of_one_view_is_the_flag():
    draw = np.random.default_rng(2)
    clean, fresh = (draw.normal(size=n) for n in (500, 3_000))
    flag = Detector(np.sort(clean), 0.0501)
    p = p_values({"ood": clean}, {"ood": fresh})
    assert Policy.calibrated({"ood": clean}, 0.0501).review(p).tolist() == flag.suspicious(flag.p_value(fresh)).tolist()


def test_reasons_are_the_views_whose_p_value_is_at_most_its_level():
    review = Review(Policy({"ood": 0.3, "margin": 0.2}, 5, 9), {"ood": np.arange(9.0), "margin": np.arange(9.0)})
    p, reasons = review.look({"ood": np.float32([6.5, 7, 8]), "margin": np.float32([8, 0, 7.5])})
    assert p["ood"].tolist() == [0.3, 0.3, 0.2]
    assert p["margin"].tolist() == [0.2, 1.0, 0.2]
    assert reasons.tolist() == [[True, True], [True, False], [True, True]]


def test_an_image_is_reviewed_if_any_view_is_a_reason_and_each_can_be_one():
    draw = np.random.default_rng(3)
    clean, fresh = (correlated(draw, n, ("ood", "margin", "reach")) for n in (300, 200))
    _, reasons = Review.of(clean, 0.1).look(fresh)
    np.testing.assert_array_equal(reasons.any(axis=1), Policy.calibrated(clean, 0.1).review(p_values(clean, fresh)))
    assert reasons.any(axis=0).all()


class LowerPrecision(Linear):
    """Scores come from the fp32 graph, as in int8, and logits from one that rounds."""

    def classify(self, image):
        logits, _ = super().classify(image)
        rounded = np.float32(np.round(logits, 1))
        return rounded, -np.logaddexp.reduce(rounded, axis=1)


def test_a_walk_is_calibrated_and_served_alike_where_logits_and_scores_come_from_two_graphs():
    exact, image = linear(4, seed=3)
    engine = LowerPrecision(exact.weight, exact.bias)
    checks = advance(engine, Checks.start(image, engine.classify(image)[0]), 5)
    np.testing.assert_allclose(checks.reach, reach_score(engine, image), atol=1e-5)
    assert np.abs(checks.reach - reach_score(exact, image)).max() > 1e-3  # the graphs do differ


def test_views_take_turns_and_no_image_is_cut_twice():
    clean = {"a": np.array([9.0, 8.0, 1.0, 2.0, 3.0]), "b": np.array([9.0, 1.0, 2.0, 3.0, 8.0])}
    assert cut(clean, 2) == {"a": 1 / 6, "b": 2 / 6}  # a takes image 0, b image 4: its own highest is gone
    assert cut(clean, 3) == {"a": 2 / 6, "b": 2 / 6}


def test_ties_send_fewer_images_never_more():
    draw = np.random.default_rng(4)
    rates = []
    for _ in range(300):
        clean, fresh = ({view: np.round(s) for view, s in correlated(draw, n, ("ood", "margin")).items()} for n in (199, 2_000))
        policy = Policy.calibrated(clean, 0.1)
        rates.append(policy.review(p_values(clean, fresh)).mean())
    assert 0 < np.mean(rates) <= 0.1
    constant = {"ood": np.zeros(99), "margin": np.zeros(99)}
    assert not Policy.calibrated(constant, 0.5).review(p_values(constant, {view: np.zeros(3) for view in constant})).any()


def test_a_share_that_the_images_cannot_keep_is_refused_with_the_least_that_they_can():
    clean = correlated(np.random.default_rng(5), 39, ("ood", "margin"))
    assert Policy.calibrated(clean, 0.05).cuts == 2
    with pytest.raises(EbjdatError, match=r"39 calibration images and 2 views \(ood, margin\): choose 0.05 <= share < 1"):
        Policy.calibrated(clean, 0.049)
    for share in (0.0, -1.0, 1.0, 2.0):
        with pytest.raises(EbjdatError, match="share"):
            Policy.calibrated(clean, share)


def test_views_of_different_images_are_refused():
    with pytest.raises(EbjdatError, match="same images in each view, not of 10, 12"):
        Policy.calibrated({"ood": np.zeros(10), "margin": np.zeros(12)}, 0.5)
    with pytest.raises(EbjdatError, match="not of none"):
        Policy.calibrated({}, 0.5)


# Evaluation ----------------------------------------------------------------------------------------------------------

EPS = 0.02


@pytest.fixture(scope="module")
def subject():
    """Return a linear model of two classes as the evaluation opens it, its images, their margins and the margin's slope."""
    model, image = linear(2, seed=5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.from_numpy(model.weight))
        net[1].bias.copy_(torch.from_numpy(model.bias))
    return open_module("linear", net, "linear"), image, margin(model.classify(image)[0]), np.abs(model.weight[1] - model.weight[0]).sum()


def rejecter(radius=0.0, least=0.0, room=1e6):
    return Rejecter(least, "energy", 0.0, room, 1.0, radius)


def test_tasks_measure_what_the_served_functions_say(subject):
    opened, image, margins, slope = subject
    model, _ = linear(2, seed=5)
    label = np.zeros(len(image), np.int64)
    found = {}
    for task in (Walk(), Slope(), Searched(0.01)):
        found |= task.run(opened, image, label)
    assert found["slope"] == pytest.approx(slope, rel=1e-5)
    assert found["leads"] == pytest.approx(walk(model, image), abs=1e-5)
    assert found["stable"].tolist() == search(model, image, 0.01).tolist()
    values = rankings(found, "energy", 0.0)
    assert values["reach_score"] == pytest.approx(reach_score(model, image), abs=1e-5)
    assert values["margin_over_slope"] == pytest.approx(-margins / slope, abs=1e-6)  # float32
    assert values["unstable"].tolist() == (margins <= 0.01 * slope).tolist()
    assert all(len(value) == len(image) for value in values.values())


def test_points_are_where_the_attack_ends(subject):
    opened, image, _, _ = subject
    label = opened.logits(image).argmax(axis=1)
    attack = Pgd(Threat("linf", EPS), leave=False)
    made = Points(attack).run(opened, image, label)
    assert 0 < np.abs(made["image"] - image).max() <= EPS + 1e-6
    assert np.array_equal(made["logits"], attack.run(opened, image, label)["logits"])


@pytest.mark.parametrize(("objective", "start"), [("alone", "image"), ("worst", "uniform"), ("sum", "image")])
@pytest.mark.parametrize("radius", [0.0, EPS / 4, EPS / 2])
@pytest.mark.parametrize("least", [0.0, 0.05])
def test_the_adaptive_attack_of_a_linear_model_reaches_all_that_can_be_reached(subject, objective, start, radius, least):
    opened, image, margins, slope = subject
    label = opened.logits(image).argmax(axis=1)
    found = EvadeReach(Threat("linf", EPS), rejecter(radius, least), objective, start=start).run(opened, image, label)
    assert np.abs(found["image"] - image).max() <= EPS + 1e-6
    # the far corner of the ball is EPS * slope beyond the image: accepted there if the boundary lies further back than radius and margin
    depth = EPS * slope - margins
    reachable = (depth > radius * slope) & (depth >= least) & (depth > 0)
    near = np.abs(depth - max(radius * slope, least)) < 0.01
    assert (found["holds"] == ~reachable)[~near].all()
    assert 0 < found["holds"].sum() < len(image)


def test_the_search_gives_what_robust_accuracy_at_eps_less_its_radius_gives_and_no_more(subject):
    opened, image, margins, slope = subject
    label = opened.logits(image).argmax(axis=1)
    for radius in (EPS / 4, EPS / 2):
        holds = EvadeReach(Threat("linf", EPS), rejecter(radius), "worst").run(opened, image, label)["holds"]
        assert holds.sum() == pytest.approx((margins > (EPS - radius) * slope).sum(), abs=1)


def test_what_is_rejected_evades_nothing(subject):
    opened, image, _, _ = subject
    wrong = 1 - opened.logits(image).argmax(axis=1)
    assert evades(opened, image, wrong, rejecter()).all()
    assert not evades(opened, image, 1 - wrong, rejecter()).any()
    assert not evades(opened, image, wrong, rejecter(room=-1e6)).any()
    assert evades(opened, image, wrong, rejecter(0.01)).tolist() == Searched(0.01).run(opened, image, wrong)["stable"].tolist()


def test_the_area_under_the_risk_coverage_curve_by_hand():
    wrong = np.array([False, True, False, True])
    assert aurc(np.array([0.0, 3.0, 1.0, 2.0]), wrong) == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)
    assert aurc(np.array([3.0, 0.0, 2.0, 1.0]), wrong) == pytest.approx((1 + 1 + 2 / 3 + 2 / 4) / 4)
    assert aurc(np.zeros(4), wrong) == pytest.approx(0.5)
    assert aurc(np.array([0.0, 1.0, 1.0, 2.0]), wrong) == pytest.approx((0 + 0.25 + 1 / 3 + 0.5) / 4)  # the order of the pair is chance
