"""Tests of metrics against independent implementations and cases computed by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score, roc_curve

from training.errors import DataError
from training.evaluation import distances
from training.evaluation import metrics as measures
from training.evaluation.inception import Inception, load_inception

values = st.lists(st.integers(0, 6), min_size=3, max_size=30)


@given(values, values)
def test_aupr_and_auroc_are_scikit_learns(negative, positive):
    a, b = np.asarray(negative, float), np.asarray(positive, float)
    truth, score = np.r_[np.zeros(len(a)), np.ones(len(b))], np.r_[a, b]
    assert measures.average_precision(a, b) == pytest.approx(average_precision_score(truth, score))
    assert measures.auroc(a, b) == pytest.approx(roc_auc_score(truth, score))


def test_fpr_at_95_accepts_95_percent_of_clean_images():
    rng = np.random.default_rng(0)
    clean, other = rng.normal(size=200), rng.normal(1, 1, 300)
    fpr, tpr, _ = roc_curve(np.r_[np.ones(200), np.zeros(300)], -np.r_[clean, other], drop_intermediate=False)
    assert measures.fpr_at_95(clean, other) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
    assert measures.fpr_at_95(np.arange(100.0), np.asarray([94.0, 95.0])) == 0.5


def test_delongs_error_is_the_spread_of_repeated_draws():
    rng = np.random.default_rng(0)
    draws = [(rng.normal(size=60), rng.normal(1, 1, 90)) for _ in range(400)]
    spread = np.std([measures.auroc(a, b) for a, b in draws])
    assert np.mean([measures.auroc_stderr(a, b) for a, b in draws]) == pytest.approx(spread, rel=0.12)


def test_the_error_of_a_difference_of_aurocs_is_the_spread_of_repeated_draws():
    rng = np.random.default_rng(0)

    def draw():
        clean, other = rng.normal(size=60), rng.normal(1, 1, 90)
        return clean, other, clean + 0.5 * rng.normal(size=60), other + 0.5 * rng.normal(size=90)  # two scores of the same images

    draws = [draw() for _ in range(400)]
    spread = np.std([measures.auroc(a, b) - measures.auroc(c, d) for a, b, c, d in draws])
    assert np.mean([measures.auroc_difference_stderr(*each) for each in draws]) == pytest.approx(spread, rel=0.12)
    a, b, _, _ = draws[0]
    assert measures.auroc_difference_stderr(a, b, a, b) == 0.0
    assert measures.auroc_difference_stderr(a, b, np.ones(60), np.ones(90)) == pytest.approx(measures.auroc_stderr(a, b))  # chance has none


def test_the_paired_interval_covers_and_is_agrestis_and_mins():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        easy = rng.random(200)
        a, b = (easy < 0.7) ^ (rng.random(200) < 0.1), (easy < 0.75) ^ (rng.random(200) < 0.1)
        low, high = measures.paired_interval(a, b)
        hits += low <= -0.05 * 0.8 <= high  # P(a) - P(b): flips shrink it by 1 - 2 x 0.1
    assert 0.93 < hits / 400 < 0.985
    a, b = np.asarray([True] * 9 + [False] * 3 + [True] * 8), np.asarray([False] * 9 + [True] * 3 + [True] * 8)
    centre, half = (9.5 - 3.5) / 22, 1.959964 * ((13 / 22 - (6 / 22) ** 2) / 22) ** 0.5
    assert measures.paired_interval(a, b) == pytest.approx((centre - half, centre + half), abs=1e-6)
    same = measures.paired_interval(a, a)
    assert same[0] == -same[1] < 0  # never a point: nothing is known for certain of the images that were not seen


def test_likelihood_and_brier_are_scikit_learns():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 200)
    label = rng.integers(0, 4, 200)
    assert measures.negative_log_likelihood(p, label).mean() == pytest.approx(log_loss(label, p, labels=range(4)))
    two, binary = rng.dirichlet(np.ones(2), 200), rng.integers(0, 2, 200)
    assert measures.brier(two, binary).mean() == pytest.approx(2 * brier_score_loss(binary, two[:, 1]))


def test_the_floor_is_what_a_calibrated_model_shows():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(5, 0.4), 400)
    shown = [measures.expected_calibration_error(p, np.asarray([rng.choice(5, p=row) for row in p])) for _ in range(40)]
    assert measures.calibration_floor(p) == pytest.approx(np.mean(shown), rel=0.15)
    wrong = measures.expected_calibration_error(p, rng.integers(0, 5, 400))
    assert wrong > 3 * measures.calibration_floor(p)
    bins = measures.reliability(p, p.argmax(axis=1))
    assert sum(n for _, _, n in bins) == 400
    assert all(accuracy == 1.0 for _, accuracy, _ in bins)


def test_distances_of_known_samples():
    a = np.asarray([0.0, 1.0, 2.0])
    assert measures.wasserstein(a, a + 3) == pytest.approx(3.0)
    assert measures.overlap(a, a) == pytest.approx(1.0)
    assert measures.overlap(a, a + 100) == 0.0


def test_mcnemar_by_hand():
    a = np.asarray([True] * 9 + [False] + [True] * 20)
    b = np.asarray([False] * 9 + [True] + [True] * 20)
    assert measures.mcnemar(a, b) == pytest.approx(2 * 11 / 2**10)  # 9 of 10 one way
    assert measures.mcnemar(a, a) == 1.0


def test_the_interval_of_a_mean_covers():
    rng = np.random.default_rng(0)
    hits = [low <= 0 <= high for low, high in (measures.mean_interval(rng.normal(size=50)) for _ in range(400))]
    assert 0.9 < np.mean(hits) < 0.98
    assert measures.mean_interval(np.asarray([1.0]))[1] == np.inf


def test_frechet_distance_is_torchmetrics_on_the_same_features():
    torchmetrics = pytest.importorskip("torchmetrics.image.fid", reason="pip install torchmetrics")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 8)), rng.normal(0.2, 1.3, (400, 8))
    metric = torchmetrics.FrechetInceptionDistance(feature=Given(8), input_img_size=(8, 1, 1), normalize=False).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    assert distances.frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-6)


class Given(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.num_features = features

    def forward(self, x):
        return x.flatten(1)


def test_extrapolation_takes_the_bias_of_few_samples_away():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(20_000, 16))
    fake = rng.normal(0.3, 1, size=(600, 16))
    truth = 16 * 0.09
    plain, (beyond, error) = distances.frechet_distance(fake, real), distances.frechet_infinity(fake, real)
    assert plain > truth + 0.1
    assert abs(beyond - truth) < abs(plain - truth)
    assert 0 < error < 0.2


def test_the_kernel_distance_is_unbiased_and_its_formula():
    rng = np.random.default_rng(0)
    same = [distances.mmd(rng.normal(size=(40, 3)), rng.normal(size=(40, 3))) for _ in range(300)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 300**0.5
    a, b = rng.normal(size=(5, 2)), rng.normal(1, 1, (5, 2))

    def kernel(x, y):
        return (x @ y / 2 + 1) ** 3

    inside = sum(kernel(s[i], s[j]) for s in (a, b) for i in range(5) for j in range(5) if i != j) / 20
    assert distances.mmd(a, b) == pytest.approx(inside - 2 * np.mean([[kernel(x, y) for y in b] for x in a]))
    value, error, blocks = distances.kernel_distance(a, b)
    assert (value, blocks) == (pytest.approx(distances.mmd(a, b)), 1)
    assert np.isnan(error)  # of one block there is none
    draws = [distances.kernel_distance(rng.normal(size=(300, 3)), rng.normal(0.5, 1, (300, 3))) for _ in range(120)]
    assert np.mean([error for _, error, _ in draws]) == pytest.approx(np.std([value for value, _, _ in draws]), rel=0.35)
    assert {blocks for _, _, blocks in draws} == {5}


def test_precision_and_recall_of_known_sets():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(300, 4))
    assert distances.precision_recall(real, real) == (1.0, 1.0)
    assert distances.precision_recall(real + 100, real) == (0.0, 0.0)
    precision, recall = distances.precision_recall(real[:150] * 0.1, real)  # all in the middle
    assert precision > 0.95
    assert recall < 0.5
    distance, index = distances.nearest(real[:20], real)
    np.testing.assert_array_equal(index, np.arange(20))
    assert distance.max() < 1e-6


def test_inception_score_of_known_predictions():
    sure = np.eye(10)[np.arange(1000) % 10]
    assert distances.inception_score(sure)[0] == pytest.approx(10.0, rel=1e-6)
    assert distances.inception_score(np.full((1000, 10), 0.1))[0] == pytest.approx(1.0)


def test_inception_takes_its_own_file_and_no_other(tmp_path):
    torch.manual_seed(0)
    net = Inception().eval()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["fc.weight"] == (1008, 2048)
    assert (
        sum(value.numel() for value in net.parameters()) == 23_850_960
    )  # torchvision's 27,161,264 less the auxiliary head, with 1,008 classes
    file = tmp_path / "weights.pth"
    torch.save(net.state_dict(), file)
    with pytest.raises(DataError, match="figures of another file are not FID"):
        load_inception(file)
    import hashlib

    again = load_inception(file, hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    image = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        features, logits = again(image)
        torch.testing.assert_close(net(image)[0], features)
    assert features.shape == (1, 2048)
    assert logits.shape == (1, 1008)
    torch.save({"fc.weight": torch.zeros(2)}, file)
    with pytest.raises((DataError, RuntimeError)):
        load_inception(file, hashlib.sha256(file.read_bytes()).hexdigest()[:8])
