"""Data: what is accepted as CIFAR-10, and the splits."""

import hashlib
import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from training import images
from training.errors import DataError


def small_cifar(root, monkeypatch, tamper=False):
    """A CIFAR-10 of 20 images a batch, in the canonical layout, with its own checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums = {}
    for name in images.CIFAR10_BATCHES:
        pixels = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        sums[name] = hashlib.md5(pixels.tobytes()).hexdigest()
        rows = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(20, 3072)
        if tamper:
            rows[0, 0] ^= 1
        (folder / name).write_bytes(pickle.dumps({b"data": rows, b"labels": rng.integers(0, 10, 20).tolist()}, protocol=2))
    monkeypatch.setattr(images, "CIFAR10_BATCHES", sums)
    monkeypatch.setenv("EBJDAT_DATA", str(root))
    return folder


def test_canonical_batches_are_read_and_checked(tmp_path, monkeypatch):
    small_cifar(tmp_path, monkeypatch)
    train, test = images._cifar10(tmp_path)
    assert train.image.shape == (100, 32, 32, 3)
    assert len(test) == 20


def test_changed_pixels_are_refused(tmp_path, monkeypatch):
    small_cifar(tmp_path, monkeypatch, tamper=True)
    with pytest.raises(DataError, match="not the official ones"):
        images.load("cifar10")


def test_atlases_and_class_folders_hold_the_same_images(tmp_path, monkeypatch):
    small_cifar(tmp_path / "a", monkeypatch)
    train, test = images._cifar10(tmp_path / "a")
    for split, part in (("train", train), ("test", test)):
        for i, (image, label) in enumerate(zip(part.image, part.label, strict=True)):
            home = tmp_path / "b" / "cifar10" / split / images.CIFAR10_NAMES[label]
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(home / f"{i:04}.png")
    again, _ = images._cifar10(tmp_path / "b")
    assert sorted(image.tobytes() for image in again.image) == sorted(image.tobytes() for image in train.image)
    label_of = {image.tobytes(): label for image, label in zip(train.image, train.label, strict=True)}
    assert all(label_of[image.tobytes()] == label for image, label in zip(again.image, again.label, strict=True))
    assert len(set(again.label[:20].tolist())) > 3
    sheet = train.image[:20].reshape(4, 5, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(128, 160, 3)
    Image.fromarray(sheet).save(tmp_path / "atlas.webp", lossless=True)
    np.testing.assert_array_equal(images.read_atlas(tmp_path / "atlas.webp", 32), train.image[:20])


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/should-not-exist",))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    file = tmp_path / "data_batch_1"
    file.write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(DataError, match="does not hold"):
        images._python_batch(file)


def test_a_damaged_batch_is_a_data_error(tmp_path):
    file = tmp_path / "data_batch_1"
    file.write_bytes(pickle.dumps({b"labels": []})[:-3])
    with pytest.raises(DataError, match="fetch the archive again"):
        images._python_batch(file)


def test_no_data_and_no_network_says_where_to_put_it(tmp_path, monkeypatch):
    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr(images.urllib.request, "urlretrieve", offline)
    monkeypatch.setenv("EBJDAT_DATA", str(tmp_path))
    with pytest.raises(DataError, match="EBJDAT_DATA"):
        images.load("cifar10")


def test_a_wrong_download_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"something else")
    monkeypatch.setenv("EBJDAT_DATA", str(tmp_path))
    with pytest.raises(DataError, match="sha256"):
        images.load("cifar10")


def test_unknown_data():
    with pytest.raises(DataError, match="known are"):
        images.load("imagenet")


def test_the_splits_are_disjoint_and_always_the_same():
    first, second = images.load("digits"), images.load("digits")
    parts = [first.train, first.selection, first.calibration, first.test]
    assert [len(p) for p in parts] == [1097, 200, 200, 300]
    assert first.sha256 == second.sha256
    np.testing.assert_array_equal(first.selection.image, second.selection.image)
    keys = [image.tobytes() for part in parts for image in part.image]
    assert len(keys) - len(set(keys)) <= 5  # digits holds a few identical pictures


@pytest.mark.data
def test_real_cifar10_is_split_45_25_25():
    data = images.load("cifar10")
    assert (len(data.train), len(data.selection), len(data.calibration), len(data.test)) == (45_000, 2_500, 2_500, 10_000)
    assert np.bincount(data.test.label).tolist() == [1000] * 10
    buffer = io.BytesIO()
    Image.fromarray(data.test.image[0]).save(buffer, "PNG")
    assert data.names[data.test.label[0]] == "cat"
