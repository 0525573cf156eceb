"""The exceptions a caller may want to tell apart; every message says what is wrong, where, and what to do."""


class EbjdatError(Exception):
    """Base of every error this package raises on purpose.

    ``options`` are what may be given on a command line to mend it: a command names those that it has (console.py), code none.
    """

    def __init__(self, message: str = "", *, options: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.options = options


class BundleError(EbjdatError):
    """A model bundle is missing, damaged, stale or of an unknown schema; the message names the file."""


class EngineError(EbjdatError):
    """The engine or provider that was asked for cannot run here."""


class InvalidImage(EbjdatError):
    """The bytes are not an image this server accepts; the message names the limit or the fix."""
