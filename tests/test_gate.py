"""Tests of the gate of a refresh: a model worse than the store's `current` stays a candidate, with the reason, unless --force."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

import training.train
from ebjdat_serve.bundle import CANDIDATE, MANIFEST, Bundle, write_json
from ebjdat_serve.editing import check_editable, copied
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.exporting.reference import write_selftest
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import Images
from ebjdat_serve.server.served_model import open_bundle
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.store import CURRENT, candidates, listing, publish, rollback, versions, withhold
from training.calibrate import calibrate
from training.data.datasets import load
from training.errors import HeldBack
from training.evaluation import context, gate
from training.evaluation.context import Suite
from training.evaluation.evaluated_model import bundle_spec
from training.evaluation.gate import MARGIN, judge
from training.evaluation.metrics import auroc
from training.evaluation.ood_sets import strange_images
from training.loop.clock import Clock
from training.presets import BUDGETS, METHODS
from training.refresh import deliver, finished, refresh


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(autouse=True, scope="module")
def runs(tmp_path_factory):
    """One folder of results for all tests: what the same model says of the same images is not computed again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBJDAT_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


def spoiled(bundle, data, folder, version="spoiled"):
    """Return a copy whose last layer has forgotten what it learned, calibrated as it is."""
    worse = copied(bundle, folder)
    tensors = load_file(worse.path / "weights.safetensors")
    head = tensors["head.weight"]
    noise = np.random.default_rng(0).normal(0, np.abs(head).mean(), head.shape)
    save_file({**tensors, "head.weight": noise.astype(head.dtype)}, worse.path / "weights.safetensors")
    worse = worse.update("weights.safetensors", version=version)
    for name in ("classify.onnx", "score.onnx", "step.onnx"):
        graph = onnx.load(worse.path / name, load_external_data=False)
        for entry in graph.metadata_props:
            if entry.key == "weights":
                entry.value = worse.manifest.files["weights.safetensors"].sha256
        (worse.path / name).write_bytes(graph.SerializeToString())
    worse = worse.update("classify.onnx", "score.onnx", "step.onnx")
    write_selftest(worse, load_file(worse.path / "selftest.safetensors")["image"])
    return calibrate(worse.update("selftest.safetensors"), data)


@pytest.fixture(scope="module")
def good(golden, tmp_path_factory):
    return copied(Bundle.load(golden), tmp_path_factory.mktemp("good") / "digits")


@pytest.fixture(scope="module")
def worse(good, digits, tmp_path_factory):
    return spoiled(good, digits, tmp_path_factory.mktemp("worse") / "digits")


def test_a_worse_model_stays_a_candidate_and_current_is_what_it_was(good, worse, digits, tmp_path):
    store = tmp_path / "store"
    first = publish(good, store)
    with pytest.raises(HeldBack, match="accuracy_clean") as told:
        deliver(worse, digits, tmp_path, store, force=False)
    assert Bundle.load(store).path == first
    assert versions(store) == [first]
    (home,) = candidates(store)
    said = json.loads((home / CANDIDATE).read_text())
    assert said["reason"] in str(told.value)
    rows = {row["metric"]: row for row in said["comparison"]}
    assert rows["accuracy_clean"]["worse"]
    assert rows["accuracy_clean"]["n"] == len(digits.selection)
    assert (rows["accuracy_clean"]["dataset"], rows["accuracy_clean"]["split"]) == ("digits", "selection")
    assert rows["accuracy_clean"]["interval"][1] < -MARGIN
    assert rows["accuracy_pgd20"]["eps"] == 51 / 255
    assert (rows["auroc_flag"]["against"], rows["auroc_flag"]["against_split"]) == ("digits", "selection")
    assert "flag_rate_clean" in rows
    assert json.loads((tmp_path / "gate.json").read_text())["reason"] == said["reason"]


@pytest.mark.slow
def test_each_model_is_judged_by_its_own_views(good, digits, tmp_path):
    """One calibrated by the logits alone no longer sees blank images, and is held back for it."""
    blind = calibrate(copied(good, tmp_path / "blind"), digits, views=("logits",))
    flagged = {row.images.dataset: row for row in gate.compare(blind, good, digits) if row.metric == "auroc_flag"}
    blank = flagged["blank images"]
    for bundle, value in ((blind, blank.new), (good, blank.current)):
        subject, combination = bundle_spec(bundle.path)(), bundle.combination()
        sets = (to_unit(digits.selection.image), dict(strange_images(digits, digits.selection.image, print))["blank images"])
        clean, other = (combination.score(subject.look(image)["terms"]) for image in sets)
        assert value == pytest.approx(auroc(clean, other), abs=1e-6)
    assert blank.worse


@pytest.mark.slow
def test_a_candidate_is_listed_never_served_and_published_by_force(good, worse, tmp_path):
    store = tmp_path / "store"
    first = publish(good, store)
    home = withhold(worse, store, "it is worse", [])
    command = [sys.executable, "-m", "ebjdat_serve.cli"]
    shown = subprocess.run([*command, "list", str(store)], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == [f"current   {first.name}", f"candidate {home.name}: it is worse"]
    assert (
        "held back, not served: it is worse"
        in subprocess.run([*command, "inspect", str(home)], capture_output=True, text=True, check=True).stdout
    )
    with pytest.raises(BundleError, match="is a candidate and is not served: it is worse"):
        open_bundle(home, Settings())
    with pytest.raises(BundleError, match="no version"):
        rollback(store, "spoiled")
    with pytest.raises(BundleError, match="published or deleted unchanged"):
        check_editable(home, force=True)
    for source in (home, worse.path):  # nor is it published by another way
        done = subprocess.run([*command, "publish", str(source), str(store)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "held back: it is worse; or give --force" in done.stderr
    assert Bundle.load(store).path == first
    done = subprocess.run([*command, "publish", str(home), str(store), "--force"], capture_output=True, text=True, check=True)
    assert Bundle.load(store).manifest.version == "spoiled"
    assert not candidates(store)
    assert not (Bundle.load(store).path / CANDIDATE).exists()
    assert listing(store).splitlines()[0] == f"previous  {first.name}"
    with pytest.raises(BundleError, match="is no store"):
        listing(tmp_path)


def test_the_first_an_identical_and_a_better_one_pass(good, worse, digits, tmp_path):
    store = tmp_path / "store"
    assert judge(worse, store, digits).reason == ""
    deliver(worse, digits, tmp_path, store, force=False)
    better = judge(good, store, digits)
    assert better.reason == ""
    assert {row.metric: row.gain for row in better.rows}["accuracy_clean"] > 0.3
    deliver(good, digits, tmp_path, store, force=False)
    assert Bundle.load(store).manifest.version == good.manifest.version
    assert judge(good, store, digits).rows == []  # the very same
    again = copied(good, tmp_path / "again").update(version="again")
    same = judge(again, store, digits)
    assert same.reason == ""
    assert {row.gain for row in same.rows} == {0.0}
    deliver(again, digits, tmp_path, store, force=False)
    assert Bundle.load(store).manifest.version == "again"


def test_what_was_held_back_is_published_once_it_passes(good, worse, digits, tmp_path):
    store = tmp_path / "store"
    withhold(good, store, "it was worse than an earlier one", [])
    publish(worse, store)
    assert deliver(good, digits, tmp_path, store, force=False) == store / f"digits-{good.manifest.version}"
    assert Bundle.load(store).manifest == good.manifest
    assert not candidates(store)


@pytest.mark.parametrize("empty", [True, False])
def test_a_refresh_takes_nothing_back_that_was_published_during_its_gate(good, worse, digits, tmp_path, monkeypatch, empty):
    store, other = tmp_path / "store", copied(good, tmp_path / "other").update(version="other")
    if not empty:
        publish(worse, store)
    verdict = gate.judge(good, store, digits)

    def judge(*arguments):
        publish(other, store)
        return verdict

    monkeypatch.setattr(gate, "judge", judge)
    with pytest.raises(BundleError, match="points at digits-other now"):
        deliver(good, digits, tmp_path, store, force=False)
    assert Bundle.load(store).manifest == other.manifest


def test_a_bundle_measured_on_more_images_than_asked_for_is_finished(good):
    """`--resume` of a run with a smaller suite keeps the figures of the larger one."""
    weights = good.path / "weights.safetensors"
    assert finished(good.path, weights, 300)
    assert finished(good.path, weights, 100)
    assert not finished(good.path, weights, 301)


def test_a_model_measured_further_becomes_the_next_revision(good, digits, tmp_path):
    store = tmp_path / "store"
    publish(good, store)
    more = copied(good, tmp_path / "more")
    write_json(more.path / "metrics.json", [])
    deliver(more.update("metrics.json"), digits, tmp_path, store, force=False)
    assert Bundle.load(store).manifest.version == f"{good.manifest.version}.r1"
    assert Bundle.load(store).metrics() == []
    assert (store / "current" / "README.md").read_text(encoding="utf-8").startswith(f"# digits@{good.manifest.version}.r1\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: {"labels": [*m.labels[:-1], "other"]}, "its labels are"),
        (lambda m: {"input": replace(m.input, height=12)}, "12 x 8|8 x 12|pixels"),
        (lambda m: {"provenance": replace(m.provenance, data_sha256="0" * 64)}, "trained on other images"),
    ],
)
def test_what_cannot_be_compared_is_a_candidate_with_that_reason(good, digits, tmp_path, change, said):
    store = tmp_path / "store"
    store.mkdir()
    other = copied(good, store / "digits-other")  # by hand: one of another size, that its graphs are not made for, is not published
    other.update(version="other", **change(other.manifest))
    (store / CURRENT).symlink_to("digits-other")
    with pytest.raises(HeldBack, match=f"cannot be compared with digits@other: .*({said})"):
        deliver(good, digits, tmp_path, store, force=False)
    assert Bundle.load(store).manifest.version == "other"
    deliver(good, digits, tmp_path, store, force=True)
    assert Bundle.load(store).manifest.version == good.manifest.version


def test_a_current_model_that_is_damaged_cannot_be_compared_with(good, digits, tmp_path):
    home = publish(copied(good, tmp_path / "other").update(version="other"), tmp_path / "store")
    (home / MANIFEST).chmod(0o644)
    (home / MANIFEST).write_text("{")
    assert "cannot be compared with the current model" in judge(good, tmp_path / "store", digits).reason


@pytest.mark.parametrize("rows", ["none", "stale"])
def test_a_current_model_without_a_calibration_of_its_graph_cannot_be_compared_with(good, digits, tmp_path, rows):
    home = publish(copied(good, tmp_path / "other").update(version="other"), tmp_path / "store")
    for name in ("calibration.json", MANIFEST):
        (home / name).chmod(0o644)
    kept = json.loads((home / "calibration.json").read_text())
    write_json(home / "calibration.json", [] if rows == "none" else [{**row, "of": "0" * 64} for row in kept])
    Bundle.draft(home).update("calibration.json")
    assert "cannot be compared with the current model" in judge(good, tmp_path / "store", digits).reason


def test_the_gate_never_looks_at_the_test_set(good, worse, digits, tmp_path):
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError("the gate looked at the test set")

    publish(good, tmp_path / "store")
    assert judge(worse, tmp_path / "store", replace(digits, test=Untouchable())).reason


def test_worse_is_an_interval_beyond_the_margin():
    row = gate.Compared("accuracy_clean", Images(dataset="x"), 100, 0.5, 0.6, -0.1, (-0.3, -MARGIN + 1e-6))
    assert not row.worse
    assert replace(row, interval=(-0.3, -MARGIN - 1e-6)).worse


@pytest.mark.slow
def test_a_refresh_with_a_barely_trained_model(good, tmp_path, monkeypatch, digits):
    """The whole of it: train, export, parity, calibrate, evaluate, gate; then --force."""
    monkeypatch.setitem(context.SUITES, "quick", Suite(*[20, 5, 5, 0, 0, 0, 2, 5, 1, 5, 10], queries=5, thorough=False))
    monkeypatch.setattr("training.evaluate.USUAL", ("clean", "robustness", "landscape"))
    store, run = tmp_path / "store", tmp_path / "run"
    first = publish(good, store)
    stage = replace(METHODS["standard"](BUDGETS["digits"]), name="barely", epochs=0.2)
    common = {"init": None, "clock": Clock(), "suite": "quick", "device": torch.device("cpu"), "store": store}
    with pytest.raises(HeldBack, match=f"worse than digits@{good.manifest.version}"):
        refresh(stage, run, **common)
    assert Bundle.load(store).path == first
    (home,) = candidates(store)
    assert home.name.startswith("barely-")
    done = refresh(stage, run, force=True, **common)
    assert Bundle.load(store).path == done.resolve()
    assert done.name == home.name
    assert not candidates(store)
    assert refresh(stage, run, **common) == done  # the same again passes


@pytest.mark.parametrize("error", [EbjdatError("there is no home folder"), OSError(28, "No space left on device", "weights")])
def test_a_machine_without_a_place_for_runs_ends_a_refresh_in_one_line(error, monkeypatch):
    def root():
        raise error

    monkeypatch.setattr(training.train, "runs_root", root)
    monkeypatch.setattr(sys, "argv", ["train.py", "digits"])
    with pytest.raises(SystemExit) as ended:
        training.train.main()
    assert ended.value.code == f"train.py: {error}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digits"], ["digits", "--run", "r1", "--resume", "--force"]),
        (["digits", "--run", "mine", "--resume"], ["digits", "--run", "mine", "--resume", "--force"]),
        (["digits", "--run=mine", "--store", "s"], ["digits", "--run=mine", "--store", "s", "--resume", "--force"]),
    ],
)
def test_a_model_that_is_held_back_ends_with_a_status_and_the_command_that_publishes_it(words, expected, monkeypatch, tmp_path, capsys):
    def held(*arguments, **options):
        raise HeldBack("it is worse")

    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main sets this process's threads
    for name in ("r1", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"git": "g", "started": "s", "stages": [{"name": "digits"}]}))
    monkeypatch.setattr(training.train, "refresh", held)
    monkeypatch.setattr(training.train, "default_run", lambda *told: "r1")
    monkeypatch.setattr(sys, "argv", ["train.py", *words, *([] if "--resume" in words else ["--resume"])])
    with pytest.raises(SystemExit) as ended:
        training.train.main()
    assert ended.value.code == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("publish it nevertheless: ")
    assert shlex.split(last.removeprefix("publish it nevertheless: "))[2:] == expected
