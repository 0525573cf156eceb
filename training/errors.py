"""The laboratory's exceptions; every message says what is wrong, where, and what to do."""

from ebjdat_serve.errors import EbjdatError


class TrainingError(EbjdatError):
    """A run cannot be started or continued as asked."""


class HeldBack(TrainingError):
    """A refresh ended on a model that its gate does not let pass: it is a candidate in the store, and `current` is what it was."""


class TrainingDiverged(TrainingError):
    """The energies left their limits more often than a run allows."""


class OutOfTime(TrainingError):
    """The deadline came before a stage's first step."""


class DataError(TrainingError):
    """Data is missing or is not what it should be: where to put it, or how to get it."""
