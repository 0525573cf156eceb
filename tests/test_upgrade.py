"""`ebjdat-serve upgrade`: a bundle of schema 1, as the version before wrote it, becomes one of schema 2 that answers the same."""

import shutil

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve.bundle import MANIFEST, Bundle, read_json, sha256, write_json
from ebjdat_serve.cli import main
from ebjdat_serve.detection import Detector
from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import BundleError
from ebjdat_serve.graphs import as_varint, references, varint, whole_fields, with_features
from ebjdat_serve.scores import ood_score
from ebjdat_serve.server.compute.model import Model
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.store import publish
from ebjdat_serve.upgrade import upgrade
from ebjdat_serve.views import VIEWS, Combination, rank_term
from tests.conftest import ROOT
from training.data.datasets import load
from training.evaluation.context import unit

DATA = ROOT / "tests" / "data"


@pytest.fixture
def old(tmp_path):
    """The digits bundle of schema 1, with the files that schema 2 left as they were."""
    folder = tmp_path / "old"
    shutil.copytree(DATA / "digits-schema1", folder)
    for name in read_json(folder / MANIFEST)["files"]:
        if not (folder / name).exists():
            shutil.copyfile(DATA / "digits" / name, folder / name)
    return folder


def test_it_answers_as_before(old, tmp_path, capsys):
    assert main(["upgrade", str(old), str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'new'} is digits@2026.11.26-000fcab7.r1, schema 2" in said
    assert (
        f"without the view features: the bundle was converted from schema 1, which had none: python training/calibrate.py {tmp_path}"
        in said
    )
    image, _ = unit(load("digits").test)
    before = ort.InferenceSession(str(old / "classify.onnx")).run(["logits", "energy"], {"image": image})
    model = Model(tmp_path / "new", Settings(device="cpu", threads=1), ("classify", "step"))
    found = model.engine.classify(image)
    np.testing.assert_array_equal(found.logits, before[0])
    np.testing.assert_array_equal(found.energy, before[1])
    (row,) = read_json(old / "calibration.json")
    p_value = Detector(np.array(row["scores"]), 0.05).p_value(ood_score(row["score"], row["weight"], before[0]))
    predicted = model.predict(load("digits").test.image)
    np.testing.assert_array_equal(predicted.p_value, p_value)
    head = load_engine(model.bundle, "torch", "cpu").classify(image)
    np.testing.assert_allclose(found.features, head.features, atol=1e-5)


def test_what_it_says_of_itself(old, tmp_path):
    done = upgrade(old, tmp_path / "new")
    m, before = done.manifest, read_json(old / MANIFEST)
    assert (m.schema, m.input.resize, m.output, m.licence.weights) == (2, "squash", "logits", "unknown")
    assert vars(m.capabilities) == {"energy": "yes", "features": "yes", "gradient": "yes", "generate": "yes"}
    assert m.labels == before["labels"]
    assert {name for name in m.files if m.files[name].sha256 != before["files"].get(name, {}).get("sha256")} == {
        "classify.onnx", "calibration.json", "selftest.safetensors", "metrics.json", "views.safetensors", "README.md",
    }  # fmt: skip
    assert all(done.holds(row.of) for row in done.metrics())  # the graph computes what it did: figures are not stale
    assert (done.path / "README.md").read_text(encoding="utf-8").startswith(f"# digits@{m.version}\n")
    assert oct((done.path / "views.safetensors").stat().st_mode)[-3:] == "644"


def test_a_store_is_upgraded_into_a_bundle_that_it_takes(old, tmp_path):
    """Its current version is of schema 1, which servers of this version refuse with the way out."""
    store = tmp_path / "store"
    store.mkdir()
    shutil.copytree(old, store / "digits-2026.11.26-000fcab7")
    (store / "current").symlink_to("digits-2026.11.26-000fcab7")
    with pytest.raises(BundleError, match=rf"schema 1 is not 2, .*; ebjdat-serve upgrade {store}\S* NEW converts it"):
        Bundle.load(store)
    home = publish(upgrade(store, tmp_path / "new"), store)
    assert home.name == "digits-2026.11.26-000fcab7.r1"
    assert Bundle.load(store).path == home


def test_what_cannot_be_converted_is_said_and_nothing_is_left(old, tmp_path):
    new = tmp_path / "new"
    with pytest.raises(BundleError, match="is of schema 2, which needs no upgrade"):
        upgrade(DATA / "digits", new)
    new.mkdir()
    with pytest.raises(BundleError, match="exists already"):
        upgrade(old, new)
    new.rmdir()
    for inside in (old / "sub", old / "a" / ".." / "b"):
        with pytest.raises(BundleError, match="is inside the bundle"):
            upgrade(old, inside)
    new.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="exists already"):
        upgrade(old, new)
    new.unlink()
    manifest = read_json(old / MANIFEST)
    for change, said in (
        ({"schema": 7}, "is of schema 7, and only 1 is converted"),
        ({"input": [32, 32]}, r"input: unknown keys \[\], missing keys \['height', 'width'\]"),
        ({"name": "../up"}, "not a valid name"),
    ):
        write_json(old / MANIFEST, {**manifest, **change})
        with pytest.raises(BundleError, match=said):
            upgrade(old, new)
    write_json(old / MANIFEST, manifest)
    graph = (old / "classify.onnx").read_bytes()
    (old / "classify.onnx").write_bytes(graph[:-1] + bytes([graph[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"classify\.onnx is damaged"):
        upgrade(old, new)
    (old / "classify.onnx").write_bytes(graph)
    rows = read_json(old / "calibration.json")
    unknown, strange = [{**rows[0], "score": "luck"}], [{"of": 3}]
    for changed, said in ((unknown, "'luck' is no view"), (strange, "no calibration of schema 1"), ({}, "no calibration of schema 1")):
        write_json(old / "calibration.json", changed)
        entry = {"sha256": sha256(old / "calibration.json"), "bytes": (old / "calibration.json").stat().st_size}
        write_json(old / MANIFEST, {**manifest, "files": {**manifest["files"], "calibration.json": entry}})
        with pytest.raises(BundleError, match=said):
            upgrade(old, new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_a_graph_keeps_its_bytes_but_for_an_operator_and_an_output(old):
    before = (old / "classify.onnx").read_bytes()
    after = with_features(before, "here")
    assert len(after) - len(before) < 80
    assert references(after).operators == references(before).operators | {"Identity"}
    assert b"".join(raw for _, raw in whole_fields(memoryview(after))) == after
    with pytest.raises(BundleError, match="here has no operator that makes logits"):
        with_features(before.replace(b"logits", b"lagits"), "here")


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=60), st.lists(st.floats(-25, 25, width=32), min_size=1, max_size=30))
def test_ranks_of_the_calibration_itself_leave_p_values_as_they_were(clean, asked):
    clean, asked = np.sort(np.array(clean, np.float32)), np.array(asked, np.float32)
    before = Detector(clean.astype(np.float64), 0.9).p_value(asked)
    combination = Combination({"energy": {}}, {"energy": clean}, {"energy": VIEWS["energy"]})
    scores = combination.score(combination.ranked(clean[:, None])).astype(np.float64)
    assert (np.diff(scores) >= 0).all()
    after = Detector(scores, 0.9).p_value(combination.score(rank_term(clean, asked)[:, None]))
    np.testing.assert_array_equal(after, before)


def test_varints_are_read_as_they_are_written():
    for value in (0, 1, 127, 128, 300, 2**32, 2**63 - 1):
        assert varint(memoryview(as_varint(value)), 0) == (value, len(as_varint(value)))
