# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""JSON and YAML that others wrote: read as data, whatever they hold, within bounds."""

from __future__ import annotations

import errno
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yaml import Node, SafeLoader, Token

__all__ = ["check_text", "parse_json", "parse_yaml", "read_text"]

# What a document may come to once its aliases are written out, in values.
_MAX_VALUES = 1_000_000
_MAX_DEPTH = 100


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a regular file; a pipe or a device would be waited for without an end.

    Raises:
        OSError: If it cannot be read, or is no regular file.
        UnicodeDecodeError: If it holds no text of that encoding.
    """
    if path.exists() and not path.is_file():
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(code, "it is no regular file", str(path))
    return path.read_text(encoding=encoding)


def check_text(text: str) -> str:
    """A text, if it can be written in UTF-8, as tokenizers take it.

    Raises:
        ValueError: If it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r:.80} has half of a character at {error.start}") from None
    return text


def parse_json(text: str | bytes) -> object:
    """What a JSON text says.

    Raises:
        ValueError: If it is no JSON, or nested deeper than it can be read.

    Examples:
        >>> parse_json("[" * 100_000)
        Traceback (most recent call last):
            ...
        ValueError: it is nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str) -> object:
    """What a YAML text says, in types of its own alone.

    Raises:
        yaml.YAMLError: If it is no YAML, or has tags of other types.
        ValueError: If it is nested too deeply, refers to itself, or its aliases come to more values
            than any file here has.

    Examples:
        >>> parse_yaml("{a: &x [1, 2], b: *x}")
        {'a': [1, 2], 'b': [1, 2]}
    """
    try:
        loader = _loader()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            limit = max(_MAX_VALUES, len(text))
            if _values(node, {}) > limit:
                raise ValueError("its aliases come to more values than any file here has")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (AttributeError, OverflowError, TypeError) as error:
        raise ValueError(f"it holds a value that cannot be read ({error})") from None


@cache
def _loader() -> type[SafeLoader]:
    """The safe loader, which ends where a document is nested deeper than any file here is.

    Each level makes every further token slower, so that a short text could take hours.
    """
    import yaml

    class Bounded(yaml.SafeLoader):
        def fetch_flow_collection_start(self, TokenClass: type[Token]) -> None:
            _check_depth(self.flow_level)
            super().fetch_flow_collection_start(TokenClass)

        def add_indent(self, column: int) -> bool:
            _check_depth(len(self.indents))
            return super().add_indent(column)

    return Bounded


def _check_depth(depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")


def _values(node: Node, known: dict[int, int]) -> int:
    """Number of values in a node once its aliases are written out.

    Raises:
        ValueError: If the node is a part of itself.
    """
    number = id(node)
    if number in known:
        if not known[number]:
            raise ValueError("it holds a value that is a part of itself")
        return known[number]
    known[number] = 0  # begun
    inner: list[Node] = []
    for item in node.value if isinstance(node.value, list) else ():
        inner += item if isinstance(item, tuple) else (item,)
    known[number] = 1 + sum(_values(one, known) for one in inner)
    return known[number]
