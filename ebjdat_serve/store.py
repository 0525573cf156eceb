"""A store of bundles: a folder for each version, never changed, and `current`, a link that is moved in one step.

store/cifar10-2026.11.21-a3e1/     store/current -> cifar10-2026.11.21-a3e1     store/previous -> the one before
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ebjdat_serve.bundle import MANIFEST, SIGNATURE, Bundle
from ebjdat_serve.errors import BundleError
from ebjdat_serve.locking import alone

CURRENT, PREVIOUS = "current", "previous"


def publish(bundle: Bundle, store: Path, key: Path | None = None) -> Path:
    """Copy a verified bundle into ``store``, signed with ``key`` if there is one, and point ``current`` at it.

    A reader sees the old one or the new one, whole. Raises BundleError for a damaged bundle, a version that is there with other content,
    a precision beyond its limits, and a full disk; ``current`` is then what it was.
    """
    bundle = Bundle.load(bundle.path)
    for calibration in bundle.calibrations():
        bundle.check_precision(calibration.precision)
    with _alone(store, create=True):
        home = store / f"{bundle.manifest.name}-{bundle.manifest.version}"
        if home.exists():
            if Bundle.draft(home).manifest != bundle.manifest:
                raise BundleError(f"{home} exists with other content: a version is published once")
            if Bundle.load(home).key == bundle.key:
                _copy_signature(bundle.path, home)
        else:
            _copy(bundle, home)
        if key:
            from ebjdat_serve.signing import sign

            sign(home, key)
        _point(store, home.name)
    return home


def rollback(store: Path, version: str = "") -> Path:
    """Point ``current`` at the version before, or at ``version`` (its folder's name, or what follows the name in it); return its folder.

    Raises BundleError when there is none, or it is damaged.
    """
    with _alone(store):
        name = version or (os.readlink(store / PREVIOUS) if (store / PREVIOUS).is_symlink() else "")
        found = [folder for folder in versions(store) if folder.name == name or (version and folder.name.endswith(f"-{version}"))]
        if len(found) != 1:
            there = ", ".join(folder.name for folder in found or versions(store)) or "none"
            if found:
                raise BundleError(f"{store} has several versions {version}: {there}; give the whole name")
            raise BundleError(f"{store} has no {'version ' + version if version else 'previous version'}; there are: {there}")
        Bundle.load(found[0])
        _point(store, found[0].name)
    return found[0]


def versions(store: Path) -> list[Path]:
    """Return the folders of all versions, by name."""
    return sorted(
        file.parent for file in store.glob(f"*/{MANIFEST}") if not file.parent.is_symlink() and not file.parent.name.startswith(".")
    )


def _copy(bundle: Bundle, home: Path) -> None:
    for left in home.parent.glob(".incoming-*"):
        shutil.rmtree(left)  # of a publisher that was killed: the lock is ours
    aside = Path(tempfile.mkdtemp(prefix=".incoming-", dir=home.parent))
    try:
        for name in (MANIFEST, *bundle.manifest.files):
            shutil.copyfile(bundle.path / name, aside / name)
            with (aside / name).open("rb") as copy:
                os.fsync(copy.fileno())
            (aside / name).chmod(0o444)  # a server has it mapped: who writes into it changes or kills what is served
        _copy_signature(bundle.path, aside)
        aside.chmod(0o755)
        Bundle.load(aside)  # what was copied is what was verified
        aside.rename(home)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy_signature(source: Path, target: Path) -> None:
    if (source / SIGNATURE).is_file() and source.resolve() != target.resolve():
        aside = target / f".{SIGNATURE}.part"
        shutil.copyfile(source / SIGNATURE, aside)
        os.replace(aside, target / SIGNATURE)


def _point(store: Path, name: str) -> None:
    before = os.readlink(store / CURRENT) if (store / CURRENT).is_symlink() else ""
    if before == name:
        return
    if before:
        _link(store / PREVIOUS, before)
    _link(store / CURRENT, name)


def _link(link: Path, target: str) -> None:
    aside = link.with_name(f".{link.name}-new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)


@contextmanager
def _alone(store: Path, *, create: bool = False) -> Iterator[None]:
    """Hold the store's lock, so that two publishers take turns; what the disk refuses is a BundleError."""
    try:
        if create:
            store.mkdir(parents=True, exist_ok=True)
        with alone(store / ".lock"):
            yield
    except OSError as error:
        raise BundleError(f"{store} cannot be changed: {error.strerror or error}; what it pointed at, it points at still") from error
