# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of an editor: those of its class and of those that it hands the rest to."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Mapping

__all__ = ["arguments_of", "check_arguments"]


@functools.cache
def arguments_of(cls: type) -> tuple[str, ...]:
    """Names of the arguments of a class, its own first.

    Examples:
        >>> from lightning_edit import ROME
        >>> arguments_of(ROME)[:2]
        ('model', 'layers')
    """
    found: dict[str, None] = {}
    for owner in cls.__mro__:
        init = owner.__dict__.get("__init__")
        if init is None:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        found |= dict.fromkeys(named)
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return tuple(found)


def check_arguments(cls: type, given: Mapping[str, object], unused: Mapping[str, str]) -> None:
    """Checks that a class has the arguments that it is given.

    Args:
        cls: The class.
        given: Name to value.
        unused: Arguments of its bases that the class has no use for, and what to do instead.

    Raises:
        TypeError: If it has no such argument; the message names the one that may have been meant.
        ValueError: If it has no use for one that is not None.

    Examples:
        >>> from lightning_edit import MEMIT
        >>> MEMIT("smollm2", stepz=3)
        Traceback (most recent call last):
            ...
        TypeError: MEMIT has no argument `stepz`. Did you mean `steps`? It takes model, layers, ...
    """
    known = arguments_of(cls)
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise TypeError(
                f"{cls.__name__} has no argument `{name}`.{hint} It takes "
                f"{', '.join(n for n in known if n not in unused)}."
            )
        if name in unused and value is not None:
            raise ValueError(f"{cls.__name__} has no use for `{name}`: {unused[name]}")
