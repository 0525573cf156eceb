"""JSON objects as dataclasses: unknown and missing keys, wrong types and numbers out of bounds are refused."""

from dataclasses import fields
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ebjdat_serve.errors import BundleError

T = TypeVar("T")


def parse(kind: type[T], data: Any, where: str) -> T:
    """Return ``data`` as the dataclass ``kind``.

    Keys of fields that may be None may be missing. Raises BundleError for unknown or missing keys, wrong types, and numbers beyond the
    ``Bounds`` that annotate their field.
    """
    if not isinstance(data, dict):
        raise BundleError(f"{where}: expected an object, found {type(data).__name__}")
    hints = get_type_hints(kind, include_extras=True)
    unknown = sorted(set(data) - set(hints))
    missing = sorted({f.name for f in fields(kind) if NoneType not in get_args(hints[f.name])} - set(data))  # type: ignore[arg-type]
    if unknown or missing:
        raise BundleError(f"{where}: unknown keys {unknown}, missing keys {missing}")
    values = {name: _value(hints[name], data.get(name), f"{where}: {name}") for name in hints}
    try:
        return kind(**values)
    except BundleError as error:  # what a dataclass asks of its fields together
        raise BundleError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    if hasattr(hint, "__dataclass_fields__"):
        return parse(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if NoneType in arguments:
        return None if value is None else _value(arguments[0], value, where)
    if origin is Annotated:
        number = _value(arguments[0], value, where)
        if fault := arguments[1].fault(number):
            raise BundleError(f"{where} {fault}")
        return number
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        if get_args(arguments[0])[:1] == (float,) and set(map(type, value)) == {float}:  # a calibration has ten thousand scores
            bounds = get_args(arguments[0])[1]
            if all(bounds.least <= number <= bounds.most for number in value):
                return value
        return [_value(arguments[0], item, where) for item in value]
    if origin is Literal:
        if value in arguments and type(value) is type(arguments[0]):
            return value
        raise BundleError(f"{where}: {repr(value)[:40]} is not {' or '.join(map(repr, arguments))}, which this version knows")
    if hint is Any or (isinstance(hint, type) and isinstance(value, hint) and not isinstance(value, bool)):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    raise BundleError(f"{where}: {repr(value)[:40]} is not a {getattr(hint, '__name__', hint)}")
