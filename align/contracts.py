"""What a part of the user's own must say and may leave out. The one place that asks a part for attributes by name.

A base declares each attribute that a loop reads: with its default, or by its annotation alone where every part must say
it. A part may inherit the base or be of any other class, see adopt; loops then read plain attributes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any, TypeVar

from align.jsons import Json

B = TypeVar("B")
NEAR = 0.8  # of difflib's ratio: step_row is 0.94 from step_rows, and kinds 0.89 from kind
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial)


def adopt(part: object, base: type[B], key: str) -> B:
    """The same object, which is a `base` from now on: what its class does not say has the base's default.

    A part that does not inherit the base is given a subclass of its own class with the base as second one; it stays
    otherwise what it was, frozen or not. key: the setting that the part belongs to, for messages.
    Raises ValueError, in one line, for a function or a class in the place of an object, a missing attribute, one that
    is spelt nearly like a declared one, and a value that is none of those declared.
    """
    if isinstance(part, type) or is_function(part):
        given = "class" if isinstance(part, type) else "function"
        raise ValueError(
            f"{key} ({_path(part)}): is a {given}; {_noun(base)} is an object of a class that inherits {_path(base)} "
            "or has its attributes"
        )
    kind, where = type(part), f"{key} ({_path(type(part))})"
    _check_spelling(kind, base, where, _own(part))
    if not isinstance(part, base):
        _join(part, base, where)
    assert isinstance(part, base)
    _check_complete(part, base, where)
    return part


def declared_by(kind: object, base: type[B], key: str) -> type[B]:
    """The class of a part that is not made yet, with the base's defaults; the base itself for what is no class, such as
    a function. Raises ValueError for an attribute that is spelt nearly like a declared one."""
    if not isinstance(kind, type):
        return base
    where = f"{key} ({_path(kind)})"
    _check_spelling(kind, base, where, ())
    try:
        return kind if issubclass(kind, base) else _joined(kind, base)
    except TypeError as error:  # a metaclass of its own
        raise ValueError(f"{where}: is not {_noun(base)}; make it a class that inherits {_path(base)}") from error


def is_function(part: object) -> bool:
    """Whether it can be called and is no object of a class of the user's own."""
    return isinstance(part, _FUNCTIONS)


def _join(part: object, base: type, where: str) -> None:
    for name in _declared(base):
        if not _says(type(part), name, _own(part)) and hasattr(part, name):
            raise ValueError(f"{where}: hands {name} on by __getattr__; say it in the class, as a property")
    try:
        object.__setattr__(part, "__class__", _joined(type(part), base))  # a frozen dataclass refuses its own way
    except TypeError as error:
        raise ValueError(f"{where}: is not {_noun(base)}; make it of a class that inherits {_path(base)}") from error


@cache
def _joined(kind: type, base: type) -> Any:
    """A class of both; the same one each time, so that two parts of one class stay equal."""

    def named(namespace: Json) -> None:
        # without slots of its own the objects of `kind` fit, whether they have a dictionary or not
        namespace |= {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        namespace |= {"__doc__": kind.__doc__}

    return types.new_class(kind.__name__, (kind, base), exec_body=named)


def _check_spelling(kind: type, base: type, where: str, own: Iterable[str]) -> None:
    """Raises ValueError for a public attribute that is nearly a declared one; settings of the part are its own."""
    from difflib import get_close_matches

    inherited = set(base.__mro__)
    said = {name: value for k in reversed(kind.__mro__) if k not in inherited for name, value in vars(k).items()}
    said |= dict.fromkeys(own)
    declared = _declared(base)
    for name in sorted(said.keys() - declared.keys() - _settings(kind)):
        alike = [other for other, value in declared.items() if _is_method(value) == _is_method(said[name])]
        near = [] if name.startswith("_") else get_close_matches(name, alike, 1, NEAR)
        if near and near[0] not in said:
            raise ValueError(f"{where}: {name} is not an attribute of {_noun(base)}; did you mean {near[0]}?")


def _check_complete(part: object, base: type, where: str) -> None:
    """Raises ValueError for an attribute that has no default and is not said, and for a value that is not allowed."""
    hints = typing.get_type_hints(base)
    for name in sorted(getattr(type(part), "__abstractmethods__", ())):
        raise ValueError(f"{where}: must have the method {name}; see {_path(base)}")
    for name, hint in hints.items():
        allowed = _choices(hint)
        if not _says(type(part), name, _own(part)):
            known = f": {_listed(allowed)}" if allowed else ""
            raise ValueError(f"{where}: must say its {name}{known}; see {_path(base)}")
        value = getattr(part, name)
        if allowed and value not in allowed:
            raise ValueError(f"{where}: {name}={value}: must be {_listed(allowed)}")
        if isinstance(value, str) and typing.get_origin(hint) in (tuple, frozenset):
            raise ValueError(f"{where}: {name}={value}: must be a tuple or a set of names, as in {{{value!r}}}")


def _declared(base: type) -> Json:
    """Public attributes of a base: name -> its default; None of one without."""
    found: Json = {}
    for k in reversed(base.__mro__[:-1]):
        found |= dict.fromkeys(k.__dict__.get("__annotations__", {})) | vars(k)
    return {name: value for name, value in found.items() if not name.startswith("_")}


def _settings(kind: type) -> set[str]:
    """What a class is made with."""
    found = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    if isinstance(kind.__init__, types.FunctionType):
        found |= set(inspect.signature(kind.__init__).parameters)
    return found


def _own(part: object) -> Iterable[str]:
    """Names in the object's own dictionary, which objects with slots do not have."""
    return tuple(getattr(part, "__dict__", ()))


def _says(kind: type, name: str, own: Iterable[str]) -> bool:
    return name in own or any(name in vars(k) for k in kind.__mro__)


def _is_method(value: object) -> bool:
    return inspect.isroutine(value) or isinstance(value, (classmethod, staticmethod))


def _choices(hint: object) -> tuple[Any, ...]:
    """The values that a Literal allows, alone or beside None; () for other types."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    named = [value for part in parts for value in _choices(part)]
    return (*named, None) if named and type(None) in parts else tuple(named)


def _listed(allowed: Iterable[object]) -> str:
    *first, last = map(str, allowed)
    return f"{', '.join(first)} or {last}" if first else last


def _noun(base: type) -> str:
    """an objective, a pair rule, ..."""
    words = " ".join(_words(base.__name__))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _words(name: str) -> Iterator[str]:
    return (word.lower() for word in re.findall("[A-Z][a-z]*", name))


def _path(thing: object) -> str:
    if isinstance(thing, partial):
        return _path(thing.func)
    named: Any = thing if isinstance(thing, (type, *_FUNCTIONS)) else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
