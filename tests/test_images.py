"""Tests of data: CIFAR-10, users' folders, and the splits."""

import hashlib
import io
import os
import pickle
import socket
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from ebjdat_serve.contract import Input
from ebjdat_serve.pixels import decode
from training.data import archives, datasets
from training.data.augment import augment, crop, cutout, recolour
from training.distributed import Noise
from training.errors import DataError, TrainingError
from training.loop.clock import Clock
from training.loop.stream import Stream
from training.presets import DIGITS
from training.refresh import filled, refresh


def small_cifar(root, monkeypatch, tamper=False):
    """A CIFAR-10 of 20 images a batch, in the canonical layout, with its own checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums = {}
    for name in archives.CIFAR10_BATCHES:
        pixels = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        sums[name] = hashlib.md5(pixels.tobytes()).hexdigest()
        rows = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(20, 3072)
        if tamper:
            rows[0, 0] ^= 1
        (folder / name).write_bytes(pickle.dumps({b"data": rows, b"labels": rng.integers(0, 10, 20).tolist()}, protocol=2))
    monkeypatch.setattr(archives, "CIFAR10_BATCHES", sums)
    monkeypatch.setenv("EBJDAT_DATA", str(root))
    return folder


def test_canonical_batches_are_read_and_checked(tmp_path, monkeypatch):
    small_cifar(tmp_path, monkeypatch)
    _, train, test = archives.cifar10(tmp_path)
    assert train.image.shape == (100, 32, 32, 3)
    assert len(test) == 20


def test_changed_pixels_are_refused(tmp_path, monkeypatch):
    small_cifar(tmp_path, monkeypatch, tamper=True)
    with pytest.raises(DataError, match="differ from the official ones"):
        datasets.load("cifar10")


def test_atlases_and_class_folders_hold_the_same_images(tmp_path, monkeypatch):
    small_cifar(tmp_path / "a", monkeypatch)
    _, train, test = archives.cifar10(tmp_path / "a")
    for split, part in (("train", train), ("test", test)):
        for i, (image, label) in enumerate(zip(part.image, part.label, strict=True)):
            home = tmp_path / "b" / "cifar10" / split / archives.CIFAR10_NAMES[label]
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(home / f"{i:04}.png")
    _, again, _ = archives.cifar10(tmp_path / "b")
    assert sorted(image.tobytes() for image in again.image) == sorted(image.tobytes() for image in train.image)
    label_of = {image.tobytes(): label for image, label in zip(train.image, train.label, strict=True)}
    assert all(label_of[image.tobytes()] == label for image, label in zip(again.image, again.label, strict=True))
    assert len(set(again.label[:20].tolist())) > 3
    sheet = train.image[:20].reshape(4, 5, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(128, 160, 3)
    Image.fromarray(sheet).save(tmp_path / "atlas.webp", lossless=True)
    np.testing.assert_array_equal(datasets.read_atlas(tmp_path / "atlas.webp", 32), train.image[:20])


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/should-not-exist",))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    file = tmp_path / "data_batch_1"
    file.write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(DataError, match="does not hold"):
        archives._python_batch(file)


def test_a_damaged_batch_is_a_data_error(tmp_path):
    file = tmp_path / "data_batch_1"
    file.write_bytes(pickle.dumps({b"labels": []})[:-3])
    with pytest.raises(DataError, match="fetch the archive again"):
        archives._python_batch(file)


def test_no_data_and_no_network_says_where_to_put_it(tmp_path, monkeypatch):
    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr(archives.urllib.request, "urlretrieve", offline)
    monkeypatch.setenv("EBJDAT_DATA", str(tmp_path))
    with pytest.raises(DataError, match="EBJDAT_DATA"):
        datasets.load("cifar10")


def test_a_wrong_download_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"something else")
    monkeypatch.setenv("EBJDAT_DATA", str(tmp_path))
    with pytest.raises(DataError, match="sha256"):
        datasets.load("cifar10")


def test_unknown_data():
    with pytest.raises(DataError, match="neither a data set"):
        datasets.load("imagenet")


def test_the_splits_are_disjoint_and_always_the_same():
    first, second = datasets.load("digits"), datasets.load("digits")
    parts = [first.train, first.selection, first.calibration, first.test]
    assert [len(p) for p in parts] == [1097, 200, 200, 300]
    assert first.sha256 == second.sha256
    np.testing.assert_array_equal(first.selection.image, second.selection.image)
    keys = [image.tobytes() for part in parts for image in part.image]
    assert len(keys) - len(set(keys)) <= 5  # digits holds a few identical images


@pytest.mark.data
def test_real_cifar10_is_split_45_25_25():
    data = datasets.load("cifar10")
    assert (len(data.train), len(data.selection), len(data.calibration), len(data.test)) == (45_000, 2_500, 2_500, 10_000)
    assert np.bincount(data.test.label).tolist() == [1000] * 10
    buffer = io.BytesIO()
    Image.fromarray(data.test.image[0]).save(buffer, "PNG")
    assert data.names[data.test.label[0]] == "cat"


# a folder of one's own, and extra images --------------------------------------------------------------------------------


def pictures(folder, names, n, size=(12, 16), suffix=".png", mode="RGB"):
    rng = np.random.default_rng(len(names))
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            shape = (*size, 3) if mode == "RGB" else size
            Image.fromarray(((rng.integers(0, 100, shape) + 40 * index) % 256).astype(np.uint8), mode).save(folder / name / f"{i}{suffix}")


def test_a_folder_of_class_folders_is_a_data_set(tmp_path):
    pictures(tmp_path / "own", ("ash", "birch", "cedar"), 100)
    data = datasets.load(str(tmp_path / "own"))
    assert (data.name, data.names) == ("own", ("ash", "birch", "cedar"))
    assert data.train.image.shape[1:] == (12, 16, 3)
    assert [len(part) for part in (data.train, data.selection, data.calibration, data.test)] == [200, 25, 25, 50]
    assert set(data.test.label.tolist()) == {0, 1, 2}
    again = datasets.load(str(tmp_path / "own"), Input(12, 16))
    assert again.sha256 == data.sha256
    assert datasets.load(str(tmp_path / "own"), Input(8, 8)).train.image.shape[1:] == (8, 8, 3)


def test_pictures_of_any_kind_are_squashed_as_the_server_squashes_them(tmp_path):
    pictures(tmp_path / "own" / "train", ("ash", "birch"), 110, size=(30, 20), suffix=".jpg", mode="L")
    pictures(tmp_path / "own" / "test", ("ash", "birch"), 10, size=(9, 50))
    data = datasets.load(str(tmp_path / "own"), Input(16, 16))
    assert (len(data.test), data.test.image.shape[1:]) == (20, (16, 16, 3))
    served = {decode(file.read_bytes(), Input(16, 16)).tobytes() for file in (tmp_path / "own" / "test").rglob("*.png")}
    assert {image.tobytes() for image in data.test.image} == served


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda root: pictures(root, ("ash",), 300), "two or more classes"),
        (lambda root: pictures(root, ("ash", "birch"), 29), "holds 58 images .* 60 are the least"),
        (
            lambda root: (pictures(root / "train", ("ash", "birch"), 24), pictures(root / "test", ("ash", "birch"), 20)),
            "48 images .* 50 in train/ are the least",
        ),
        (lambda root: (pictures(root, ("ash", "birch"), 130), pictures(root / "train", ("ash", "birch"), 2)), "no test"),
        (lambda root: (pictures(root, ("ash",), 250), pictures(root, ("birch",), 3)), r"fewer than 8 training images of birch \(3\)"),
        (lambda root: (pictures(root, ("ash",), 150), pictures(root, ("birch",), 150, size=(8, 8))), "they must be of one size"),
        (lambda root: (pictures(root, ("ash", "birch"), 130), (root / "ash" / "x.png").write_bytes(b"no")), "x.png"),
        (
            lambda root: (root / "ash").mkdir(parents=True) or (root / "birch").mkdir(),
            r"no images \(PNG, JPEG.*AVIF.*\) of ash, birch",
        ),
        (lambda root: (pictures(root, ("ash", "birch"), 40), (root / "oak").mkdir()), "of oak"),
        (
            lambda root: (pictures(root / "train", ("ash", "birch"), 40), pictures(root / "test", ("ash", "birch", "oak"), 4)),
            "test/ alone has oak: both must hold the same classes",
        ),
        (
            lambda root: (pictures(root / "train", ("ash", "birch", "oak"), 40), pictures(root / "test", ("ash", "birch"), 4)),
            "train/ alone has oak: both must hold the same classes",
        ),
        (
            lambda root: (pictures(root, ("ash", "birch"), 40), os.mkdir(os.fsencode(root) + b"/caf\xe9")),
            r"caf\\xe9: a class needs a name in UTF-8",
        ),
        (lambda root: pictures(root, ("1", "2"), 40), "the label of class 0, '1', is the number of class 1: .*; rename its folder"),
        (
            lambda root: pictures(root, tuple(map(str, range(11))), 40),
            "the label of class 2, '10', is the number of class 10: .* leading zeros: 00, 01 to 10",
        ),
    ],
)
def test_a_folder_that_cannot_be_trained_on_says_why(tmp_path, build, said):
    build(tmp_path / "own")
    with pytest.raises(DataError, match=said):
        datasets.load(str(tmp_path / "own"))


def test_what_is_a_picture_is_told_by_its_content_and_what_is_none_is_named(tmp_path, capsys):
    own = tmp_path / "own"
    pictures(own, ("ash", "birch"), 30)
    renamed = (("0.png", "0"), ("1.png", "1.txt"), ("2.png", "2.GIF"), ("3.png", "3.jfif"), ("4.png", "4.jpe"), ("5.png", "5.bmp"))
    for old, new in renamed:  # every one holds a PNG
        (own / "ash" / old).rename(own / "ash" / new)
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(own / "ash" / "x.jfif", "JPEG")
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(own / "ash" / "x.bmp", "PPM")
    (own / "birch" / "album.jpg" / "deeper").mkdir(parents=True)
    (own / "birch" / "6.png").rename(own / "birch" / "album.jpg" / "deeper" / "6.png")
    (own / "birch" / "album.jpg" / "7.png").symlink_to(own / "birch" / "7.png")
    (own / "birch" / "album.jpg" / "round").symlink_to(own / "birch")  # a circle
    (own / "birch" / "._8.png").write_bytes(b"\x00\x05\x16\x07" * 8)
    (own / "birch" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 8)
    (own / "labels.csv").write_text("no image", encoding="utf-8")
    with open(os.fsencode(own / "birch") + b"/caf\xe9.png", "wb") as odd:
        odd.write((own / "birch" / "9.png").read_bytes())
    data = datasets.load(str(own))
    counts = np.bincount(np.concatenate([part.label for part in (data.train, data.selection, data.calibration, data.test)]))
    assert counts.tolist() == [30 + 1, 30 + 2]  # the JPEG; the link and the odd name
    said = capsys.readouterr().err
    assert "left out 4 of 67 files: 1 PPM, which is not supported (x.bmp); 1 hidden (._8.png); 1 in no class folder (labels.csv)" in said
    assert "1 not an image (Thumbs.db)" in said
    said.encode("ascii")  # nothing here is printed that a terminal may lack


def test_what_is_hidden_or_no_file_is_named_and_not_read(tmp_path, capsys, monkeypatch):
    own = tmp_path / "own"
    pictures(own, ("ash", "birch"), 30)
    for hidden in (own / "ash" / ".ipynb_checkpoints" / "deeper", own / ".cache"):
        hidden.mkdir(parents=True)
        (hidden / "0-checkpoint.png").write_bytes((own / "ash" / "0.png").read_bytes())
    (own / ".DS_Store").write_bytes(b"x")
    (own / "ash" / "gone.png").symlink_to(tmp_path / "nowhere")
    (own / "ash" / "itself.png").symlink_to(own / "ash" / "itself.png")
    os.mkfifo(own / "birch" / "pipe.png")  # opening it would wait for ever
    monkeypatch.chdir(own / "birch")  # the whole path may be longer than a socket's may be
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.png")
    data = datasets.load(str(own))
    assert data.names == ("ash", "birch")
    assert sum(len(part) for part in (data.train, data.selection, data.calibration, data.test)) == 60
    said = capsys.readouterr().err
    assert "left out 7 of 67 files: 2 broken link (gone.png, itself.png); 3 hidden (.DS_Store, .cache, 0-checkpoint.png)" in said
    assert "2 neither file nor folder (pipe.png, socket.png)" in said


def test_images_that_the_network_cannot_take_are_refused_with_the_option_that_mends_it(tmp_path):
    pictures(tmp_path / "own", ("ash", "birch"), 130, size=(9, 9))
    stage = replace(DIGITS, dataset=str(tmp_path / "own"))
    with pytest.raises(DataError, match=r"own: 9 x 9 pixels.*multiple of 4") as error:
        refresh(stage, tmp_path / "run", init=None, clock=Clock(), suite=None, device=torch.device("cpu"))
    assert error.value.options == ("--set size=32",)
    assert not (tmp_path / "run" / "config.json").exists()  # a run whose data is refused has not begun


def test_all_damaged_pictures_are_named_at_once(tmp_path):
    own = tmp_path / "own"
    pictures(own / "train", ("ash", "birch"), 30)
    pictures(own / "test", ("ash", "birch"), 5)
    bad = [own / "train" / "ash" / "3.png", own / "train" / "birch" / "4.png", own / "test" / "ash" / "0.png"]
    bad[0].write_bytes(b"no image at all, whatever it is called")
    bad[1].write_bytes(bad[1].read_bytes()[:60])
    bad[2].write_bytes(b"")
    for contract in (None, Input(8, 8)):
        with pytest.raises(DataError, match="3 of 70 images cannot be read") as error:
            datasets.load(str(own), contract)
        for file in bad:
            assert str(file) in str(error.value)


def test_pictures_that_lie_on_their_side_have_the_size_that_they_are_shown_at(tmp_path):
    own = tmp_path / "own"
    pictures(own, ("ash", "birch"), 40, suffix=".jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.zeros((16, 12, 3), np.uint8)).save(own / "ash" / "turned.jpg", exif=turned)  # shown 12 high and 16 wide
    assert datasets.load(str(own)).train.image.shape[1:3] == (12, 16)
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(own / "ash" / "other.jpg", exif=turned)
    with pytest.raises(DataError, match="12 x 16"):
        datasets.load(str(own))


def test_a_class_spelt_in_two_normal_forms_is_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    pictures(tmp_path / "own" / "train", (decomposed, "birch"), 40)
    pictures(tmp_path / "own" / "test", (composed, "birch"), 5)
    data = datasets.load(str(tmp_path / "own"))
    assert data.names == (composed, "birch")
    assert np.bincount(data.test.label).tolist() == [5, 5]
    image = np.full((5, 12, 16, 3), 7, np.uint8)
    np.savez(tmp_path / "extra.npz", image=image, label=np.zeros(5, np.int64), names=np.asarray([decomposed, "birch"]))
    assert len(datasets.load_extra(str(tmp_path / "extra.npz"), data)) == 5
    pictures(tmp_path / "more", (decomposed, "birch"), 3)
    assert np.bincount(datasets.load_extra(str(tmp_path / "more"), data).label).tolist() == [3, 3]


def test_few_of_a_class_are_in_every_split_and_are_named(tmp_path, capsys):
    pictures(tmp_path / "own", ("ash",), 400)
    pictures(tmp_path / "own", ("birch",), 12)
    data = datasets.load(str(tmp_path / "own"))
    parts = [np.bincount(part.label, minlength=2).tolist() for part in (data.train, data.selection, data.calibration, data.test)]
    assert parts == [[268, 8], [33, 1], [33, 1], [66, 2]]
    said = capsys.readouterr().err
    assert "few images of birch (train 8, selection 1, calibration 1, test 2): figures of it are uncertain" in said
    assert "34 images calibrate the flag: p-values are multiples of 1/35" in said


def test_sixty_pictures_are_enough_to_train_and_to_flag(tmp_path):
    pictures(tmp_path / "own", ("ash", "birch", "cedar"), 20)
    data = datasets.load(str(tmp_path / "own"))
    assert [len(part) for part in (data.train, data.selection, data.calibration, data.test)] == [22, 8, 20, 10]
    keys = [image.tobytes() for part in (data.train, data.selection, data.calibration, data.test) for image in part.image]
    assert len(set(keys)) == 60
    assert 1 / (len(data.calibration) + 1) < 0.05  # a p-value below the usual alpha can be had
    assert filled(DIGITS, len(data.train), tells=False).batch_size == 8
    assert filled(DIGITS, 64, tells=False) == DIGITS


@given(st.lists(st.integers(8, 300), min_size=2, max_size=12), st.integers(8, 60))
def test_parts_are_in_proportion_whatever_the_classes(counts, size):
    assume(sum(counts) >= 3 * max(size, len(counts)))  # as _folder sees to
    label = np.repeat(np.arange(len(counts)), counts)
    first, second, rest = datasets.parts_of(label, [size, size])
    assert sorted(np.concatenate([first, second, rest]).tolist()) == list(range(len(label)))
    for part in (first, second):
        share = np.bincount(label[part], minlength=len(counts))
        assert len(part) == max(size, len(counts))
        assert share.min() >= 1
    exact = np.asarray(counts) * size / sum(counts)
    share = np.bincount(label[first], minlength=len(counts))
    assert (share - exact)[exact >= 1].max(initial=0) <= 1
    assert (exact - share).max() <= len(counts)  # what the rare classes were given


def test_cifar100_and_svhn_are_read_as_they_are_published(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rows = rng.integers(0, 256, (30, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({b"data": rows, b"fine_labels": list(range(30)), b"coarse_labels": [0] * 30}, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [f"n{i}".encode() for i in range(100)]}, protocol=2))
    names, train, _ = archives.cifar100(tmp_path)
    assert names[99] == "n99"
    np.testing.assert_array_equal(train.image[3, :, :, 1].ravel(), rows[3, 1024:2048])
    assert train.label.tolist() == list(range(30))

    digests = {}
    for name in archives.SVHN_FILES:
        image = rng.integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
        savemat(tmp_path / name, {"X": image, "y": np.arange(1, 13)[:, None] % 10 + 1})
        digests[name] = hashlib.md5((tmp_path / name).read_bytes()).hexdigest()
    with pytest.raises(DataError, match="not the official file"):
        archives.svhn(tmp_path)
    monkeypatch.setattr(archives, "SVHN_FILES", digests)
    _, train, test = archives.svhn(tmp_path)
    assert len(train) == len(test) == 12
    assert set(train.label.tolist()) == set(range(10))  # class 10 of the file is the digit 0
    np.testing.assert_array_equal(test.image[5], image[..., 5])


def test_extra_images_fill_their_share_of_every_batch(tmp_path):
    data = datasets.load("digits")
    np.savez(tmp_path / "extra.npz", image=np.full((50, 8, 8, 3), 77, np.uint8), label=np.full(50, 3))
    stage = replace(DIGITS, extra=str(tmp_path / "extra.npz"), extra_fraction=0.25, augment="none")
    stream = Stream(stage, data, torch.device("cpu"), Noise.seeded(0))
    for step in range(30):
        batch = stream.batch(step)
        extra = (batch.image * 255 == 77).flatten(1).all(dim=1)
        assert int(extra.sum()) == 16
        assert (batch.label[extra] == 3).all()
        assert not (batch.plain * 255 == 77).flatten(1).all(dim=1).any()
    for settings, said in (({"extra_fraction": 1.0}, "leaves none"), ({"extra": str(tmp_path / "absent.npz")}, "must be an .npz")):
        with pytest.raises(TrainingError, match=said):
            Stream(replace(stage, **settings), data, torch.device("cpu"), Noise.seeded(0))
    for arrays, said in (
        ({"image": np.zeros((5, 8, 8, 3), np.uint8)}, "pseudo_label"),
        ({"image": np.zeros((5, 8, 8, 3)), "label": np.zeros(5)}, "must be uint8"),
        ({"image": np.zeros((5, 8, 8, 3), np.uint8), "label": np.full(5, 10)}, "labels must be from 0 to 9"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(DataError, match=said):
            datasets.load_extra(str(tmp_path / "bad.npz"), data)


def test_one_epoch_visits_every_image_once():
    data = datasets.load("digits")
    stream = Stream(replace(DIGITS, augment="none", batch_size=50), data, torch.device("cpu"), Noise.seeded(0))
    seen = [image.numpy().tobytes() for step in range(stream.steps_per_epoch) for image in stream.batch(step).image]
    assert stream.steps_per_epoch == 21
    assert len(set(seen)) >= 1050 - 5


def test_augmentation_keeps_shape_range_and_what_it_promises():
    image = torch.arange(2 * 3 * 8 * 8, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(2, 3, 8, 8)
    out = crop(image, Noise.seeded(0), padding=2, flip=True)
    assert (out.shape, out.dtype) == (image.shape, torch.uint8)
    for one, source in zip(out, image, strict=True):
        assert set(one.unique().tolist()) <= set(source.unique().tolist())
    torch.testing.assert_close(crop(image, Noise.seeded(0), padding=0, flip=False), image)
    many = torch.rand(200, 3, 8, 12)
    holes = (cutout(many, Noise.seeded(0)) == 0).all(dim=1).flatten(1).float().mean(dim=1)
    assert 0 < holes.mean() < 16 / 96 + 0.02
    assert holes.max() <= 16 / 96 + 1e-6
    changed = recolour(many, Noise.seeded(0))
    assert (changed.mean(dim=(1, 2, 3)) - many.mean(dim=(1, 2, 3))).abs().max() > 0.05
    for kind in ("none", "crop", "strong"):
        x = augment(image, Noise.seeded(0), kind=kind, padding=1, flip=True)
        assert (x.shape, x.dtype) == (image.shape, torch.float32)
        assert 0 <= x.min() <= x.max() <= 1


def test_a_folder_is_decoded_by_the_contract_that_is_given_and_so_is_what_comes_later(tmp_path):
    contract = Input(8, 8, "shorter", "bicubic", crop=0.5)
    pictures(tmp_path / "own", ("ash", "birch"), 40, size=(24, 17))
    data = datasets.load(str(tmp_path / "own"), contract)
    assert (data.input, data.size) == (contract, (8, 8))
    by_contract = {decode(file.read_bytes(), contract).tobytes() for file in (tmp_path / "own").rglob("*.png")}
    parts = (data.train, data.selection, data.calibration, data.test, datasets.load_extra(str(tmp_path / "own"), data))
    assert {image.tobytes() for part in parts for image in part.image} == by_contract
    assert datasets.load("digits").input == Input(8, 8)
