"""Install commands for missing packages, for this Python and, in a checkout, from it."""

import shlex
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent


def checkout() -> bool:
    """Return whether the package runs from its checkout, as `make` installs it."""
    return (CHECKOUT / "pyproject.toml").is_file()


def pip(*words: str) -> str:
    """Return a command for this Python's pip."""
    return shlex.join([sys.executable, "-m", "pip", *words])


def install(extras: str) -> str:
    """Return the command that installs extras of this package, ``gpu`` or ``gpu,tensorrt``."""
    if checkout():
        home = "." if Path.cwd() == CHECKOUT else str(CHECKOUT)
        return pip("install", "-e", f"{home}[{extras}]")
    return pip("install", f"ebjdat-serve[{extras}]")
