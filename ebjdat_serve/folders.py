"""Cache, data and run folders: under ~/.cache/ebjdat_serve, or where an environment variable points."""

import os
from pathlib import Path

from ebjdat_serve.errors import EbjdatError, cause


def folder(variable: str, name: str = "") -> Path:
    """Return the folder that ``variable`` names, or ``name`` in the cache; raise EbjdatError without both the variable and a home."""
    try:
        return Path(os.environ.get(variable) or Path("~/.cache/ebjdat_serve") / name).expanduser()
    except RuntimeError as error:
        raise EbjdatError(f"there is no home folder to keep files in: set {variable} to a folder") from error


def ensure_folder(path: Path, variable: str) -> Path:
    """Create ``path`` if it is missing and return it; raise EbjdatError naming ``variable`` when it is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, variable, error) from error
    if not os.access(path, os.W_OK):
        raise unwritable(path, variable)
    return path


def unwritable(path: Path, variable: str, error: OSError | None = None) -> EbjdatError:
    """Return the error for a folder that cannot be written."""
    why = f" ({cause(error)})" if error else ""
    return EbjdatError(f"{path} cannot be written{why}: set {variable} to a folder that can")
