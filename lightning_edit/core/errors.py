# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""One family of errors. Every message says what is wrong, where, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = [
    "ArtifactError",
    "EditError",
    "FailedRequestsError",
    "LedgerError",
    "LocatorError",
    "LockedError",
    "MissingDependencyError",
    "ModelError",
    "RequestError",
    "ServerError",
    "SettingError",
    "StorageError",
    "some_of",
]


def some_of(names: Iterable[str], most: int = 5) -> str:
    """Names for a message, of which nobody would read hundreds.

    Args:
        names: In the order in which they are told.
        most: How many of them are.

    Examples:
        >>> some_of("abc"), some_of("abcdefg")
        ('a, b, c', 'a, b, c, d, e and 2 more')
    """
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


class EditError(Exception):
    """Base of every error that lightning_edit raises on purpose."""


class RequestError(EditError, ValueError):
    """An edit request, or a set of them, cannot be carried out as written."""


class FailedRequestsError(EditError):
    """Not one request of a batch could be carried out, each for a reason of its own.

    Args:
        reasons: Id of each request to what went wrong and how to mend it.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(" ".join(f"Request {id_!r}: {why}" for id_, why in reasons.items()))
        self.reasons = dict(reasons)


class LocatorError(EditError, ValueError):
    """A layer, module or parameter that an editor needs is not in the model."""


class ModelError(EditError, ValueError):
    """A model cannot be found or loaded, or its architecture does not suit the method."""


class ArtifactError(EditError, ValueError):
    """A saved edit or a given statistic is damaged, or belongs to another base model."""


class StorageError(EditError, OSError):
    """A file or folder cannot be written: the disk is full or may not be written to."""


class LedgerError(EditError, ValueError):
    """A ledger cannot be read or written, was tampered with, or does not know what is asked."""


class LockedError(EditError):
    """A folder is in use by another run."""


class SettingError(EditError, TypeError, ValueError):
    """An argument of a class has another type than the class takes, or is none of its choices."""


class ServerError(EditError):
    """A model server does not answer, or does not do what it was asked for."""


class MissingDependencyError(EditError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package `{package}`, which is not installed. "
            f"Install it with `pip install 'lightning-edit[{extra}]'`."
        )
