"""Tests of the evaluation on models with known results: undefended, masked in two ways, random; resumed; recomputed from its arrays."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import nn

from ebjdat_serve.bundle import Bundle, write_json, write_rows
from ebjdat_serve.card import Baseline, figure
from ebjdat_serve.detection import Detector
from ebjdat_serve.errors import BundleError, EbjdatError, EngineError
from ebjdat_serve.networks.wideresnet import WideResNet
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import FRESH, Images, first, rows_where
from ebjdat_serve.scores import SCORES, ood_score
from ebjdat_serve.sentences import protocol_words
from tests.baseline import assert_max_softmax_beside
from tests.conftest import ROOT
from training import card, compare, evaluate
from training.card import write_card
from training.data.datasets import load
from training.data.image_folders import Split
from training.errors import DataError, TrainingError
from training.evaluate import evaluate_module
from training.evaluation import evaluated_model, generation
from training.evaluation.adaptive import Evade, EvadeBySquare, ScoreAttack, without
from training.evaluation.attacks import Pgd, Trace
from training.evaluation.autoattack import APGD, AutoAttack, ReleasedAutoAttack, Square, summary, tally
from training.evaluation.context import SUITES, claim
from training.evaluation.crown import load_crown
from training.evaluation.evaluated_model import bundle_spec, module_sha256, module_spec
from training.evaluation.extractors import RESNET4B, available
from training.evaluation.figures import landscape
from training.evaluation.flags import Flag, flags_of
from training.evaluation.landscape import clean_of
from training.evaluation.ood import fooled, fooled_rows, shift_rows, suspicion_rows
from training.evaluation.ood_sets import ODD_SETS
from training.evaluation.report import write_evaluation_report
from training.evaluation.resnet20 import load_extractor
from training.evaluation.result_cache import ResultCache, load_arrays, read
from training.evaluation.rows import number, proportion
from training.evaluation.scores import margin, ood_score_of
from training.evaluation.shifts import CORRUPTIONS, SHIFTS, corrupted, shifted
from training.methods.adversary import Threat

LINF = Threat("linf", 51 / 255)


class Net(nn.Module):
    """A small network without any defence."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32 * 16, 10)

    def plain(self, x):
        return self.head(F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(2 * x - 1)))), 2).flatten(1))

    def forward(self, x):
        return self.plain(x)


class Quantised(Net):
    """Masked: rounding has no gradient."""

    def forward(self, x):
        return self.plain(torch.round(8 * x) / 8)


class Scaled(Net):
    """Masked: cross-entropy saturates, so that its gradient is zero in fp32."""

    def forward(self, x):
        return 1e3 * self.plain(x)


class Noisy(Net):
    """Answers at random, which hides nothing from averaged gradients."""

    def forward(self, x):
        return self.plain(x + 0.15 * torch.randn_like(x))


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def weights(digits):
    """One training run; the wrappers above only hide its gradient."""
    torch.manual_seed(0)
    net = Net()
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    image, label = torch.from_numpy(to_unit(digits.train.image)), torch.from_numpy(digits.train.label)
    for _ in range(12):
        for i in torch.randperm(len(label)).split(64):
            loss = F.cross_entropy(net.plain(image[i] + 0.05 * torch.randn_like(image[i])), label[i])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net.state_dict()


def made(kind, weights):
    net = kind()
    net.load_state_dict(weights)
    return net


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def values(rows):
    return {row.key: row.value for row in rows}


def value(rows, metric, **wanted):
    (found,) = rows_where(rows, metric, **wanted)
    return found.value


def measured(kind, weights, runs, **more):
    return evaluate_module(made(kind, weights), "digits", n=40, name=kind.__name__, folder=runs / kind.__name__, **more)


def test_an_undefended_net_is_broken_and_not_called_masked(weights, runs):
    rows = measured(Net, weights, runs, parts=("clean", "robustness", "masking"))
    assert value(rows, "accuracy_clean") > 0.9
    for metric in ("accuracy_pgd20_margin", "accuracy_pgd20_restarts", "accuracy_apgd", "accuracy_worst_case"):
        assert value(rows, metric) <= 0.05
    assert value(rows, "masking_suspected") == 0.0
    assert {row.value for row in rows if row.check} == {1.0}
    low, high = first(rows, "accuracy_apgd").interval
    assert 0 <= low <= value(rows, "accuracy_apgd") <= high <= 1


@pytest.mark.parametrize(
    ("kind", "failed"),
    [
        pytest.param(Quantised, "white_box_beats_square", marks=pytest.mark.slow),
        pytest.param(Scaled, "falls_to_zero", marks=pytest.mark.slow),
    ],
)
def test_a_masked_gradient_is_unmasked(kind, failed, weights, runs):
    rows = measured(kind, weights, runs, parts=("robustness", "masking"))
    assert value(rows, "accuracy_pgd20", norm="linf", eps=51 / 255) > 0.8  # what would have been claimed
    assert value(rows, "accuracy_worst_case") < 0.3
    assert value(rows, "masking_suspected") == 1.0
    assert value(rows, "check_gradients_exist") == value(rows, f"check_{failed}") == 0.0
    assert value(rows, "accuracy_unmasked") < 0.3
    report = (runs / kind.__name__ / "report.html").read_text()
    assert "Masked gradients are suspected" in report
    if kind is Quantised:
        assert value(rows, "autoattack_warnings", attack="apgd") > 0
        measured(kind, weights, runs, parts=("clean",))  # the warnings of other parts stay
        assert "points with zero gradient" in (runs / kind.__name__ / "report.html").read_text()


@pytest.mark.slow
def test_a_random_net_is_attacked_by_averaged_gradients(weights, runs):
    rows = measured(Noisy, weights, runs, parts=("robustness", "masking"), suite="quick")
    assert value(rows, "check_deterministic") == 0.0
    assert value(rows, "masking_suspected") == 0.0
    assert {row.eot for row in rows_where(rows, "accuracy_pgd20")} == {16}
    assert {row.value for row in rows if row.check and row.check != "deterministic"} == {1.0}
    assert value(rows, "accuracy_worst_case") <= 0.05
    assert not rows_where(rows, "accuracy_apgd")  # the package has another version for such nets


def test_three_lines_measure_any_module(weights, runs):
    net = made(Net, weights).train()
    rows = evaluate_module(net, "digits", n=20, parts=("clean",))
    assert not net.training
    assert (rows[0].metric, rows[0].n, rows[0].dataset, rows[0].split, rows[0].part) == ("accuracy_clean", 20, "digits", "test", "clean")
    assert rows[0].of == module_sha256(net)
    assert (runs / "evaluation" / f"module-{rows[0].of[:12]}-{load('digits').sha256[:8]}" / "report.html").is_file()


def test_every_figure_can_be_recomputed_from_the_arrays(weights, runs):
    rows = measured(Net, weights, runs, parts=("clean", "suspicion", "landscape"))
    arrays = load_arrays(runs / "Net")
    test, strange = clean_of(arrays), Images(dataset="uniform noise")
    clean, noise = arrays[test], arrays[strange]
    assert value(rows, "accuracy_clean") == np.mean(clean["logits"].argmax(1) == clean["label"])
    energy = {name: -np.log(np.exp(found["logits"].astype(float)).sum(axis=1)) for name, found in arrays.items()}
    for score in ("energy", "gradient_norm"):
        a, b = (energy[s] if score == "energy" else arrays[s]["gradient"] for s in (test, strange))
        truth = np.r_[np.zeros(len(a)), np.ones(len(b))]
        (found,) = rows_where(rows, f"auroc_{score}", dataset="uniform noise")
        assert found.value == pytest.approx(roc_auc_score(truth, np.r_[a, b]), abs=1e-6)
    (name,) = [images for images in arrays if images.attack == "pgd" and images.eps == 51 / 255]
    moved = energy[name] - energy[test][: len(energy[name])]
    (gap,) = rows_where(rows, "energy_gap", images=name)
    assert gap.value == pytest.approx(moved.mean(), abs=1e-5)
    distance = np.abs(np.sort(energy[name]) - np.sort(energy[test][: len(moved)])).mean() / energy[test].std()
    (w1,) = rows_where(rows, "energy_w1_over_sd", images=name)
    assert w1.value == pytest.approx(distance, rel=1e-4)
    assert noise["logits"].shape[1] == 10
    hit = (clean["logits"].argmax(1) == clean["label"])[: len(arrays[name]["label"])] & ~arrays[name]["robust_mask"]
    (success,) = rows_where(rows, "attack_success", images=name)
    assert success.value * success.n == pytest.approx(hit.sum())
    confidence = {s: -np.log(np.exp(found["logits"] - found["logits"].max(1, keepdims=True)).sum(1)) for s, found in arrays.items()}
    for which, chosen in (("fooled", hit), ("not fooled", ~hit)):
        (found,) = rows_where(rows, "auroc_max_softmax", images=replace(name, subset=which))
        a, b = -confidence[test][: len(hit)], -confidence[name][chosen]
        assert (found.n, found.against_n) == (len(a) + len(b), len(a))
        assert found.value == pytest.approx(roc_auc_score(np.r_[np.zeros(len(a)), np.ones(len(b))], np.r_[a, b]), abs=1e-6)


def test_the_images_that_an_attack_fooled_are_counted_apart(weights, runs):
    """Right images that stand dilute a rate: half of the images flagged may be all of the fooled ones, or none."""
    logits = np.asarray([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [0.0, 9.0]], np.float32)
    clean = {"logits": logits, "label": np.zeros(4, np.int64)}  # the last is wrong to begin with
    unsure = np.asarray([[0.0, 0.1], [0.0, 9.0], [9.0, 0.0], [0.0, 9.0]], np.float32)
    found = {"logits": unsure, "label": np.zeros(4, np.int64), "notes": np.asarray(["a", "b"])}
    np.testing.assert_array_equal(fooled(clean, found), [True, True, False, False])
    c = SimpleNamespace(data=SimpleNamespace(name="d"), subject=SimpleNamespace(graph="g"), say=lambda text: None)
    flag = Flag("max_softmax", 0.0, np.linspace(0.0, 0.5, 99))
    images = Images(dataset="d", split="test", attack="pgd", norm="linf", eps=1 / 255, steps=20)
    rows = list(fooled_rows(c, [flag], [flag], images, clean, found))
    by = {(row.metric, row.subset): row for row in rows if row.alpha != 0.01}
    assert {row.attack for row in rows} == {"pgd"}
    assert (by["attack_success", None].value, by["attack_success", None].n) == (2 / 3, 3)
    assert (by["flag_power", "fooled"].value, by["flag_power", "fooled"].n) == (0.5, 2)
    assert (by["flag_power", "not fooled"].value, by["flag_power", "not fooled"].n) == (0.0, 2)
    assert by["auroc_max_softmax", "fooled"].n == 4 + 2


@pytest.mark.slow
def test_max_softmax_stands_beside_every_figure_of_the_served_score(weights, runs):
    few = replace(SUITES["quick"].at_most(8), hostile=2, queries=3)
    rows = evaluate_module(made(Net, weights), "digits", suite=few, parts=("suspicion", "shifts", "hostile"), folder=runs / "few")
    assert_max_softmax_beside(rows, "energy_entropy")
    assert {row.dataset for row in rows_where(rows, "flag_power")} >= {"blank images", "uniform noise"}


@pytest.fixture(scope="module")
def sums(golden, digits, tmp_path_factory):
    """The context of the digits bundle and its rows of the parts on the flag, of few images."""
    bundle = Bundle.load(golden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBJDAT_RUNS", str(tmp_path_factory.mktemp("runs")))
        few = SUITES["quick"].at_most(40)
        c = evaluate.context(bundle_spec(bundle.path), digits, few, bundle=bundle)
        yield c, [row for part in (suspicion_rows, shift_rows) for row in part(c)]


def test_the_served_score_is_the_sum_of_views_with_each_view_and_max_softmax_beside(sums):
    c, rows = sums
    assert_max_softmax_beside([row for row in rows if row.metric != "share_of_flags"], "views")
    noise = Images(dataset="uniform noise")
    named = list(c.subject.views.combination.stored)
    for name in ("views", *(f"view_{view}" for view in named), "max_softmax"):
        assert first(rows, "flag_power", images=noise, alpha=0.05, score=name).n == 40
        assert first(rows, f"auroc_{name}", images=noise) is not None
    terms = c.arrays[noise]["terms"]
    clean, label = c.arrays[c.where]["terms"].sum(axis=1), [0] * 40 + [1] * 40
    assert first(rows, "auroc_views", images=noise).value == pytest.approx(roc_auc_score(label, [*clean, *terms.sum(axis=1)]), abs=1e-6)
    detector = Detector(np.asarray(c.bundle.calibration().scores), 0.05)
    flagged = detector.suspicious(detector.p_value(terms.sum(axis=1).astype(np.float32)))
    assert first(rows, "flag_power", images=noise, alpha=0.05, score="views").value == flagged.mean() > 0.9
    spoke = {row.score: row.value for row in rows_where(rows, "share_of_flags", images=noise)}
    why = c.subject.views.combination.why(terms[flagged])
    assert spoke == {f"view_{view}": pytest.approx(why.count(view) / len(why)) for view in named}


def test_a_landscape_shows_the_ood_score_of_a_calibrated_bundle_beside_the_energies(sums):
    c, _ = sums
    arrays = {images: found for images, found in c.arrays.items() if not images.attack}
    figure = landscape(arrays, 8 / 255)
    assert [axis.get_xlabel().split(",")[0] for axis in figure.axes] == ["E(x)", "E(x", "OOD score"]
    outline = next(patch for patch in figure.axes[2].patches if patch.get_label() == "clean")
    heights, edges, _ = outline.get_data()
    total = arrays[c.where]["terms"].sum(axis=1)
    inside = (edges[0] <= total) & (total <= edges[-1])
    assert (heights * np.diff(edges)).sum() == pytest.approx(inside.mean())  # the clean images are in it, by their sums
    uncalibrated = {images: {key: value for key, value in found.items() if key != "terms"} for images, found in arrays.items()}
    assert len(landscape(uncalibrated, 8 / 255).axes) == 2


def test_what_p_values_speak_of_is_measured_beside_untouched_images(sums):
    c, rows = sums
    for score in ("views", "max_softmax"):
        assert first(rows, "flag_rate_mixture_in_interval", score=score, alpha=0.05).expected
        assert first(rows, "flag_rate_clean", score=score, alpha=0.05).n == 40
    assert not rows_where(rows, "flag_rate_clean_in_interval")  # untouched images are not what is promised about
    odd = {row.dataset: row.n for row in rows_where(rows, "flag_power", score="views", alpha=0.05) if row.dataset in ODD_SETS}
    assert odd == dict.fromkeys(ODD_SETS, 40)
    assert {row.shift for row in rows_where(rows, "flag_rate_shifted", score="views")} == {None, *SHIFTS}
    # every flag is calibrated on the images that the bundle was: by the same engine the sums are the bundle's own
    flag, every = flags_of(c)
    (again,) = [other for other in every if other.score == "views"]
    np.testing.assert_allclose(again.clean, flag.clean, atol=1e-6)
    assert {len(other.clean) for other in every} == {len(flag.clean)}


def test_the_most_confident_wrong_acceptances_are_shown(sums):
    c, rows = sums
    shown, clean, (flag, _) = c.drawings["accepted"], c.arrays[c.where], flags_of(c)
    wrong = (clean["logits"].argmax(axis=1) != clean["label"]) & ~flag.flags(clean, 0.05)
    assert len(shown["image"]) == min(10, wrong.sum()) > 0
    assert (shown["answer"] != shown["label"]).all()
    assert (np.diff(shown["probability"]) <= 0).all()
    for image, label in zip(shown["image"], shown["label"], strict=True):
        (place,) = [i for i in np.flatnonzero(wrong) if (c.data.test.image[i] == image).all()]
        assert c.data.test.label[place] == label
    page = write_evaluation_report(c, [replace(row, part="suspicion") for row in rows]).read_text()
    assert f"{c.data.names[shown['label'][0]]} taken for {c.data.names[shown['answer'][0]]} ({shown['probability'][0]:.2f})" in page


def test_results_are_of_their_views(golden, tmp_path):
    """A bundle that is calibrated again says other things of the same images."""
    bundle = copied(golden, tmp_path / "again")
    before = bundle_spec(bundle.path)().key
    file = bundle.path / "views.safetensors"
    stored = load_file(file)
    save_file({name: array + np.float32(0.5) if name.endswith(".clean") else array for name, array in stored.items()}, file)
    bundle.update("views.safetensors")
    assert bundle_spec(bundle.path)().key != before


@pytest.mark.slow
def test_reach_is_a_part_whose_figures_fit_together(weights, runs):
    few = replace(SUITES["quick"], test=60, looked=40, strong=20, hostile=20, shifted=20, queries=30)
    rows = evaluate_module(made(Net, weights), "digits", suite=few, parts=("reach",), folder=runs / "reach")
    assert len({row.key for row in rows}) == len(rows)
    for found in rows_where(rows, "review_share", split="test", attack=None):
        low, high = found.expected
        assert low <= found.value <= high
    fooled_by_pgd = rows_where(rows, "reach_auroc", attack="pgd", score="margin")
    assert [row.eps for row in fooled_by_pgd] == [LINF.eps, LINF.eps / 2]
    assert all(value(rows, "reach_auroc_right", attack="pgd", score="margin", eps=row.eps) >= row.value for row in fooled_by_pgd)
    curve = rows_where(rows, "accuracy_with_search")
    assert [row.radius for row in curve] == [share * LINF.eps for share in (0.0, 0.125, 0.25)]
    assert all("worst of each image" in protocol_words(row) for row in curve)
    less = [row.value for row in rows_where(rows, "accuracy_less_radius")]
    assert less == sorted(less)
    rejected = [row.value for row in rows_where(rows, "clean_rejected")]
    assert rejected == sorted(rejected)
    assert value(rows, "aurc", score="max_softmax", attack=None, corruption=None) < value(rows, "error", attack=None, corruption=None)


def test_the_gradient_norm_is_that_of_the_energy(weights, digits, runs):
    net = made(Net, weights).eval()
    measured(Net, weights, runs, parts=("clean",))
    arrays = load_arrays(runs / "Net")
    said = arrays[clean_of(arrays)]["gradient"]
    image = torch.from_numpy(to_unit(digits.test.image[:3])).requires_grad_()
    (gradient,) = torch.autograd.grad(-net(image).logsumexp(dim=1).sum(), image)
    np.testing.assert_allclose(said[:3], gradient.flatten(1).norm(dim=1).numpy(), rtol=1e-4)


class Detour(Net):
    """Masked: nothing comes back through NumPy."""

    def forward(self, x):
        return self.plain(torch.from_numpy(x.detach().numpy()))


class RandomInTraining(Net):
    """Masked: answers at random, but only where gradients are taken."""

    def forward(self, x):
        return self.plain(x + 0.3 * torch.randn_like(x) if torch.is_grad_enabled() else x)


@pytest.mark.slow
def test_a_net_without_any_gradient_is_measured_and_unmasked(weights, runs):
    rows = measured(Detour, weights, runs)
    assert value(rows, "accuracy_clean") > 0.9
    assert value(rows, "check_gradients_exist") == 0.0
    assert value(rows, "masking_suspected") == 1.0
    assert value(rows, "accuracy_unmasked") < 0.3
    moved = {row.moved: row.value for row in rows_where(rows, "auroc_robust_ood", score="energy_entropy")}
    assert moved["both"] < moved["none"] - 0.2  # Square needs no gradient
    assert "its gradient is probably masked" in (runs / "Detour" / "report.html").read_text()


@pytest.mark.slow
def test_chance_under_gradients_alone_does_not_help(weights, runs):
    rows = measured(RandomInTraining, weights, runs, parts=("robustness",))
    assert value(rows, "accuracy_worst_case") <= 0.05


def test_the_key_and_the_sha_know_what_is_in_no_state_dict(weights, digits):
    class Temperature(Net):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return self.scale * self.plain(x)

    factor = [1.0]

    class Closure(Net):
        def forward(self, x):
            return factor[0] * self.plain(x)

    probe = to_unit(digits.test.image[:8])
    one, other = (Temperature(scale) for scale in (1.0, -1.0))
    for net in (one, other):
        net.load_state_dict(weights)
    assert module_sha256(one) != module_sha256(other)
    assert module_sha256(one) == module_sha256(made_like(one, weights))
    net = made(Closure, weights)
    before = module_spec(net, "net", probe)().key
    factor[0] = 2.0
    assert module_spec(net, "net", probe)().key != before


def made_like(net, weights):
    twin = type(net)(net.scale)
    twin.load_state_dict(weights)
    return twin


def test_what_cannot_be_measured_says_why(weights, runs, digits):
    class Pair(Net):
        def forward(self, x):
            return self.plain(x), x

    net = made(Net, weights)
    for words, said in (
        ({"module": made(Pair, weights), "data": "digits"}, "it returns tuple: wrap it"),
        ({"module": nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), "data": "digits"}, r"must return logits \(8, 10\)"),
        ({"module": net, "data": "digits", "parts": "clean"}, "parts is a tuple"),
        ({"module": net, "data": "digits", "parts": ("bogus",)}, "unknown part 'bogus'"),
        ({"module": net, "data": "digits", "suite": "ful"}, "quick, full"),
        ({"module": net, "data": "digits", "n": -5}, "give 1 or more"),
        ({"module": net, "data": "digits", "surrogate": ROOT / "nothing.safetensors"}, "does not exist"),
    ):
        with pytest.raises((TrainingError, DataError), match=said):
            evaluate_module(**words)
    assert all(p.requires_grad for p in net.parameters())


def test_a_judge_whose_file_is_missing_or_another_is_not_measured_and_said(tmp_path, monkeypatch):
    monkeypatch.setenv("EBJDAT_DATA", str(tmp_path))
    load_crown.cache_clear()
    found, lacking = available("cifar10")
    assert "resnet4b" not in [extractor.name for extractor in found]
    assert any("robust judge" in text and "abcrown_resnet4b.pth" in text for text in lacking)
    (tmp_path / "abcrown_resnet4b.pth").write_bytes(b"another")
    load_crown.cache_clear()
    (tmp_path / "resnet20-12fca82f.th").write_bytes(b"another")
    load_extractor.cache_clear()
    found, lacking = available("cifar10")
    assert not {"resnet4b", "resnet20"} & {extractor.name for extractor in found}
    for said in (r"robust judge: not measured, .*abcrown_resnet4b\.pth has sha256", r"resnet20: not measured, .*\.th has sha256"):
        assert any(re.search(said, text) for text in lacking)
    load_crown.cache_clear()
    load_extractor.cache_clear()


def test_a_judge_without_distances_yields_agreement_alone(monkeypatch):
    logits = np.eye(10, dtype=np.float32)
    monkeypatch.setattr(generation, "available", lambda name: ([RESNET4B], []))
    monkeypatch.setattr(generation, "features", lambda c, extractor, image: {"features": logits, "logits": logits})
    image, label = np.zeros((10, 8, 8, 3), np.uint8), np.asarray([0, 1, 2, 3, 4, 5, 6, 7, 0, 0])
    c = SimpleNamespace(
        data=SimpleNamespace(name="cifar10", train=Split(image, label), test=Split(image, label)),
        subject=SimpleNamespace(graph="g"),
        share=lambda metric, good, images, of, **more: proportion(metric, int(good.sum()), len(good), images, of, **more),
        say=lambda text: None,
    )
    rows = list(generation.distance_rows(c, {Images(dataset=FRESH, steps=80): (image, label)}, 10))
    assert [(row.metric, row.dataset, row.split, row.n, row.value) for row in rows] == [
        ("class_agreement_resnet4b", FRESH, None, 10, 0.8),
        ("class_agreement_resnet4b", "cifar10", "test", 10, 0.8),
    ]
    assert {row.extractor for row in rows} == {"resnet4b"}
    assert all("adversarially trained at l-inf 2/255" in protocol_words(row) for row in rows)


def test_log_probabilities_are_told_from_logits(weights, runs):
    class LogSoftmax(Net):
        def forward(self, x):
            return F.log_softmax(self.plain(x), dim=1)

    evaluate_module(made(LogSoftmax, weights), "digits", n=20, parts=("clean",), folder=runs / "log")
    assert "returns log-probabilities" in (runs / "log" / "report.html").read_text()
    with pytest.raises(TrainingError, match="another model or other data"):
        evaluate_module(made(Net, weights), "digits", n=20, parts=("clean",), folder=runs / "log")


@pytest.mark.slow
def test_a_smaller_run_after_a_larger_one(weights, runs):
    more = {"folder": runs / "both", "name": "net"}
    evaluate_module(made(Net, weights), "digits", n=40, parts=("clean", "landscape"), **more)
    rows = evaluate_module(made(Net, weights), "digits", n=20, parts=("clean",), **more)
    assert {row.n for row in rows if row.part == "clean"} == {20}
    assert (runs / "both" / "report.html").is_file()


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes(classes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
    subject = module_spec(net, "few")()
    image = np.random.default_rng(0).random((12, 3, 8, 8), np.float32)
    label = subject.logits(image).argmax(axis=1)
    found = AutoAttack(Threat("linf", 0.2)).run(subject, image, label)
    assert found["robust_mask"].mean() < 0.5
    assert any("four classes" in note for note in found["notes"]) == (classes < 4)
    assert ReleasedAutoAttack(0.2, queries=20).run(subject, image, label)["robust_mask"].mean() < 0.8


@pytest.mark.slow
def test_a_gradient_that_is_no_number_breaks_nothing(digits, weights):
    class Root(Net):
        def forward(self, x):
            return self.plain(torch.sqrt(x) ** 2)

    subject = module_spec(made(Root, weights), "net")()
    image, label = to_unit(digits.test.image[:20]), digits.test.label[:20]
    right = subject.logits(image).argmax(axis=1) == label
    tiny = Threat("l2", 1e-6)
    assert (Pgd(tiny).run(subject, image, label)["robust_mask"] == right).all()
    assert (AutoAttack(tiny, APGD).run(subject, image, label)["robust_mask"] == right).all()


def test_a_part_without_any_row_ends_with_the_folder_all_the_same(golden, runs, monkeypatch, capsys):
    words = [str(golden / "current" / "weights.safetensors"), "--data", "digits", "--part", "generation", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    monkeypatch.setitem(evaluate.PARTS, "generation", lambda c: iter(()))
    evaluate.main()
    (folder,) = (file.parent for file in runs.glob("evaluation/*/report.html"))
    assert capsys.readouterr().out.splitlines()[-1] == f"0 rows in {folder / 'metrics.json'}, {folder / 'report.html'}"


# Killed, damaged, in two processes ------------------------------------------------------------------------------------


def command(golden, runs, *options):
    words = [sys.executable, str(ROOT / "training" / "evaluate.py"), str(golden), *options]
    environment = {**os.environ, "EBJDAT_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    return words, environment


@pytest.mark.slow
def test_a_killed_run_goes_on_and_says_the_same(golden, tmp_path):
    bundle = copied(golden, tmp_path / "bundle")
    before_it = {file.name: file.read_bytes() for file in bundle.path.iterdir()}
    options = ("--part", "robustness", "--n", "300", "--processes", "2")
    words, environment = command(bundle.path, tmp_path / "killed", *options)
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
        chunks = tmp_path / "killed" / "evaluation" / "chunks"
        end = time.monotonic() + 120
        while time.monotonic() < end and len(list(chunks.glob("[!.]*.npz")) if chunks.is_dir() else []) < 4:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    before = {file.name: file.stat().st_mtime_ns for file in chunks.glob("[!.]*.npz")}
    assert len(before) >= 4
    assert not list(chunks.parent.glob("*/metrics.json"))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {name: (chunks / name).stat().st_mtime_ns for name in before} == before  # nothing was done twice
    (file,) = chunks.parent.glob("*/metrics.json")
    resumed = json.loads(file.read_text())
    assert {row["part"] for row in resumed} == {"robustness"}
    assert f"{len(resumed)} rows in {file}" in done.stdout
    assert file.with_name("report.html").is_file()
    words, environment = command(bundle.path, tmp_path / "afresh", *options[:-1], "1")
    assert subprocess.run(words, env=environment, capture_output=True, check=False).returncode == 0
    (file,) = (tmp_path / "afresh" / "evaluation").glob("*/metrics.json")
    assert resumed == json.loads(file.read_text())  # one process or two, at once or in pieces
    assert {file.name: file.read_bytes() for file in bundle.path.iterdir()} == before_it  # measuring writes nothing where it reads


def copied(store, folder):
    import shutil

    shutil.copytree(store / "current", folder)
    return Bundle.draft(folder)


@dataclass(frozen=True)
class Fatal:
    """Ends its process."""

    cost: float = 1.0

    def run(self, subject, image, label):
        os._exit(9)


def ledger(net, folder, processes=1):
    spec = module_spec(net, "net")
    return ResultCache(folder, spec, spec(), processes)


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("training.evaluation.result_cache.WORTH_PROCESSES", 0.0)
    torch.manual_seed(0)
    net = WideResNet(10, 1, 10)
    todo = [(Pgd(LINF, steps=2, leave=False), to_unit(digits.test.image), digits.test.label)]
    two = ledger(net, tmp_path / "two", 2)
    found = two.run("two", todo)[0], two.run("again", todo)[0], ledger(net, tmp_path / "one").run("one", todo)[0]
    two.close()
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[2][name], atol=1e-5)
        np.testing.assert_array_equal(found[0][name], found[1][name])


@pytest.mark.slow
def test_a_dead_worker_is_told_with_what_to_do(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("training.evaluation.result_cache.WORTH_PROCESSES", 0.0)
    image, label = to_unit(digits.test.image), digits.test.label
    with pytest.raises(TrainingError, match="run the same command to continue"):
        ledger(nn.Flatten(), tmp_path, 2).run("fatal", [(Fatal(), image, label)])


def test_a_damaged_chunk_is_done_again(tmp_path, digits, weights, capsys):
    image, label = to_unit(digits.test.image[:50]), digits.test.label[:50]
    book = ledger(made(Net, weights), tmp_path)
    (first,) = book.run("pgd", [(Pgd(LINF, steps=3), image, label)])
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    (again,) = book.run("pgd", [(Pgd(LINF, steps=3), image, label)])
    assert "damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(first["robust_mask"], again["robust_mask"])
    assert read(file) is not None


def test_a_result_is_of_its_model_images_and_numbers(tmp_path, digits, weights):
    image, label = to_unit(digits.test.image[:20]), digits.test.label[:20]
    other = {name: tensor + 1e-3 for name, tensor in weights.items()}
    for state, steps, pictures in ((weights, 2, image), (other, 2, image), (weights, 3, image), (weights, 2, image[::-1].copy())):
        ledger(made(Net, state), tmp_path).run("pgd", [(Pgd(LINF, steps=steps), pictures, label)])
    assert len(list(tmp_path.glob("*.npz"))) == 4


# Attacks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [LINF, Threat("l2", 1.0)], ids=lambda t: t.norm)
def test_pgd_and_the_score_attack_stay_in_their_ball(threat, digits, weights):
    subject = module_spec(made(Net, weights), "net")()
    image, label = to_unit(digits.test.image[:16]), digits.test.label[:16]
    seen = []
    spy = module_spec(made(Net, weights), "net")()
    object.__setattr__(spy, "logits", lambda x: seen.append(x.copy()) or subject.logits(x))
    Pgd(threat, leave=False).run(spy, image, label)
    raised = ScoreAttack(threat, "energy", 0.0, up=True).run(spy, image, label)["logits"]
    lowered = ScoreAttack(threat, "energy", 0.0, up=False).run(spy, image, label)["logits"]
    for x in seen:
        moved = torch.from_numpy(x - image).flatten(1)
        assert float(moved.norm(dim=1, p=2 if threat.norm == "l2" else torch.inf).max()) <= threat.eps + 1e-5
        assert x.min() >= 0
        assert x.max() <= 1
    clean = ood_score("energy", 0.0, subject.logits(image))
    assert (ood_score("energy", 0.0, raised) >= clean - 1e-5).all()
    assert (ood_score("energy", 0.0, lowered) <= clean + 1e-5).all()
    assert ood_score("energy", 0.0, raised).mean() > clean.mean() + 1


@pytest.mark.slow
def test_evasion_is_the_plain_attack_without_a_flag_and_nothing_against_a_flag_on_all(digits, weights):
    subject = module_spec(made(Net, weights), "net")()
    image, label = to_unit(digits.test.image[:30]), digits.test.label[:30]
    for variant in ("joint", "selective", "orthogonal"):
        open_ = Evade(LINF, "energy", 0.0, 1e6, 1.0, variant).run(subject, image, label)["holds"]
        shut = Evade(LINF, "energy", 0.0, -1e6, 1.0, variant).run(subject, image, label)["holds"]
        # steps at right angles to the energy are the worse for it where there is no flag to hide from
        assert open_.mean() <= (0.5 if variant == "orthogonal" else 0.1), variant
        assert shut.all()
    assert EvadeBySquare(LINF, "energy", 0.0, -1e6, 1.0, 20).run(subject, image, label)["holds"].all()
    by_square = EvadeBySquare(LINF, "energy", 0.0, 1e6, 1.0, 300).run(subject, image, label)["holds"]
    alone = Square(LINF, 300).run(subject, image, label)["robust_mask"]
    assert abs(by_square.mean() - alone.mean()) <= 0.25  # the same aim, other random numbers


def test_orthogonal_gradients_have_no_part_along_each_other():
    a, b = torch.randn(2, 4, 3, 8, 8)
    left = without(a, b)
    assert (left * b).flatten(1).sum(dim=1).abs().max() < 1e-3
    torch.testing.assert_close(without(a, torch.zeros_like(a)), a)


def test_the_released_protocol_is_weaker_than_the_official_one(digits, weights):
    subject = module_spec(made(Net, weights), "net")()
    image, label = to_unit(digits.test.image[:20]), digits.test.label[:20]
    released = ReleasedAutoAttack(0.1, queries=50).run(subject, image, label)["robust_mask"]
    official = Pgd(LINF, objective="margin", restarts=2).run(subject, image, label)["robust_mask"]
    assert released.mean() >= official.mean()
    assert 0 < released.mean() < 1


def test_margin_is_positive_exactly_where_the_class_is_wrong():
    logits, label = torch.randn(200, 5), torch.randint(0, 5, (200,))
    assert ((margin(logits, label) > 0) == (logits.argmax(dim=1) != label)).all()


def test_a_trace_of_zero_gradients_says_so(digits, weights):
    image, label = to_unit(digits.test.image[:10]), digits.test.label[:10]
    steps = (1, 4)
    found = Trace(LINF, steps).run(module_spec(made(Quantised, weights), "net")(), image, label)
    assert found["zero"].all()
    assert found["loss"].shape == (10, 2)
    assert not Trace(LINF, steps).run(module_spec(made(Net, weights), "net")(), image, label)["zero"].any()


def test_autoattacks_words_are_kept_and_added_up():
    lines = [(30, "there are 3 points with zero gradient! See flags_doc.md for details.")] * 2
    lines += [(10, "robust accuracy after APGD-CE: 25.00% (total time 1.0 s)"), (10, "other")]
    notes = summary(lines, 40)
    assert notes == ["warning (2 times): there are 3 points with zero gradient!", "apgd-ce left 10"]
    lines, times = tally(np.asarray([*notes, *notes]))
    assert lines == ["AutoAttack warned 4 times: there are # points with zero gradient!", "apgd-ce left 20"]
    assert times == 4


# Scores, flags, shifts ------------------------------------------------------------------------------------------------

logit_rows = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4), min_size=1, max_size=8)


@given(logit_rows, st.floats(0, 5))
def test_attacked_scores_are_the_served_ones(rows, weight):
    logits = np.asarray(rows, np.float32)
    for name in SCORES:
        served = ood_score(name, weight, logits)
        np.testing.assert_allclose(ood_score_of(name, weight)(torch.from_numpy(logits)).numpy(), served, atol=2e-4, rtol=1e-4)


def test_weight_one_is_the_expected_joint_energy():
    logits = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(ood_score("energy_entropy", 1.0, logits), -(p * logits).sum(axis=1), atol=1e-5)
    with pytest.raises(EbjdatError, match="unknown"):
        ood_score("luck", 0.0, logits)


@given(st.lists(st.floats(-5, 5, width=32), min_size=30, max_size=80), st.sampled_from([0.05, 0.1, 0.34]))
def test_an_image_is_unflagged_exactly_up_to_the_threshold(clean, alpha):
    flag = Flag("energy", 0.0, np.sort(np.asarray(clean, np.float64)))
    asked = np.concatenate([flag.clean, flag.clean + 1e-3, flag.clean - 1e-3]).astype(np.float32)
    detector = Detector(flag.clean, alpha)
    flagged = detector.suspicious(detector.p_value(asked))
    assert (flagged == (asked.astype(np.float64) > flag.threshold(alpha))).all()


def test_corruptions_grow_with_severity_and_repeat_themselves(digits, test_images):
    image = test_images[0][:40]
    for name in CORRUPTIONS:
        away = [np.abs(corrupted(image, name, s).astype(int) - image).mean() for s in (1, 5)]
        assert 0 < away[0] < away[1], name
        np.testing.assert_array_equal(corrupted(image, name, 3), corrupted(image, name, 3))
        assert corrupted(digits.test.image[:2], name, 5).shape == (2, 8, 8, 3)


def test_shifts_go_through_the_servers_decoder(test_images):
    image = test_images[0][:6]
    for name, shift in SHIFTS.items():
        moved = shifted(image, shift)
        assert moved.shape == image.shape
        assert np.abs(moved.astype(int) - image).mean() < 40, name
    np.testing.assert_array_equal(shifted(image, SHIFTS["grey"]), shifted(image, SHIFTS["grey, 16 bit"]))
    worse = [np.abs(shifted(image, SHIFTS[f"JPEG q{q}"]).astype(int) - image).mean() for q in (95, 75, 50)]
    assert worse == sorted(worse)


# Cards and comparisons ------------------------------------------------------------------------------------------------


def test_a_card_of_stale_figures_is_refused(golden, tmp_path, monkeypatch):
    bundle = copied(golden, tmp_path / "bundle")
    row, *others = bundle.metrics()
    rows = [replace(row, of="0" * 64), *others]
    with pytest.raises(BundleError, match=r"stale: 1 figures, accuracy_clean first"):
        write_card(bundle, rows, Baseline(), {})
    write_rows(bundle.path / "metrics.json", rows)
    monkeypatch.setattr(sys, "argv", ["card.py", str(bundle.path)])
    with pytest.raises(SystemExit, match="stale"):
        card.main()


@pytest.mark.slow
def test_models_stand_side_by_side_with_a_paired_test(weights, runs):
    parts = ("clean", "robustness")
    for kind in (Net, Scaled):
        measured(kind, weights, runs, parts=parts)
    models = [compare.read(runs / name) for name in ("Net", "Scaled")]
    (row,) = rows_where(models[0].rows.values(), "accuracy_pgd20", eps=51 / 255)
    key = compare.key(row)
    assert key in compare.shared(models, True)
    a, b = (model.images[row.key] for model in models)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    assert only_a == 0
    assert compare.paired(*models, key) == pytest.approx(min(1.0, 2 * 0.5**only_b))
    table = compare.markdown(models)
    assert "| Net | Scaled | p, Scaled |" in table
    page = compare.page(models)
    assert "<img" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained


def test_no_paired_test_is_of_other_images_than_the_row_shows(weights, runs):
    for kind in (Net, Scaled):
        measured(kind, weights, runs, parts=("clean",))
    one, other = (compare.read(runs / name) for name in ("Net", "Scaled"))
    (key,) = [known for known, row in one.rows.items() if row.metric == "accuracy_clean"]
    assert compare.paired(one, other, key) is not None
    other.rows[key] = replace(other.rows[key], n=10_000)  # a row of more images, as a bundle holds one, beside images of a run of fewer
    assert compare.paired(one, other, key) is None


def test_a_bundle_is_compared_by_what_was_measured_of_it_here(golden, runs, digits):
    from ebjdat_serve.editing import copied as writable
    from training.evaluate import evaluate
    from training.evaluation.context import SUITES

    bare = writable(Bundle.load(golden), runs.parent / "bare")
    write_json(bare.path / "metrics.json", [])
    bare = bare.update("metrics.json")
    evaluate(bare, digits, SUITES["quick"].at_most(20), parts=("clean",))
    model = compare.read(bare.path)
    assert {row.n for row in model.rows.values()} == {20}
    assert model.images


def test_a_folder_holds_one_models_evaluation(tmp_path):
    subject = {"name": "a", "weights": "1", "graph": "2", "data": "digits", "data_sha256": "3", "form": "fields"}
    for file in ("metrics.json", "images.npz"):
        claim(tmp_path, subject)
        (tmp_path / file).write_text("[]")
    claim(tmp_path, subject)
    assert (tmp_path / "metrics.json").is_file()
    claim(tmp_path, {**subject, "graph": "exported again"})
    assert [file.name for file in tmp_path.iterdir()] == ["subject.json"]
    write_json(tmp_path / "subject.json", {name: value for name, value in subject.items() if name != "form"})
    (tmp_path / "metrics.json").write_text('[{"protocol": "a sentence"}]')
    claim(tmp_path, subject)
    assert not (tmp_path / "metrics.json").exists()
    with pytest.raises(TrainingError, match="name another folder"):
        claim(tmp_path, {**subject, "weights": "4"})


def test_bounds_below_zero_are_shown():
    where, rest = Images(dataset="d"), {"interval_kind": "normal"}
    assert figure(number("energy_mean", -9.1, 9, where, "", interval=(-10.0, -8.2), **rest)) == "-9.1 [-10, -8.2]"
    assert figure(number("fpr95_energy", 0.0, 9, where, "", interval=(1e-17, 0.06), **rest)) == "0 [0, 0.06]"


def test_what_cannot_be_compared_says_why(tmp_path, weights, runs, monkeypatch):
    measured(Net, weights, runs, parts=("clean",))
    for words, said in (
        ([str(runs / "Net")], "two or more models"),
        ([str(runs / "Net"), str(tmp_path)], "neither a bundle nor the folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare.py", *words])
        with pytest.raises(SystemExit, match=said):
            compare.main()


# on a GPU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("providers", "kind"), [(["CPUExecutionProvider"], "torch"), (["CUDAExecutionProvider"], "onnx")])
def test_a_bundle_is_measured_on_the_gpu_by_whatever_computes_there(shipped, monkeypatch, providers, kind):
    """torch with CUDA beside an ONNX Runtime without it: the graph on one thread of the CPU would take hours."""
    asked = []

    def engine(bundle, kind, device, threads):
        asked.append((kind, device))
        raise EngineError("enough seen")

    monkeypatch.setattr(evaluated_model, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(evaluated_model, "load_engine", engine)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        with pytest.raises(EngineError, match="enough seen"):
            evaluated_model.open_bundle(shipped.path)
        assert not torch.backends.cudnn.allow_tf32  # of the network's gradients, whichever engine serves
    assert asked == [(kind, "cuda")]


def test_what_a_cpu_and_a_gpu_say_is_kept_apart(golden, monkeypatch):
    monkeypatch.setattr(evaluated_model, "runtime_has", lambda device: False)  # the same engine, torch, on both
    keys = set()
    for device in ("cpu", "meta"):
        monkeypatch.setattr(evaluated_model, "best_device", lambda name=device: torch.device(name))
        keys.add(evaluated_model.open_bundle(golden).key)
    assert len(keys) == 2


def test_a_gpu_takes_more_images_at_once(tmp_path):
    sizes = []

    @dataclass(frozen=True)
    class Count:
        cost = 1.0

        def run(self, subject, image, label):
            sizes.append(len(label))
            return {"label": label}

    image, label = np.zeros((700, 1), np.float32), np.arange(700)
    for device in ("cpu", "cuda"):
        model = SimpleNamespace(device=torch.device(device), key=device)
        (found,) = ResultCache(tmp_path, lambda it=model: it, model).run("count", [(Count(), image, label)])
        np.testing.assert_array_equal(found["label"], label)
    assert sizes == [100] * 7 + [200, 500] or sizes == [100] * 7 + [500, 200]
