"""Tests of conformal p-values and of their figures."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.calibrating import fit_temperature
from ebjdat_serve.detection import Detector, probabilities
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.scores import SCORES, OodScore, ood_score
from ebjdat_serve.views import VIEWS, of_logits
from training.calibrate import calibrate, carded
from training.data.datasets import load
from training.evaluation.distances import frechet_distance
from training.evaluation.metrics import auroc, expected_calibration_error, flag_rate_interval, wilson
from training.evaluation.scores import ood_score_of

energies = st.lists(st.floats(-50, 50, width=32), min_size=20, max_size=60)


@given(energies, energies)
def test_the_p_value_is_its_formula(clean, asked):
    detector = Detector(np.sort(np.array(clean, dtype=np.float64)), alpha=0.5)
    expected = [(1 + sum(c >= e for c in clean)) / (len(clean) + 1) for e in asked]
    np.testing.assert_allclose(detector.p_value(np.array(asked, dtype=np.float32)), expected)


def test_a_new_score_is_one_line(golden, tmp_path, monkeypatch):
    """Calibrated, described on the card, judged by the evaluation's attacks: all from its line in SCORES."""
    halved = OodScore(lambda e, log_p, weight, xp: e - weight * xp.amax(log_p, 1), "E(x) - {weight:.1f} max log p", lambda logits: 0.5)
    monkeypatch.setitem(SCORES, "halved", halved)
    monkeypatch.setitem(VIEWS, "halved", of_logits("halved", halved.equation))  # as VIEWS has every score
    folder = tmp_path / "bundle"
    shutil.copytree(golden / "current", folder)
    found = carded(calibrate(Bundle.draft(folder), load("digits"), views=["halved"]))
    assert found.calibration().views == ["halved"]
    assert float(found.combination().stored["halved"]["weight"]) == 0.5
    assert "halved" in (found.path / "README.md").read_text(encoding="utf-8")
    logits = np.random.default_rng(0).normal(size=(9, 10)).astype(np.float32)
    served = ood_score("halved", 0.5, logits)
    np.testing.assert_allclose(served, ood_score("energy", 0, logits) + 0.5 * ood_score("max_softmax", 0, logits), atol=1e-5)
    np.testing.assert_allclose(ood_score_of("halved", 0.5)(torch.from_numpy(logits)).numpy(), served, atol=1e-5)


def test_high_energy_is_the_suspicious_side():
    detector = Detector(np.arange(99.0), alpha=0.05)
    p = detector.p_value(np.array([-1e3, 50.0, 1e3], dtype=np.float32))
    assert p.tolist() == [1.0, 0.5, 0.01]
    assert detector.suspicious(p).tolist() == [False, False, True]


@pytest.mark.parametrize("alpha", [0.0, 0.009, 1.0, -1.0, float("nan")])
def test_an_alpha_that_cannot_be_kept_is_refused(alpha):
    with pytest.raises(EbjdatError, match=r"1/\(n\+1\)"):
        Detector(np.arange(99.0), alpha)


def test_false_alarms_are_at_most_alpha_on_average_and_inside_the_interval():
    rng = np.random.default_rng(0)
    n, m, alpha = 400, 1000, 0.05
    rates = [
        (Detector(np.sort(rng.normal(size=n)), alpha).p_value(rng.normal(size=m).astype(np.float32)) < alpha).mean() for _ in range(400)
    ]
    assert np.mean(rates) <= alpha + 0.001
    low, high = flag_rate_interval(n, m, alpha)
    assert np.mean([low <= rate <= high for rate in rates]) >= 0.975
    assert low > 0.01  # an interval that holds everything would prove nothing
    assert high < 0.12


def test_temperature_moves_probabilities_not_their_order():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    cold, hot = probabilities(logits, 0.5), probabilities(logits, 5.0)
    np.testing.assert_allclose(cold.sum(axis=1), 1, rtol=1e-5)
    assert (cold.argmax(axis=1) == hot.argmax(axis=1)).all()
    assert cold.max() > hot.max()


def test_the_fitted_temperature_undoes_a_scaling():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 5)).astype(np.float32) * 2
    label = np.array([rng.choice(5, p=p / p.sum()) for p in probabilities(logits, 1.0).astype(float)])
    assert fit_temperature(logits * 3, label) == pytest.approx(2.94202, abs=1e-5)  # of these 4,000 draws; 3 of ever more


@given(st.lists(st.integers(0, 5), min_size=2, max_size=20), st.lists(st.integers(0, 5), min_size=2, max_size=20))
def test_auroc_is_the_share_of_ordered_pairs(negative, positive):
    a, b = np.array(negative, float), np.array(positive, float)
    pairs = (b[:, None] > a[None]).mean() + 0.5 * (b[:, None] == a[None]).mean()
    assert auroc(a, b) == pytest.approx(pairs)


def test_ece_by_hand():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert expected_calibration_error(p, np.array([0, 1, 0, 0])) == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(1 - 0.6))


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 3))
    b = rng.normal(size=(200_000, 3)) * 2 + np.array([1.0, 0, 0])
    assert frechet_distance(a, b) == pytest.approx(1 + 3 * (2 - 1) ** 2, abs=0.05)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_wilson_holds_the_proportion():
    low, high = wilson(60, 200)
    assert low < 0.3 < high
    assert (low, high) == pytest.approx((0.2407, 0.3668), abs=1e-3)
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1


def test_every_published_interval_of_a_share_is_wilsons(shipped):
    rows = [row for row in json.loads((shipped.path / "metrics.json").read_text()) if "interval" in row]
    counts = [(row["value"] * row["n"], row) for row in rows]
    shares = [(round(count), row) for count, row in counts if abs(count - round(count)) < 1e-6 and not row["metric"].endswith("_mean")]
    assert len(shares) > 200
    for count, row in shares:
        assert wilson(count, row["n"]) == pytest.approx(row["interval"], abs=1e-9), row


def test_a_calibration_that_names_no_views_is_refused(golden, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(golden / "current", folder)
    rows = json.loads((folder / "calibration.json").read_text())
    old = [{key: value for key, value in row.items() if key not in ("views", "scores")} for row in rows]
    write_json(folder / "calibration.json", old)
    with pytest.raises(BundleError, match=r"calibration.json: unknown keys \[\], missing keys \['scores', 'views'\]"):
        Bundle.draft(folder).update("calibration.json").calibration()


@pytest.mark.slow
def test_every_precision_flags_by_the_views_of_fp32(golden, tmp_path):
    folder, data = tmp_path / "bundle", load("digits")
    shutil.copytree(golden / "current", folder)
    bundle = calibrate(Bundle.draft(folder), data, views=["max_softmax"])
    bundle = calibrate(bundle, data, "bf16")
    assert {row.precision: row.views for row in bundle.calibrations()} == {"fp32": ["max_softmax"], "bf16": ["max_softmax"]}
    assert bundle.combination("bf16").clean["max_softmax"].tolist() != bundle.combination().clean["max_softmax"].tolist()
    assert [row.precision for row in calibrate(bundle, data).calibrations()] == ["fp32"]  # other views: bf16's is gone, and says so
    with pytest.raises(BundleError, match="holds no bf16 calibration"):
        Bundle.draft(folder).calibration("bf16")
