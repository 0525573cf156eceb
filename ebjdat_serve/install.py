"""How what is lacking is installed here: into this Python, and from the checkout where this is one."""

import shlex
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent


def checkout() -> bool:
    """Return whether the package runs from its checkout, as `make` installs it."""
    return (CHECKOUT / "pyproject.toml").is_file()


def pip(*words: str) -> str:
    """Return the command that has this Python's pip do something."""
    return shlex.join([sys.executable, "-m", "pip", *words])


def install(extras: str) -> str:
    """Return the command that installs extras of the package, ``gpu`` or ``gpu,tensorrt``."""
    if checkout():
        home = "." if Path.cwd() == CHECKOUT else str(CHECKOUT)
        return pip("install", "-e", f"{home}[{extras}]")
    return pip("install", f"ebjdat-serve[{extras}]")
