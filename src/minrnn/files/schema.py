"""Conversion of values from JSON and TOML to declared types, with one-line errors."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, is_typeddict

T = TypeVar("T")

LONGEST_SHOWN = 60  # characters of a value in an error message


def convert(value: Any, kind: type[T], key: str = "") -> T:
    """Return a value as its declared type. The only coercion is from int to a declared float.

    Args:
        value: a value returned by a JSON or TOML parser.
        kind: None, bool, int, float, str, Any, a Literal, a union, `list[T]`, `tuple[T, ...]`,
            `dict[str, T]`, a dataclass (a table of its fields only) or a TypedDict (a table with at least
            its keys; further keys are kept).
        key: name of the value in error messages, such as `train.steps`; empty for a whole file.

    Raises:
        ValueError: a value has another type, a key is missing or, for a dataclass, unknown (the message
            suggests the nearest one), or the dataclass rejects a value.
    """
    if kind is Any or kind is object:
        return typing.cast("T", value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return typing.cast("T", _dataclass(value, kind, key))
    if is_typeddict(kind):
        return typing.cast("T", _typed_dict(value, kind, key))
    origin = get_origin(kind)
    if origin is Literal:
        return typing.cast("T", _literal(value, get_args(kind), key))
    if origin in (typing.Union, types.UnionType):
        return typing.cast("T", _union(value, get_args(kind), key))
    if origin in (list, tuple, Sequence, dict, Mapping):
        return typing.cast("T", _container(value, kind, key))
    return typing.cast("T", _scalar(value, kind, key))


def nearest(word: str, words: Iterable[str]) -> str:
    """Return `"; did you mean ...?"` with the most similar of `words`, or "" if none is similar."""
    matches = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def shown(value: object) -> str:
    """Return the repr of a value for an error message, shortened to LONGEST_SHOWN characters."""
    text = repr(value)
    return f"{text[:LONGEST_SHOWN]}..." if len(text) > LONGEST_SHOWN else text


def _dataclass(value: Any, kind: type, key: str) -> Any:
    table, hints = _table(value, key), typing.get_type_hints(kind)
    declared = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for name in table:
        if name not in declared:
            raise ValueError(f"unknown key {_below(key, name)!r}{nearest(name, declared)}")
    for name, field in declared.items():
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if name not in table and not has_default:
            raise ValueError(f"{_below(key, name)} is missing")
    return kind(**{name: convert(each, hints[name], _below(key, name)) for name, each in table.items()})


def _typed_dict(value: Any, kind: Any, key: str) -> dict[str, Any]:
    table, hints = _table(value, key), typing.get_type_hints(kind)
    # kind.__required_keys__ is wrong for string annotations: it lists them all as required.
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if name not in table and get_origin(hint) is not typing.NotRequired:
            raise ValueError(f"{_below(key, name)} is missing")
    return {name: convert(each, hints.get(name, Any), _below(key, name)) for name, each in table.items()}


def _table(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _refusal(key, "a table", value)
    return value


def _literal(value: Any, allowed: tuple[Any, ...], key: str) -> Any:
    # Types are compared too, as True == 1.
    if not any(type(value) is type(each) and value == each for each in allowed):
        raise _refusal(key, f"one of {', '.join(map(str, allowed))}", value)
    return value


def _union(value: Any, kinds: tuple[Any, ...], key: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    if len(others) == 1:
        return convert(value, others[0], key)
    for kind in others:
        try:
            return convert(value, kind, key)
        except ValueError:
            continue
    raise _refusal(key, " or ".join(_name(kind) for kind in kinds), value)


def _container(value: Any, kind: Any, key: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (dict, Mapping):
        return {
            name: convert(each, arguments[1], _below(key, name)) for name, each in _table(value, key).items()
        }
    if not isinstance(value, list | tuple):
        raise _refusal(key, "a list", value)
    items = [convert(each, arguments[0], f"{key}[{index}]") for index, each in enumerate(value)]
    return tuple(items) if origin is tuple else items


def _scalar(value: Any, kind: Any, key: str) -> Any:
    kind = types.NoneType if kind is None else kind
    if kind is float and type(value) is int:  # 1 for 1.0
        try:
            return float(value)
        except OverflowError:
            raise _refusal(key, "float", value) from None
    if type(value) is not kind:
        raise _refusal(key, _name(kind), value)
    return value


def _below(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _name(kind: Any) -> str:
    return "null" if kind is types.NoneType else getattr(kind, "__name__", str(kind))


def _refusal(key: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{key or 'it'} must be {expected}, got {shown(value)}")
