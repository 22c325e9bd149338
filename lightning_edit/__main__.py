# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The command ``lightning-edit``; also ``python -m lightning_edit``."""

# Imports only what a verb needs, when it is needed: help must not wait for torch.

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lightning_edit.__about__ import __version__

__all__ = ["main"]

TRAINER_VERBS = {
    "fit": "make edits and keep them: one optimizer step a batch of requests",
    "validate": "measure a model as it stands",
    "test": "make edits, measure, and take them out again",
    "predict": "write texts before and after edits",
}
ARTIFACT_VERBS = {
    "apply": "write a saved edit into its base model",
    "revert": "take an edit out of an edited model, bit for bit",
    "diff": "compare edits or models, parameter by parameter",
    "export": "turn an edit into a LoRA adapter or a merged model",
    "report": "write a run's report again",
    "list": "what there is: methods, data sets, configurations, or the edits in a folder",
}
USAGE = """\
Change what a language model knows.

usage: lightning-edit VERB [options]      lightning-edit VERB --help

With a Trainer, driven by configurations that compose:
{trainer}

On saved edits:
{artifact}

  lightning-edit fit --config configs/edit.yaml
  lightning-edit fit -c method/rome.yaml -c data/facts.yaml -c trainer/ddp.yaml --print_config
  lightning-edit fit --model.help ROME

options:
  -h, --help     show this text
  --version      show the version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Words after ``lightning-edit``; the process's own when None.

    Returns:
        The exit status.
    """
    if arguments is not None:
        sys.argv[1:] = arguments  # the Trainer starts further processes by the same command line
    words = sys.argv[1:]
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if verb == "--version":
        sys.stdout.write(f"lightning_edit {__version__}\n")
        return 0
    if verb in TRAINER_VERBS:
        return _run("lightning_edit.cli.trainer", verb)
    if verb in ARTIFACT_VERBS:
        return _run("lightning_edit.cli.console", verb)
    sys.stderr.write(f"lightning-edit: there is no verb {verb!r}.{_near(verb)}\n\n{_usage()}")
    return 2


def _run(module: str, verb: str) -> int:
    from lightning_edit.core.errors import EditError

    try:
        importlib.import_module(module).main()
    except EditError as error:
        sys.stderr.write(f"lightning-edit {verb}: {error}\n")
        return 1
    return 0


def _usage() -> str:
    def lines(verbs: dict[str, str]) -> str:
        return "\n".join(f"  {verb:<10}{what}" for verb, what in verbs.items())

    return USAGE.format(trainer=lines(TRAINER_VERBS), artifact=lines(ARTIFACT_VERBS))


def _near(verb: str) -> str:
    import difflib

    near = difflib.get_close_matches(verb, [*TRAINER_VERBS, *ARTIFACT_VERBS], n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
