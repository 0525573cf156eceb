"""Tests that `publish`, `sign` and `rollback` refuse what a server would, and that running and restarted servers agree."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from safetensors.numpy import load_file, save_file

from ebjdat_serve import store as stores
from ebjdat_serve.bundle import MANIFEST, SIGNATURE, Bundle, write_json
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.history import SERVED_FILE, History, Version, read_history
from ebjdat_serve.locking import Held, exclusive_lock
from ebjdat_serve.selftest import FUNCTIONS
from ebjdat_serve.server.compute.model import Model
from ebjdat_serve.server.served_model import open_bundle, open_first
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.signing import check_signature, trusted_keys
from ebjdat_serve.store import publish, remember, rollback, scratch, versions
from tests.conftest import DIGITS, ROOT, serving, until

SETTINGS = Settings(device="cpu", threads=1)


def digits(folder, **changes):
    """A copy of the digits bundle; its version is that of the folder's name."""
    shutil.copytree(DIGITS, folder)
    return Bundle.draft(folder).update(version=folder.name, **changes)


def at(bundle, started, version):
    """The bundle as another version, trained at another time."""
    return bundle.update(version=version, provenance=replace(bundle.manifest.provenance, started=started))


def point(store, name):
    """Move ``current`` by hand."""
    (store / "hand").symlink_to(name)
    os.replace(store / "hand", store / "current")


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ebjdat_serve.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = Ed25519PrivateKey.generate()
        (folder / f"{name}.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (folder / f"{name}.pub.pem").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return folder


@pytest.fixture(scope="module")
def trusting(keys):
    """The terms and the settings of a server that trusts our key."""
    settings = replace(SETTINGS, trust=(keys / "ours.pub.pem",))
    return settings.terms(settings.trusted()), settings


# what a server refuses -----------------------------------------------------------------------------------------------


def tensors(name, change):
    def changed(bundle):
        found = load_file(bundle.path / name)
        save_file({key: np.ascontiguousarray(value) for key, value in change(found).items()}, bundle.path / name)
        return bundle.update(name)

    return changed


def graph(name, change):
    def changed(bundle):
        model = onnx.load(bundle.path / name, load_external_data=False)
        change(model)
        (bundle.path / name).write_bytes(model.SerializeToString())
        bundle = bundle.update(name)
        rows = [{**row, "of": bundle.measured(row["precision"])} for row in json.loads((bundle.path / "calibration.json").read_text())]
        write_json(bundle.path / "calibration.json", rows)
        return bundle.update("calibration.json")

    return changed


def said(name, change):
    """Change a JSON file of the bundle."""

    def changed(bundle):
        data = json.loads((bundle.path / name).read_text(encoding="utf-8"))
        change(data)
        write_json(bundle.path / name, data)
        return bundle if name == MANIFEST else bundle.update(name)

    return changed


def compiled(model):
    model.graph.node.append(onnx.helper.make_node("EPContext", ["x"], ["z"], domain="com.microsoft", ep_cache_context="engine.bin"))


def elsewhere(model):
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], np.zeros(1, np.float32).tobytes(), raw=True)
    onnx.external_data_helper.set_external_data(tensor, "../../etc/passwd")
    tensor.ClearField("raw_data")
    model.graph.initializer.append(tensor)


def one_size(model):
    """Fix the batch to the eight images of the self-test."""
    model.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8


def other_weights(model):
    next(entry for entry in model.metadata_props if entry.key == "weights").value = "0" * 64


def deep(manifest):
    nested = manifest["provenance"]["configuration"]
    for _ in range(300):
        nested["in"] = {}
        nested = nested["in"]


STRANGE = {
    "a label that is another's number": (said(MANIFEST, lambda m: m.update(labels=["3", *m["labels"][1:]])), "is the number of class 3"),
    "steps without end": (said(MANIFEST, lambda m: m["sampler"].update(steps=10**12)), "steps must be 1 to 10000"),
    "labels cut": (lambda bundle: bundle.update(labels=bundle.manifest.labels[:5]), "not from one model"),
    "a label that is half a character": (said(MANIFEST, lambda m: m.update(labels=["\ud800", *m["labels"][1:]])), "lone surrogate"),
    "a key that is half a character": (said(MANIFEST, lambda m: m["provenance"]["configuration"].update({"\udcff": 1})), "lone surrogate"),
    "a note that is half a character": (said("metrics.json", lambda rows: rows[0].update(note="\ud800")), "lone surrogate"),
    "nesting that no answer can hold": (said(MANIFEST, deep), "nested"),
    "self-test": (tensors("selftest.safetensors", lambda t: {**t, "moved": t["moved"][::-1]}), "self-test failed, moved"),
    "other weights": (graph("step.onnx", other_weights), "exported from other weights"),
    "an engine of one batch size": (graph("classify.onnx", one_size), "cannot be opened"),
    "a compiled engine": (graph("classify.onnx", compiled), "compiled engine"),
    "weights elsewhere": (graph("score.onnx", elsewhere), "etc/passwd"),
    "a prior of fewer classes": (tensors("prior.safetensors", lambda t: {**t, "factor": t["factor"][:5]}), "not from one model"),
    "a prior without numbers": (tensors("prior.safetensors", lambda t: {**t, "mean": t["mean"] * np.float32("nan")}), "not finite"),
    "a graph that is none": (lambda bundle: junk(bundle, "classify.onnx"), "is not an ONNX graph"),
    "a prior that is none": (lambda bundle: junk(bundle, "prior.safetensors"), "cannot be read"),
}


def junk(bundle, name):
    (bundle.path / name).write_bytes(b"\xff" * 100)
    return bundle.update(name)


def refusal(action, *arguments, **options):
    with pytest.raises(EbjdatError) as told:
        action(*arguments, **options)
    return str(told.value)


@pytest.mark.parametrize("kind", STRANGE)
def test_what_a_server_refuses_is_not_published_signed_or_rolled_back_to_with_its_reason(kind, tmp_path, keys):
    change, reason = STRANGE[kind]
    bundle, store = digits(tmp_path / "strange"), tmp_path / "store"
    change(bundle)

    def serve(folder):  # as the HTTP process does, then its workers
        served = open_bundle(folder, SETTINGS)
        Model(folder, SETTINGS, FUNCTIONS, served.key)

    by_server = refusal(serve, bundle.path)
    assert reason in by_server
    assert refusal(publish, bundle, store, keys / "ours.pem") == by_server
    assert not store.exists()
    assert refusal(stores.sign, bundle.path, keys / "ours.pem") == by_server
    assert not (bundle.path / SIGNATURE).exists()
    store.mkdir()
    shutil.move(bundle.path, store / "strange")
    point(store, "another")
    assert refusal(rollback, store, "strange") == refusal(serve, store / "strange")
    assert os.readlink(store / "current") == "another"


def test_publish_takes_the_options_of_serve_that_decide_what_is_served(tmp_path):
    bundle, store = digits(tmp_path / "bundle"), tmp_path / "store"
    for options, variables, reason in (
        (("--alpha", "0.0001"), {}, "alpha = 0.0001 cannot be served"),
        ((), {"EBJDAT_PRECISION": "int8"}, "no int8 calibration|has no classify.int8.onnx|no figure"),
    ):
        done = command("publish", bundle.path, store, *options, **variables)
        assert done.returncode == 2
        assert any(part in done.stderr for part in reason.split("|")), done.stderr
    assert not store.exists()


# trust and age -------------------------------------------------------------------------------------------------------


def version(version="v", started="2026-11-21T05:26:30+00:00", key="k"):
    return Version("m", version, started, key)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (version("2026.11.20-ffff"), version("2026.11.21-0000")),  # exported a day later
        (version("2026.11.21-a.r2"), version("2026.11.21-a.r10")),  # revisions are numbers
        (version("2026.11.21-a"), version("2026.11.21-a.r1")),
        (version(started="2026-11-21T05:26:30+00:00"), version(started="2026-11-21T05:26:31+00:00")),
        (version(started="2026-11-21T05:26:30+02:00"), version(started="2026-11-21T05:26:30+00:00")),
        (version(started="2026-11-21T05:26:30"), version(started="2026-11-21T05:26:31+00:00")),
        (version(started="last year"), version(started="1971-01-01")),
        (version("2026.11.21-a", started="2026-11-30"), version("2026.11.22-b", started="2026-11-01")),
    ],
)
def test_age_is_told_by_the_day_of_export_then_the_start_of_training_then_the_revision(older, newer):
    assert older.age < newer.age


def test_what_was_served_before_is_older_whatever_its_manifest_says(tmp_path):
    first, second = (digits(tmp_path / name) for name in ("first", "second"))
    assert Version.of(first).age == Version.of(second).age
    history = History().with_trusted(first, (b"k",), newest=False)
    assert not history.superseded(first)
    assert not history.superseded(second)
    history = history.with_trusted(second, (b"k",), newest=False)
    assert "was served before digits@second" in history.superseded(first)
    assert history.with_trusted(first, (b"k",), newest=False) == history  # a server that looks again makes nothing newer
    allowed = history.with_trusted(first, (b"k",), newest=True)
    assert not allowed.superseded(first)
    assert "was served before digits@first" in allowed.superseded(second)


@pytest.fixture
def trusted(tmp_path, keys, trusting):
    """A store of which a server with --trust served `old`, then `new`."""
    store = tmp_path / "store"
    for name in ("old", "new"):
        home = publish(digits(tmp_path / name), store, keys / "ours.pem")
        remember(store, Bundle.load(home), trusting[0].trust)
    return store


def test_in_a_store_that_is_served_under_trust_only_what_is_signed_and_not_older_becomes_current(trusted, tmp_path, keys, trusting):
    now = (trusted / "current").resolve()
    third = digits(tmp_path / "third")
    assert "is not signed, and servers of" in refusal(publish, third, trusted)
    assert "not a signature of bundle.json by a key that serve --trust names" in refusal(publish, third, trusted, keys / "theirs.pem")
    assert "was served before" in refusal(publish, Bundle.draft(tmp_path / "old"), trusted, keys / "ours.pem")
    assert "was served before digits@new" in refusal(rollback, trusted)
    unseen = at(digits(tmp_path / "unseen"), "2020-01-01", "unseen")
    assert "is older than digits@new" in refusal(publish, unseen, trusted, keys / "ours.pem")
    with pytest.raises(BundleError) as told:
        rollback(trusted, "old")
    assert told.value.advised().endswith("or give --allow-older")
    # a signature that is right is not replaced by a strange one
    assert "belongs to no public key that serve --trust names" in refusal(stores.sign, now, keys / "theirs.pem")
    assert "not a signature" in refusal(publish, Bundle.draft(tmp_path / "new"), trusted, keys / "theirs.pem")
    check_signature(now, trusting[0].trust)
    assert (trusted / "current").resolve() == now
    assert versions(trusted) == sorted([trusted / "digits-old", trusted / "digits-new"])

    assert rollback(trusted, "old", allow_older=True) == trusted / "digits-old"
    assert open_first(replace(trusting[1], model=trusted))[0].name == "digits@old"
    assert "was served before digits@old" in refusal(rollback, trusted)  # and back: that was taken back, too
    assert publish(unseen, trusted, keys / "ours.pem", allow_older=True).name == "digits-unseen"
    assert publish(third, trusted, keys / "ours.pem").name == "digits-third"
    assert [one.version for one in read_history(trusted).versions] == ["new", "old", "unseen", "third"]


def test_publish_with_trust_needs_no_server_that_remembers(tmp_path, keys, trusting):
    """For servers that may not write the store."""
    store, terms = tmp_path / "store", trusting[0]
    bundles = [digits(tmp_path / name) for name in ("a", "b")]
    assert "is not signed" in refusal(publish, bundles[0], store, terms=terms)
    for bundle in bundles:
        publish(bundle, store, keys / "ours.pem", terms=terms)
    assert "was served before digits@b" in refusal(rollback, store)


def test_a_store_that_nobody_serves_under_trust_goes_back_and_forth(tmp_path):
    store = tmp_path / "store"
    for name in ("a", "b"):
        remember(store, Bundle.load(publish(digits(tmp_path / name), store)), ())
    assert rollback(store).name == "digits-a"
    assert rollback(store).name == "digits-b"
    assert read_history(store) == History(last="digits-b")


def test_what_is_moved_by_hand_to_an_older_version_is_refused_at_the_start_as_at_a_refresh(trusted, trusting):
    settings = replace(trusting[1], model=trusted)
    point(trusted, "digits-old")
    assert "was served before digits@new" in refusal(open_bundle, trusted, settings, trusted)
    served, refused = open_first(settings)
    assert served.name == "digits@new"
    assert "rollback" in refused
    assert "--allow-older" in refused
    assert open_first(replace(settings, model=trusted / "current"))[0].name == "digits@new"
    assert open_first(replace(SETTINGS, model=trusted))[0].name == "digits@old"  # without --trust age does not count


def test_a_bundle_that_vanishes_while_it_is_verified_is_refused_and_what_was_served_last_goes_on(
    trusted, trusting, keys, tmp_path, monkeypatch
):
    """At each of the moments at which one of its files is opened."""
    settings = replace(trusting[1], model=trusted)
    home = publish(digits(tmp_path / "third"), trusted, keys / "ours.pem")
    aside, real, left, outcomes = tmp_path / "aside", io.open, [0], []

    def vanishing(file, *arguments, **options):
        if isinstance(file, Path) and file.parent == home.resolve():
            left[0] -= 1
            if left[0] == 0:
                home.rename(aside)
        return real(file, *arguments, **options)

    for moment in itertools.count(1):
        for start in (lambda: open_bundle(trusted, settings, trusted), lambda: open_first(settings)[0]):
            left[0] = moment
            with monkeypatch.context() as patch:
                patch.setattr(io, "open", vanishing)
                try:
                    outcomes.append(start().name)
                except BundleError as error:
                    outcomes.append(str(error).replace(str(home.resolve()), "it"))
            if left[0] > 0:
                break
            aside.rename(home)
        if left[0] > 0:
            break
    assert moment > len(Bundle.load(home).manifest.files)
    assert outcomes.pop() == "digits@third"  # once it stays
    assert set(outcomes[1::2]) == {"digits@new"}
    assert all(refused.startswith(("it ", "it/")) for refused in outcomes[::2]), outcomes


def test_a_start_goes_on_with_what_was_served_last_when_current_is_refused(tmp_path):
    store, settings = tmp_path / "store", replace(SETTINGS, model=tmp_path / "store")
    for name in ("good", "bad"):
        publish(digits(tmp_path / name), store)
    assert refusal(open_first, replace(settings, model=tmp_path / "nowhere"))
    point(store, "digits-good")
    remember(store, Bundle.load(store), ())
    point(store, "digits-bad")
    (store / "digits-bad" / "weights.safetensors").chmod(0o644)
    (store / "digits-bad" / "weights.safetensors").write_bytes(b"junk")
    served, refused = open_first(settings)
    assert served.name == "digits@good"
    assert "is damaged" in refused
    (store / "current").unlink()
    assert open_first(settings)[0].name == "digits@good"
    (store / SERVED_FILE).unlink()
    assert "neither a bundle" in refusal(open_first, settings)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"last": "", "keys": ["xy"], "versions": []}', '{"last": "", "keys": ["00"], "versions": []}']
)
def test_a_damaged_history_is_no_reason_to_trust_anything(trusted, trusting, keys, tmp_path, content):
    (trusted / SERVED_FILE).write_text(content)
    assert f"restore {trusted / SERVED_FILE}" in refusal(open_first, replace(trusting[1], model=trusted))
    assert SERVED_FILE in refusal(publish, digits(tmp_path / "next"), trusted, keys / "ours.pem")
    assert SERVED_FILE in refusal(rollback, trusted, "old")


def test_nothing_is_remembered_of_a_version_that_current_has_left_nor_while_a_publisher_works(trusted, trusting):
    before = read_history(trusted)
    remember(trusted, Bundle.load(trusted / "digits-old"), trusting[0].trust)
    assert read_history(trusted) == before
    with exclusive_lock(trusted / ".lock"), pytest.raises(Held):
        remember(trusted, Bundle.load(trusted), trusting[0].trust)


@pytest.mark.slow
def test_running_and_restarted_servers_agree_on_what_is_served(tmp_path, keys, trusting):
    store, settings = tmp_path / "store", replace(trusting[1], model=tmp_path / "store")
    trust = ("--trust", str(keys / "ours.pub.pem"))
    old, new = digits(tmp_path / "old"), digits(tmp_path / "new")
    publish(old, store, keys / "ours.pem")

    def both(server, model, refused=None):
        """Wait until the running server serves a model, and see that one that starts now would, too."""
        until(
            lambda: server.info()["model"] == model and (refused or "") in ((server.info()["refresh"]["refused"] or {}).get("reason") or "")
        )
        assert open_first(settings)[0].name == model

    with serving(store, tmp_path / "log", "--device", "cpu", "--generate-workers", "0", "--refresh-interval", "0.2", *trust) as server:
        until(lambda: read_history(store).last == "digits-old")
        publish(new, store, keys / "ours.pem")
        both(server, "digits@new")
        until(lambda: read_history(store).last == "digits-new")
        point(store, "digits-old")  # a replay: signed, and older
        both(server, "digits@new", "was served before digits@new")
        done = command("rollback", store, "old", "--device", "cpu", "--allow-older")
        assert done.returncode == 0, done.stderr
        both(server, "digits@old")  # current did not move: the server noticed that it was allowed


@pytest.mark.slow
def test_a_restart_goes_on_with_what_was_served_last_when_workers_refuse_current(tmp_path):
    store = tmp_path / "store"
    publish(digits(tmp_path / "good"), store)
    with serving(store, tmp_path / "log") as server:
        until(lambda: read_history(store).last == "digits-good")
        liar = digits(store / "digits-liar")
        tensors("selftest.safetensors", lambda t: {**t, "logits": t["logits"][::-1]})(liar)
        point(store, "digits-liar")
        until(lambda: "self-test failed" in ((server.info()["refresh"]["refused"] or {}).get("reason") or ""))
    with serving(store, tmp_path / "again") as server:
        assert server.info()["model"] == "digits@good"
        assert "digits@good on http" in server.log.read_text()
        assert "self-test failed" in server.info()["refresh"]["refused"]["reason"]
        publish(digits(tmp_path / "next"), store)
        until(lambda: server.info()["model"] == "digits@next")
        assert server.info()["refresh"]["refused"] is None


# what a killed publisher leaves --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from ebjdat_serve import atomic, store
from ebjdat_serve.bundle import Bundle
left = int(sys.argv[4])
def dying(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
setattr(os, sys.argv[3], dying(getattr(os, sys.argv[3])))
store.publish(Bundle.draft(Path(sys.argv[1])), Path(sys.argv[2]), force=True)
"""


@pytest.mark.parametrize(
    ("call", "number", "current"),
    [("fsync", 3, "a"), pytest.param("replace", 1, "a", marks=pytest.mark.slow), pytest.param("rmdir", 1, "b", marks=pytest.mark.slow)],
    ids=["copying", "pointing", "removing the candidate"],
)
def test_what_a_killed_publisher_leaves_harms_nobody_and_goes_with_the_next(call, number, current, tmp_path):
    store = tmp_path / "store"
    publish(digits(tmp_path / "a"), store)
    bundle = digits(tmp_path / "b")
    stores.withhold(bundle, store, "worse", [])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, bundle.path, store, call, str(number)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=60,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Bundle.load(store).manifest.version == current
    remains = {path.name for path in store.rglob(".*") if path.name != ".lock"}
    assert remains  # it was killed at work
    publish(bundle, store, force=True)
    assert Bundle.load(store).manifest.version == "b"
    assert {path.name for path in store.rglob(".*")} == {".lock"}
    assert not stores.candidates(store)
    assert not list((store / "candidates").iterdir())


def test_a_scratch_folder_lives_as_long_as_its_process(tmp_path):
    store = tmp_path / "store"
    publish(digits(tmp_path / "a"), store)
    (store / ".scratch-dead").mkdir()
    with scratch(store) as folder:
        publish(digits(tmp_path / "b"), store)
        assert folder.is_dir()
        assert not (store / ".scratch-dead").exists()
    assert not folder.exists()


def test_trusted_keys_are_the_public_keys_of_their_files(keys):
    with pytest.raises(EbjdatError, match="holds a private key"):
        trusted_keys([keys / "ours.pem"])
    assert [len(key) for key in trusted_keys([keys / "ours.pub.pem", Path(keys / "theirs.pub.pem")])] == [32, 32]
