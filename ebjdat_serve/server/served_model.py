"""A verified bundle, as the HTTP process needs it."""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ebjdat_serve.bundle import MANIFEST, SIGNATURE, Bundle, resolve
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.history import SERVED_FILE, read_history
from ebjdat_serve.listing import printable
from ebjdat_serve.manifest import OF_IMAGES, YES, Calibration, RecordedCalibration
from ebjdat_serve.rows import to_json
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.store import CURRENT, reason_held_back
from ebjdat_serve.verification import verified

log = logging.getLogger("ebjdat_serve")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAMED = "a model's name is of 1 to 64 letters, digits, '.', '_' and '-', and begins with a letter or digit"


@dataclass(frozen=True)
class ServedModel:
    """A verified bundle; ``key`` is the sha256 of what decides its answers, ``Bundle.served``."""

    key: str
    bundle: Bundle
    calibration: Calibration | None  # None: there are neither p-values nor a flag
    review_share: float | None  # the expected one, at most what was asked for; None without a calibration
    no_check: str  # why check=reach cannot be answered, "" where it can
    metrics: list[dict[str, Any]]
    recorded: RecordedCalibration | None = None  # what ``calibration`` is of, if of recorded scores
    calibrations: tuple[str, ...] = ()  # the names of those that are there
    scored_by: str = ""  # sha256 of what decides scores; "" without a calibration

    @property
    def calibration_name(self) -> str:
        """The name of the calibration that is served."""
        return self.recorded.name if self.recorded else OF_IMAGES

    @property
    def name(self) -> str:
        """NAME@VERSION, as answers name the model that made them."""
        return f"{self.bundle.manifest.name}@{self.bundle.manifest.version}"

    @property
    def labels(self) -> list[str]:
        """Labels by class index."""
        return self.bundle.manifest.labels

    def lacks(self, capability: str) -> str:
        """Return why the model has no energy, features, gradient or generation, "" where it has."""
        reason: str = getattr(self.bundle.manifest.capabilities, capability)
        return "" if reason == YES else reason


def store_at(path: Path) -> Path | None:
    """Return the store that a server of ``path`` follows, or began with: ``path``, or the folder of the link ``current``; else None."""
    if (path / MANIFEST).is_file():
        return path.parent if path.name == CURRENT and path.is_symlink() else None
    return path if (path / CURRENT).is_symlink() or (path / SERVED_FILE).is_file() else None


def named_models(settings: Settings) -> list[tuple[str, Path]]:
    """Return the name that each model of a server is given, "" where its bundle's is to be taken, and its bundle or store.

    Raises EbjdatError for a name that an address cannot hold.
    """
    found = []
    for text in map(str, (settings.model, *settings.more)):
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            found.append(("", Path(text)))
        elif not NAME.fullmatch(name):
            raise EbjdatError(f"{printable(text)}: {NAMED}")
        else:
            found.append((name, Path(path)))
    return found


def open_bundle(path: Path, settings: Settings, store: Path | None = None) -> ServedModel:
    """Return the bundle at ``path``, or the current one of a store there, after every check that needs no engine.

    With ``store`` and --trust, one older than what was served last is refused. Raises BundleError, and EbjdatError for an alpha that its
    calibration cannot serve.
    """
    folder = resolve(path)
    if reason := reason_held_back(folder):
        raise BundleError(f"{folder} is a candidate and is not served: {reason}; ebjdat-serve publish {folder} STORE --force publishes it")
    trust = settings.trusted()
    found = verified(folder, settings.terms(trust))
    if store and trust and (reason := read_history(store).superseded(found.bundle)):
        raise BundleError(f"{folder}: {reason}; ebjdat-serve rollback {store} {folder.name} --allow-older has it served")
    if settings.check == "reach" and found.no_check:
        raise BundleError(f"{folder}: {found.no_check}; serve --check none serves it")
    rows = [to_json(row) for row in found.rows]
    calibrated = found.calibrated
    calibration, share = (calibrated.calibration, calibrated.review.policy.expected) if calibrated else (None, None)
    model = ServedModel(found.bundle.served, found.bundle, calibration, share, found.no_check, rows)
    if calibrated is None:
        return model
    names = (OF_IMAGES, *found.bundle.recorded())
    return replace(model, recorded=calibrated.recorded, calibrations=names, scored_by=calibrated.scored_by)


def open_first(settings: Settings) -> tuple[ServedModel, str]:
    """Return the bundle that a server starts with, and "" or why it is not the current one of its store.

    When that is refused, it is what a server of the store served last: a running one would go on with that, too.
    """
    store = store_at(settings.model)
    try:
        return open_bundle(settings.model, settings, store), ""
    except BundleError as error:
        last = open_last(settings, store)
        if last is None:
            raise
        return last, str(error)


def open_last(settings: Settings, store: Path | None) -> ServedModel | None:
    """Return what a server of ``store`` served last, None when there is none or it cannot be served."""
    try:
        if store is None or not (name := Path(read_history(store).last).name):
            return None
        return open_bundle(store / name, settings)
    except EbjdatError as error:
        log.warning("what was served last cannot be served either: %s", error)
        return None


def fingerprint(folder: Path, store: Path | None = None) -> tuple[Any, ...]:
    """Return a value that changes when the bundle in a folder, its signature, or the history of its store is replaced."""
    files = [folder / MANIFEST, folder / SIGNATURE, *([store / SERVED_FILE] if store else [])]
    return (folder, *(file.stat().st_mtime_ns if file.exists() else 0 for file in files))
