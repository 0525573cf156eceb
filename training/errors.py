"""Exceptions of training and evaluation; every message names the problem, its place and the fix."""

from ebjdat_serve.errors import EbjdatError


class TrainingError(EbjdatError):
    """A run cannot be started or continued as asked."""


class HeldBack(TrainingError):
    """The gate of a refresh held the model back: it is a candidate in the store, and `current` is unchanged."""


class TrainingDiverged(TrainingError):
    """The energies left their limits more often than a run allows."""


class OutOfTime(TrainingError):
    """The deadline came before a stage's first step."""


class DataError(TrainingError):
    """Data is missing or invalid; the message says where to put it, or how to get it."""
