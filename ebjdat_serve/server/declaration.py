"""What a setting is: an option, a variable, bounds and help, all from one declaration."""

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ebjdat_serve.errors import EbjdatError

BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
SEPARATORS = {Path: ":", str: ","}
"""What separates the values of a variable for an option that may be repeated; an IPv6 address has colons."""


@dataclass(frozen=True)
class About:
    """What a setting is: the group of its option, help, unit, bounds, how texts show a default that varies, and a word for a value."""

    group: str
    help: str
    unit: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    shown: str = ""
    metavar: str = ""

    @property
    def bounds(self) -> str:
        """The bounds in words, "" without any."""
        words = []
        if self.at_least is not None:
            words = [f"{self.at_least:g} to {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"]
        if self.above is not None:
            words = [f"{'seconds ' if self.unit == 'seconds' else ''}above {self.above:g}"]
        if self.below is not None:
            words.append(f"below {self.below:g}")
        return " and ".join(words)

    def holds(self, value: float) -> bool:
        """Return whether a number is within the bounds; NaN and infinity never are."""
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def seconds(group: str, help: str) -> About:
    """Return what a time is."""
    return About(group, help, unit="seconds", above=0)


def count(group: str, help: str, unit: str, at_least: int = 1) -> About:
    """Return what a number of things is."""
    return About(group, help, unit, at_least)


@dataclass(frozen=True)
class Setting:
    """One field of Settings."""

    name: str
    type: Any
    default: Any
    about: About

    @property
    def flag(self) -> str:
        """The option of `serve`, or the name of its positional argument."""
        return {"model": "MODEL", "more": "[NAME=]MODEL"}.get(self.name) or f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"EBJDAT_{self.name.upper()}"

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are allowed, none where any value of the type is."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def default_text(self) -> str:
        """The default as help and docs show it."""
        if self.about.shown or self.type is bool:
            return self.about.shown or ("yes" if self.default else "no")
        return "none" if self.default in ((), None, "") else f"{self.default:g}" if self.type is float else str(self.default)

    def parse(self, text: str) -> Any:
        """Return the value that a variable's text means; raise EbjdatError that names the variable."""
        if self.type is bool:
            if text.lower() not in BOOLEANS:
                raise EbjdatError(f"{self.variable} must be one of {', '.join(BOOLEANS)}, not {text!r}")
            return BOOLEANS[text.lower()]
        if get_origin(self.type) is tuple:
            kind = get_args(self.type)[0]
            return tuple(map(kind, text.split(SEPARATORS[kind])))
        try:
            value = text if self.choices else self.type(text)
        except ValueError:
            raise EbjdatError(f"{self.variable} must be {'an integer' if self.type is int else 'a number'}, not {text!r}") from None
        self.check(value, self.variable)
        return value

    def check(self, value: Any, called: str) -> None:
        """Raise EbjdatError for a value out of bounds; ``called`` is the flag or variable that it was given by."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise EbjdatError(f"{called} must be one of {', '.join(self.choices)}, not {value!r}")
        if self.about.bounds and not self.about.holds(value):
            raise EbjdatError(f"{called} must be {self.about.bounds}, not {value}")

    def add_to(self, group: "argparse._ArgumentGroup") -> None:
        """Add the option; where it is not given, the parsed arguments have no value for it."""
        here = f": {self.default}" if self.about.shown and isinstance(self.default, int) else ""  # what it is on this machine
        text = f"{self.about.help} ({self.default_text}{here})"
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if self.type is bool:
            group.add_argument(self.flag, action=argparse.BooleanOptionalAction, **common)
        elif self.choices:
            group.add_argument(self.flag, choices=self.choices, **common)
        elif get_origin(self.type) is tuple and not self.flag.startswith("--"):
            group.add_argument(self.name, nargs="*", type=get_args(self.type)[0], metavar=self.flag, **common)
        elif get_origin(self.type) is tuple:
            group.add_argument(self.flag, action="append", type=get_args(self.type)[0], metavar=self.about.metavar, **common)
        elif self.flag.startswith("--"):
            metavar = self.about.metavar or self.about.unit.upper().replace(" PER SECOND", "/S") or "N"
            group.add_argument(self.flag, type=self.type, metavar=metavar, **common)
        else:
            group.add_argument(self.name, nargs="?", type=self.type, metavar=self.flag, help=text)


def declared(settings: type[Any]) -> tuple[Setting, ...]:
    """Return the fields of a dataclass of settings as they are declared."""
    types = get_type_hints(settings, include_extras=True)
    return tuple(
        Setting(one.name, without_none(kind), one.default, about) for one in fields(settings) for kind, about in [get_args(types[one.name])]
    )


def without_none(kind: Any) -> Any:
    """Return the type of which a setting's value is when it is given: X for X | None."""
    return get_args(kind)[0] if get_origin(kind) is UnionType else kind
