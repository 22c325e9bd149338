# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The parser of the command line: packaged configurations, and errors that say what was meant."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_edit.modules.base import EditModule
from lightning_edit.presets import config_folder
from lightning_edit.rendering.escaping import visible

__all__ = ["EditParser"]

_YAML_SOURCE = '"<unicode string>"'
# What jsonargparse says beside the matter, when none of the types of an option fits.
_NOISE = re.compile(
    r"\s*(?:- )?(?:Does not validate against any of the Union subtypes|Subtypes: .*|Errors:"
    r"|Expected a <class 'NoneType'>|Given value(?: type)?: .*"
    r"|Expected a path but .* either not accessible or invalid)"
)

# An option, and the class of which one of its own options was wrong.
_CLASS = re.compile(r'Parser key "([\w.]+)":\s+Problem with given class_path \'([\w.]+)\'')


class EditParser(LightningArgumentParser):
    """Lightning's parser, with errors that say what was wrong and what may have been meant."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = _plain(message) + _suggestion(message, self)
        if not self.exit_on_error:
            super().error(message, ex)
        # The usage of a verb lists some hundred options and would hide the message.
        verb = getattr(ex, "subcommand_parser", None) or self
        program = verb.prog.replace(" [options]", "")
        where = _CLASS.search(message)  # options of a class are in its own help alone
        shown = "--help" if where is None else f"--{where[1]}.help {where[2]}"
        sys.stderr.write(f"{program}: {visible(message)}\nAll options: {program} {shown}\n")
        self.exit(2)


def _plain(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip() and not _NOISE.fullmatch(line)]
    plain = "\n".join(dict.fromkeys(re.sub(r"^(\s*)- ", r"\1", line) for line in lines)).strip()
    if _YAML_SOURCE not in plain:
        return plain
    return plain.replace(_YAML_SOURCE, ", ".join(_damaged_configs()) or _YAML_SOURCE)


def _damaged_configs() -> list[str]:
    """The configurations of the command line that are no YAML: the parser does not name them."""
    import yaml

    damaged = []
    for option, file in itertools.pairwise(sys.argv):
        if option in ("-c", "--config") and Path(file).is_file():
            try:
                yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            except yaml.YAMLError:
                damaged.append(f"`{file}`")
    return damaged


def _suggestion(message: str, parser: LightningArgumentParser) -> str:
    """What the names that a message complains of may have been meant to be."""
    if "Did you mean" in message:
        return ""
    options = set(_options(parser))
    options |= {name.rpartition(".")[2] for name in options}
    known, wrong = options, re.findall(r"[Oo]ption '([\w.]+)' is not accepted", message)
    wrong += re.findall(r"does not accept option '([\w.]+)'", message)
    if not wrong:
        known = {*options, *_class_names()}
        wrong += re.findall(r"Expected a dot import path string: (\w+)", message)
        wrong += re.findall(r"Import path '?(\w+)'?", message)
        wrong += re.findall(r"(?:Unrecognized|unrecognized)[^:]*: (?:--)?([\w.]+)", message)
    for name in wrong:
        first, dot, rest = name.partition(".")
        if dot and first not in known:  # a section, with what stands in it
            near = _nearest(first, known)
            if near:
                return f"\nDid you mean `{near}.{rest}` instead of `{name}`?"
        near = _nearest(name.rpartition(".")[2], known)
        if near:
            return f"\nDid you mean `{near}` instead of `{name}`?"
    for path in re.findall(r"File does not exist: '([^']+)'", message):
        name = str(Path(path).relative_to(Path.cwd())) if Path.cwd() in Path(path).parents else path
        near = _nearest_config(name)
        if near:
            return f"\nDid you mean `{near}`, which comes with the package?"
    return ""


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like a misspelt one, whatever its case; none if all differ."""
    folded = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return folded[near[0]] if near else ""


def _nearest_config(name: str) -> str:
    """The packaged configuration that a name may have meant, with or without folder and suffix."""
    known = _packaged_configs()
    short = {path.removesuffix(".yaml"): path for path in known}
    short |= {Path(path).stem: path for path in reversed(known)}
    near = _nearest(name, known)
    return near or short.get(_nearest(name.removesuffix(".yaml"), short), "")


def _packaged_configs() -> list[str]:
    folder = config_folder()
    return [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.yaml"))]


def _options(parser: LightningArgumentParser) -> list[str]:
    names = [action.dest for action in parser._actions]
    for action in parser._actions:  # a verb has a parser of its own
        for verb in getattr(action, "_name_parser_map", {}).values():
            names += _options(verb)
    return names


def _class_names() -> list[str]:
    names: list[str] = []
    todo: list[type] = [EditModule, LightningDataModule, Callback]
    while todo:
        found: list[type] = type.__subclasses__(todo.pop())
        for cls in found:
            names.append(cls.__name__)
            todo.append(cls)
    return names
