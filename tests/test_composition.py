# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A class is abstract or final: what it has written, no other class of the package rewrites."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from tests.test_rooms import SOURCES, methods, name_of, tree_of

# Concrete methods that subclasses may override, each with its reason.
EXTENSION_POINTS = {
    "EditModule.default_layers": "most methods edit other layers than all where none are named",
    "EditModule.edited_names": "a few methods edit other weights than the MLPs' outputs",
    "EditModule.make_target": "memories are edited in place of weights",
    "EditDataModule.read_records": "some data sets are no JSON lines",
    "EditMemory.derive": "three memories keep what they look up in another shape than the entries",
    "EditMemory.narrowed": "an entry that loses a request changes in two memories",
    "EditMemory.rewrite": "edits that are prompts change what the model is asked",
    "EditDataModule.to_requests": "each data set has records of its own; ours need no reading",
}


@dataclass(frozen=True)
class Class:
    """A class as its source shows it."""

    where: str
    bases: tuple[str, ...]
    concrete: frozenset[str]
    abstract: frozenset[str]


def classes() -> dict[str, Class]:
    """All classes of the package by name."""
    found = {}
    for path in SOURCES:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                written = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                abstract = {
                    n.name
                    for n in written
                    if any("abstractmethod" in ast.unparse(d) for d in n.decorator_list)
                }
                concrete = {n.name for n in written if not n.name.startswith("__")} - abstract
                bases = tuple(ast.unparse(base).partition("[")[0] for base in node.bases)
                name = node.name if node.name[0] != "_" else f"{path.stem}.{node.name}"
                assert name not in found, f"two classes of the name {name}"
                found[name] = Class(name_of(path), bases, frozenset(concrete), frozenset(abstract))
    return found


def above(name: str, known: dict[str, Class]) -> list[str]:
    """The package's classes that a class derives from, nearest first."""
    found = []
    for base in known[name].bases:
        if base in known:
            found += [base, *above(base, known)]
    return found


def test_no_concrete_method_is_overridden_but_at_extension_points() -> None:
    known = classes()
    wrong, used = [], set()
    for name, one in known.items():
        for base in above(name, known):
            for method in sorted(one.concrete & known[base].concrete):
                tops = [b for b in [base, *above(base, known)] if method in known[b].concrete]
                point = f"{tops[-1]}.{method}"
                used.add(point)
                if point not in EXTENSION_POINTS:
                    wrong.append(f"{one.where}: {name}.{method} overrides that of {base}")
    assert not wrong, "\n".join(wrong)
    assert used == set(EXTENSION_POINTS), "a point that nothing uses is none"
    assert len(EXTENSION_POINTS) <= 8


def test_a_method_has_at_most_two_classes_of_the_package_above_it() -> None:
    known = classes()
    homes = {home.replace(".", "/") for home in methods()}
    for name, one in known.items():
        if one.where.removeprefix("lightning_edit/").removesuffix(".py") in homes:
            # Whatever is read as data, a data module, too, is read by `PlainCheckpoints`, and
            # whatever has arguments has them checked.
            every = {"PlainCheckpoints", "CheckedArguments"}
            editors = [base for base in above(name, known) if base not in every]
            assert len(editors) <= 2, f"{name}: {editors}"


def test_no_class_of_the_package_is_reached_by_two_ways() -> None:
    known = classes()
    for name in known:
        found = above(name, known)
        assert len(found) == len(set(found)), f"{name} has {found} above it"
