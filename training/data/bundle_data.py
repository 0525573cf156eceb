"""The data set that a bundle was trained on, or that an imported one is measured on."""

from collections.abc import Mapping
from pathlib import Path

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.errors import BundleError
from training.data.datasets import Dataset, load
from training.data.labelled_folder import labelled_folder
from training.errors import DataError


def check_data(bundle: Bundle, data: Dataset) -> None:
    """Raise BundleError unless ``data`` has the splits that the bundle was trained on: others would overlap with its training images.

    Of an imported bundle nobody knows them: its data has no images to train on.
    """
    bundle.check_files()
    if bundle.manifest.imported and not len(data.train):
        return
    if data.sha256 != bundle.manifest.provenance.data_sha256:
        raise BundleError(
            f"{data.name} here (sha256 {data.sha256[:12]}) is not the data, or not the order, that {bundle.path} was trained on "
            f"({bundle.manifest.provenance.data_sha256[:12]}): its calibration split would hold training images"
        )


def dataset_of(bundle: Bundle, moved: str | None = None, folders: Mapping[str, str] | None = None) -> Dataset:
    """Return the data set that the bundle names, a folder's images by the bundle's input contract; ``moved``: the folder's new path.

    Of an imported bundle ``moved`` is a folder of labelled images to measure it on, and ``folders`` labels by names of its sub-folders.
    """
    manifest = bundle.manifest
    if manifest.imported:
        if not moved:
            raise DataError(f"{bundle.path} is imported, its data is not known: name a folder of labelled images", options=("--data DIR",))
        return labelled_folder(Path(moved).expanduser(), manifest, folders)
    source = moved or manifest.provenance.configuration.get("dataset", manifest.provenance.dataset)
    return load(source, manifest.input)
