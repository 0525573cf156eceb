"""Tests of the views of the OOD score: their formulas, ranks and sum, and that a new one is one function."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from benchmarks import view_candidates as candidates
from benchmarks import view_figures as figured
from benchmarks.view_images import BENIGN, BLURRED, proxies
from benchmarks.view_tables import document
from ebjdat_serve.detection import Detector
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.handling import HANDLINGS, encoded, handled, squashed
from ebjdat_serve.pixels import decode, to_unit
from ebjdat_serve.scores import SCORES, ood_score
from ebjdat_serve.view_files import load_reviewed, load_views, save_views
from ebjdat_serve.views import (
    DEFAULT_VIEWS,
    NEIGHBOUR_SHARE,
    VIEWS,
    Combination,
    Known,
    Seen,
    View,
    dimensions,
    distance,
    fit,
    fit_neighbours,
    fit_relative,
    gaussian,
    left_out,
    neighbours,
    of_logits,
    rank_term,
    relative,
    score_of,
    statistics,
)
from tests.conftest import ROOT
from training.evaluation.metrics import flag_rate_interval
from training.evaluation.odd import ODD, odd_images

F, K = 12, 5
values = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40)


def seen(n, seed, shift=0.0):
    """Pictures with edges and grain, features around a mean and the logits of a fixed head."""
    rng = np.random.default_rng(seed)
    coarse = np.repeat(np.repeat(rng.random((n, 3, 4, 4)), 4, axis=2), 4, axis=3)
    image = (coarse + rng.normal(0, 0.05, coarse.shape)).clip(0, 1).astype(np.float32)
    features = (rng.normal(size=(n, F)) + 3 + shift).astype(np.float32)
    return Seen(image, features, (features - 3) @ HEAD.T)


HEAD = np.random.default_rng(9).normal(size=(K, F)).astype(np.float32)
KNOWN = Known(seen(600, 0), statistics(seen(600, 0).image), seen(300, 1))


def ranked(names, known=KNOWN, views=VIEWS):
    """Views, fitted, with the ranks of the selection split."""
    found = fit(names, known, views)
    return found.with_ranks_of(found.raw(known.selection))


FITTED = ranked(list(VIEWS))


@given(values, values)
def test_a_term_is_minus_the_log_of_the_conformal_p_value_and_finite(clean, asked):
    clean = np.sort(np.array(clean, np.float32))
    score = np.array([*asked, np.inf, -np.inf, np.nan], np.float32)
    found, n = rank_term(clean, score), len(clean)
    expected = [-np.log((1 + sum(c >= s for c in clean)) / (n + 1)) for s in score]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.isfinite(found).all()
    assert found[-3] == found[-1] == pytest.approx(np.log(n + 1))  # beyond all, and no number at all
    assert found[-2] == 0


@given(values, st.floats(-50, 50, width=32), st.floats(0, 50, width=32))
def test_a_term_never_falls_as_the_score_rises(clean, score, more):
    low, high = rank_term(np.sort(np.array(clean, np.float32)), np.array([score, score + more], np.float32))
    assert low <= high


@given(st.lists(st.integers(-50, 50), min_size=1), st.integers(1, 10), st.integers(-5, 5))
def test_a_view_may_be_rescaled_without_a_change(clean, scale, offset):
    """Only order counts, so that views of different units can be added."""
    clean = np.array(clean, np.float64)
    twice = np.sort(clean * scale + offset)
    np.testing.assert_array_equal(rank_term(np.sort(clean), clean), rank_term(twice, clean * scale + offset))


def test_the_terms_of_clean_images_have_an_exponential_tail():
    rng = np.random.default_rng(0)
    terms = rank_term(np.sort(rng.normal(size=500)), rng.normal(size=50_000))
    for t in (0.5, 1.0, 2.0, 4.0):
        k = np.exp(-t)
        assert (terms > t).mean() == pytest.approx(k, abs=4 * np.sqrt(k * (1 - k) / 500))


@pytest.mark.parametrize("name", SCORES)
def test_every_score_of_the_logits_is_a_view(name):
    view = of_logits(name, "")
    stored = view.fit(KNOWN)
    weight = SCORES[name].fit(KNOWN.selection.logits)
    np.testing.assert_allclose(view.score(stored, KNOWN.training), ood_score(name, weight, KNOWN.training.logits), rtol=1e-6)


def test_the_neighbour_is_the_kth_by_brute_force():
    stored, asked = fit_neighbours(KNOWN), seen(20, 3)
    assert stored["unit"].dtype == np.float16
    k = max(1, round(NEIGHBOUR_SHARE * 600))
    assert k == 3
    kept = stored["unit"].astype(np.float64)
    for feature, value in zip(asked.features.astype(np.float64), neighbours({"unit": kept.astype(np.float32)}, asked), strict=True):
        cosines = sorted(kept @ feature / np.linalg.norm(feature), reverse=True)
        assert value == pytest.approx(1 - cosines[k - 1], abs=1e-5)


def test_fifty_of_eleven_thousand_and_three_megabytes():
    n, f = 11_500, 128
    features = np.random.default_rng(0).normal(size=(n, f)).astype(np.float32)
    training = Seen(np.zeros((n, 3, 8, 8), np.float32), features, features[:, :K])
    stored = fit_neighbours(replace(KNOWN, training=training))
    assert stored["unit"].shape == (11_000, f)
    assert round(NEIGHBOUR_SHARE * 11_000) == 50
    assert stored["unit"].nbytes + 3 * 4 * 2500 < 3_000_000


def test_the_distance_is_mahalanobis():
    x = np.random.default_rng(0).normal(size=(4000, 3)) @ np.array([[2.0, 1, 0], [0, 1, 0.5], [0, 0, 3]]) + 5
    asked = np.array([[5.0, 5, 5], [9, 1, 0]])
    inverse = np.linalg.inv(np.cov(x.T))
    expected = [(a - x.mean(0)) @ inverse @ (a - x.mean(0)) for a in asked]
    np.testing.assert_allclose(distance(gaussian(x), asked), expected, rtol=5e-3, atol=1e-3)


def test_relative_is_the_difference_of_two_mahalanobis_distances():
    stored, asked = fit_relative(KNOWN), seen(20, 3)
    x, y = KNOWN.training.features.astype(np.float64), KNOWN.training.logits.argmax(axis=1)
    means = np.stack([x[y == label].mean(axis=0) for label in np.unique(y)])
    left = np.concatenate([x[y == label] - x[y == label].mean(axis=0) for label in np.unique(y)])

    def squared(rows, mean, of):
        n, f = of.shape
        covariance = (of - of.mean(axis=0)).T @ (of - of.mean(axis=0)) / n
        shrunk = (n * covariance + f * np.diag(np.diag(covariance))) / (n + f) + 1e-4 * np.trace(covariance) / f * np.eye(f)
        return np.einsum("nf,fg,ng->n", rows - mean, np.linalg.inv(shrunk), rows - mean)

    rows = asked.features.astype(np.float64)
    expected = np.min([squared(rows, mean, left) for mean in means], axis=0) - squared(rows, x.mean(axis=0), x)
    np.testing.assert_allclose(relative(stored, asked), expected, rtol=1e-3, atol=1e-3)


def test_a_class_that_is_never_predicted_has_no_mean():
    t = KNOWN.training
    some = t.logits.argmax(axis=1) != 2
    few = replace(KNOWN, training=Seen(t.image[some], t.features[some], t.logits[some]))
    stored = fit_relative(few)
    assert len(stored["white_means"]) == len(np.unique(t.logits[some].argmax(axis=1))) < K
    assert np.isfinite(relative(stored, seen(9, 3))).all()


def test_with_few_calibration_images_or_little_room_views_of_features_are_left_out():
    assert left_out(DEFAULT_VIEWS, 500, 8) == {}
    assert left_out(DEFAULT_VIEWS, 499, 128) == {"features": "499 calibration images; views of features need 500"}
    assert "holds 7 dimensions of features; 8 are the least" in left_out(DEFAULT_VIEWS, 2500, 7)["features"]


@given(st.integers(1, 3000), st.integers(1, 1000), st.integers(0, 10**8))
def test_no_more_dimensions_are_kept_than_the_budget_holds(f, classes, budget):
    d = dimensions(f, classes, budget)
    assert 0 <= d <= f

    def cost(d):
        return 4 * d + 8 * d * d + 4 * classes * d + (2 * f * d if d < f else 0)

    assert cost(d) <= budget or d == 0
    assert d == f or cost(d + 1) > budget


def test_features_of_many_dimensions_are_projected_into_the_budget():
    free, tight = fit_relative(KNOWN), fit_relative(replace(KNOWN, budget=1200))
    assert "projection" not in free
    assert tight["projection"].shape[1] == dimensions(F, len(free["white_means"]), 1200) < F
    assert sum(array.nbytes for array in tight.values()) <= 1200
    np.testing.assert_allclose(tight["projection"].astype(float).T @ tight["projection"], np.eye(tight["projection"].shape[1]), atol=2e-3)
    turned = np.linalg.qr(np.random.default_rng(2).normal(size=(F, F)))[0].astype(np.float32)  # in another basis it is the same distance
    asked = seen(20, 3)
    basis = replace(KNOWN, training=replace(KNOWN.training, features=KNOWN.training.features @ turned), budget=1200)
    assert np.isfinite(relative(fit_relative(basis), replace(asked, features=asked.features @ turned))).all()
    strange = replace(asked, features=asked.features + 30)
    assert relative(tight, strange).min() > relative(tight, asked).max()


def test_fitted_views_are_read_as_they_were_written(tmp_path):
    file, names = tmp_path / "views.safetensors", list(VIEWS)
    save_views(file, {"fp32": FITTED, "int8": ranked(["logits"])}, {"fp32": {"ood": np.arange(5, dtype=np.float32)}})
    assert load_reviewed(file, "fp32", ["ood"])["ood"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(BundleError, match=r"has no int8\.reviewed\.margin: calibrate again"):
        load_reviewed(file, "int8", ["margin"])
    found, asked = load_views(file, "fp32", names), seen(50, 11)
    np.testing.assert_array_equal(found.terms(asked), FITTED.terms(asked))
    assert list(load_views(file, "fp32", ["statistics", "logits"]).clean) == ["statistics", "logits"]
    assert found.nbytes == FITTED.nbytes
    for names, precision, said in (
        (["logits", "nose"], "fp32", "view 'nose' is unknown"),
        (["features"], "int8", r"int8\.features\.clean must be sorted"),
        ([], "fp32", "one view or more"),
        (["logits", "logits"], "fp32", "each once"),
    ):
        with pytest.raises(BundleError, match=said):
            load_views(file, precision, names)
    shuffled = Combination(FITTED.stored, {**FITTED.clean, "logits": FITTED.clean["logits"][::-1]}, FITTED.views)
    save_views(file, {"fp32": shuffled}, {})
    with pytest.raises(BundleError, match="must be sorted"):
        load_views(file, "fp32", ["logits"])
    file.write_bytes(b"no tensors")
    with pytest.raises(BundleError, match="cannot be read"):
        load_views(file, "fp32", ["logits"])


@settings(deadline=None)
@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-100, 100)))
def test_a_gaussian_of_few_or_equal_rows_is_finite(x):
    found = distance(gaussian(x), np.concatenate([x, x + 1, np.zeros_like(x)]))
    assert np.isfinite(found).all()
    assert (found >= 0).all()


def test_statistics_by_hand():
    flat = np.full((1, 3, 8, 8), 0.25, np.float32)
    steps = np.zeros((1, 3, 8, 8), np.float32)
    steps[..., ::2] = 1  # columns: |horizontal difference| is 1 everywhere, vertical 0
    a, b = statistics(np.concatenate([flat, steps]))
    assert a[:3] == pytest.approx(np.log(1e-3), abs=1e-4)
    assert a[3] == pytest.approx(0.25)
    assert b[0] == pytest.approx(np.log(1 + 1e-3), abs=1e-6)
    assert b[1] == pytest.approx(np.log(0.5 + 1e-3), abs=1e-6)
    assert b[2] == pytest.approx(np.log(2 + 1e-3), abs=1e-4)  # the Laplacian is -2 or 2
    assert b[3] == 0.5
    assert a[4] == 0
    assert b[4] == pytest.approx(np.log2(7) - 4 / 7 * np.log2(4) - 3 / 7 * np.log2(3))  # of seven differences four fall and three rise
    noise = np.random.default_rng(0).random((1, 3, 8, 8)).astype(np.float32)
    assert statistics(noise)[0, 4] > b[4] > 0


def test_statistics_do_not_see_colour():
    """Grey images are benign: a statistic that needs saturation would flag them all."""
    image = seen(50, 4).image
    grey = np.repeat((0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]), 3, axis=1)
    np.testing.assert_allclose(statistics(grey)[:, 2], statistics(image)[:, 2], atol=2e-5)
    np.testing.assert_allclose(statistics(grey)[:, 4], statistics(image)[:, 4], atol=0.25)  # bits; rounding alone


@settings(deadline=None, max_examples=30)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(3, 12), st.integers(3, 12), st.just(3))))
def test_any_image_has_a_finite_score(image):
    assert np.isfinite(statistics(to_unit(image))).all()


def test_an_image_has_the_same_score_alone_and_in_a_batch():
    asked = seen(40, 5)
    together = FITTED.terms(asked)
    alone = [FITTED.terms(Seen(asked.image[i : i + 1], asked.features[i : i + 1], asked.logits[i : i + 1]))[0] for i in range(40)]
    np.testing.assert_allclose(np.stack(alone), together, atol=0.02)  # rounding may pass one clean score of 300


def test_the_sum_is_calibrated_as_one():
    """Terms may depend on each other as they like: false alarms of the sum are inside the interval."""
    combination = ranked(DEFAULT_VIEWS)
    calibration, test = (combination.score(combination.terms(seen(1000, seed))) for seed in (6, 7))
    detector = Detector(np.sort(calibration).astype(np.float64), 0.05)
    low, high = flag_rate_interval(1000, 1000, 0.05)
    assert low <= detector.suspicious(detector.p_value(test)).mean() <= high


def test_each_view_speaks_of_what_it_sees():
    combination = ranked(["logits", "neighbours", "statistics"])
    plain = seen(30, 8)
    white = Seen(np.ones_like(plain.image), plain.features, plain.logits)
    # features turned away at the same logits: only the distance to neighbours changes
    null = np.linalg.svd(HEAD)[2][K:]
    strange = (plain.features + 40 * null.sum(axis=0)).astype(np.float32)
    far = Seen(plain.image, strange, plain.logits)
    for images, name in ((white, "statistics"), (far, "neighbours")):
        why = combination.why(combination.terms(images))
        assert why.count(name) >= 28
    terms = combination.terms(white)
    np.testing.assert_allclose(combination.score(terms), terms.sum(axis=1), rtol=1e-6)
    assert (combination.score(terms) > np.median(combination.score(combination.terms(plain)))).all()


def test_of_equal_terms_the_first_view_speaks():
    assert FITTED.why(np.zeros((2, len(VIEWS)))) == ["logits"] * 2


def test_a_new_view_is_one_function():
    views = {**VIEWS, "redness": View(lambda stored, seen: seen.image[:, 0].mean(axis=(1, 2)).astype(np.float64), "how red it is")}
    combination = ranked(["logits", "redness"], views=views)
    red = seen(5, 9)
    red.image[:] = np.array([1, 0, 0], np.float32)[:, None, None]
    assert combination.why(combination.terms(red)) == ["redness"] * 5
    assert score_of(views["redness"], {}, red).tolist() == [1.0] * 5


def test_an_unknown_view_is_refused():
    with pytest.raises(EbjdatError, match="view nose is unknown; this version knows logits, features, statistics, neighbours, gaussian"):
        fit(["logits", "nose"], KNOWN)


def test_bytes_are_counted():
    combination = ranked(["neighbours"])
    assert combination.nbytes == 600 * F * 2 + 300 * 4
    assert combination.ready["neighbours"]["unit"].dtype == np.float32


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (24, 40)])
def test_odd_images_are_of_the_size_and_differ(height, width):
    found = odd_images(height, width, 12)
    assert set(found) == {*ODD, "black", "white"}
    for name in ODD:
        assert found[name].shape == (12, height, width, 3)
        assert len({image.tobytes() for image in found[name]}) > 6, name
    assert found["white"].min() == 255
    assert found["black"].max() == 0


def test_half_of_the_images_are_handled_lightly():
    image = np.rint(255 * seen(80, 10).image).astype(np.uint8).transpose(0, 2, 3, 1)
    found = handled(image, 0)
    same = np.array([(a == b).all() for a, b in zip(image, found, strict=True)])
    assert 0.4 < same.mean() < 0.65
    assert np.abs(found.astype(int) - image)[~same].mean() < 40
    np.testing.assert_array_equal(found, handled(image, 0))
    assert (handled(image, 1) != found).any()
    np.testing.assert_array_equal(handled(image, 0, untouched=1.0), image)


def test_what_is_handled_without_a_file_is_what_the_decoder_makes_of_a_png():
    noise = np.random.default_rng(3)
    image = Image.fromarray(noise.integers(0, 256, (12, 9, 3), dtype=np.uint8))
    for handle in HANDLINGS:
        made = handle(image, noise)
        if not isinstance(made, bytes):
            np.testing.assert_array_equal(squashed(made, 12, 9), decode(encoded(made, "PNG"), 12, 9))


# The benchmark -------------------------------------------------------------------------------------------------------

ROWS = json.loads((ROOT / "benchmarks" / "views.json").read_text(encoding="utf-8"))


def test_the_tables_of_the_decision_are_those_of_the_json():
    text = (ROOT / "docs" / "decisions" / "0025-views.md").read_text(encoding="utf-8")
    assert document(text, ROWS) == text, (
        "run python benchmarks/views.py --json benchmarks/views.json --document docs/decisions/0025-views.md"
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_sum_meets_its_bars(precision):
    chosen = [row for row in ROWS if row.get("score") == "sum" and row.get("mode") == figured.CHOSEN and row["precision"] == precision]
    value = {(row["metric"], row["set"]): row["value"] for row in chosen}
    odd = [found for (metric, where), found in value.items() if metric == "power" and where.startswith("odd/")]
    assert len(odd) == 10
    assert min(odd) >= 0.95
    for where, area, power in (("svhn_train_first1080", 0.95, 0.75), ("cifar100_test_3000", 0.68, 0.0), ("imagenet_500", 0.72, 0.0)):
        assert value["AUROC", f"ood/{where}"] >= area
        assert value["power", f"ood/{where}"] >= power
    for name in BENIGN:
        assert value["flag rate", f"benign/{name}"] <= (0.12 if name in BLURRED else 0.08), name
    for row in chosen:
        if row["metric"] == "flag rate" and row["set"] in ("clean/test", "handled/test"):
            assert row["expected"][0] <= row["value"] <= row["expected"][1]


@given(st.lists(st.integers(0, 40), min_size=30, max_size=120), st.lists(st.integers(-5, 45), min_size=1, max_size=30))
def test_the_benchmark_flags_as_the_detector_does(clean, asked):
    figures = figured.Figures.__new__(figured.Figures)
    scores = {"clean/calibration": np.array(clean, np.float32), "clean/test": np.array(asked, np.float32)}
    figures.raw = {"clean": {"energy": scores}}
    mode = figured.Mode("clean", "clean")
    flagged = figures.score("energy", mode, "clean/test") >= figures.threshold("energy", mode)
    detector = Detector(np.sort(np.array(clean, np.float64)), figured.ALPHA)
    np.testing.assert_array_equal(flagged, detector.suspicious(detector.p_value(scores["clean/test"])))


def test_proxies_are_made_of_the_images_and_are_not_them():
    image = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), dtype=np.uint8)
    found = proxies(image)
    assert (np.sort(found["sixteen tiles shuffled"].reshape(6, -1)) == np.sort(image.reshape(6, -1))).all()
    assert (found["inverted"].astype(int) + image == 255).all()
    assert (found["halves of two"][1, :, :12] == image[1, :, :12]).all()
    assert (found["halves of two"][1, :, 12:] == image[0, :, 12:]).all()
    for name, made in found.items():
        assert made.dtype == np.uint8, name
        assert name.startswith("turned") or made.shape == image.shape
        assert name.startswith("turned") or (made != image).any(axis=(1, 2, 3)).all(), name


def test_statistics_with_zlib_and_saturation_extend_the_five():
    image = seen(5, 3).image
    assert (candidates.with_zlib(image)[:, :4] == statistics(image)[:, :4]).all()
    assert (candidates.saturation_too(image)[:, :5] == statistics(image)).all()
    assert candidates.all_but(3)(image).shape == (5, 4)
