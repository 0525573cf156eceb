"""Tests of the claims of the README and the model card against their rows."""

import re
import sys
from dataclasses import replace

import pytest

from ebjdat_serve.bundle import Bundle, write_rows
from ebjdat_serve.card import BASELINES, Baseline, figure
from ebjdat_serve.editing import copied
from ebjdat_serve.errors import BundleError
from ebjdat_serve.rows import CONTROL, FRESH, PRIOR, Row, first, rows_where
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.views import VIEWS
from tests.baseline import assert_max_softmax_beside
from tests.conftest import ROOT
from training import card
from training.card import about_baseline, baseline_of, costs, readme_limits, readme_table, worse, write_sections
from training.evaluation.chosen import (
    CONTROLS,
    Model,
    chief,
    comparisons,
    model_of,
    readme_figures,
    readme_rows,
    served_score,
    worse_than_chance,
)
from training.evaluation.flag_text import Flagged, benign_limit, flag_sentence, odd_limit

GENERATED = ("limits", "figures")


def section(text, name):
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bundle():
    return Bundle.load(SHIPPED)


def test_the_readme_is_short_and_its_figures_are_the_shipped_rows(readme, bundle):
    assert len(readme.splitlines()) <= 160
    again = "run python training/card.py ebjdat_serve/models/cifar10 --readme README.md"
    assert section(readme, "figures") == readme_table(bundle), again
    assert section(readme, "limits") == readme_limits(bundle), again
    assert write_sections(readme, {"limits": readme_limits(bundle), "figures": readme_table(bundle)}) == readme


def test_the_readme_shows_nine_rows_each_beside_what_it_is_compared_with(readme, bundle):
    found = list(readme_rows(bundle, bundle.metrics(), baseline_of(bundle)))
    assert len(found) == len(readme_figures(model_of(bundle))) == 9
    assert all(others for _, _, others in found)
    for said, row, others in found:
        assert f"| {said} | {figure(row)} |" in readme
        for name, other in others:
            assert f"{name} {figure(other)}" in readme
            assert other.of


def test_a_baseline_of_other_images_says_how_many(bundle):
    rows, other = bundle.metrics(), first(baseline_of(bundle).rows, "accuracy_pgd20", norm="linf", eps=8 / 255)
    fewer = [replace(other, n=n, value=0.25) for n in (7, 12)]
    for known, expected in ((fewer, ("control (n = 12)", fewer[1])), ([*fewer, other], ("control", other))):
        found = readme_rows(bundle, rows, Baseline("control", known))
        assert [others for _, row, others in found if row.metric == "accuracy_pgd20"] == [[expected]]


def test_no_figure_stands_in_the_readme_outside_what_is_generated(readme):
    text = readme
    for name in GENERATED:
        text = text.replace(section(text, name), "")
    versions = r"(?:Python|PyTorch|ONNX Runtime) \d\.\d+(?: (?:to|and) \d\.\d+)?"
    text = re.sub(rf"```.*?```|arXiv \d+\.\d+|{versions}|Apache-2\.0", "", text, flags=re.S)
    assert set(re.findall(r"(?<![\d.])\d*\.\d+", text)) <= {"0.05", "0.01"}
    assert not re.search(r"\d ?%", text.replace("95 % intervals", ""))


def test_limits_stand_before_the_figures_and_say_what_is_inconvenient(readme):
    assert (
        readme.index("## Limits")
        < readme.index("## What energy is")
        < readme.index("## Results of the bundled model")
        < readme.index("## HTTP API")
    )
    limits = readme.split("## Limits")[1].split("\n## ")[0]
    for said in ("GPU", "blank images", "against its control", "max softmax", "no defence", "FID"):
        assert said in limits
    missing = readme.split("**Missing**")[1].split("\n\n")[0]
    for name in ("LAS-AWP", "DHAT-CFA", "SCORE"):
        assert name in missing


def row(metric, value, dataset="d", **more):
    return Row(**{"metric": metric, "value": value, "n": 10, "dataset": dataset, "seed": 0, "of": "a" * 64, **more})


def test_what_cost_robustness_is_the_bundles_own_method(bundle, monkeypatch):
    provenance, rows = bundle.manifest.provenance, bundle.metrics()
    other = replace(provenance, configuration={**provenance.configuration, "method": {"kind": "Trades"}})
    trades = Bundle(bundle.path, replace(bundle.manifest, provenance=other))
    same = rows_where(rows, "accuracy_pgd20")
    better = [replace(each, value=0.9, interval=(0.89, 0.91)) for each in same]
    for found, said in ((better, "**Trades costs robustness** against its control, at"), (same, "Robustness against its control, at")):
        monkeypatch.setattr(card, "baseline_of", lambda of, rows=found: Baseline("control", rows))
        (line,) = costs(trades, rows)
        assert line.startswith(f"- {said}")


@pytest.mark.parametrize(("metric", "words"), [("accuracy_apgd", "under APGD-CE and APGD-T"), ("accuracy_autoattack", "under official")])
def test_attacks_that_both_were_measured_under_are_compared(bundle, monkeypatch, metric, words):
    rows = bundle.metrics()
    same = rows_where(rows, metric, norm="linf", eps=8 / 255)
    assert same
    monkeypatch.setattr(card, "baseline_of", lambda of: Baseline("control", same))
    (line,) = costs(bundle, rows)
    assert words in line
    assert "PGD-20" not in line
    monkeypatch.setattr(card, "baseline_of", lambda of: Baseline("control", [replace(row, n=7) for row in same]))
    assert costs(bundle, rows) == []


def test_worse_than_chance_is_said_only_where_the_interval_says_so(bundle):
    assert not worse_than_chance(row("auroc_energy", 0.4997, stderr=0.018))
    assert not worse_than_chance(row("auroc_energy", 0.2))  # without an error nothing is known
    assert worse_than_chance(row("auroc_energy", 0.46, stderr=0.02))
    said = worse(
        bundle,
        [row("auroc_energy", 0.4997, "near", score="energy", stderr=0.018), row("auroc_energy", 0.2, "far", score="energy", stderr=0.01)],
    )
    assert "energy on far (0.200)" in said
    assert "near" not in said
    assert worse(bundle, [row("auroc_energy", 0.4997, stderr=0.018)]) == ""


def test_the_warm_start_is_spoken_of_as_far_as_it_was_measured(bundle):
    rows, other = [row("accuracy_clean", 0.7)], row("accuracy_clean", 0.8, of="b" * 64)
    assert "which was not evaluated" in about_baseline(bundle, rows, Baseline())
    for title in BASELINES.values():
        assert f"no figure of the {title} is of the same" in about_baseline(bundle, rows, Baseline(title, [replace(other, n=11)]))
        said = about_baseline(bundle, rows, Baseline(title, [other]))
        assert f"The column `{title}` is of" in said
        assert "bbbbbbbbbbbb" in said
        loss, only = row("nll", 0.5), row("nll", 0.6, of="b" * 64)  # a file without the clean accuracy
        assert f"The column `{title}` is of" in about_baseline(bundle, [loss], Baseline(title, [only]))
    started = replace(bundle.manifest, provenance=replace(bundle.manifest.provenance, init_sha256="c" * 64))
    assert "from given weights (sha256 cccccccccccc)" in about_baseline(Bundle(bundle.path, started), rows, Baseline())
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert "evaluated identically" not in card
    assert about_baseline(bundle, bundle.metrics(), baseline_of(bundle)) in card
    assert baseline_of(bundle).rows
    for line in baseline_of(bundle).rows:
        assert line.of not in {entry.sha256 for entry in bundle.manifest.files.values()}


def test_a_card_compares_with_one_network(bundle, tmp_path):
    copy = copied(bundle, tmp_path / "cifar10")
    for name in BASELINES:
        write_rows(copy.path / name, [row("accuracy_clean", 0.8, of="b" * 64)])
    with pytest.raises(BundleError, match=r"has baseline\.json and control\.json, and a card compares with one"):
        baseline_of(copy.update(*BASELINES))


def test_a_row_stands_beside_its_own_kind(bundle):
    served, plain = (readme_figures(Model(score, 8 / 255, "d")) for score in ("energy_entropy", "max_softmax"))
    rows = [
        row("flag_power", 0.1, "blank images", alpha=0.05, score="energy"),
        row("flag_power", 0.2, "blank images", alpha=0.05, score="energy_entropy"),
        row("flag_power", 0.3, "blank images", alpha=0.05, score="max_softmax"),
        row("class_agreement_resnet4b", 0.4, FRESH),
        row("class_agreement_resnet4b", 0.5, split="test"),
    ]
    assert first(rows, served[5].metric, **served[5].fields) is rows[1]
    assert list(comparisons(served[5], plain[5], rows[1], rows, Baseline())) == [("max softmax", rows[2])]
    assert first(rows, served[7].metric, **served[7].fields) is rows[3]
    assert list(comparisons(served[7], plain[7], rows[3], rows, Baseline())) == [("test images", rows[4])]
    clean = row("accuracy_clean", 0.7)
    assert list(comparisons(served[0], plain[0], clean, [clean], Baseline("control", [replace(clean, value=0.8)]))) == [
        ("control", replace(clean, value=0.8))
    ]
    other = replace(clean, value=0.8, n=11)
    assert list(comparisons(served[0], plain[0], clean, [clean], Baseline(rows=[other]))) == [("warm start (n = 11)", other)]


def test_the_card_shows_what_was_fooled_and_not_all_attacked(bundle):
    shown = chief(bundle, bundle.metrics())
    attacked = {r.subset for r in shown if r.attack and r.score and r.moved is None and r.metric != "accuracy_with_rejection"}
    assert attacked == {"fooled", "not fooled"}


def test_max_softmax_stands_beside_every_shipped_figure_of_the_score(bundle):
    rows, score = [r for r in bundle.metrics() if r.part], served_score(bundle)
    assert_max_softmax_beside(rows, score)
    attacked = any(r.part == "hostile" and r.score == score for r in rows)
    assert ("how far one gets was not measured" in flag_sentence(bundle, rows)) == (not attacked)


@pytest.mark.parametrize("text", [None, "<!-- limits --><!-- /limits -->"])
def test_a_readme_that_cannot_be_written_is_told_before_the_bundle_is_changed(golden, tmp_path, monkeypatch, text):
    if text:
        (tmp_path / "none.md").write_text(text)
    copy = copied(Bundle.load(golden), tmp_path / "digits")
    before = (copy.path / "README.md").read_bytes()
    monkeypatch.setattr(sys, "argv", ["card.py", str(copy.path), "--readme", str(tmp_path / "none.md")])
    with pytest.raises(SystemExit, match=r"none\.md|must contain <!-- figures -->"):
        card.main()
    assert (copy.path / "README.md").read_bytes() == before


def test_samples_are_judged_by_a_robust_net_that_is_none_of_the_models(bundle):
    judged = {(r.dataset, r.split, r.control) for r in rows_where(bundle.metrics(), "class_agreement_resnet4b")}
    assert judged >= {(FRESH, None, None), (PRIOR, None, None), (CONTROL, None, CONTROLS[0]), ("cifar10", "test", None)}


def test_the_cards_section_on_the_flag_claims_nothing_without_its_row(golden):
    bundle = Bundle.load(golden)
    said = flag_sentence(bundle, [])
    assert "how far one gets was not measured" in said
    assert not re.search(r"\d\.\d\d\d", said.replace(f"{len(bundle.calibration().scores):,}", ""))
    for name in bundle.calibration().views:
        assert f"- `{name}`: {VIEWS[name].words};" in said
    for name, why in bundle.calibration().left_out.items():
        assert f"Without `{name}`: {why}." in said
    assert "a share of 0.5 of them lightly handled" in said
    assert "not measured" in " ".join(odd_limit(Flagged(bundle, [])))
    assert benign_limit(Flagged(bundle, []), "") == []


def test_the_cards_section_on_the_flag_shows_both_scores(golden):
    bundle = Bundle.load(golden)
    alpha = {"alpha": 0.05}
    rows = [
        row("flag_rate_mixture", 0.0515, score="views", **alpha),
        row("flag_rate_mixture", 0.0625, score="max_softmax", **alpha),
        row("flag_rate_shifted", 0.125, score="views", shift="grey", **alpha),
        row("flag_rate_shifted", 0.0715, score="views", shift="JPEG q75", **alpha),
        row("flag_power", 0.875, "gradients", score="views", **alpha),
        row("flag_power", 0.375, "blank images", score="views", **alpha),
        row("flag_power", 0.0045, "blank images", score="max_softmax", **alpha),
        replace(row("share_of_flags", 0.75, "gradients", score="view_statistics", **alpha), n=40),
    ]
    said = flag_sentence(bundle, rows)
    assert "| test images, handled as the calibration's | 0.0515 | 0.0625 | 10 |" in said
    assert "| test images after grey | 0.125 | not measured | 10 |\n| test images after JPEG q75 | 0.0715 |" in said
    assert "| blank images | 0.375 | 0.0045 | 10 |\n| gradients | 0.875 |" in said
    assert "Which view speaks, of more than half of the flagged images: `statistics` on gradients." in said
    f = Flagged(bundle, rows)
    assert odd_limit(f) == [
        "- **The flag misses odd pictures** of 2 kinds: at alpha 0.05 it flags least of blank images, 0.375 (max softmax: 0.0045), n = 10;"
        " of blank images 0.375 (max softmax: 0.0045), n = 10."
    ]
    assert benign_limit(f, "0.04") == [
        "- Harmless changes: after grey, the worst of 2, it flags 0.125 (max softmax: not measured), n = 10; of untouched test images 0.04."
    ]
