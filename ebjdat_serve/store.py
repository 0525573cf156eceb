"""A store of bundles: an immutable folder per version, and `current`, a link that is replaced atomically.

store/cifar10-2026.11.21-a3e1/     store/current -> cifar10-2026.11.21-a3e1     store/previous -> the one before
store/candidates/cifar10-2026.11.28-77f0/     held back by a refresh's gate, with the reason in candidate.json; never served
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ebjdat_serve.atomic import replacing
from ebjdat_serve.bundle import MANIFEST, SIGNATURE, Bundle, read_json, write_json
from ebjdat_serve.errors import BundleError
from ebjdat_serve.locking import exclusive_lock

CURRENT, PREVIOUS = "current", "previous"
CANDIDATES = "candidates"
CANDIDATE = "candidate.json"  # in the folder of a held-back bundle, not in its manifest: {"reason", "comparison"}
REVISION = re.compile(r"(.*)\.r(\d+)")


EMPTY = Path()
"""The target of a store without a current version."""


def pointed_at(store: Path) -> Path:
    """Return the folder that ``store`` points at, or EMPTY."""
    return (store / CURRENT).resolve() if (store / CURRENT).is_symlink() else EMPTY


def publish(bundle: Bundle, store: Path, key: Path | None = None, *, force: bool = False, after: Path | None = None) -> Path:
    """Copy a verified bundle into ``store``, signed with ``key`` if there is one, and point ``current`` at it.

    Readers see either the old bundle or the new one. Raises BundleError, with ``current`` unchanged, for a damaged bundle, an existing
    version with other content, a candidate without ``force``, a precision beyond its limits, and a full disk; and when ``current`` is no
    longer ``after``, the folder that the bundle was made from or compared with.
    """
    bundle = Bundle.load(bundle.path)
    for calibration in bundle.calibrations():
        bundle.check_precision(calibration.precision)
    with _locked(store, create=True):
        now = pointed_at(store)
        if after is not None and now != after:
            change = f"{now.name or 'nothing'} now, no longer at {after.name or 'nothing'}"
            raise BundleError(f"{store} points at {change}: nothing was published, repeat it with the current version")
        home = store / f"{bundle.manifest.name}-{bundle.manifest.version}"
        candidate = store / CANDIDATES / home.name
        if (reason := reason_held_back(candidate)) and not force:
            raise BundleError(f"{home.name} is a candidate of {store}, held back: {reason}", options=("--force",))
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
        shutil.rmtree(candidate, ignore_errors=True)
    return home


def withhold(bundle: Bundle, store: Path, reason: str, comparison: list[dict[str, Any]]) -> Path:
    """Copy a verified bundle to the candidates of ``store``, with the reason and its figures; ``current`` stays unchanged.

    Raises BundleError for a damaged bundle and a full disk.
    """
    bundle = Bundle.load(bundle.path)
    with _locked(store, create=True):
        home = store / CANDIDATES / f"{bundle.manifest.name}-{bundle.manifest.version}"
        home.parent.mkdir(exist_ok=True)
        if home.resolve() != bundle.path.resolve():
            shutil.rmtree(home, ignore_errors=True)
            _copy(bundle, home, {CANDIDATE: {"reason": reason, "comparison": comparison}})
    return home


def rollback(store: Path, version: str = "") -> Path:
    """Point ``current`` at the previous version, or at ``version`` (a folder name, or the part after the bundle's name); return its folder.

    Raises BundleError when the version is missing or damaged.
    """
    with _locked(store):
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


def candidates(store: Path) -> list[Path]:
    """Return the folders of bundles that a refresh held back, by name."""
    return sorted(file.parent for file in store.glob(f"{CANDIDATES}/*/{CANDIDATE}") if not file.parent.name.startswith("."))


def reason_held_back(folder: Path) -> str:
    """Return why the bundle in ``folder`` was held back, or an empty string when it is not a candidate."""
    return str(read_json(folder / CANDIDATE)["reason"]) if (folder / CANDIDATE).is_file() else ""


def listing(store: Path) -> str:
    """Return a line per version, `current` and `previous` marked, and per candidate, with its reason; raise BundleError for no store."""
    if not (store / CURRENT).is_symlink() and not candidates(store):
        raise BundleError(f"{store} is no store: it has neither {CURRENT} nor {CANDIDATES}")
    marks = {os.readlink(store / mark): mark for mark in (PREVIOUS, CURRENT) if (store / mark).is_symlink()}
    lines = [f"{marks.get(folder.name, ''):10}{folder.name}" for folder in versions(store)]
    return "\n".join(lines + [f"candidate {folder.name}: {reason_held_back(folder)}" for folder in candidates(store)])


def store_of(folder: Path) -> Path | None:
    """Return the store that contains the version in ``folder``, or None."""
    return folder.parent if (folder.parent / CURRENT).is_symlink() and folder in versions(folder.parent) else None


def next_revision(bundle: Bundle, store: Path | None = None) -> str:
    """Return the bundle's version with the next revision number, ``.rN``, that ``store`` does not have yet."""
    name, version = bundle.manifest.name, bundle.manifest.version
    base, number = found.groups() if (found := REVISION.fullmatch(version)) else (version, "0")
    taken = {folder.name for folder in (*versions(store), *candidates(store))} if store else set()
    revision = int(number) + 1
    while f"{name}-{base}.r{revision}" in taken:
        revision += 1
    return f"{base}.r{revision}"


def _copy(bundle: Bundle, home: Path, extra: dict[str, Any] | None = None) -> None:
    for left in home.parent.glob(".incoming-*"):
        shutil.rmtree(left)  # of a publisher that was killed: the lock is ours
    temporary = Path(tempfile.mkdtemp(prefix=".incoming-", dir=home.parent))
    try:
        for name in (MANIFEST, *bundle.manifest.files):
            shutil.copyfile(bundle.path / name, temporary / name)
            with (temporary / name).open("rb") as copy:
                os.fsync(copy.fileno())
            (temporary / name).chmod(0o444)  # a server maps it: a write would change or crash the served model
        for name, content in (extra or {}).items():
            write_json(temporary / name, content)
        _copy_signature(bundle.path, temporary)
        temporary.chmod(0o755)
        Bundle.load(temporary)  # verify the copy
        temporary.rename(home)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_signature(source: Path, target: Path) -> None:
    if (source / SIGNATURE).is_file() and source.resolve() != target.resolve():
        with replacing(target / SIGNATURE) as temporary:
            shutil.copyfile(source / SIGNATURE, temporary)


def _point(store: Path, name: str) -> None:
    before = os.readlink(store / CURRENT) if (store / CURRENT).is_symlink() else ""
    if before == name:
        return
    if before:
        with replacing(store / PREVIOUS) as link:
            link.symlink_to(before)
    with replacing(store / CURRENT) as link:
        link.symlink_to(name)


@contextmanager
def _locked(store: Path, *, create: bool = False) -> Iterator[None]:
    """Hold the store's lock, so that publishers take turns; raise BundleError when writing fails."""
    try:
        if create:
            store.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(store / ".lock"):
            yield
    except OSError as error:
        raise BundleError(f"{store} cannot be changed: {error.strerror or error}; its current version is unchanged") from error
