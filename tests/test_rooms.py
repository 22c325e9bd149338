# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the code itself."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_edit"
FILES = sorted(PACKAGE.rglob("*.py"))
OPTIONAL = {"rich", "peft", "matplotlib", "datasets", "gguf", "transformers", "safetensors"}
SHARED_BASES = {
    "adapter_layers",
    "base",
    "descent",
    "locate",
    "second_moment",
    "tail",
    "target_loss",
    "target_values",
    "tuning",
}


def imports(file: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, those for type checkers left out."""

    def visit(node: ast.AST, inside: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            nested = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            if isinstance(child, ast.Import) and not (top_level and inside):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not (top_level and inside):
                yield child.module or ""
            yield from visit(child, nested)

    return visit(ast.parse(file.read_text()), inside=False)


def room(name: str) -> list[Path]:
    return sorted((PACKAGE / name).rglob("*.py"))


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", [*room("core"), *room("functional")], ids=name_of)
def test_nouns_and_mathematics_need_torch_alone(file: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "lightning_edit"}
    assert {name.split(".")[0] for name in imports(file, top_level=True)} <= allowed


@pytest.mark.parametrize("file", room("functional"), ids=name_of)
def test_mathematics_takes_tensors_not_nouns(file: Path) -> None:
    ours = [name for name in imports(file) if name.startswith("lightning_edit")]
    assert all(name.startswith("lightning_edit.functional") for name in ours), ours


@pytest.mark.parametrize("file", room("metrics"), ids=name_of)
def test_metrics_know_mathematics_alone(file: Path) -> None:
    ours = {".".join(name.split(".")[:2]) for name in imports(file) if "lightning_edit" in name}
    assert ours <= {"lightning_edit.functional", "lightning_edit.metrics", "lightning_edit.core"}


@pytest.mark.parametrize("file", room("report"), ids=name_of)
def test_reports_need_neither_torch_nor_lightning(file: Path) -> None:
    names = set(imports(file))
    assert not {name.split(".")[0] for name in names} & {"torch", "lightning", "transformers"}
    ours = {name for name in names if name.startswith("lightning_edit.")}
    allowed = ("lightning_edit.report", "lightning_edit.core.errors")
    assert all(name.startswith(allowed) for name in ours), ours


@pytest.mark.parametrize("file", room("callbacks"), ids=name_of)
def test_callbacks_know_no_method(file: Path) -> None:
    methods = [name for name in imports(file) if name.startswith("lightning_edit.modules")]
    assert set(methods) <= {"lightning_edit.modules.base"}


@pytest.mark.parametrize("file", room("modules"), ids=name_of)
def test_methods_do_not_know_each_other(file: Path) -> None:
    if file.name == "__init__.py":
        return
    prefix = "lightning_edit.modules."
    others = {n.removeprefix(prefix) for n in imports(file) if n.startswith(prefix)}
    assert others <= SHARED_BASES


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_file_keeps_the_house_rules(file: Path) -> None:
    text = file.read_text()
    lines = text.splitlines()
    assert len(lines) <= 600
    assert lines[0] == "# Copyright the lightning_edit developers."
    assert lines[1] == "# SPDX-License-Identifier: Apache-2.0"
    assert not {name.split(".")[0] for name in imports(file, top_level=True)} & OPTIONAL
    if name_of(file) not in ("__main__.py", "console.py"):
        assert "lightning_edit.cli" not in set(imports(file))
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_tables_of_contents_name_each_thing_once(file: Path) -> None:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            constants = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            assert len(set(constants)) == len(constants)
