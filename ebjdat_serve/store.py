"""A store of bundles: an immutable folder per version, and `current`, a link that is replaced atomically.

store/cifar10-2026.11.21-a3e1/     store/current -> cifar10-2026.11.21-a3e1     store/previous -> the one before
store/candidates/cifar10-2026.11.28-77f0/     held back by a refresh's gate, with the reason in candidate.json; never served
store/served.json     what its servers served: history.py
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebjdat_serve.atomic import replacing
from ebjdat_serve.bundle import CANDIDATE, MANIFEST, SIGNATURE, Bundle, read_bytes, read_json, write_json
from ebjdat_serve.errors import BundleError, cause, visible
from ebjdat_serve.history import REVISION, SERVED_FILE, read_history, write_history
from ebjdat_serve.locking import abandoned, exclusive_lock, hold
from ebjdat_serve.selftest import FUNCTIONS
from ebjdat_serve.verification import USUAL, Terms, verified

CURRENT, PREVIOUS = "current", "previous"
CANDIDATES = "candidates"
INCOMING, REMOVED, SCRATCH = ".incoming-", ".removed-", ".scratch-"
"""What the names of unfinished folders begin with: a copy, a deletion, and a folder that its process holds."""
EMPTY = Path()
"""The target of a store without a current version."""


def pointed_at(store: Path) -> Path:
    """Return the folder that ``store`` points at, or EMPTY."""
    return (store / CURRENT).resolve() if (store / CURRENT).is_symlink() else EMPTY


def publish(
    bundle: Bundle,
    store: Path,
    key: Path | None = None,
    *,
    force: bool = False,
    after: Path | None = None,
    terms: Terms = USUAL,
    allow_older: bool = False,
) -> Path:
    """Copy a bundle into ``store``, signed with ``key`` if there is one, and point ``current`` at it.

    Readers see either the old bundle or the new one. Raises, with ``current`` unchanged, what ``verified`` does by ``terms``; and
    BundleError for an existing version with other content, a candidate without ``force``, a precision beyond its limits, a full disk, and
    when ``current`` is no longer ``after``, the folder that the bundle was made from or compared with.

    In a store that is served under --trust a trusted key must have signed the bundle, and without ``allow_older`` it may not be older than
    what was served last. Trusted are the keys of ``terms``; without any, those that the store's servers trusted last.
    """
    bundle = verified(bundle.path, replace(terms, trust=()), FUNCTIONS).bundle
    for calibration in bundle.calibrations():
        bundle.check_precision(calibration.precision)
    with _locked(store, create=True):
        now = pointed_at(store)
        if after is not None and now != after:
            change = f"{now.name or 'nothing'} now, no longer at {after.name or 'nothing'}"
            raise BundleError(f"{store} points at {change}: nothing was published, repeat it with the current version")
        home = store / f"{bundle.manifest.name}-{bundle.manifest.version}"
        candidate = store / CANDIDATES / home.name
        if (reason := reason_held_back(candidate) or reason_held_back(bundle.path)) and not force:
            raise BundleError(f"{home.name} is a candidate of {store}, held back: {reason}", options=("--force",))
        there = home.exists()
        if there and Bundle.draft(home).manifest != bundle.manifest:
            raise BundleError(f"{home} exists with other content: a version is published once")
        same = not there or Bundle.load(home).key == bundle.key
        content = read_bytes((home if there else bundle.path) / MANIFEST)
        signature = _signature(content, key, [bundle.path, home] if same else [home])
        trust = terms.trust or read_history(store).trust
        if trust:
            _check_signed(bundle, content, signature, trust, store)
            _check_age(store, bundle, allow_older=allow_older)
        if there:
            _write_signature(home, signature)
        else:
            _copy(bundle, home, signature=signature)
        _point(store, home.name)
        if trust:
            write_history(store, read_history(store).with_trusted(bundle, trust, newest=True))
        _discard(candidate)
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
            _discard(home)
            _copy(bundle, home, {CANDIDATE: {"reason": reason, "comparison": comparison}}, signature=_signature(b"", None, [bundle.path]))
    return home


def rollback(store: Path, version: str = "", *, terms: Terms = USUAL, allow_older: bool = False) -> Path:
    """Point ``current`` at the previous version, or at ``version`` (a folder name, or the part after the bundle's name); return its folder.

    Raises BundleError when the version is missing, what ``verified`` does by ``terms``, and as ``publish`` does in a store that is served
    under --trust.
    """
    home = _find(store, version)
    trust = terms.trust or read_history(store).trust
    bundle = verified(home, replace(terms, trust=trust), FUNCTIONS).bundle
    with _locked(store):
        if trust:
            _check_age(store, bundle, allow_older=allow_older)
        _point(store, home.name)
        if trust:
            write_history(store, read_history(store).with_trusted(bundle, trust, newest=True))
    return home


def sign(path: Path, key: Path, terms: Terms = USUAL) -> Path:
    """Sign the bundle at ``path``, a bundle or a store, with the private key in ``key``; return the signature's file.

    Raises what ``verified`` does by ``terms``, EbjdatError for a key that is none, and BundleError for one that neither ``terms`` nor the
    servers of the bundle's store trust.
    """
    from ebjdat_serve import signing

    bundle = verified(path, replace(terms, trust=()), FUNCTIONS).bundle
    store = store_of(bundle.path)
    private, trust = signing.private_key(key), terms.trust or (read_history(store).trust if store else ())
    if trust and private.public_key().public_bytes_raw() not in trust:
        raise BundleError(f"{key} belongs to no public key that serve --trust names")
    return signing.write_signature(bundle.path, private.sign(read_bytes(bundle.path / MANIFEST)))


def remember(store: Path, bundle: Bundle, trust: tuple[bytes, ...]) -> None:
    """Record in ``store`` that a server serves ``bundle``, under ``trust``, unless ``current`` has moved on meanwhile.

    Raises BundleError when it cannot be recorded, Held when a publisher holds the store.
    """
    with _locked(store, wait=False):
        if pointed_at(store) != bundle.path:
            return
        before = read_history(store)
        done = replace(before, last=bundle.path.name)
        if trust:
            done = done.with_trusted(bundle, trust, newest=False)
        if done != before:
            write_history(store, done)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Yield a temporary folder in ``parent``, a store or any folder; in a store, one that a killed process leaves is swept later."""
    with _locked(parent) if (parent / CURRENT).is_symlink() else nullcontext():
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
        holding = hold(folder)
    try:
        yield folder
    finally:
        if holding is not None:
            os.close(holding)
        shutil.rmtree(folder, ignore_errors=True)


def _find(store: Path, version: str) -> Path:
    """Return the folder of a version by its whole name or the part after the bundle's name; without one, the previous version's."""
    if not store.is_dir():
        raise BundleError(f"{store} cannot be changed: it is no folder")
    name = version or (os.readlink(store / PREVIOUS) if (store / PREVIOUS).is_symlink() else "")
    found = [folder for folder in versions(store) if folder.name == name or (version and folder.name.endswith(f"-{version}"))]
    if len(found) == 1:
        return found[0]
    there = ", ".join(folder.name for folder in found or versions(store)) or "none"
    if found:
        raise BundleError(f"{store} has several versions {version}: {there}; give the whole name")
    raise BundleError(f"{store} has no {'version ' + version if version else 'previous version'}; there are: {there}")


def _check_signed(bundle: Bundle, content: bytes, signature: bytes, trust: tuple[bytes, ...], store: Path) -> None:
    """Raise BundleError unless a key that servers of ``store`` trust made ``signature``."""
    from ebjdat_serve.signing import check_signed

    if not signature:
        raise BundleError(
            f"{bundle.path} is not signed, and servers of {store} trust only signed bundles: ebjdat-serve publish BUNDLE STORE --key KEY; "
            f"if none has --trust any more, remove {store / SERVED_FILE}"
        )
    check_signed(content, signature, trust, bundle.path / SIGNATURE)


def _check_age(store: Path, bundle: Bundle, *, allow_older: bool) -> None:
    if (reason := read_history(store).superseded(bundle)) and not allow_older:
        raise BundleError(f"{reason}; servers of {store} would refuse it", options=("--allow-older",))


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
    return visible(str(read_json(folder / CANDIDATE)["reason"])) if (folder / CANDIDATE).is_file() else ""


def listing(store: Path) -> str:
    """Return a line per version, `current` and `previous` marked, and per candidate, with its reason; raise BundleError for no store."""
    if not (store / CURRENT).is_symlink() and not candidates(store):
        raise BundleError(f"{store} is no store: it has neither {CURRENT} nor {CANDIDATES}")
    marks = {os.readlink(store / mark): mark for mark in (PREVIOUS, CURRENT) if (store / mark).is_symlink()}
    lines = [f"{marks.get(folder.name, ''):10}{folder.name}" for folder in versions(store)]
    lines += [f"candidate {folder.name}: {reason_held_back(folder)}" for folder in candidates(store)]
    return "\n".join(map(visible, lines))


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


def _copy(bundle: Bundle, home: Path, extra: dict[str, Any] | None = None, *, signature: bytes = b"") -> None:
    temporary = Path(tempfile.mkdtemp(prefix=INCOMING, dir=home.parent))
    try:
        for name in (MANIFEST, *bundle.manifest.files):
            shutil.copyfile(bundle.path / name, temporary / name)
            with (temporary / name).open("rb") as copy:
                os.fsync(copy.fileno())
            (temporary / name).chmod(0o444)  # a server maps it: a write would change or crash the served model
        for name, content in (extra or {}).items():
            write_json(temporary / name, content)
        _write_signature(temporary, signature)
        temporary.chmod(0o755)
        if Bundle.load(temporary).key != bundle.key:
            raise BundleError(f"{bundle.path} was changed while it was copied: publish it again")
        temporary.rename(home)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _signature(content: bytes, key: Path | None, folders: Sequence[Path]) -> bytes:
    """Return the signature of a manifest: by ``key``, else the first there is in ``folders``, else b""."""
    if key:
        from ebjdat_serve.signing import private_key

        return private_key(key).sign(content)
    return next((read_bytes(folder / SIGNATURE) for folder in folders if (folder / SIGNATURE).is_file()), b"")


def _write_signature(home: Path, signature: bytes) -> None:
    if signature:
        with replacing(home / SIGNATURE) as temporary:
            temporary.write_bytes(signature)


def _discard(folder: Path) -> None:
    """Delete a folder if it is there; one that is half deleted when the process is killed is swept later."""
    if folder.is_dir():
        removed = folder.rename(folder.with_name(f"{REMOVED}{folder.name}"))
        shutil.rmtree(removed)


def _sweep(store: Path) -> None:
    """Delete what killed processes left; the caller holds the store's lock."""
    for folder in (store, store / CANDIDATES):
        for left in [*folder.glob(f"{INCOMING}*"), *folder.glob(f"{REMOVED}*")]:
            shutil.rmtree(left)
        for left in folder.glob(f"{SCRATCH}*"):
            if abandoned(left):
                shutil.rmtree(left)


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
def _locked(store: Path, *, create: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the store's lock, so that publishers take turns; raise BundleError when writing fails, Held without ``wait``."""
    try:
        if create:
            store.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(store / ".lock", wait=wait):
            _sweep(store)
            yield
    except OSError as error:
        raise BundleError(f"{store} cannot be changed: {cause(error)}; its current version is unchanged") from error
