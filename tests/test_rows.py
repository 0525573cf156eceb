"""Tests of rows: their fields, that names and fields agree, and that no code depends on a sentence."""

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

from ebjdat_serve import sentences as words
from ebjdat_serve.bundle import Bundle, read_rows, write_json, write_rows
from ebjdat_serve.card import BASELINES
from ebjdat_serve.errors import BundleError
from ebjdat_serve.rows import COMPARED, OUTCOME, Images, Row, first, images_key, parse_images, parse_row, parse_rows, to_json
from ebjdat_serve.sentences import EXTRACTORS
from tests.conftest import ROOT
from training import compare
from training.card import baseline_of, refuse_stale
from training.evaluation import figures, gate
from training.evaluation.chosen import chief, readme_rows
from training.evaluation.evidence import measurement, merge

SENTENCES = (
    *("attack_name", "attack_words", "data_words", "definition", "eps_name", "flag_words", "images_name", "judge_words", "place_words"),
    *("probability_words", "protocol_words", "sampler_words", "set_name", "threat_name", "attacked_name"),
)
MODELS = ("standard", "pgd-at", "sada-jem", "ebjdat")


def tracked():
    """Return (file, rows) of every file of rows that git tracks."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    names = [name for name in done.stdout.splitlines() if name.rsplit("/", 1)[-1] in ("metrics.json", *BASELINES)]
    found = [(name, read_rows(ROOT / name)) for name in names]
    file = ROOT / "benchmarks" / "gpu_robustness.json"
    found += [(f"{file.name}, {model}", parse_rows(rows, file)) for model, rows in json.loads(file.read_text()).items()]
    return found


@pytest.fixture(scope="module")
def files():
    found = tracked()
    assert len(found) >= 21
    assert sum(len(rows) for _, rows in found) > 2700
    return found


def row(metric="accuracy_clean", value=0.5, **more):
    return Row(**{"metric": metric, "value": value, "n": 10, "dataset": "d", "of": "a" * 64, "seed": 0, **more})


def test_every_tracked_row_is_a_measurement_of_its_own_and_round_trips(files):
    for name, rows in files:
        assert len({measurement(each) for each in rows}) == len(rows), name
        for each in rows:
            assert parse_row(json.loads(json.dumps(to_json(each))), name) == each
            assert parse_images(images_key(each.images)) == each.images


def test_a_file_of_rows_round_trips(tmp_path):
    rows = [
        row(interval=(0.25, 0.75), interval_kind="wilson", attacks=("a", "b"), observed={"share": 0.5}),
        row("auroc_energy", 1 / 3, stderr=0.1, score="energy", against="d", against_split="test", against_n=5),
    ]
    write_rows(tmp_path / "metrics.json", rows)
    assert read_rows(tmp_path / "metrics.json") == rows
    assert None not in json.loads((tmp_path / "metrics.json").read_text())[0].values()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"protocol": "PGD-20, l-inf 8/255"}, r"row 1: unknown keys \['protocol'\]"),
        ({"eps": "8/255"}, "row 1: eps: '8/255' is not float"),
        ({"eps": None}, "row 1: eps: None is not float"),
        ({"n": 1.5}, "row 1: n: 1.5 is not int"),
        ({"n": True}, "row 1: n: True is not int"),
        ({"expected": [0.1]}, r"row 1: expected: \[0.1\] is not tuple"),
        ({"attacks": [1]}, "row 1: attacks: 1 is not str"),
        ({"interval": [0.1, 0.2], "interval_kind": "wilson", "stderr": 0.1}, "row 1: give interval or stderr, not both"),
        ({"interval": [0.1, 0.2]}, "row 1: give interval and interval_kind together"),
    ],
)
def test_what_is_no_row_is_refused_with_file_row_and_key(shipped, tmp_path, change, said):
    good = to_json(row())
    write_json(tmp_path / "metrics.json", [good, {**good, **change}])
    with pytest.raises(BundleError, match=rf"metrics\.json: {said}"):
        read_rows(tmp_path / "metrics.json")


@pytest.mark.parametrize("missing", ["metric", "value", "n", "dataset", "of", "seed"])
def test_a_row_that_lacks_a_key_is_refused(tmp_path, missing):
    write_json(tmp_path / "metrics.json", [{key: value for key, value in to_json(row()).items() if key != missing}])
    with pytest.raises(BundleError, match=rf"row 0: unknown keys \[\], missing keys \['{missing}'\]"):
        read_rows(tmp_path / "metrics.json")


def test_every_field_is_explained():
    said = f"{inspect.getdoc(Images)} {inspect.getdoc(Row)}"
    _, table = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").split("## A row")
    named = {field.name for field in fields(Row)}
    assert named <= set(re.findall(r"\w+", said))
    assert named <= set(re.findall(r"`(\w+)`", table.split("\n## ")[0]))
    assert named >= OUTCOME


def kinds(*names):
    """Return the names of metrics that each kind has one of."""
    return {f"{name}_{kind}": kind for name in names for kind in (*COMPARED, *EXTRACTORS)}


SCORED = kinds("auroc", "aupr", "fpr95")
JUDGED = kinds("frechet", "frechet_infinity", "kernel_distance", "precision", "recall", "class_agreement")


def test_names_and_fields_agree(files):
    """Code selects by fields: what a metric's name says besides must be there too."""
    seen = set()
    for name, rows in files:
        for each in rows:
            agrees(each, name)
            seen.add(each.metric)
    assert {"auroc_energy_entropy", "accuracy_autoattack_l2", "check_falls_to_zero", "ratio_classify_batch32_int8"} & seen


def agrees(each, name):
    metric, parts = each.metric, each.metric.split("_")
    if metric in SCORED:
        assert each.score == SCORED[metric], name
    if metric in JUDGED:
        assert each.extractor == JUDGED[metric], name
    if metric.startswith("sets_better_than_"):
        assert metric == f"sets_better_than_{each.baseline}_{each.score}", name
    assert (each.precision is not None) == (parts[-1] in ("fp16", "bf16", "int8")), name
    assert each.precision in (None, parts[-1]), name
    assert metric.startswith("check_") == (each.check is not None), name
    assert each.check is None or metric == f"check_{each.check}", name
    if each.precision is None and parts[:2] == ["accuracy", "pgd20"]:
        assert (each.attack, each.steps) == ("pgd", 20), name
        assert each.norm == ("l2" if parts[-1] == "l2" else "linf"), name
        assert each.objective == ("margin" if parts[-1] in ("margin", "restarts") else None if "released" in parts else "ce"), name
    for attack in ("apgd", "autoattack", "square", "transfer"):
        if metric in (f"accuracy_{attack}", f"accuracy_{attack}_l2"):
            assert each.attack == attack, name
            assert each.norm == ("l2" if parts[-1] == "l2" else "linf"), name
    if each.eps is not None:
        assert each.norm in ("linf", "l2"), name
    if "batch1" in parts or "batch32" in parts:
        assert f"batch{each.batch}" in parts, name


# no sentence decides anything -----------------------------------------------------------------------------------------


@pytest.fixture
def garbled(monkeypatch):
    """Return a function that rewords every sentence, wherever it was imported to."""

    def reword():
        done = 0
        for module in [module for name, module in sys.modules.items() if name.split(".")[0] in ("ebjdat_serve", "training", "benchmarks")]:
            for name in SENTENCES:
                if callable(getattr(module, name, None)):
                    monkeypatch.setattr(module, name, lambda *given: "another sentence")
                    done += 1
        monkeypatch.setattr(words, "WORDS", (lambda row: "another sentence",))
        monkeypatch.setattr(words, "DEFINITIONS", {})
        assert done > 20
        assert words.protocol_words(row()) == words.images_name(Images(dataset="d")) == "another sentence"

    return reword


def drawn(figure):
    """Return the numbers that a figure shows: of its lines, bars and outlines."""
    found = []
    for axis in figure.axes:
        found += [np.asarray(line.get_xydata(), float) for line in axis.lines]
        found += [np.concatenate([path.vertices.ravel() for path in group.get_paths()]) for group in axis.collections]
        found += [patch.get_path().vertices for patch in axis.patches]
    figures.plt.close(figure)
    return [part.tolist() for part in found if part.size]


def decided(shipped):
    """Return all that is decided by rows: charts, the card's and the README's choice, what is compared, what is merged."""
    rows, baseline = shipped.metrics(), baseline_of(shipped)
    refuse_stale(shipped, rows)
    models = [compare.read(ROOT / "benchmarks" / "models" / name) for name in MODELS]
    known = compare.shared(models, True)
    fewer = [replace(each, n=max(1, each.n - 1)) for each in rows]
    merged = merge(rows, fewer, shipped)
    arrays = models[-1].arrays
    return {
        "curves": drawn(figures.curves(rows)),
        "separations": drawn(figures.separations(rows)),
        "differences": drawn(figures.differences(arrays)),
        "landscape": drawn(figures.landscape(arrays, 8 / 255)),
        "landscapes": drawn(figures.landscapes([(model.name, model.arrays) for model in models], 8 / 255)),
        "card": [each.key for each in chief(shipped, rows)],
        "readme": [(each.key, [other.key for _, other in others]) for _, each, others in readme_rows(shipped, rows, baseline)],
        "compared": [(key, [compare.paired(models[0], model, key) for model in models[1:]]) for key in known],
        "merged": [(measurement(each), each.n) for each in merged.rows],
        "kept": len(merged.kept),
    }


def test_rewording_every_sentence_changes_no_chart_no_choice_and_no_comparison(shipped, garbled):
    before = decided(shipped)
    for name, found in before.items():
        assert found, name
    assert len(before["readme"]) == 9
    assert any(p is not None for _, tested in before["compared"] for p in tested)
    garbled()
    assert decided(shipped) == before


def test_rewording_every_sentence_changes_no_verdict_of_the_gate(golden, monkeypatch, garbled):
    rng = np.random.default_rng(0)
    right, bundle = rng.random(400) < 0.9, Bundle.load(golden)
    other = replace(bundle, path=bundle.path / "other")
    clean, strange = rng.normal(0, 1, 400), rng.normal(1, 1, 400)
    good = gate.Seen(right, right, ~right, {"uniform noise": (clean, strange)})
    poor = gate.Seen(right & (rng.random(400) < 0.5), right, ~right, {"uniform noise": (clean, clean)})
    monkeypatch.setattr(gate, "strange_images", lambda *given: [("uniform noise", strange)])
    monkeypatch.setattr(gate, "seen", lambda bundle, *given: poor if bundle is other else good)
    monkeypatch.setattr(gate.Bundle, "load", staticmethod(lambda path: bundle))
    monkeypatch.setattr(gate, "pointed_at", lambda store: store)
    monkeypatch.setattr(gate.Bundle, "served", property(lambda self: str(self.path)))

    def verdict():
        found = gate.judge(other, golden, gate_data())
        return (
            bool(found.reason),
            [(each.metric, each.images, each.gain, each.interval, each.worse) for each in found.rows],
            found.comparison(),
        )

    before = verdict()
    assert before[0]
    assert [worse for *_, worse in before[1]] == [True, False, False, True]
    garbled()
    assert verdict() == before


def gate_data():
    from training.data.datasets import load

    return load("digits")


def test_a_note_is_shown_and_is_no_part_of_a_measurement():
    noted = row(note="by hand")
    assert words.protocol_words(noted).endswith("by hand")
    assert noted.key == row().key
    assert first([noted], "accuracy_clean", split=None) is noted


def taken_apart(tree):
    """Yield the lines that look into a name, a set's name or a note."""
    inside = ("metric", "dataset", "note", "subset", "against", "shift")
    cutting = ("startswith", "endswith", "split", "rsplit", "partition", "rpartition", "removeprefix", "removesuffix", "find", "replace")

    def is_text(node):
        return isinstance(node, ast.Attribute) and node.attr in inside

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            regex = isinstance(node.func.value, ast.Name) and node.func.value.id == "re" and any(map(is_text, node.args))
            if regex or (node.func.attr in cutting and is_text(node.func.value)):
                yield node.lineno
        if (
            isinstance(node, ast.Compare)
            and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
            and any(map(is_text, node.comparators))
        ):
            yield node.lineno


def test_no_code_takes_a_name_or_a_note_apart():
    assert list(taken_apart(ast.parse('row.metric.startswith("auroc_")\n"vs" in row.dataset\nre.search("x", row.note)'))) == [1, 2, 3]
    files = [file for folder in ("ebjdat_serve", "training", "benchmarks", "export") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {file.name: lines for file in files if (lines := list(taken_apart(ast.parse(file.read_text(encoding="utf-8")))))}
    assert not found
