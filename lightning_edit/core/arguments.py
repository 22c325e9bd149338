# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Constructor arguments have the types that their annotations say, or are named."""

from __future__ import annotations

import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache
from typing import Literal, Self, Union, get_args, get_origin, get_type_hints

from lightning_edit.core.errors import SettingError

__all__ = ["CheckedArguments"]

_PLAIN: dict[object, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a finite number"),
    str: (str, "text"),
}


class CheckedArguments:
    """Base of classes whose constructors are given values of the annotated types alone.

    The annotations are those that the command line goes by, too. What they name for type checkers
    only is not looked at.

    Examples:
        >>> class Method(CheckedArguments):
        ...     def __init__(self, layers: list[int], lr: float = 0.1) -> None:
        ...         self.lr = lr
        >>> Method([1, 2], lr=1).lr
        1
        >>> Method([1, "2"])
        Traceback (most recent call last):
            ...
        lightning_edit.core.errors.SettingError: Method: `layers` is expected to be list[int], but
        got [1, '2'].
    """

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Checks what the constructor is about to get.

        Raises:
            SettingError: If an argument has another type; the message names it.
        """
        for name, value in _named(cls, args, kwargs):
            hint = _hint(typing.cast("Hashable", cls), name)
            if not _fits(value, hint):
                raise SettingError(
                    f"{cls.__name__}: `{name}` is expected to be {_in_words(hint)}, but got "
                    f"{_shown(value)}."
                )
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[()]:
        """Nothing: copies are given their state, and no arguments."""
        return ()


def _named(
    cls: type, args: Sequence[object], kwargs: Mapping[str, object]
) -> Iterator[tuple[str, object]]:
    """Arguments by name; those too many, Python itself complains of."""
    if args:
        parameters = list(inspect.signature(_init(cls)).parameters.values())[1:]
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        places = [parameter.name for parameter in parameters if parameter.kind in kinds]
        yield from zip(places, args, strict=False)
    yield from kwargs.items()


def _init(cls: type) -> Callable[..., None]:
    found: Callable[..., None] = vars(cls).get("__init__") or next(
        vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)
    )
    return found


@cache
def _hint(cls: Hashable, name: str) -> object:
    """What an argument is annotated with, in the first class that takes it by name."""
    for owner in typing.cast(type, cls).__mro__:
        init = vars(owner).get("__init__")
        if not isinstance(init, types.FunctionType):
            continue
        parameters = inspect.signature(init).parameters
        if name in parameters:
            annotation = parameters[name].annotation
            if annotation is inspect.Parameter.empty:
                return object
            holder = types.SimpleNamespace(__annotations__={name: annotation})
            try:
                return get_type_hints(holder, globalns=init.__globals__)[name]
            except (NameError, TypeError):  # named for type checkers alone
                return object
        if not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return object


def _fits(value: object, hint: object) -> bool:
    """Whether a value is of a type, as far as can be told."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint in _PLAIN:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if hint is float and is_number and math.isnan(typing.cast(float, value)):
            return False
        return isinstance(value, _PLAIN[hint][0]) and (hint is bool or not isinstance(value, bool))
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if isinstance(origin, type):
        return _fits_generic(value, origin, inner)
    if not isinstance(hint, type) or hint is object:
        return True
    try:
        return isinstance(value, hint)
    except TypeError:  # a protocol that is for type checkers
        return True


def _fits_generic(value: object, origin: type, inner: tuple[object, ...]) -> bool:
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items()
        )
    if origin is tuple and inner[-1:] != (...,):
        return (
            isinstance(value, Sequence)
            and not isinstance(value, (str, bytes))
            and len(value) == len(inner)
            and all(map(_fits, value, inner))
        )
    if issubclass(origin, Sequence):
        # A tuple in place of a list is no mistake.
        return (
            isinstance(value, Sequence)
            and not isinstance(value, (str, bytes))
            and all(_fits(item, inner[0]) for item in value)
        )
    try:
        return isinstance(value, origin)
    except TypeError:
        return True


def _in_words(hint: object) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if hint is type(None):
        return "null"
    if hint in _PLAIN:
        return _PLAIN[hint][1]
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:  # of a class that is not finished
        return f"a {type(value).__name__}"
