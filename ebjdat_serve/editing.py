"""Write permission for bundles: drafts are writable; tracked, installed, published and served bundles need --force."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection
from contextlib import ExitStack
from errno import EACCES
from pathlib import Path

from safetensors import SafetensorError

from ebjdat_serve.atomic import replacing, undone
from ebjdat_serve.bundle import MANIFEST, SIGNATURE, Bundle
from ebjdat_serve.card import retitled
from ebjdat_serve.errors import BundleError, EbjdatError, first_line
from ebjdat_serve.locking import changing, is_held
from ebjdat_serve.store import next_revision, publish, reason_held_back, scratch, store_of

FORCED = "also one that is tracked by git, installed or being served; in a store it becomes a new version"
"""The help of --force of commands that change a bundle."""
HELD = "weights.safetensors"
"""The file of a bundle that is locked while it changes: every bundle has it, and no change writes it."""
PACKAGE = Path(__file__).resolve().parent


def edit(path: Path, change: Callable[[Bundle], Bundle], *, force: bool = False, renews: Collection[str] = ()) -> Bundle:
    """Return the bundle at ``path``, a bundle or a store, after ``change``.

    ``change`` writes into a copy: what stops it half way leaves the bundle whole. In a store, whose versions never change, the copy is
    published as the next revision; elsewhere its files take the place of the bundle's. ``renews``: files that ``change`` writes anew
    whatever they hold, so that they may be damaged. Raises BundleError as ``check_editable`` does, while another process changes it, when
    the store points at another version by then, and when writing fails.
    """
    bundle = check_editable(path, force=force)
    store = store_of(bundle.path)
    try:
        if store is None:
            if not os.access(bundle.path, os.W_OK):
                raise PermissionError(EACCES, os.strerror(EACCES))  # told before hours of work
            with changing(bundle.path / HELD), tempfile.TemporaryDirectory(prefix="ebjdat-serve-") as folder:
                try:
                    done = changed_copy(change, bundle.path, Path(folder), renews)
                except OSError as error:
                    place = f"the copy of {bundle.path} in {tempfile.gettempdir()}"
                    raise BundleError(f"{place} cannot be written: {error.strerror or error}; set TMPDIR to a folder with room") from error
                return put_files(done, bundle.path)
        with scratch(store) as folder:
            done = changed_copy(change, bundle.path, folder, renews)
            if done.manifest == bundle.manifest:
                return bundle
            return Bundle.draft(publish(retitled(done, next_revision(bundle, store)), store, after=bundle.path.resolve()))
    except OSError as error:
        raise BundleError(f"{bundle.path} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:  # its words for an error of the system
        raise BundleError(f"{bundle.path} cannot be written: {first_line(error)}") from error


def check_editable(path: Path, *, force: bool = False) -> Bundle:
    """Return the bundle at ``path``; raise BundleError without ``force`` if it is tracked, installed, published or being served.

    A candidate, an earlier version of a store and a signed bundle are refused either way.
    """
    bundle = Bundle.draft(path)
    home, store = bundle.path, store_of(bundle.path)
    if reason_held_back(home):
        raise BundleError(f"{home} is a candidate, which is published or deleted unchanged; change the bundle it was made from")
    if store and home != (store / "current").resolve():
        raise BundleError(f"{home} is a version of {store} and not the current one: versions never change; roll back to it, or copy it")
    if HELD not in bundle.manifest.files:
        raise BundleError(f"{home / MANIFEST} lists no {HELD}: restore the bundle")
    if (home / SIGNATURE).is_file():
        raise BundleError(f"{home} is signed: change a copy without {SIGNATURE}, sign it and publish it")
    reason = "" if force else guarded(home)
    if reason:
        raise BundleError(f"{home} {reason}: copy the folder and change the copy", options=("--force",))
    return bundle


def changed_copy(change: Callable[[Bundle], Bundle], home: Path, folder: Path, renews: Collection[str]) -> Bundle:
    """Return what ``change`` makes of a copy in ``folder`` of the bundle as it is by now.

    Raises BundleError for a damaged file, which a change would make the bundle's own; errors name the bundle, not the copy.
    """
    bundle = Bundle.draft(home)
    bundle.check_files(without=renews)
    missing = [name for name in renews if name in bundle.manifest.files and not (home / name).is_file()]
    copy = copied(bundle, folder / home.name, without=missing)
    try:
        return change(copy)
    except EbjdatError as error:
        error.args = (str(error).replace(str(copy.path), str(home)),)
        raise


def put_files(done: Bundle, home: Path) -> Bundle:
    """Give the bundle in ``home`` the files of ``done``, and return it; where one cannot be written, all are put back as they were.

    Only a process that is killed between two renames leaves files of both. Raises OSError, and BundleError for a folder in a file's place.
    """
    before = Bundle.draft(home).manifest.files
    changed = [name for name, entry in done.manifest.files.items() if before.get(name) != entry or not (home / name).is_file()]
    gone = before.keys() - done.manifest.files.keys()
    if folders := [home / name for name in (*changed, *gone) if (home / name).is_dir()]:
        raise BundleError(f"{folders[0]} is a folder in the place of a file: remove it")
    with ExitStack() as undo, ExitStack() as last_is_first:  # the manifest, which is entered first, takes its place last
        for name in (MANIFEST, *changed, *gone):
            undo.enter_context(undone(home / name))
        for name in gone:
            (home / name).unlink(missing_ok=True)
        for name in (MANIFEST, *changed):
            file = last_is_first.enter_context(replacing(home / name))
            shutil.copyfile(done.path / name, file)
            if (home / name).is_file():
                like(home / name, file)
    return Bundle.draft(home)


def like(old: Path, new: Path) -> None:
    """Give ``new`` the mode of ``old``, and its owner where this process may."""
    shutil.copymode(old, new)
    if os.geteuid() == 0:
        os.chown(new, old.stat().st_uid, old.stat().st_gid)


def guarded(folder: Path) -> str:
    """Return why changing the bundle in ``folder`` needs ``force``, or an empty string."""
    if store := store_of(folder):
        return f"is the current version of the store {store}, where a change becomes a new version"
    if tracked(folder / MANIFEST):
        return "is tracked by git"
    if folder.is_relative_to(PACKAGE):
        return "is part of the installed package"
    return "is being served" if is_held(folder) else ""


def tracked(file: Path) -> bool:
    """Return whether git tracks ``file``; without git, or outside a repository, it does not."""
    # a checkout owned by another user is read all the same
    command = ["git", "-c", "safe.directory=*", "-C", str(file.parent), "ls-files", "--error-unmatch", "--", file.name]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def copied(bundle: Bundle, folder: Path, *, without: Collection[str] = ()) -> Bundle:
    """Return a copy of the bundle in ``folder``, its files writable, unsigned; ``without`` some of its files."""
    folder.mkdir()
    for name in (MANIFEST, *bundle.manifest.files):
        if name not in without:
            shutil.copyfile(bundle.path / name, folder / name)
    return Bundle.draft(folder)


def put(done: Bundle, home: Path) -> Bundle:
    """Move ``done`` to its place, and return it: published if ``home`` is in a store, else in place of the old bundle."""
    if store := store_of(home):
        return Bundle.draft(publish(done, store, after=home.resolve()))
    old = done.path.with_name("old")
    home.rename(old)
    try:
        done.path.rename(home)
    except BaseException:
        old.rename(home)  # the folder around it is removed
        raise
    return Bundle.draft(home)
