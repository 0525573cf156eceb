"""The data set that a bundle was trained on."""

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.errors import BundleError
from training.data.datasets import Dataset, load


def check_data(bundle: Bundle, data: Dataset) -> None:
    """Raise BundleError unless ``data`` has the splits that the bundle was trained on: others would overlap with its training images."""
    bundle.check_files()
    if data.sha256 != bundle.manifest.provenance.data_sha256:
        raise BundleError(
            f"{data.name} here (sha256 {data.sha256[:12]}) is not the data, or not the order, that {bundle.path} was trained on "
            f"({bundle.manifest.provenance.data_sha256[:12]}): its calibration split would hold training images"
        )


def dataset_of(bundle: Bundle, moved: str | None = None) -> Dataset:
    """Return the data set that the bundle names, a folder's images by the bundle's input contract; ``moved``: the folder's new path."""
    manifest = bundle.manifest
    source = moved or manifest.provenance.configuration.get("dataset", manifest.provenance.dataset)
    return load(source, manifest.input)
