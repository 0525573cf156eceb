"""Tests of bundles: what is refused, and that readers never see a partial one."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebjdat_serve.bundle import MANIFEST, Bundle, Manifest, parse, resolve, sha256
from ebjdat_serve.errors import BundleError
from ebjdat_serve.store import publish


@pytest.fixture
def copy(shipped, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(shipped.path, folder)
    return folder


def edit(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_the_manifest_round_trips(shipped):
    assert parse(Manifest, json.loads(json.dumps(asdict(shipped.manifest))), "again") == shipped.manifest


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_refused_and_the_file_named(copy, data):
    name = data.draw(st.sampled_from(sorted(Bundle.draft(copy).manifest.files)))
    file = copy / name
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Bundle.load(copy)
    file.write_bytes(whole)


@pytest.mark.parametrize("name", ["weights.safetensors", "classify.onnx", "calibration.json"])
def test_a_missing_or_short_file_is_refused_and_named(copy, name):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=name):
        Bundle.load(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(schema=99), "schema 99 is unknown"),
        (lambda m: m.update(colour="red"), r"unknown keys \['colour'\]"),
        (lambda m: m.pop("labels"), r"missing keys \['labels'\]"),
        (lambda m: m["sampler"].update(steps="many"), "sampler: steps"),
        (lambda m: m["files"].update({"../../etc/passwd": {"sha256": "0", "bytes": 1}}), "not a plain file name"),
        (lambda m: m["files"].pop("score.onnx"), "score.onnx missing"),
    ],
)
def test_a_strange_manifest_is_refused(copy, change, said):
    edit(copy, change)
    with pytest.raises(BundleError, match=said):
        Bundle.load(copy)


def test_a_manifest_that_is_not_json_is_refused(copy):
    (copy / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.load(copy)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_calibration_of_another_graph_is_stale(copy, precision):
    rows = json.loads((copy / "calibration.json").read_text())
    for row in rows:
        row["of"] = "0" * 64 if row["precision"] == precision else row["of"]
    (copy / "calibration.json").write_text(json.dumps(rows))
    Bundle.draft(copy).update("calibration.json")
    with pytest.raises(BundleError, match=f"stale: {precision}"):
        Bundle.load(copy).calibration(precision)


def test_neither_bundle_nor_store(tmp_path):
    with pytest.raises(BundleError, match="neither a bundle"):
        Bundle.load(tmp_path)


def test_publish_points_current_at_a_whole_copy_and_a_version_is_published_once(copy, tmp_path):
    store = tmp_path / "store"
    first = publish(Bundle.load(copy), store)
    assert resolve(store) == first.resolve()
    assert publish(Bundle.load(copy), store) == first  # the same content again is no error
    Bundle.draft(copy).update(sampler=replace(Bundle.draft(copy).manifest.sampler, steps=7))
    with pytest.raises(BundleError, match="published once"):
        publish(Bundle.load(copy), store)
    Bundle.draft(copy).update(version="next")
    second = publish(Bundle.load(copy), store)
    assert resolve(store) == second.resolve()
    assert Bundle.load(first).manifest.version != Bundle.load(second).manifest.version
    assert not list(store.glob(".incoming-*"))


def test_a_damaged_bundle_is_not_published(copy, tmp_path):
    (copy / "classify.onnx").write_bytes(b"")
    with pytest.raises(BundleError):
        publish(Bundle.draft(copy), tmp_path / "store")
    assert not (tmp_path / "store" / "current").exists()


def test_one_copy_of_the_weights(shipped):
    import onnx

    weights = shipped.path / "weights.safetensors"
    content = weights.read_bytes()
    for name in ("classify.onnx", "score.onnx"):
        model = onnx.load(shipped.path / name, load_external_data=False)
        outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert len(outside) > 40
        for tensor in outside:
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert where["location"] == weights.name
            assert int(where["offset"]) + int(where["length"]) <= len(content)
        assert (shipped.path / name).stat().st_size < 200_000
        properties = {entry.key: entry.value for entry in model.metadata_props}
        assert properties["weights"] == sha256(weights)
