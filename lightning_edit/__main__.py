# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The command ``lightning-edit``; also ``python -m lightning_edit``."""

# Imports only what a verb needs, when it is needed: help must not wait for torch.

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lightning_edit.__about__ import __version__
from lightning_edit.cli.verbs import VERBS
from lightning_edit.rendering.terminal import spell_out

__all__ = ["main"]

USAGE = """\
Change what a language model knows.

usage: lightning-edit VERB [options]      lightning-edit VERB --help

With a Trainer, driven by configurations that compose:
{trainer}

On saved edits:
{console}

Over many runs:
{comparison}
{tuning}

  lightning-edit fit --config configs/edit.yaml
  lightning-edit fit -c method/rome.yaml -c data/facts.yaml -c trainer/ddp.yaml --print_config
  lightning-edit fit --model.help ROME
  lightning-edit compare -c benchmark/smoke.yaml

options:
  -h, --help     show this text
  --version      show the version
"""


#: Exit status after Ctrl-C, as of other programs: 128 + SIGINT.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Words after ``lightning-edit``; the process's own when None.

    Returns:
        The exit status.
    """
    if arguments is not None:
        sys.argv[1:] = arguments  # the Trainer starts further processes by the same command line
    spell_out(sys.stdout, sys.stderr)
    words = sys.argv[1:]
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if verb == "--version":
        sys.stdout.write(f"lightning_edit {__version__}\n")
        return 0
    if verb in VERBS:
        return _run(verb)
    sys.stderr.write(f"lightning-edit: there is no verb {verb!r}.{_near(verb)}\n\n{_usage()}")
    return 2


def _run(verb: str) -> int:
    from lightning_edit.core.errors import EditError
    from lightning_edit.rendering.escaping import visible

    try:
        importlib.import_module(f"lightning_edit.cli.{VERBS[verb].module}").main()
    except EditError as error:
        sys.stderr.write(f"lightning-edit {verb}: {visible(error)}\n")
        return 1
    except OSError as error:  # such as a full disk
        place = f"`{error.filename}`: " if error.filename else ""
        reason = visible(f"{place}{error.strerror or error}")
        sys.stderr.write(f"lightning-edit {verb}: {reason}. Mend that, and run it again.\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        # Lightning's own status of an interrupted run is 1, as that of a failed one.
        if isinstance(end.__context__, KeyboardInterrupt):
            return INTERRUPTED
        raise
    return 0


def _usage() -> str:
    lines: dict[str, list[str]] = {}
    for name, verb in VERBS.items():
        lines.setdefault(verb.module, []).append(f"  {name:<12}{verb.summary}")
    return USAGE.format(**{module: "\n".join(told) for module, told in lines.items()})


def _near(verb: str) -> str:
    import difflib

    near = difflib.get_close_matches(verb, VERBS, n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
