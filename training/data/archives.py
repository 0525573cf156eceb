"""Readers of published data sets, with their checksums: CIFAR-10, CIFAR-100, SVHN, digits."""

import hashlib
import io
import json
import logging
import pickle
import tarfile
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve.atomic import replacing
from ebjdat_serve.folders import ensure_folder
from ebjdat_serve.install import install
from training.data.image_folders import SPLIT_SEED, Split, read_atlas, read_folder
from training.errors import DataError

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = tuple("0123456789")
CIFAR10_BATCHES = {  # md5 of the uint8 pixels, height x width x channel, of the official batches
    "data_batch_1": "4e54456ff66eb84aa6dad699a3ccdde5",
    "data_batch_2": "48c284263cfe015b0a5fdaf4d1b48082",
    "data_batch_3": "e56488c2b23b0954326d27e32d6995cc",
    "data_batch_4": "b6c4ab5e98dfc7c2a7bea58ad2be17ff",
    "data_batch_5": "10cfacc324af1dfb4114bf11187cade7",
    "test_batch": "6d2714505047e13831cd876923568712",
}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
CIFAR100_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
SVHN_URL = "http://ufldl.stanford.edu/housenumbers"
SVHN_FILES = {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"}
log = logging.getLogger("training")

# CIFAR-10 ----------------------------------------------------------------------------------------------------------


def cifar10(root: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Return class names, train and test, from python batches, WebP atlases or folders of PNG, downloaded if none is there."""
    if (root / "cifar-10-batches-py").is_dir():
        batches = {name: _python_batch(root / "cifar-10-batches-py" / name) for name in CIFAR10_BATCHES}
    elif (root / "atlas" / "labels.json").is_file():
        batches = _atlases(root / "atlas")
    elif (root / "cifar10" / "train").is_dir():
        train, test = (read_folder(root / "cifar10" / part, CIFAR10_NAMES) for part in ("train", "test"))
        return CIFAR10_NAMES, train, test
    else:
        download(CIFAR10_URL, root / "cifar-10-python.tar.gz", "sha256", CIFAR10_SHA256)
        unpack(root / "cifar-10-python.tar.gz", root / "cifar-10-batches-py", tuple(CIFAR10_BATCHES))
        return cifar10(root)
    for name, expected in CIFAR10_BATCHES.items():
        if hashlib.md5(batches[name].image.tobytes()).hexdigest() != expected:
            raise DataError(f"{name}: its pixels differ from the official ones; remove {root / 'cifar-10-batches-py'} and fetch it again")
    parts = [batches[name] for name in CIFAR10_BATCHES if name != "test_batch"]
    train = Split(np.concatenate([p.image for p in parts]), np.concatenate([p.label for p in parts]))
    return CIFAR10_NAMES, train, batches["test_batch"]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles the contents of a CIFAR-10 batch, dicts of bytes, ints and one NumPy array, and nothing else."""

    ALLOWED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("_codecs", "encode"),
            *(
                (f"numpy.{core}.{module}", name)
                for core in ("core", "_core")
                for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"a CIFAR-10 batch does not hold {module}.{name}")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        batch: dict[bytes, Any] = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"{path} is not a CIFAR python batch ({error}); fetch the archive again") from error
    return batch


def _python_batch(path: Path, key: bytes = b"labels") -> Split:
    batch = _unpickle(path)
    if b"data" not in batch or key not in batch:
        raise DataError(f"{path} is not a CIFAR python batch: it holds no {key.decode()}; fetch the archive again")
    rows, labels = batch[b"data"], batch[key]
    image = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Split(image, np.asarray(labels, dtype=np.int64))


def _atlases(folder: Path) -> dict[str, Split]:
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    return {name: Split(read_atlas(folder / f"{name}.webp", 32), np.asarray(labels[name], dtype=np.int64)) for name in CIFAR10_BATCHES}


def download(url: str, archive: Path, digest: str, expected: str) -> None:
    """Download ``url`` to ``archive`` unless it exists, and check its digest; raise DataError naming the file to put there."""
    ensure_folder(archive.parent, "EBJDAT_DATA")
    if not archive.is_file():
        log.warning("%s is not under %s: downloading %s", archive.name, archive.parent, url)
        try:
            with replacing(archive) as partial:
                urllib.request.urlretrieve(url, partial)
        except OSError as error:
            raise DataError(
                f"{archive.name} is not under {archive.parent} and cannot be downloaded ({error}). Put {url} there, or set EBJDAT_DATA "
                "to a folder that holds it"
            ) from error
    with archive.open("rb") as file:
        if hashlib.file_digest(file, digest).hexdigest() != expected:
            raise DataError(f"{archive} is not the official file ({digest} differs): remove it and try again")


def unpack(archive: Path, folder: Path, members: Sequence[str]) -> None:
    """Extract only the named members of ``archive`` into ``folder``."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as parent, tarfile.open(archive) as tar:
        temporary = Path(parent) / folder.name
        temporary.mkdir()
        for name in members:
            member = tar.extractfile(f"{folder.name}/{name}")
            if member is None:
                raise DataError(f"{archive} holds no {name}")
            (temporary / name).write_bytes(member.read())
        temporary.rename(folder)


# CIFAR-100 and SVHN -------------------------------------------------------------------------------------------------


def cifar100(root: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Return the 100 fine class names, train and test, from ``cifar-100-python/``, downloaded if it is missing."""
    folder = root / "cifar-100-python"
    if not folder.is_dir():
        download(CIFAR100_URL, root / "cifar-100-python.tar.gz", "md5", CIFAR100_MD5)
        unpack(root / "cifar-100-python.tar.gz", folder, ("train", "test", "meta"))
    names = tuple(name.decode() for name in _unpickle(folder / "meta")[b"fine_label_names"])
    return names, _python_batch(folder / "train", b"fine_labels"), _python_batch(folder / "test", b"fine_labels")


def svhn(root: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Return class names, train and test, from ``train_32x32.mat`` and ``test_32x32.mat``, downloaded if they are missing."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"SVHN comes in MATLAB files, which need SciPy: {install('train')}") from error

    parts = []
    for name, expected in SVHN_FILES.items():
        download(f"{SVHN_URL}/{name}", root / name, "md5", expected)
        arrays = loadmat(root / name)
        image = np.ascontiguousarray(arrays["X"].transpose(3, 0, 1, 2))
        parts.append(Split(image, arrays["y"].ravel().astype(np.int64) % 10))  # in the file the digit 0 is class 10
    return DIGITS, parts[0], parts[1]


# digits ------------------------------------------------------------------------------------------------------------


def digits(_: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Return class names, train (1,497) and test (300) of scikit-learn's digits, 8 x 8, grey as RGB, in a fixed shuffled order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"digits need scikit-learn: {install('train')}") from error

    arrays = load_digits()
    grey = np.rint(arrays.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(grey))
    image = np.repeat(grey[..., None], 3, axis=3)
    examples = Split(np.ascontiguousarray(image[order]), arrays.target.astype(np.int64)[order])
    return DIGITS, examples.take(slice(0, 1497)), examples.take(slice(1497, None))
