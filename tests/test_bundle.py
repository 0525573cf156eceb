"""Tests of bundles: what is refused, and that readers never see a partial one."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebjdat_serve.bundle import MANIFEST, Bundle, resolve, sha256
from ebjdat_serve.errors import BundleError
from ebjdat_serve.manifest import Manifest
from ebjdat_serve.parsing import parse
from ebjdat_serve.server.read.generate_request import find_label
from ebjdat_serve.store import publish
from tests.conftest import DIGITS


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(DIGITS, folder)
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
        (lambda m: m.update(schema=99), "schema 99 is not 2"),
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


def labels(*names):
    return lambda m: m.update(labels=[*names, *m["labels"][len(names) :]])


def number(part, name, value):
    return lambda m: m[part].update({name: value})


BEYOND = {
    "steps": (number("sampler", "steps", 10**12), "sampler: steps must be 1 to 10000, not 1000000000000"),
    "no steps": (number("sampler", "steps", 0), "sampler: steps must be 1 to 10000, not 0"),
    "noise": (number("sampler", "noise_std", -1e308), r"sampler: noise_std must be 0 to 10, not -1e\+308"),
    "noise that is none": (number("sampler", "noise_std", float("nan")), "NaN is not JSON"),
    "step size": (number("sampler", "step_size", float("inf")), "Infinity is not JSON"),
    "clip": (number("sampler", "grad_clip", -1), r"sampler: grad_clip must be 0 to 1e\+09, not -1"),
    "height": (number("input", "height", 10**6), "input: height must be 1 to 4096"),
    "width": (number("input", "width", 0), "input: width must be 1 to 4096"),
    "seed": (number("provenance", "seed", 10**400), "provenance: seed must be 0 to"),
    "rollbacks": (number("provenance", "rollbacks", -1), "provenance: rollbacks must be 0 to"),
    "size of a file": (lambda m: m["files"]["step.onnx"].update(bytes=-1), r"files.step.onnx: bytes must be 0 to"),
    "number of another class": (labels("3"), "labels: the label of class 0, '3', is the number of class 3"),
    "number written otherwise": (labels("a", "0_0"), "labels: the label of class 1, '0_0', is the number of class 0"),
    "from one": (lambda m: m.update(labels=[str(i) for i in range(1, 11)]), "is the number of class 1: give it a name, or number all"),
    "empty label": (labels(""), "labels: the label of class 0, '', shows nothing"),
    "blank label": (labels("a", " "), "labels: the label of class 1, ' ', shows nothing"),
    "nothing to see": (labels("\u200d"), "shows nothing"),
    "a mark of nothing": (labels("\ufe0f"), "shows nothing"),
    "a file that is the signature": (
        lambda m: m["files"].update({"bundle.json.sig": m["files"]["prior.safetensors"]}),
        "which others write",
    ),
    "a file that holds it back": (lambda m: m["files"].update({"candidate.json": m["files"]["prior.safetensors"]}), "which others write"),
    "a file of a folder above": (lambda m: m["files"].update({"..": m["files"]["prior.safetensors"]}), "'..' is not a plain file name"),
    "a file of no name": (lambda m: m["files"].update({"": m["files"]["prior.safetensors"]}), "'' is not a plain file name"),
    "a file of a long name": (
        lambda m: m["files"].update({"a" * 300: m["files"]["prior.safetensors"]}),
        "'a{40}' is not a plain file name",
    ),
    "infinity": (lambda m: m["provenance"].update(configuration={"a": float("inf")}), "Infinity is not JSON"),
    "white space": (labels("a\u3000"), "white space at an end"),
    "twice": (labels("a", "b", "a"), "labels: the label of class 2, 'a', is that of class 0 too"),
    "twice in other forms": (labels("\u00e9", "e\u0301"), "is that of class 0 too"),
    "twice, with a joiner": (labels("cat", "cat\u200d"), "is that of class 0 too"),
    "bidi": (labels("\u202ecat"), r"labels: the label of class 0, '\\u202ecat', holds a control character, or one that orders"),
    "isolate": (labels("a\u2066b"), "holds a control character"),
    "line end": (labels("a\r\nSet-Cookie: x"), "holds a control character"),
    "nul": (labels("a\0b"), "holds a control character"),
    "no width": (labels("a\u200bb"), "holds a control character"),
    "long label": (labels("a" * 500_000), "'a{40}', has 500000 characters, more than 200"),
    "no labels": (lambda m: m.update(labels=[]), "there is no label"),
    "long name": (lambda m: m.update(name="a" * 101), "not a valid name or version"),
    "long manifest": (lambda m: m["provenance"].update(git="a" * 5_000_000), r"bundle.json is larger than 4194304 bytes"),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_numbers_and_labels_beyond_their_bounds_are_refused_by_field_and_bound(shipped, tmp_path, kind):
    """As soon as a manifest is read, by whoever reads it."""
    change, said = BEYOND[kind]
    shutil.copyfile(shipped.path / MANIFEST, tmp_path / MANIFEST)
    edit(tmp_path, change)
    with pytest.raises(BundleError, match=said) as told:
        Bundle.draft(tmp_path)
    assert len(str(told.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        [str(i) for i in range(10)],
        ["Cat", "cat", "10", "3.5", "-1", "\u0664", "a b", "\u0645\u06cc\u200c\u062e\u0648", "\U0001f469\u200d\U0001f52c", "9"],
    ],
    ids=["digits in order", "others"],
)
def test_labels_that_name_one_class_each_pass(shipped, tmp_path, names):
    shutil.copyfile(shipped.path / MANIFEST, tmp_path / MANIFEST)
    edit(tmp_path, labels(*names))
    found = Bundle.draft(tmp_path).manifest.labels
    assert [find_label(name, found) for name in found] == list(range(10))
    assert [find_label(str(index), found) for index in range(10)] == list(range(10))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", 1e308, "temperature must be 0.001 to 1000"),
        ("temperature", 0, "temperature must be 0.001 to 1000, not 0.0"),
        ("temperature", float("nan"), "NaN is not JSON"),
        ("handled", 1.5, r"handled must be 0 to 1, not 1.5"),
        ("views", ["logits", 3], "views: 3 is not a str"),
        ("energies", [0.0, 1e17], r"energies must be -1e\+12 to 1e\+12, not 1e\+17"),
        ("scores", [-1e308, 0.0], r"scores must be -1e\+12 to 1e\+12, not -1e\+308"),
    ],
)
def test_a_calibration_beyond_its_bounds_is_refused_by_field_and_bound(shipped, tmp_path, field, value, said):
    rows = json.loads((shipped.path / "calibration.json").read_text())
    (tmp_path / "calibration.json").write_text(json.dumps([{**rows[0], field: value}]))
    with pytest.raises(BundleError, match=rf"calibration.json.*{said}"):
        replace(shipped, path=tmp_path).calibration()


def test_a_manifest_that_is_not_json_is_refused(copy):
    (copy / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.load(copy)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_calibration_of_another_graph_is_stale(shipped, tmp_path, precision):
    folder = tmp_path / "bundle"
    shutil.copytree(shipped.path, folder)
    rows = json.loads((folder / "calibration.json").read_text())
    for row in rows:
        row["of"] = "0" * 64 if row["precision"] == precision else row["of"]
    (folder / "calibration.json").write_text(json.dumps(rows))
    Bundle.draft(folder).update("calibration.json")
    with pytest.raises(BundleError, match=f"stale: {precision}"):
        Bundle.load(folder).calibration(precision)


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
