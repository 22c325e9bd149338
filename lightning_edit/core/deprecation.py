# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How a public name goes: it warns for a version or more, and then is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import typing_extensions

__all__ = ["deprecated"]

T = TypeVar("T", bound=Callable[..., object])


def deprecated(*, since: str, removed: str, instead: str) -> Callable[[T], T]:
    """Marks a function or class: whoever calls it is told what to use instead.

    A test fails once the version is reached in which it is to be gone.

    Args:
        since: First version that warns.
        removed: Version without it.
        instead: What to use in its place.

    Returns:
        A decorator. What it decorates gives a ``FutureWarning`` when it is called, and a class when
        it is subclassed, too.

    Examples:
        >>> import warnings
        >>> @deprecated(since="0.2", removed="0.4", instead="`WeightDelta.norm`")
        ... def size(edit):
        ...     return edit.norm()
        >>> from lightning_edit import WeightDelta
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     size(WeightDelta({}))
        0.0
        >>> print(caught[0].message)
        `size` is deprecated since 0.2 and will be gone in 0.4. Use `WeightDelta.norm` instead.
    """

    def mark(target: T) -> T:
        message = (
            f"`{target.__name__}` is deprecated since {since} and will be gone in {removed}. "
            f"Use {instead} instead."
        )
        return typing_extensions.deprecated(message, category=FutureWarning)(target)

    return mark
