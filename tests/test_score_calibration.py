"""`ebjdat-serve calibrate BUNDLE --scores FILE`: a calibration of scores that a server recorded, beside the one on images."""

import json
import os
import re
import shutil
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from errno import ENOSPC
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom

import ebjdat_serve
from ebjdat_serve import audit_rows, score_calibration
from ebjdat_serve.audit_rows import LONGEST_LINE, bound_of
from ebjdat_serve.bundle import Bundle, read_json, write_json
from ebjdat_serve.card import imported_card, summary
from ebjdat_serve.cli import main
from ebjdat_serve.detection import Detector
from ebjdat_serve.editing import edit
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.folder_calibration import calibrate_folder
from ebjdat_serve.pixels import encode_png
from ebjdat_serve.score_calibration import Choice, calibrate_scores, threshold
from ebjdat_serve.scored_by import scored_by
from ebjdat_serve.server.endpoints.endpoint import Service
from ebjdat_serve.server.served_model import open_bundle
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.store import publish
from ebjdat_serve.verification import Terms, verified
from tests.classifiers import folder_of, images, write
from tests.conftest import HTTP, serving, until

BEGIN = datetime(2026, 11, 1, 12, tzinfo=UTC)
N = 200
BY: dict[str, str] = {}
"""What decides scores, by the bundle's key: a log has hundreds of rows."""


def quiet(text):
    pass


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A bundle that is calibrated on images, the walk of check=reach included."""
    folder = tmp_path_factory.mktemp("calibrated")
    bundle = write(folder / "bundle", gradient=True)
    return calibrate_folder(bundle, folder_of(folder / "images", 120), reach_images=20, say=quiet).path


@pytest.fixture
def bundle(calibrated, tmp_path):
    shutil.copytree(calibrated, tmp_path / "bundle")
    return Bundle.load(tmp_path / "bundle")


def row(bundle, i, score, **changes):
    """What a server's audit log says of picture i."""
    about = {"time": (BEGIN + timedelta(hours=i)).isoformat(timespec="milliseconds"), "key": "", "precision": "fp32"}
    about |= {
        "sha256_scores": BY.get(bundle.key) or BY.setdefault(bundle.key, scored_by(bundle, "fp32", bundle.combination())),
        "sha256": sha256(str(i).encode()).hexdigest(),
    }
    return {**about, "energy": -float(np.float32(score)), "suspicion": float(np.float32(score)), "margin": 1.0 + i, **changes}


def written(file, rows, end=""):
    file.write_text("".join(json.dumps(one) + "\n" for one in rows) + end, encoding="utf-8")
    return file


def scores(n, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1.0, n)


@pytest.fixture
def log(bundle, tmp_path):
    return written(tmp_path / "audit.jsonl", [row(bundle, i, score) for i, score in enumerate(scores(N, 20.0))])


def calibrate(bundle, *files, **choice):
    return calibrate_scores(Bundle.draft(bundle.path), Choice(files, **choice), quiet)


def test_it_is_written_beside_the_one_on_images_which_stays_the_default(bundle, log, capsys):
    before = {name: (bundle.path / name).read_bytes() for name in ("calibration.json", "views.safetensors")}
    assert main(["calibrate", str(bundle.path), "--scores", str(log)]) == 0
    said = capsys.readouterr().out
    assert f"calibration traffic, fp32: {N} pictures, of {N} rows recorded 2026-11-01 12:00:00 to 2026-11-09 19:00:00 UTC" in said
    assert f"n = {N}: p-values down to 1/{N + 1}" in said
    assert "the former flags 100.0% of the recorded images" in said
    assert "the drift test tells them from those of the calibration on images" in said
    assert "an attack of that period then counts as usual" in said
    assert before == {name: (bundle.path / name).read_bytes() for name in before}
    done = Bundle.load(bundle.path)
    recorded = done.recorded()["traffic"]
    assert recorded.scores == sorted(float(np.float32(score)) for score in scores(N, 20.0))
    assert recorded.margins == [1.0 + i for i in np.argsort(scores(N, 20.0).astype(np.float32), kind="stable")]
    assert (recorded.images, recorded.precision, recorded.skipped) == (N, "fp32", {})
    assert [vars(one) for one in recorded.sources] == [{"file": log.name, "sha256": sha256(log.read_bytes()).hexdigest(), "lines": N}]
    of_images, of_traffic = (verified(done.path, Terms(calibration=name)).calibrated for name in ("images", "traffic"))
    assert of_images.calibration == bundle.calibration()
    assert of_traffic.calibration.temperature == of_images.calibration.temperature
    assert of_traffic.calibration.views == of_images.calibration.views
    assert float(of_traffic.detector.p_value(np.array([0.0]))[0]) == 1.0
    assert float(of_images.detector.p_value(np.array([15.0]))[0]) == 1 / (len(of_images.calibration.scores) + 1)
    assert of_images.check
    assert of_traffic.check is None


def test_verify_sign_publish_and_the_card_hold_it(bundle, log, tmp_path, capsys):
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    signed = Bundle.load(shutil.copytree(bundle.path, tmp_path / "signed"))
    calibrate(signed, log)
    assert main(["sign", str(signed.path), "--key", str(tmp_path / "key.pem"), "--calibration", "traffic", "--engine", "onnx"]) == 0
    assert verified(signed.path, Terms(trust=(key.public_key().public_bytes_raw(),), calibration="traffic")).calibrated
    with pytest.raises(BundleError, match="is signed: change a copy"):
        edit(signed.path, lambda draft: calibrate_scores(draft, Choice([log])))
    capsys.readouterr()
    assert main(["sign", str(signed.path), "--key", str(tmp_path / "key.pem"), "--calibration", "none"]) == 2
    assert "has no calibration 'none'; there are: images, traffic" in capsys.readouterr().err
    store = tmp_path / "store"
    publish(bundle, store)
    assert main(["calibrate", str(store), "--scores", str(log), "--force"]) == 0
    done = Bundle.load(store)
    assert done.manifest.version.endswith(".r1")
    assert list(done.recorded()) == ["traffic"]
    assert main(["verify", str(store), "--engine", "onnx"]) == 0
    assert "With `serve --calibration traffic`, in fp32, p-values hold for images exchangeable with the 200 recorded 2026-11-01" in (
        imported_card(done)
    )
    assert "recorded      traffic: fp32, 200 images recorded" in summary(done)
    (done.path / "calibration.traffic.json").chmod(0o644)
    with (done.path / "calibration.traffic.json").open("a") as file:
        file.write(" ")
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.load(store)


def test_rows_of_others_repeated_and_outside_the_period_are_counted_by_reason(bundle, tmp_path):
    rows = [row(bundle, i, i / 10) for i in range(60)]
    rows[1]["sha256_scores"], rows[2]["sha256_scores"] = "0" * 64, None
    rows[3] |= {"sha256_scores": "0" * 64, "precision": "int8"}
    rows[4]["suspicion"] = None
    del rows[5]["sha256_scores"]
    again = [{**rows[10], "suspicion": 99.0}, {**rows[11]}]
    files = [written(tmp_path / "audit.1", rows[:30]), written(tmp_path / "audit", [*rows[30:], *again])]
    done = calibrate(bundle, *files, since=BEGIN, until=BEGIN + timedelta(hours=50)).recorded()["traffic"]
    assert done.skipped == {
        "of another model, graph or views": 1,
        "without sha256_scores: of an earlier server, or a model that is not calibrated": 2,
        "of another precision": 1,
        "of scores that are not finite": 1,
        "of a picture that was sent before": 2,
        "outside the period": 10,
    }
    assert len(done.scores) == done.images == 45
    assert max(done.scores) == pytest.approx(4.9)
    assert (done.since, done.until) == ("2026-11-01T12:00:00.000+00:00", "2026-11-03T13:00:00.000+00:00")
    assert [one.lines for one in done.sources] == [30, 32]


def test_a_torn_last_line_of_a_live_log_is_tolerated_and_said(bundle, tmp_path):
    rows = [row(bundle, i, i) for i in range(21)]
    torn = written(tmp_path / "audit", rows[:20], end=json.dumps(rows[20])[:77])
    assert calibrate(bundle, torn).recorded()["traffic"].skipped == {"torn: the last line of a file that is still written": 1}
    whole = written(tmp_path / "whole", rows[:20], end=json.dumps(rows[20]))
    assert calibrate(bundle, whole).recorded()["traffic"].images == 21


@pytest.mark.parametrize(
    "line",
    [
        '{"time": "20',
        "",
        "[]",
        "7",
        "\udcff",
        "[" * 60_000,
        '{"suspicion": NaN}',
        '{"a": 1, "a": 2}',
        "x" * 10_000_000,
        '{"time": "2026-11-01T12:00:00"}',
        '{"time": 7}',
        {"suspicion": 1e300},
        {"suspicion": 10**400},
        {"margin": True},
        {"sha256": "zz" * 32},
        {"sha256": 7},
        {"sha256": " " * 64},
    ],
    ids=lambda line: str(line)[:12],
)
def test_a_line_that_no_server_wrote_is_one_error_that_names_file_and_line(bundle, tmp_path, capsys, line):
    rows = [json.dumps(row(bundle, i, i)) for i in range(30)]
    rows[7] = line if isinstance(line, str) else json.dumps({**row(bundle, 7, 7.0), **line})
    file = tmp_path / "audit"
    file.write_bytes("".join(f"{one}\n" for one in rows).encode("utf-8", "surrogateescape"))
    before = {one.name: one.read_bytes() for one in bundle.path.iterdir()}
    assert main(["calibrate", str(bundle.path), "--scores", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ebjdat-serve: {file}, line 8, is no row of an audit log: ")
    assert len(said.splitlines()) == 1
    assert len(said) < 500
    assert before == {one.name: one.read_bytes() for one in bundle.path.iterdir()}


def test_a_log_may_come_through_a_pipe(bundle, tmp_path):
    rows = written(tmp_path / "audit", [row(bundle, i, i) for i in range(24)]).read_bytes()
    reading, writing = os.pipe()
    os.write(writing, rows)  # less than a pipe holds
    os.close(writing)
    try:
        done = calibrate(bundle, Path(f"/dev/fd/{reading}")).recorded()["traffic"]
    finally:
        os.close(reading)
    assert (done.images, done.sources[0].sha256) == (24, sha256(rows).hexdigest())


def test_of_few_pictures_no_score_is_beyond_a_small_alpha(bundle, tmp_path, capsys):
    log = written(tmp_path / "audit", [row(bundle, i, i) for i in range(24)])
    assert main(["calibrate", str(bundle.path), "--scores", str(log)]) == 0
    assert re.search(
        r"alpha 0\.01: flagged (above \S+ nats|never) by the calibration on images, never by this one", capsys.readouterr().out
    )


def test_a_long_line_is_not_read_whole(tmp_path):
    file = tmp_path / "long"
    file.write_bytes(b"x" * 3 * LONGEST_LINE)
    with file.open("rb") as stream:
        assert len(next(audit_rows.bounded(stream, 3 * LONGEST_LINE))) == LONGEST_LINE + 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--name", "../x"], "--name must be of 1 to 40 small letters"),
        (["--name", "images"], "--name must be of 1 to 40 small letters"),
        (["--name", "x" * 41], "--name must be of 1 to 40 small letters"),
        (["--name", "a.b"], "--name must be of 1 to 40 small letters"),
        (["--name", ""], "--name must be of 1 to 40 small letters"),
        (["--since", "yesterday"], "'yesterday' is no date"),
        (["--since", "2026-11-05", "--until", "2026-11-01"], "--since 2026-11-05 is not before the end of --until 2026-11-01"),
        (["--precision", "int8"], "holds no int8 calibration"),
        (
            ["--until", "2026-11-01"],
            "12 pictures of this bundle in fp32; a calibration takes 20 at least; left out: 188 rows outside the period",
        ),
        (["--reach-images", "3"], "--reach-images: calibrate with --scores has no use for it"),
    ],
)
def test_what_is_wrong_with_a_call_is_said_and_nothing_is_written(bundle, log, capsys, options, said):
    before = {one.name: one.read_bytes() for one in bundle.path.iterdir()}
    code = main(["calibrate", str(bundle.path), "--scores", str(log), *options])
    assert said in capsys.readouterr().err
    assert code == 2
    assert before == {one.name: one.read_bytes() for one in bundle.path.iterdir()}


def test_a_call_takes_a_folder_or_scores(bundle, log, tmp_path, capsys):
    assert main(["calibrate", str(bundle.path)]) == 2
    assert main(["calibrate", str(bundle.path), str(tmp_path), "--scores", str(log)]) == 2
    assert main(["calibrate", str(bundle.path), str(tmp_path), "--name", "x"]) == 2
    said = capsys.readouterr().err
    assert said.count("calibrate takes either DIR, a folder of images, or --scores FILE") == 2
    assert "--name: calibrate with DIR has no use for it" in said


def test_one_is_removed_and_the_others_stay(bundle, log, capsys):
    for name in ("one", "two"):
        calibrate(bundle, log, name=name)
    damaged = bundle.path / "calibration.one.json"
    damaged.write_text("{")  # or it could not be removed
    assert main(["calibrate", str(bundle.path), "--remove", "one"]) == 0
    assert capsys.readouterr().out == f"the calibration one is removed: {bundle.path}\n"
    done = Bundle.load(bundle.path)
    assert list(done.recorded()) == ["two"]
    assert not damaged.exists()
    assert "calibration.one.json" not in done.manifest.files
    before = {one.name: one.read_bytes() for one in bundle.path.iterdir()}
    for name in ("one", "images", "../../x", "selftest", ""):
        assert main(["calibrate", str(bundle.path), "--remove", name]) == 2
        assert f"has no calibration {name!r} of recorded scores; there are: two" in capsys.readouterr().err
    assert main(["calibrate", str(bundle.path), "--remove", "two", "--since", "2026-11-01"]) == 2
    assert "--since: calibrate with --remove has no use for it" in capsys.readouterr().err
    assert main(["calibrate", str(bundle.path), "--remove", "two", "--scores", str(log)]) == 2
    assert before == {one.name: one.read_bytes() for one in bundle.path.iterdir()}


@pytest.mark.parametrize("name", ["traffic", "new"])
def test_where_the_manifest_cannot_be_written_the_bundle_stays_as_it_was(bundle, log, tmp_path, capsys, monkeypatch, name):
    calibrate(bundle, log)
    before = {one.name: one.read_bytes() for one in bundle.path.iterdir()}

    def full(*names, **changes):
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(Bundle, "update", full)
    other = written(tmp_path / "other", [row(bundle, i, i) for i in range(24)])
    assert main(["calibrate", str(bundle.path), "--scores", str(other), "--name", name]) == 2
    said = "cannot be written: No space left on device; set TMPDIR to a folder with room"
    assert re.search(rf"the copy of {re.escape(str(bundle.path))} in \S+ {said}$", capsys.readouterr().err.strip())
    assert before == {one.name: one.read_bytes() for one in bundle.path.iterdir()}


def test_one_whose_file_is_gone_is_removed(bundle, log, capsys):
    calibrate(bundle, log)
    (bundle.path / "calibration.traffic.json").unlink()
    assert main(["calibrate", str(bundle.path), "--remove", "traffic"]) == 0
    assert Bundle.load(bundle.path).recorded() == {}


def test_of_two_at_once_one_is_refused_and_none_is_lost(bundle, log, capsys):
    said = []

    def change(draft):
        said.append((main(["calibrate", str(bundle.path), "--scores", str(log), "--name", "two"]), capsys.readouterr().err))
        return calibrate_scores(draft, Choice([log], "one"), quiet)

    edit(bundle.path, change)
    assert said == [(2, f"ebjdat-serve: another command is changing {bundle.path}: wait for it\n")]
    assert main(["calibrate", str(bundle.path), "--scores", str(log), "--name", "two"]) == 0
    assert list(Bundle.load(bundle.path).recorded()) == ["one", "two"]


def test_in_a_store_it_is_removed_from_the_next_version(bundle, log, tmp_path, capsys):
    publish(calibrate(bundle, log), tmp_path / "store")
    assert main(["calibrate", str(tmp_path / "store"), "--remove", "traffic"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path / "store"), "--remove", "traffic", "--force"]) == 0
    done = Bundle.load(tmp_path / "store" / "current")
    assert (done.recorded(), done.manifest.version) == ({}, f"{bundle.manifest.version}.r1")


def test_a_bundle_without_a_calibration_is_told_to_make_one_first(tmp_path):
    bundle = write(tmp_path / "bundle")
    with pytest.raises(EbjdatError, match=r"has no calibration, and recorded scores are by its views: ebjdat-serve calibrate BUNDLE DIR"):
        calibrate(bundle, tmp_path / "audit")
    with pytest.raises(BundleError, match="has no calibration 'traffic', nor one on images"):
        verified(bundle.path, Terms(calibration="traffic"))


def test_a_name_that_is_not_there_or_does_not_hold_is_one_line(bundle, log):
    done = calibrate(bundle, log, name="autumn")
    with pytest.raises(BundleError, match="has no calibration 'x'; there are: images, autumn"):
        verified(done.path, Terms(calibration="x"))
    with pytest.raises(BundleError, match=r"has no calibration '\.\./secret'; there are: images, autumn"):
        verified(done.path, Terms(calibration="../secret"))
    data = read_json(done.path / "calibration.autumn.json")
    for change, said in (
        ({"scored_by": "0" * 64}, "autumn is stale"),
        ({"precision": "int8"}, "recorded in int8 and does not hold for fp32"),
        ({"scores": data["scores"][::-1]}, "scores must be sorted"),
        ({"margins": []}, "of as many images"),
        ({"name": "other"}, "is the calibration other"),
        ({"name": "../x"}, "no name of a calibration"),
        ({"since": "now"}, "no time with a zone"),
        ({"since": "2026-11-01"}, "no time with a zone"),
        ({"since": "0001-01-01T00:00+14:00"}, "no time with a zone"),
        ({"more": 1}, "unknown keys"),
        ({"precision": "fp32](http://x)"}, "precision: .* is not 'fp32' or"),
        ({"skipped": {f"r{i}": 1 for i in range(101)}}, "more than it may hold"),
        ({"sources": data["sources"] * 1001}, "more than it may hold"),
        ({name: [0.0] * 10_001 for name in ("scores", "margins")} | {"images": 10_001}, "more than it may hold"),
    ):
        write_json(done.path / "calibration.autumn.json", {**data, **change})
        done.update("calibration.autumn.json")
        with pytest.raises(BundleError, match=said):
            verified(done.path, Terms(calibration="autumn"))
    write_json(done.path / "calibration.autumn.json", data)
    done.update("calibration.autumn.json")
    with pytest.raises(EbjdatError, match="cannot be served with 200"):
        verified(done.path, Terms(calibration="autumn", alpha=0.001))


def test_a_bundle_holds_so_many_of_so_many_bytes(bundle, log, monkeypatch):
    """They are all read when it is opened: a bundle of somebody else may list a name for each of thousands of large files."""
    monkeypatch.setattr("ebjdat_serve.bundle.MOST_RECORDED", 2)
    for name in ("one", "two", "two"):
        done = calibrate(bundle, log, name=name)
    with pytest.raises(EbjdatError, match="2 calibrations of recorded scores at most"):
        calibrate(bundle, log, name="three")
    assert list(Bundle.load(bundle.path).recorded()) == ["one", "two"]
    shutil.copy(done.path / "calibration.one.json", done.path / "calibration.three.json")
    done.update("calibration.three.json")
    with pytest.raises(BundleError, match="2 calibrations of recorded scores at most"):
        Bundle.load(bundle.path)
    monkeypatch.undo()
    (done.path / "calibration.two.json").write_text(" " * (4 * 2**20 + 1))
    done.update("calibration.two.json")
    with pytest.raises(BundleError, match="is larger than"):
        Bundle.load(bundle.path)


def test_another_calibration_on_images_drops_what_was_recorded_by_other_views(bundle, log, tmp_path, caplog):
    calibrate(bundle, log)
    again = calibrate_folder(Bundle.draft(bundle.path), folder_of(tmp_path / "more", 120, seed=9), reach_images=0, say=quiet)
    assert again.recorded() == {}
    assert not (bundle.path / "calibration.traffic.json").exists()
    assert "dropped the calibrations by recorded scores traffic" in caplog.text
    Bundle.load(bundle.path)


def test_what_decides_scores_is_told_from_what_does_not(bundle, log, tmp_path):
    by = scored_by(bundle, "fp32", bundle.combination())
    done = calibrate(bundle, log)
    assert scored_by(done, "fp32", done.combination()) == by
    assert done.served != bundle.served
    other = done.update(input=bundle.manifest.input.__class__(11, 10))
    assert scored_by(other, "fp32", other.combination()) != by


def test_of_many_pictures_some_are_kept_at_random(bundle, log, monkeypatch):
    monkeypatch.setattr(score_calibration, "MOST_SCORES", 50)
    done = calibrate(bundle, log).recorded()["traffic"]
    assert (len(done.scores), done.images) == (50, N)
    assert done.scores == sorted(done.scores)
    assert set(done.scores) < {float(np.float32(score)) for score in scores(N, 20.0)}


def test_who_sent_most_of_it_is_said(bundle, tmp_path):
    rows, said = [row(bundle, i, i, key="shop" if i < 18 else "") for i in range(24)], []
    calibrate_scores(bundle, Choice([written(tmp_path / "audit", rows)]), said.append)
    assert said == ["the API key shop sent 75% of the pictures"]


def test_of_so_many_keys_the_names_are_kept(bundle, tmp_path, monkeypatch):
    """Each name is some 100 bytes of somebody else's choice, and a log has millions of lines."""
    monkeypatch.setattr(audit_rows, "MOST_KEYS", 3)
    rows, said = [row(bundle, i, i, key=f"key {i}" if i < 20 else "key 2") for i in range(24)], []
    found = audit_rows.read_rows([written(tmp_path / "audit", rows)], audit_rows.Wanted(BY[bundle.key], "fp32"))
    assert found.keys == {"key 0": 1, "key 1": 1, "key 2": 5, "others": 17}
    calibrate_scores(bundle, Choice([tmp_path / "audit"]), said.append)
    assert said == []  # the others are not one


@pytest.mark.parametrize("cut", [1, 5, 77, 300])
def test_a_line_that_a_killed_server_began_is_left_out_and_the_next_is_read(bundle, tmp_path, cut):
    rows = [json.dumps(row(bundle, i, i, key='{"time":')) for i in range(24)]
    text = "\n".join([*rows[:9], rows[9][:cut] + rows[10][:cut] + rows[11], *rows[12:]]) + "\n"
    (tmp_path / "audit").write_text(text, encoding="utf-8")
    done = calibrate(bundle, tmp_path / "audit").recorded()["traffic"]
    whole, told_apart = cut >= len(rows[9]), cut >= len('{"time":')
    assert done.scores == [float(i) for i in range(24) if whole or i not in (9, 10)]
    assert done.skipped == ({} if whole else {audit_rows.TORN: 2 if told_apart else 1})
    (tmp_path / "audit").write_text(text + rows[9][:cut] + rows[10][:cut], encoding="utf-8")  # and is being written
    left_out = calibrate(bundle, tmp_path / "audit").recorded()["traffic"].skipped
    if whole:
        assert left_out == {"of a picture that was sent before": 2}
    else:
        assert left_out == {audit_rows.TORN: 3 if told_apart else 1, audit_rows.UNFINISHED: 1}


def test_whole_rows_that_share_a_line_are_all_read(bundle, tmp_path):
    rows = [json.dumps(row(bundle, i, i)) for i in range(30)]
    (tmp_path / "audit").write_text("\n".join([*rows[:5], "".join(rows[5:20]), *rows[20:]]) + "\n", encoding="utf-8")
    done = calibrate(bundle, tmp_path / "audit").recorded()["traffic"]
    assert done.scores == [float(i) for i in range(30)]
    assert done.skipped == {}


def test_what_a_calibration_of_the_same_name_replaces_is_said(bundle, log):
    said = []
    first = calibrate_scores(bundle, Choice([log]), said.append)
    assert said == []
    made = first.recorded()["traffic"].made
    second = calibrate_scores(first, Choice([log]), said.append)
    assert said == [f"the calibration traffic, made {made}, is replaced"]
    calibrate_scores(second, Choice([log], "another"), said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    "line", ['{"time": "x" {"time": 1', 'x{"time": "2026-11-01T00:00+00:00"}', '{"a": {"b": 1}', '{"time": 1}{"time": [}']
)
def test_a_line_that_no_server_left_stays_an_error(bundle, log, line):
    text = log.read_text().splitlines()
    log.write_text("\n".join([*text[:30], line, *text[30:]]) + "\n")
    with pytest.raises(EbjdatError, match="line 31, is no row of an audit log"):
        calibrate(bundle, log)


def test_exchangeable_images_are_flagged_as_often_as_alpha_says(bundle, tmp_path):
    flagged, fresh = [], 100
    for draw in range(10):
        drawn = scores(99 + fresh, 3.0, seed=draw)
        log = written(tmp_path / "audit", [row(bundle, i, score) for i, score in enumerate(drawn[:99])])
        found = verified(calibrate(bundle, log).path, Terms(calibration="traffic")).calibrated
        p = found.detector.p_value(drawn[99:].astype(np.float32))
        flagged.append([int((p <= level).sum()) for level in (0.01, 0.1, 0.5)])
    for level, hits in zip((0.01, 0.1, 0.5), np.sum(flagged, axis=0), strict=True):
        one = betabinom(fresh, round(level * 100), 100 - round(level * 100))
        assert hits <= 10 * one.mean() + 4 * np.sqrt(10 * one.var()), level


@settings(max_examples=50)
@given(st.lists(st.floats(-50, 50, width=32), min_size=20, max_size=60), st.sampled_from([0.05, 0.1, 0.3]))
def test_the_threshold_is_where_the_flag_begins(values, alpha):
    ordered = sorted(values)
    detector, limit = Detector(np.asarray(ordered), alpha), threshold(ordered, alpha)
    for score in {*ordered, min(limit, 1e9), np.nextafter(min(limit, 1e9), np.inf)}:
        assert bool(detector.suspicious(detector.p_value(np.array([score])))[0]) == (score > limit)


def test_dates_and_times_bound_the_period():
    assert bound_of("2026-11-01") == datetime(2026, 11, 1, tzinfo=UTC)
    assert bound_of("2026-11-01", end=True) == datetime(2026, 11, 2, tzinfo=UTC)
    assert bound_of("2026-11-01T10:00+02:00", end=True) == datetime(2026, 11, 1, 8, tzinfo=UTC)
    assert bound_of("2026-11-01T10:00") == datetime(2026, 11, 1, 10, tzinfo=UTC)
    for text in ("9999-12-31", "", "1", "2026-13-01"):
        with pytest.raises(EbjdatError, match="is no date"):
            bound_of(text, end=True)


def test_in_python_and_with_another_drift_test(bundle, log):
    done = calibrate(bundle, log)
    png = encode_png(images(1, (12, 10), 3)[0])
    usual, own = (ebjdat_serve.load(done.path, device="cpu", threads=1, calibration=name) for name in ("images", "traffic"))
    assert own.classify(png).suspicion == usual.classify(png).suspicion
    assert own.classify(png).p_value == 1.0  # recorded scores are higher by far
    with pytest.raises(EbjdatError, match="of which none is of the walk"):
        own.classify(png, check="reach")
    drifts = []
    for name in ("images", "traffic"):
        settings = Settings(done.path, calibration=name)
        service = SimpleNamespace(name="m", settings=settings, drifts=SimpleNamespace(of=lambda of, make: (of, make())))
        service.shared = SimpleNamespace(drift_file=SimpleNamespace(take=lambda of, drift: drift))
        drifts.append(Service.drift(service, open_bundle(done.path, settings)))
    assert drifts[0][0] != drifts[1][0]
    assert drifts[1][1].test.n == N
    assert "200 images recorded" in drifts[1][1].words


def test_a_server_serves_it_says_so_and_records_what_the_next_is_made_of(bundle, log, tmp_path, capsys):
    done = calibrate(bundle, log)
    options = ("--device", "cpu", "--calibration", "traffic", "--audit-log", str(tmp_path / "own"))
    pngs = [encode_png(image) for image in images(24, (12, 10), 5)]
    with serving(done.path, tmp_path / "server.log", *options) as server:
        body = json.dumps({"images": [b64encode(png).decode() for png in pngs]})
        answer = HTTP.post(f"{server.url}/classify", content=body, headers={"Content-Type": "application/json"}).json()
        assert {one["p_value"] for one in answer["results"]} == {1.0}
        info = HTTP.get(f"{server.url}/info").json()
        assert (info["calibration"]["name"], info["calibration"]["available"]) == ("traffic", ["images", "traffic"])
        assert info["calibration"]["means"].startswith("p-values hold for images exchangeable with the 200 recorded 2026-11-01 12:00:00 to")
        assert info["drift"]["means"].count("images recorded 2026-11-01")
        refused = HTTP.post(f"{server.url}/classify?check=reach", content=pngs[0])
        assert (refused.status_code, "the walk of check=reach" in refused.text) == (409, True)
        until(lambda: (tmp_path / "own").read_text().count("\n") == 24)
    rows = [json.loads(line) for line in (tmp_path / "own").read_text().splitlines()]
    assert {(one["precision"], one["calibration"]) for one in rows} == {("fp32", "traffic")}
    for one, result in zip(rows, answer["results"], strict=True):
        assert np.float32(one["suspicion"]) == np.float32(result["suspicion"])
    assert main(["calibrate", str(done.path), "--scores", str(tmp_path / "own"), "--name", "next"]) == 0
    assert "24 pictures, of 24 rows" in capsys.readouterr().out
    assert list(Bundle.load(done.path).recorded()) == ["next", "traffic"]
