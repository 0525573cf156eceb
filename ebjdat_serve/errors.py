"""The exceptions a caller may want to tell apart; every message says what is wrong, where, and what to do."""

from collections.abc import Collection


class EbjdatError(Exception):
    """Base of every error this package raises on purpose.

    ``options`` are what may be given on a command line to mend it: a command names those that it has (console.py), code none.
    """

    def __init__(self, message: str = "", *, options: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.options = options

    def advised(self, known: Collection[str] | None = None) -> str:
        """Return the text with the options that mend it: all, or those of which ``known`` holds every flag."""
        fit = [option for option in self.options if known is None or {word for word in option.split() if word[:2] == "--"} <= set(known)]
        return f"{self}; or give {' or '.join(fit)}" if fit else str(self)


class BundleError(EbjdatError):
    """A model bundle is missing, damaged, stale or of an unknown schema; the message names the file."""


class EngineError(EbjdatError):
    """The engine or provider that was asked for cannot run here."""


class InvalidImage(EbjdatError):
    """The bytes are not an image this server accepts; the message names the limit or the fix, ``index`` which image of several it is."""

    index: int | None = None
