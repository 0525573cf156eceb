"""Exceptions of the serving package; every message names the problem, its place and the fix."""

import unicodedata
from collections.abc import Collection

UNSEEN = ("Cc", "Cf", "Zl", "Zp")
"""Unicode's categories of characters that a reader does not see, or that order others anew: control, format, and ends of lines."""
JOINERS = "\u200c\u200d"
"""Characters without a shape of their own that words of some scripts need."""


def visible(text: str) -> str:
    """Return text of a file as one line that a terminal shows and does not obey: what a reader would not see as escapes."""
    return "".join(ascii(one)[1:-1] if unicodedata.category(one) in UNSEEN and one not in JOINERS else one for one in text)


def cause(error: BaseException) -> str:
    """Return what an exception says, the system's words for one of the system; its name for one that says nothing, as TimeoutError()."""
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or repr(error)


def first_line(error: BaseException, most: int = 200) -> str:
    """Return the first line of what a library's exception says, at most ``most`` characters; its name if it says nothing."""
    return visible((str(error).strip().splitlines() or [type(error).__name__])[0][:most])  # a strange file's words may be in it


OF_NETWORKS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What building or running a network of somebody else raises; NotImplementedError is a RuntimeError."""


class EbjdatError(Exception):
    """Base of every error this package raises on purpose.

    ``options`` are command-line options that fix it: a command appends those it has (console.py); as a library, none are shown.
    """

    def __init__(self, message: str = "", *, options: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.options = options

    def advised(self, known: Collection[str] | None = None) -> str:
        """Return the message with the options that fix it: all, or those whose flags are all in ``known``."""
        fit = [option for option in self.options if known is None or {word for word in option.split() if word[:2] == "--"} <= set(known)]
        return f"{self}; or give {' or '.join(fit)}" if fit else str(self)


class BundleError(EbjdatError):
    """A model bundle is missing, damaged, stale or of an unknown schema; the message names the file."""


class EngineError(EbjdatError):
    """The requested engine or provider cannot run here."""


class InvalidImage(EbjdatError):
    """The bytes are not an image this server accepts; the message names the limit or the fix, ``index`` which image of several it is.

    ``too_large`` says that the same picture is accepted with fewer bytes or pixels.
    """

    def __init__(self, message: str = "", *, too_large: bool = False) -> None:
        super().__init__(message)
        self.index: int | None = None
        self.too_large = too_large
