"""`ebjdat-serve calibrate`: a bundle calibrated on a folder, from 20 images up; and training's calibration, which has the same core."""

import json
import shutil
import sys
import warnings
import weakref

import numpy as np
import pytest
from PIL import Image
from scipy.stats import betabinom

from benchmarks.hostile_images import png_of_tags
from ebjdat_serve import folder_calibration as fc
from ebjdat_serve import folder_images
from ebjdat_serve.bundle import Bundle, read_json
from ebjdat_serve.calibrating import fit_temperature
from ebjdat_serve.cli import main
from ebjdat_serve.contract import Input
from ebjdat_serve.detection import Detector
from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.folder_calibration import Split, calibrate_folder, promise
from ebjdat_serve.folder_images import FolderImages, labels_of
from ebjdat_serve.handling import CALIBRATION, handled
from ebjdat_serve.pixels import decode, to_unit
from ebjdat_serve.reach import reach_score
from ebjdat_serve.store import publish
from ebjdat_serve.verification import Terms, verified
from ebjdat_serve.views import Seen
from tests.classifiers import folder_of, images, write
from tests.conftest import DIGITS
from training.calibrate import calibrate
from training.data.bundle_data import dataset_of

CPU = Terms(engine="onnx", device="cpu")
SIZE = Input(12, 10)
LABELS = ("ant", "bee", "cow", "dog")


def quiet(text):
    pass


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("few") / "images", 24)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("many") / "images", 160)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_strange_tags_of_an_image_write_no_line_each(tmp_path):
    (tmp_path / "a.png").write_bytes(png_of_tags(100, 1000))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert FolderImages([tmp_path / "a.png"], SIZE, quiet).decoded(tmp_path / "a.png").shape == (12, 10, 3)
    assert not said


@pytest.mark.parametrize("n", [20, 59, 60, 499, 5_000, 50_000])
def test_parts_have_no_image_in_common_and_all_together(n):
    split = Split.of(n)
    parts = [split.fit, split.ranks, split.calibration]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    assert len(split.calibration) == (n if n < fc.SPLIT else n - 2 * min(n // 4, 10_000))
    assert all(np.array_equal(one, other) for one, other in zip(parts, vars(Split.of(n)).values(), strict=True))
    assert abs(np.mean(split.calibration[: n // 3]) / n - 0.5) < 0.25  # the first to walk are of no one class of a sorted listing


def test_of_few_images_all_are_for_p_values_by_a_score_that_needs_no_fit(few, tmp_path):
    done = calibrate_folder(write(tmp_path / "bundle"), few, say=quiet)
    c = done.calibration()
    assert (c.views, c.temperature, c.reviewed, c.reach_steps, c.handled) == (["energy"], 1.0, ["ood", "margin"], 0, 0.5)
    assert set(c.left_out) == {"statistics", "logits", "features"}
    assert c.dataset == "24 images of images"
    engine, each = load_engine(done, "onnx", "cpu"), []
    for place, file in enumerate(sorted(few.iterdir())):
        image = decode(file.read_bytes(), SIZE)[np.newaxis]
        each.append(engine.classify(to_unit(handled(image, CALIBRATION, 0.5, (place, 0)))).energy[0])
    np.testing.assert_allclose(c.energies, np.sort(each), rtol=1e-6)
    found = verified(done.path, CPU).calibrated
    for energy in (-100.0, c.energies[3], np.mean(c.energies), 100.0):  # the rank of the rank is the rank
        raw = np.array([[energy]], np.float32)
        p = Detector(np.asarray(c.scores), 0.05).p_value(found.combination.score(found.combination.ranked(raw)))
        assert p[0] == (1 + np.sum(np.float32(c.energies) >= raw[0, 0])) / 25


@pytest.mark.parametrize(("output", "logits"), [("logits", "logits"), ("probabilities", "max_softmax")])
def test_of_more_images_views_are_fitted_and_ranked_on_others(many, tmp_path, output, logits):
    bundle = write(tmp_path / "bundle", output=output, features=False)
    done = calibrate_folder(bundle, many, say=quiet)
    c, combination = done.calibration(), done.combination()
    assert (c.views, len(c.scores), len(c.energies)) == (["statistics", logits], 80, 80 if output == "logits" else 0)
    assert list(c.left_out) == ["features"]
    assert c.left_out["features"].startswith("no features: ")
    split, engine = Split.of(160), load_engine(done, "onnx", "cpu")
    listed, raw = sorted(many.iterdir()), []
    for place in split.ranks:
        image = to_unit(handled(decode(listed[place].read_bytes(), SIZE)[np.newaxis], 1, 0.5, (int(place), 0)))
        raw.append(combination.raw(Seen(image, None, engine.classify(image).logits))[0])
    for column, name in enumerate(combination.stored):
        np.testing.assert_allclose(combination.clean[name], np.sort(np.array(raw)[:, column]), rtol=1e-5, atol=1e-6)
    assert verified(done.path, CPU).calibrated.detector.alpha == 0.05


def test_it_does_not_depend_on_chunks_and_holds_pixels_of_one_at_a_time(many, tmp_path, monkeypatch):
    one, other = (write(tmp_path / name, gradient=True) for name in ("one", "other"))
    calibrate_folder(one, many, reach_images=30, say=quiet)
    held, most, chunks = set(), [], FolderImages.chunks

    def watched(self, *args):
        for places, pixels in chunks(self, *args):
            assert len(pixels) <= 7
            number = len(most)
            held.add(number)
            weakref.finalize(pixels, held.discard, number)
            most.append(len(held))
            yield places, pixels

    monkeypatch.setattr(folder_images, "CHUNK", 7)
    monkeypatch.setattr(FolderImages, "chunks", watched)
    calibrate_folder(other, many, reach_images=30, say=quiet)
    assert max(most) <= 2
    a, b = (read_json(tmp_path / name / "calibration.json")[0] for name in ("one", "other"))
    assert a["scores"] == pytest.approx(b["scores"], rel=1e-5)
    assert a["reach_steps"] == b["reach_steps"] == 5


def test_clean_images_are_flagged_as_often_as_alpha_says(tmp_path):
    done = calibrate_folder(write(tmp_path / "bundle"), folder_of(tmp_path / "images", 400, (12, 10)), say=quiet)
    found, engine = verified(done.path, CPU).calibrated, load_engine(done, "onnx", "cpu")
    fresh = to_unit(handled(images(500, (12, 10), 77), 9))
    terms = found.combination.terms(Seen(fresh, None, engine.classify(fresh).logits))
    flagged = int(found.detector.suspicious(found.detector.p_value(found.combination.score(terms))).sum())
    k = int(np.ceil(0.05 * 201)) - 1
    low, high = betabinom(500, k, 201 - k).ppf([0.0005, 0.9995])
    assert low <= flagged <= high


def test_what_n_buys_is_said():
    assert promise(24) == (
        "n = 24: p-values down to 1/25; at alpha 0.05 it flags 4.0% of images like these on average, and 0.1% to 14.3% by 95 of 100 such "
        "calibrations"
    )
    assert "no p-value is below alpha 0.01; the smallest is 1/51" in promise(50, 0.01)


def test_too_few_images_are_refused_and_nothing_is_written(tmp_path):
    bundle, folder = write(tmp_path / "bundle"), folder_of(tmp_path / "images", 19)
    (folder / "notes.txt").write_text("no image")
    before = files(bundle.path)
    with pytest.raises(EbjdatError, match=r"holds 19 images .*; a calibration takes 20 at least; left out 1 of 20 files: 1 not an image"):
        calibrate_folder(bundle, folder, say=quiet)
    (folder / "last.png").write_bytes(b"\x89PNG\r\n\x1a\nand nothing")
    with pytest.raises(EbjdatError, match=r"19 images for p-values can be read, 1 cannot; a calibration takes 20 at least"):
        calibrate_folder(bundle, folder, say=quiet)
    with pytest.raises(EbjdatError, match="is not a folder"):
        calibrate_folder(bundle, tmp_path / "nowhere", say=quiet)
    assert files(bundle.path) == before


def test_unreadable_ones_are_named_and_left_out(few, tmp_path):
    folder, said = tmp_path / "images", []
    shutil.copytree(few, folder)
    whole = (folder / "0003.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[:-30])
    (folder / "huge.png").write_bytes(whole + bytes(17 * 2**20))
    done = calibrate_folder(write(tmp_path / "bundle"), folder, say=said.append)
    assert len(done.calibration().scores) == 24
    assert said[-1].startswith("left out 2 that cannot be read: broken.png: the image is truncated or damaged")
    assert "huge.png: the image has " in said[-1]


def test_a_folder_of_images_that_cannot_be_read_is_refused_with_the_first_reasons(few, tmp_path):
    shutil.copytree(few, tmp_path / "images")
    for file in sorted((tmp_path / "images").iterdir())[:13]:
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(EbjdatError, match=r"more than half of the images cannot be read: 0000\.png: the image is truncated"):
        calibrate_folder(write(tmp_path / "bundle"), tmp_path / "images", say=quiet)


def test_answers_that_are_not_finite_are_not_calibrated_on_and_nothing_is_written(few, tmp_path, monkeypatch):
    bundle = write(tmp_path / "bundle")
    before, engine = files(bundle.path), load_engine(bundle, "onnx", "cpu")
    real = engine.classify

    def overflowing(image):
        found = real(image)
        return found._replace(logits=np.where(image[:, :1, 0, 0] > 0.9, np.inf, found.logits))

    monkeypatch.setattr(engine, "classify", overflowing)
    monkeypatch.setattr(fc, "load_engine", lambda *given: engine)
    shutil.copytree(few, tmp_path / "images")
    Image.new("RGB", (30, 30), "white").save(tmp_path / "images" / "white.png")
    with pytest.raises(EbjdatError, match="the model's answer is not finite on one of the images"):
        calibrate_folder(bundle, tmp_path / "images", say=quiet)
    assert files(bundle.path) == before


def test_a_damaged_bundle_is_not_calibrated(few, tmp_path):
    bundle = write(tmp_path / "bundle")
    weights = bundle.path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(EbjdatError, match="is damaged"):
        calibrate_folder(bundle, few, say=quiet)


def test_labels_of_sub_folders_give_a_temperature(tmp_path):
    folder, said = folder_of(tmp_path / "images", 100, labels=LABELS), []
    done = calibrate_folder(write(tmp_path / "bundle"), folder, say=said.append)
    assert said[0].startswith("100 images, with labels of 4 sub-folders: 25 to fit views on, 25 for ranks, 50 for p-values")
    split, engine = Split.of(100), load_engine(done, "onnx", "cpu")
    listed = sorted(folder.rglob("*.png"))
    logits, label = [], []
    for place in split.fit:
        logits.append(engine.classify(to_unit(decode(listed[place].read_bytes(), SIZE)[np.newaxis])).logits[0])
        label.append(LABELS.index(listed[place].parent.name))
    for place in split.calibration:
        image = handled(decode(listed[place].read_bytes(), SIZE)[np.newaxis], CALIBRATION, 0.5, (int(place), 0))
        logits.append(engine.classify(to_unit(image)).logits[0])
        label.append(LABELS.index(listed[place].parent.name))
    assert done.calibration().temperature == pytest.approx(fit_temperature(np.array(logits), np.array(label)), rel=1e-3)


def test_which_folders_are_labels(tmp_path):
    def of(*names, folders=()):
        return labels_of([tmp_path / name for name in names], tmp_path, list(LABELS), dict(folders))

    label, said = of("ant/a.png", "dog/deeper/b.png", "c.png", "2/d.png")
    assert (label.tolist(), said) == ([0, 3, -1, 2], "with labels of 3 sub-folders, 1 beside them without")
    assert of("a.png", "b.png") == (None, "without labels, since there are no sub-folders")
    assert of("x/a.png")[0] is None
    assert of("x/a.png", "y/b.png", folders={"x": "cow", "y": "bee"}.items())[0].tolist() == [2, 1]
    with pytest.raises(EbjdatError, match=r"of 2 sub-folders 1 are not named as a label, 'zebra' first"):
        of("ant/a.png", "zebra/b.png")
    with pytest.raises(EbjdatError, match="'yak' is no label of the model"):
        of("ant/a.png", folders={"x": "yak"}.items())


def test_without_scipy_labels_are_no_use_and_that_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    bundle, folder = write(tmp_path / "bundle"), folder_of(tmp_path / "images", 24, labels=LABELS)
    with pytest.raises(EbjdatError, match=r"a temperature is fitted by SciPy, which is not installed: .*\[calibrate\]"):
        calibrate_folder(bundle, folder, say=quiet)
    assert "calibration.json" not in files(bundle.path)


def test_the_walk_is_calibrated_where_there_is_a_gradient_at_a_cost_that_is_said(few, tmp_path, monkeypatch):
    bundle, said = write(tmp_path / "bundle", gradient=True), []
    done = calibrate_folder(bundle, few, say=said.append)
    assert said[1].startswith("check=reach: 24 images walk 5 steps towards another label, about 0 s")
    found = verified(done.path, Terms(engine="onnx", device="cpu"), ("classify", "score"))
    assert (found.no_check, found.calibrated.check.policy.n) == ("", 24)
    engine, scores = load_engine(done, "onnx", "cpu"), []
    for place, file in enumerate(sorted(few.iterdir())):
        image = handled(decode(file.read_bytes(), SIZE)[np.newaxis], CALIBRATION, 0.5, (place, 0))
        scores.append(reach_score(engine, to_unit(image))[0])
    np.testing.assert_allclose(found.calibrated.check.clean["reach"], np.sort(scores), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(fc, "REACH_SECONDS", 1e-9)
    again = calibrate_folder(done, few, say=said.append)
    assert again.calibration().reach_steps == 0
    assert any("--reach-images 20 has it done" in text for text in said)


def test_the_command_makes_a_new_version_of_a_store_and_renews_the_card(few, tmp_path, capsys):
    publish(write(tmp_path / "bundle"), tmp_path / "store", terms=CPU)
    assert main(["calibrate", str(tmp_path / "store"), str(few)]) == 2
    assert "--force" in capsys.readouterr().err
    mapping = tmp_path / "folders.json"
    mapping.write_text(json.dumps({"x": 3}))
    assert main(["calibrate", str(tmp_path / "store"), str(few), "--force", "--folders", str(mapping)]) == 2
    assert "must be a JSON object of labels" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path / "store"), str(few), "--force"]) == 0
    assert "n = 24: p-values down to 1/25" in capsys.readouterr().out
    done = Bundle.load(tmp_path / "store")
    assert done.manifest.version == "1.r1"
    text = (done.path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# tiny@1.r1\n")
    assert "P-values speak of images like 24 images of images, of which 50% were lightly handled" in text


def test_trainings_calibration_is_what_it_was(tmp_path):
    shutil.copytree(DIGITS, tmp_path / "digits")
    draft = Bundle.draft(tmp_path / "digits")
    calibrate(draft, dataset_of(draft))
    (new,), (kept,) = (read_json(folder / "calibration.json") for folder in (draft.path, DIGITS))
    numbers = {"energies", "scores", "temperature"}  # of another machine these differ in their last digits
    assert {name: new[name] for name in set(new) - numbers} == {name: kept[name] for name in set(kept) - numbers}
    for name in numbers:
        assert new[name] == pytest.approx(kept[name], rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_from_a_thousand_images_features_are_a_view(tmp_path):
    shutil.copytree(DIGITS, tmp_path / "bundle")
    folder = folder_of(tmp_path / "images", 1_000, (8, 8))
    done = calibrate_folder(Bundle.draft(tmp_path / "bundle"), folder, reach_images=20, say=quiet)
    c = done.calibration()
    assert (c.views, c.left_out, len(c.scores)) == (["statistics", "logits", "features"], {}, 500)
    found = verified(done.path, CPU, ("classify", "score", "step"))
    assert found.calibrated.check.policy.n == 20
