"""Tests of write permission for bundles, and that a row is never replaced by one of fewer images."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import httpx2
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ebjdat_serve import editing
from ebjdat_serve.bundle import EVIDENCE, GRAPHS, Bundle, read_rows, sha256, write_json, write_rows
from ebjdat_serve.editing import check_editable, copied, edit, guarded, put
from ebjdat_serve.errors import BundleError
from ebjdat_serve.locking import hold, is_held
from ebjdat_serve.rows import FRESH, Row
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.store import next_revision, publish, sign, versions
from ebjdat_serve.view_files import save_views
from tests.conftest import serving
from tests.test_faults import workers
from tests.test_refresh import info, until
from training import calibrate
from training.card import rewrite
from training.data.datasets import load
from training.errors import TrainingError
from training.evaluate import evaluate, evaluate_bundle, main
from training.evaluation.context import Suite, suite_of
from training.evaluation.evidence import Evaluation, measurement, merge, take

FEW = Suite(*[20] * 11, queries=10, thorough=False)


def digest(folder):
    return {file.name: (sha256(file), file.stat().st_mtime_ns) for file in folder.iterdir()}


def titled(bundle):
    return (bundle.path / "README.md").read_text(encoding="utf-8").splitlines()[0]


def noted(bundle, text="noted"):
    """A change of the evidence alone."""
    (bundle.path / "README.md").write_text(text)
    return bundle.update("README.md")


@pytest.fixture
def bundle(golden, tmp_path):
    return copied(Bundle.load(golden), tmp_path / "digits")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


# who may write ---------------------------------------------------------------------------------------------------------


def test_a_draft_is_open_and_what_others_rely_on_is_not(bundle, tmp_path, monkeypatch):
    assert guarded(bundle.path) == ""
    held = hold(bundle.path)
    assert is_held(bundle.path)
    assert guarded(bundle.path) == "is being served"
    os.close(held)
    assert not is_held(bundle.path)
    home = publish(bundle, tmp_path / "store")
    assert "current version of the store" in guarded(home)
    git = ["git", "-C", str(bundle.path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert guarded(bundle.path) == ""  # there, and not tracked
    subprocess.run([*git, "add", "bundle.json"], check=True)
    assert guarded(bundle.path) == "is tracked by git"
    monkeypatch.setattr(editing, "tracked", lambda file: False)
    assert guarded(SHIPPED) == "is part of the installed package"


@pytest.mark.parametrize("command", ["training.calibrate", "training.precision", "training.card", "training.evaluate", "export.to_onnx"])
def test_no_command_writes_into_the_shipped_bundle_unasked(command, monkeypatch):
    options = {"training.precision": ["--precision", "int8"], "training.evaluate": ["--into", str(SHIPPED)]}.get(command, [])
    before = digest(SHIPPED)
    monkeypatch.setattr(sys, "argv", [command, str(SHIPPED), *options])
    with pytest.raises(SystemExit, match=r"(is tracked by git|is part of the installed package).*--force"):
        import_module(command).main()
    assert digest(SHIPPED) == before


def test_a_version_of_a_store_never_changes_a_new_one_is_published(bundle, tmp_path):
    store = tmp_path / "store"
    first = publish(bundle, store)
    before = digest(first)
    with pytest.raises(BundleError, match="a change becomes a new version"):
        edit(store, noted)
    done = edit(store, noted, force=True)
    assert done.path == (store / "current").resolve() != first
    assert done.manifest.version == f"{bundle.manifest.version}.r1"
    assert (done.path / "README.md").read_text() == "noted"
    assert digest(first) == before
    assert edit(store, lambda draft: draft, force=True).path == done.path  # nothing changed, nothing is published
    with pytest.raises(BundleError, match="not the current one"):
        edit(first, noted, force=True)
    assert not [file for file in store.iterdir() if file.name.startswith(".edit-")]


def test_a_new_version_carries_a_card_of_its_own_name_and_the_same_card_again_is_no_version(bundle, tmp_path):
    store = tmp_path / "store"
    publish(bundle, store)
    rows = bundle.metrics()

    def change(draft):
        write_rows(draft.path / "metrics.json", rows[:-1])
        return draft.update("metrics.json")

    for expected, by in ((".r1", change), (".r2", rewrite), (".r2", rewrite)):
        done = edit(store, by, force=True)
        assert done.manifest.version == bundle.manifest.version + expected
        assert titled(done) == f"# {done.manifest.name}@{done.manifest.version}"
    Bundle.load(store)


def test_other_views_are_said_by_the_card_of_the_same_version(bundle, tmp_path, monkeypatch, capsys):
    """A calibration that changed alone left a current version whose card named the score before it."""
    store = tmp_path / "store"
    publish(bundle, store)
    samples = bundle.manifest.files["samples.png"]
    monkeypatch.setattr(sys, "argv", ["calibrate.py", str(store), "--views", "max_softmax", "--force"])
    calibrate.main()
    done = Bundle.load(store)
    assert done.calibration().views == ["max_softmax"]
    before, after = ((one.path / "README.md").read_text(encoding="utf-8") for one in (bundle, done))
    assert ["- `statistics`:" in card for card in (before, after)] == [True, False]
    assert ["- `max_softmax`:" in card for card in (before, after)] == [False, True]
    assert done.manifest.files["samples.png"] == samples  # no image is drawn again for it


def test_precisions_that_a_calibration_drops_are_named(bundle, caplog):
    rows = json.loads((bundle.path / "calibration.json").read_text(encoding="utf-8"))
    write_json(bundle.path / "calibration.json", [*rows, {**rows[0], "precision": "bf16"}])
    save_views(bundle.path / "views.safetensors", {"fp32": bundle.combination(), "bf16": bundle.combination()}, {})
    calibrate.calibrate(bundle.update("calibration.json", "views.safetensors"), load("digits"), views=["max_softmax"])
    assert "other views: bf16;" in caplog.text


def test_the_way_to_take_figures_that_is_advised_is_open(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.evaluate.evaluate", lambda *_, **__: Evaluation(tmp_path, [], {}))
    for path, said in (
        (bundle.path, f"--into {bundle.path} takes them into it"),
        (publish(bundle, tmp_path / "store"), "copy the folder and give the copy to --into"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(path), "--part", "clean"])
        import_module("training.evaluate").main()
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("force", [False, True])
def test_what_is_signed_is_changed_by_nobody_without_the_key(bundle, tmp_path, force):
    key, store = tmp_path / "key.pem", tmp_path / "store"
    key.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    home = publish(bundle, store, key)
    sign(bundle.path, key)
    for folder, path in ((home, store), (bundle.path, bundle.path)):
        before = digest(folder)
        with pytest.raises(BundleError, match=r"is signed: change a copy without bundle\.json\.sig, sign it and publish it"):
            edit(path, noted, force=force)
        assert digest(folder) == before
    assert (store / "current").resolve() == home


def test_no_edit_takes_back_what_was_published_meanwhile(bundle, tmp_path):
    store = tmp_path / "store"
    first = publish(bundle, store)
    other = copied(bundle, tmp_path / "other").update(version="other")

    def change(draft):
        publish(other, store)
        return noted(draft)

    with pytest.raises(BundleError, match=f"points at digits-other now, no longer at {first.name}"):
        edit(store, change, force=True)
    more = copied(bundle, tmp_path / "more").update(version="more")
    with pytest.raises(BundleError, match="points at digits-other now"):
        put(more, first)
    assert (store / "current").resolve() == store / "digits-other"
    assert versions(store) == [first, store / "digits-other"]
    (store / "current").unlink()
    with pytest.raises(BundleError, match="points at nothing now"):
        publish(more, store, after=first)


def test_a_link_that_says_the_same_otherwise_is_the_same(bundle, tmp_path):
    home = publish(bundle, tmp_path / "store")
    (tmp_path / "store" / "current").unlink()
    (tmp_path / "store" / "current").symlink_to(f"{home}/")
    assert edit(tmp_path / "store", noted, force=True).manifest.version == f"{bundle.manifest.version}.r1"


def test_the_next_revision_is_one_that_the_store_does_not_have(bundle, tmp_path):
    store = tmp_path / "store"
    for version, following in (("1.rc2", "1.rc2.r1"), ("a.r9", "a.r10")):
        assert next_revision(bundle.update(version=version), store) == following
    for version in ("b", "b.r1"):
        publish(bundle.update(version=version), store)
    assert next_revision(bundle.update(version="b"), store) == "b.r2"


# rows ------------------------------------------------------------------------------------------------------------------


def row(metric="accuracy_clean", n=100, part="clean", dataset="digits", of="x", **more):
    return Row(**{"metric": metric, "value": 0.5, "n": n, "part": part, "dataset": dataset, "of": of, "seed": 0, **more})


def test_a_row_of_fewer_images_never_takes_the_place_of_one_of_more():
    old = [row(n=100), row("accuracy_pgd20", 50, "robustness"), row("accuracy_clean_int8", 10, None)]
    merged = merge(old, [row(n=99, value=0.1), row("accuracy_pgd20", 50, "robustness", value=0.2), row("nll", 5, "calibration")])
    assert [(r.metric, r.value, r.n) for r in merged.rows] == [
        ("accuracy_clean", 0.5, 100),
        ("accuracy_pgd20", 0.2, 50),
        ("nll", 0.5, 5),
        ("accuracy_clean_int8", 0.5, 10),
    ]
    assert [(a.n, b.n) for a, b in merged.kept] == [(100, 99)]
    assert "kept accuracy_clean of n = 100 (measured now: n = 99)" in merged.summary()


def test_counts_of_images_do_not_make_another_measurement():
    few, many = (
        row("frechet_resnet20", n, "generation", FRESH, extractor="resnet20", against="digits", against_n=5 * n, blocks=n)
        for n in (100, 500)
    )
    assert merge([many], [few]).rows == [many]
    assert merge([few], [many]).rows == [many]
    strong, weak = (row("accuracy_square", 100, "robustness", attack="square", queries=q) for q in (5000, 300))
    assert merge([strong], [weak]).rows == [strong, weak]  # another attack is another measurement


def test_a_comparison_with_fewer_clean_images_is_the_poorer_one():
    """Of as many samples, but against 20 clean images in the place of 500."""
    drawn = {"metric": "energy_gap", "n": 200, "part": "landscape", "dataset": FRESH, "against": "digits"}
    old, new = row(**drawn, against_n=500), row(**drawn, against_n=20)
    assert merge([old], [new]).rows == [old]
    assert merge([old], [row(**drawn, against_n=501)]).rows[0].against_n == 501


def measurement_text(r):
    return f"{r.part} {r.key}"


def test_every_shipped_row_is_a_measurement_of_its_own_and_none_gets_poorer(shipped):
    rows = shipped.metrics()
    assert len({measurement(r) for r in rows}) == len(rows)
    poorer = [replace(r, n=r.n - 1, value=-1.0) for r in rows if r.part]
    merged = merge(rows, poorer, shipped)
    assert sorted(merged.rows, key=measurement_text) == sorted(rows, key=measurement_text)
    assert len(merged.kept) == len(poorer)


def test_rows_of_other_files_are_dropped_and_never_taken(bundle):
    of = bundle.manifest.files["weights.safetensors"].sha256
    write_rows(bundle.path / "metrics.json", [row(of="0" * 64, n=10_000), row("nll", part="calibration", of=of)])
    bundle = bundle.update("metrics.json")
    done, merged = take(bundle, Evaluation(bundle.path, [row(of=of)], {}))
    assert [r.metric for r in done.metrics()] == ["nll", "accuracy_clean"]
    assert "landscape.png" not in Bundle.load(bundle.path).manifest.files  # its rows are gone
    assert len(merged.stale) == 1
    with pytest.raises(BundleError, match="takes no rows of 111111111111"):
        take(bundle, Evaluation(bundle.path, [row(of="1" * 64)], {}))


def test_a_baseline_is_of_another_network_and_a_card_that_fails_leaves_the_bundle_whole(bundle, tmp_path, monkeypatch):
    of = bundle.manifest.files["weights.safetensors"].sha256
    done, file = Evaluation(bundle.path, [row(of=of)], {}), tmp_path / "other.json"
    for rows, said in (([], "holds no rows"), ([row(of=of)], "holds figures of this bundle itself")):
        write_rows(file, rows)
        with pytest.raises(BundleError, match=f"{said}: give the metrics.json"):
            take(bundle, done, file)
    write_rows(file, [row("nll", of="0" * 64)])  # without the clean accuracy
    taken, _ = take(bundle, done, file, "control")
    assert (bundle.path / "control.json").is_file()
    assert not (bundle.path / "baseline.json").is_file()
    with monkeypatch.context() as broken:
        broken.setattr("training.card.card", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(taken, done, file, "warm start")
    assert "control.json" in Bundle.load(bundle.path).manifest.files  # which lists what is there


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--baseline-is", "control"], "add --baseline FILE"), (["--baseline", "none.json"], "none.json cannot be read")],
)
def test_a_baseline_that_cannot_be_read_is_told_before_anything_is_measured(bundle, runs, monkeypatch, words, said):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(bundle.path), "--part", "clean", "--into", str(bundle.path), *words])
    with pytest.raises(SystemExit, match=said):
        main()
    assert not list(runs.glob("**/metrics.json"))


def test_an_evaluation_leaves_the_bundle_as_it_was_until_its_rows_are_taken(bundle, runs):
    before, rows = digest(bundle.path), bundle.metrics()
    done = evaluate(bundle, load("digits"), FEW, parts=("clean",))
    assert digest(bundle.path) == before
    assert done.folder.is_relative_to(runs)
    assert read_rows(done.folder / "metrics.json") == done.rows
    assert {r.n for r in done.rows} == {20}
    drawn = (bundle.path / "samples.png").stat().st_mtime_ns
    bundle, merged = take(bundle, done)
    assert bundle.metrics() == rows  # all of theirs were of more images
    assert len(merged.kept) == len(done.rows)
    assert (bundle.path / "samples.png").stat().st_mtime_ns == drawn
    Bundle.load(bundle.path)


def test_into_takes_what_was_measured_of_the_same_weights(bundle, golden, runs, tmp_path, capsys):
    bare = copied(Bundle.load(golden), tmp_path / "bare")
    write_json(bare.path / "metrics.json", [])
    bare.update("metrics.json")

    class Options:
        into, force, baseline, baseline_is, data, folders, allow_code = bare.path, False, None, None, None, None, False

    Options.bundle = bundle.path
    evaluate_bundle(Options, suite_of("quick", 20, []), ("clean",), {"processes": 1})
    said = capsys.readouterr().out
    assert f"into {bare.path / 'metrics.json'}" in said
    assert "3 rows taken, 0 kept" in said
    assert {r.n for r in Bundle.load(bare.path).metrics()} == {20}
    Options.into = SHIPPED
    Options.force = True
    with pytest.raises(TrainingError, match="has other weights than"):
        evaluate_bundle(Options, suite_of("quick", 20, []), ("clean",), {"processes": 1})


def test_a_folder_whose_figures_git_tracks_is_measured_into_by_force_alone(bundle, runs, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    folder.mkdir()
    write_json(folder / "metrics.json", [])
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "metrics.json"], check=True)
    words = ["evaluate.py", str(bundle.path), "--part", "clean", "--n", "20", "--processes", "1", "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"metrics\.json is tracked by git: name another --folder; or give --force"):
        import_module("training.evaluate").main()
    assert json.loads((folder / "metrics.json").read_text()) == []
    monkeypatch.setattr(sys, "argv", [*words, "--force"])
    import_module("training.evaluate").main()
    assert json.loads((folder / "metrics.json").read_text())


COMMANDS = {
    "training.card": "card.py BUNDLE",
    "training.evaluate": "evaluate.py OTHER --part clean --into BUNDLE",
    "training.calibrate": "calibrate.py BUNDLE",
    "training.precision": "precision.py BUNDLE --precision int8",
    "export.to_onnx": "to_onnx.py BUNDLE",
    "ebjdat_serve.cli": "ebjdat-serve calibrate BUNDLE --remove traffic",
}
"""Commands that change a bundle, by the module of their ``main``."""


def changes(monkeypatch, capsys, module, bundle, other):
    """Run a command that changes ``bundle``; raise SystemExit with what it says where it fails."""
    places = {"BUNDLE": str(bundle.path), "OTHER": str(other.path)}
    monkeypatch.setattr(sys, "argv", [places.get(word, word) for word in COMMANDS[module].split()])
    if import_module(module).main():
        raise SystemExit(capsys.readouterr().err)


def damaged(file, kind):
    content = bytearray(file.read_bytes())
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind != "deleted":
        content[len(content) // 2] ^= 1
        file.write_bytes(content if kind == "altered" else content[:100])


def state(folder):
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("metrics.json", kind) for kind in ("deleted", "altered", "truncated", "folder")),
        ("landscape.png", "altered"),
        ("weights.safetensors", "altered"),
    ],
)
@pytest.mark.parametrize("module", COMMANDS)
def test_damage_is_never_recorded_as_the_bundles_own(bundle, golden, runs, tmp_path, monkeypatch, capsys, kind, name, module):
    other = copied(Bundle.load(golden), tmp_path / "other")
    damaged(bundle.path / name, kind)
    before = state(bundle.path)
    with pytest.raises(SystemExit, match=rf"{name} is (missing|damaged)"):
        changes(monkeypatch, capsys, module, bundle, other)
    assert state(bundle.path) == before
    assert not list(runs.glob("**/metrics.json"))


@pytest.mark.parametrize("module", [name for name in COMMANDS if name not in ("training.card", "training.evaluate")])
def test_a_damaged_card_is_no_matter_to_those_alone_that_write_it(bundle, runs, monkeypatch, capsys, module):
    damaged(bundle.path / "README.md", "altered")
    with pytest.raises(SystemExit, match=r"README\.md is damaged"):
        changes(monkeypatch, capsys, module, bundle, bundle)


def test_a_card_that_is_a_link_is_not_written_through(bundle, tmp_path):
    (bundle.path / "README.md").rename(tmp_path / "elsewhere.md")
    (bundle.path / "README.md").symlink_to(tmp_path / "elsewhere.md")
    before = (tmp_path / "elsewhere.md").read_bytes()
    with pytest.raises(BundleError, match=r"README\.md is a link that leaves the bundle"):
        edit(bundle.path, rewrite, renews=("README.md",))
    assert (tmp_path / "elsewhere.md").read_bytes() == before


@pytest.mark.parametrize("ends", ["in the change", "while files are copied", "at the second rename", "by Ctrl-C at the last"])
def test_an_edit_that_is_stopped_half_way_leaves_the_bundle_whole(bundle, monkeypatch, ends):
    before = state(bundle.path)
    copyfile, rename, renamed = shutil.copyfile, os.replace, []

    def change(draft):
        write_rows(draft.path / "metrics.json", [])
        if ends == "in the change":
            raise KeyboardInterrupt
        for name in ("README.md", "another.json"):
            (draft.path / name).write_text("{}")
        return draft.update("metrics.json", "README.md", "another.json")

    def copying(source, target, **more):
        if ends == "while files are copied" and str(target).endswith("README.md.part"):
            raise OSError(28, "No space left on device")
        return copyfile(source, target, **more)

    def renaming(source, target):
        if os.path.dirname(target) == str(bundle.path) and str(source).endswith(".part") and not str(target).endswith(".before"):
            renamed.append(target)
            if ends == "at the second rename" and len(renamed) == 2:
                raise OSError(5, "Input/output error")
            if ends == "by Ctrl-C at the last" and str(target).endswith("bundle.json"):
                raise KeyboardInterrupt
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(editing.shutil, "copyfile", copying)
        patch.setattr(os, "replace", renaming)
        with pytest.raises((KeyboardInterrupt, BundleError)):
            edit(bundle.path, change)
    assert len(renamed) == {"at the second rename": 2, "by Ctrl-C at the last": 4}.get(ends, 0)
    assert state(bundle.path) == before
    assert not list(bundle.path.glob(".*"))
    edit(bundle.path, noted)
    assert (Bundle.load(bundle.path).path / "README.md").read_text() == "noted"


def test_a_folder_in_the_place_of_a_file_is_told_before_any_is_replaced(bundle):
    def change(draft):
        shutil.copyfile(SHIPPED / "classify.onnx", draft.path / "classify.onnx")
        return draft.update("classify.onnx")

    (bundle.path / "classify.onnx").unlink()
    (bundle.path / "classify.onnx").mkdir()
    before = state(bundle.path)
    with pytest.raises(BundleError, match=r"classify\.onnx is a folder in the place of a file: remove it"):
        edit(bundle.path, change, renews=GRAPHS)
    assert state(bundle.path) == before
    (bundle.path / "classify.onnx").rmdir()
    edit(bundle.path, change, renews=GRAPHS).check_files()


def test_errors_of_a_change_name_the_bundle_and_not_its_copy(bundle, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=re.escape(f"{bundle.path} has no calibration 'traffic'")):
        changes(monkeypatch, capsys, "ebjdat_serve.cli", bundle, bundle)
    monkeypatch.setattr(sys, "argv", ["ebjdat-serve", "calibrate", str(bundle.path), "--remove", "a" * 300])
    assert import_module("ebjdat_serve.cli").main()
    assert "has no calibration" in capsys.readouterr().err


def test_a_copy_that_has_no_room_is_told_apart_from_the_bundle(bundle):
    def change(draft):
        raise OSError(28, "No space left on device")

    with pytest.raises(BundleError, match=r"the copy of .* cannot be written: No space left on device; set TMPDIR to a folder with room"):
        edit(bundle.path, change)


def test_a_changed_file_keeps_mode_and_owner(bundle):
    card, asked = bundle.path / "README.md", []
    card.chmod(0o640)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editing.os, "geteuid", lambda: 0)
        patch.setattr(editing.os, "chown", lambda *given: asked.append(given[1:]))
        edit(bundle.path, noted)
    assert card.stat().st_mode & 0o777 == 0o640
    assert set(asked) == {(card.stat().st_uid, card.stat().st_gid)}


def test_a_manifest_without_weights_is_refused(bundle):
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != "weights.safetensors"}
    replace(bundle, manifest=replace(bundle.manifest, files=files)).update()
    with pytest.raises(BundleError, match=r"bundle\.json lists no weights\.safetensors"):
        edit(bundle.path, rewrite)


def test_a_damaged_card_is_written_anew(bundle):
    first = titled(bundle)
    (bundle.path / "README.md").unlink()
    assert titled(edit(bundle.path, rewrite, renews=("README.md",))) == first
    Bundle.load(bundle.path)


def test_a_bundle_is_no_folder_for_figures(bundle, runs, monkeypatch):
    before = digest(bundle.path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(bundle.path), "--part", "clean", "--folder", str(bundle.path)])
    with pytest.raises(SystemExit, match="is a bundle or a store, with figures of its own: name another folder"):
        main()
    assert digest(bundle.path) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--amount", "test=²"], "--amount test=²: give NAME=N"),
        (["--amount", f"test={'9' * 4500}"], "give NAME=N"),
        (["--size", "16"], "a bundle says its own size: leave it out$"),
        (["--buffer", "README.md"], r"README\.md is no state\.pt of a stage"),
        (["--buffer", ""], r"\. is no state\.pt of a stage"),
        (["--buffer", "none.pt"], r"none\.pt is no state\.pt of a stage"),
        (["--control", "weights.safetensors"], "is the model itself: a control is another"),
        (["--control", "none.safetensors"], r"none\.safetensors"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is(bundle, runs, monkeypatch, words, said):
    monkeypatch.chdir(bundle.path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(bundle.path), "--part", "generation", *words])
    with pytest.raises(SystemExit, match=said):
        main()
    assert not list(runs.glob("**/*.npz"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({"averaged_with": value}, "by method EbJdat ") for value in ("x", 7, {}, {"name": ""})),
        ({"averaged_with": {"name": "other"}}, "the mean of two runs from one start, this one and `other`"),
        *(
            ({"method": value}, said)
            for value, said in (({}, "by method unknown "), (["a"], "by method ['a'] "), ("ebjdat", "by method EbJdat "))
        ),
    ],
)
def test_a_card_is_written_of_any_recorded_configuration(bundle, changes, said):
    m = bundle.manifest
    configuration = {**m.provenance.configuration, **changes}
    odd = replace(bundle, manifest=replace(m, provenance=replace(m.provenance, configuration=configuration))).update()
    edit(odd.path, rewrite)
    text = (Bundle.load(bundle.path).path / "README.md").read_text(encoding="utf-8")
    assert said in text
    assert ("the mean of two runs" in text) == ("the mean of two runs" in said)


# a running server ------------------------------------------------------------------------------------------------------


def test_evidence_is_no_part_of_what_is_served(bundle):
    before = bundle.served
    for name in EVIDENCE:
        (bundle.path / name).write_bytes(b"[]")
    assert bundle.update(*EVIDENCE).served == before
    rows = json.loads((bundle.path / "calibration.json").read_text())
    write_json(bundle.path / "calibration.json", [{**r, "temperature": 2.0} for r in rows])
    assert bundle.update("calibration.json").served != before


@pytest.mark.slow
def test_a_running_server_does_not_swap_because_somebody_measured(bundle, tmp_path, picture):
    log = tmp_path / "log"
    with serving(bundle.path, log) as server:
        until(lambda: is_held(bundle.path))
        with pytest.raises(BundleError, match="is being served"):
            check_editable(bundle.path)
        before = httpx2.post(f"{server.url}/classify", content=picture).json()
        first, *others = bundle.metrics()

        def change(draft):
            write_rows(draft.path / "metrics.json", [replace(first, value=0.125), *others])
            return draft.update("metrics.json")

        edit(bundle.path, change, force=True)
        until(lambda: info(server)["metrics"][0]["value"] == 0.125)  # it is shown
        assert info(server)["refresh"] == {"opening": None, "refused": None, "retiring": []}
        os.kill(workers(server)[0], signal.SIGKILL)  # and a worker that starts again opens what is there
        until(lambda: httpx2.post(f"{server.url}/classify", content=picture, timeout=30).json() == before)
        assert "now serving" not in log.read_text()
        assert "cannot open" not in log.read_text()
    assert not is_held(bundle.path)


def test_copies_of_read_only_files_can_be_written(bundle, tmp_path):
    store = tmp_path / "store"
    publish(bundle, store)
    modes = []
    edit(store, lambda draft: (modes.extend(file.stat().st_mode & 0o200 for file in draft.path.iterdir()), noted(draft))[1], force=True)
    assert all(modes)
    assert np.all([file.stat().st_mode & 0o222 == 0 for file in (store / "current").resolve().iterdir()])
    shutil.rmtree(store)
