# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which room may import which, and what every file looks like, read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_edit"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = sorted(
    path
    for folder in ("lightning_edit", "tests", "examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
HEADER = "# Copyright the lightning_edit developers.\n# SPDX-License-Identifier: Apache-2.0\n"
OPTIONAL = {"rich", "peft", "matplotlib", "datasets", "gguf", "ruamel", "shtab"}
# Shared bases and building blocks: a module that is no method.
METHODS = {
    "alpha_edit",
    "calinet",
    "emmet",
    "fine_tune",
    "full_tuning",
    "ke",
    "grace",
    "ike",
    "kn",
    "loc_ft",
    "lora",
    "lora_tuning",
    "malmen",
    "memit",
    "mend",
    "r_rome",
    "rome",
    "trained_editor",
    "pmet",
    "scr",
    "serac",
    "t_patcher",
    "ultra_edit",
    "wise",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Dotted names that a file imports, leaving out those for the type checker."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name_of(path)} imports relatively"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(child)

    return walk(tree_of(path))


def others(path: Path, *, lazy: bool = True) -> set[str]:
    """Top-level packages beside the standard library that a file imports."""
    tops = {name.partition(".")[0] for name in imports(path, lazy=lazy)}
    return tops - set(sys.stdlib_module_names) - {"typing_extensions"}


def own(path: Path) -> set[str]:
    """Rooms and modules of this package that a file imports."""
    names = {name for name in imports(path) if name.startswith("lightning_edit.")}
    return {name.removeprefix("lightning_edit.") for name in names}


def room(name: str) -> list[Path]:
    files = sorted((PACKAGE / name).rglob("*.py"))
    assert files
    return files


def within(names: set[str], *allowed: str) -> bool:
    return all(name.partition(".")[0] in allowed for name in names)


@pytest.mark.parametrize("path", room("core"), ids=name_of)
def test_core_imports_torch_and_the_standard_library(path: Path) -> None:
    assert others(path, lazy=False) <= {"torch", "lightning_edit"}
    assert others(path) <= {"torch", "lightning_edit", "safetensors"}
    assert within(own(path), "core")


@pytest.mark.parametrize("path", room("functional"), ids=name_of)
def test_functions_take_tensors_and_know_no_nouns(path: Path) -> None:
    assert others(path) <= {"torch", "lightning_edit"}
    assert within(own(path), "functional")


@pytest.mark.parametrize("path", room("memories"), ids=name_of)
def test_memories_know_models_and_mathematics_alone(path: Path) -> None:
    assert others(path, lazy=False) <= {"torch", "lightning_edit"}
    assert within(own(path), "core", "functional", "memories")


@pytest.mark.parametrize("path", room("metrics"), ids=name_of)
def test_metrics_take_tensors(path: Path) -> None:
    assert others(path) <= {"torch", "torchmetrics", "lightning_edit", "matplotlib"}
    found = own(path)
    assert within(found, "functional", "metrics", "core")
    assert {name for name in found if name.startswith("core")} <= {
        "core.errors.MissingDependencyError"
    }


@pytest.mark.parametrize("path", room("report"), ids=name_of)
def test_reports_need_neither_torch_nor_lightning(path: Path) -> None:
    assert others(path) <= {"lightning_edit", "rich"}
    found = own(path)
    assert within(found, "report", "core", "__about__")
    assert {name for name in found if name.startswith("core")} <= {
        "core.errors.ArtifactError",
        "core.errors.MissingDependencyError",
    }


@pytest.mark.parametrize("path", room("evaluation"), ids=name_of)
def test_evaluation_knows_models_and_metrics_alone(path: Path) -> None:
    assert within(own(path), "core", "functional", "metrics", "evaluation")


@pytest.mark.parametrize("path", room("data"), ids=name_of)
def test_data_know_requests_alone(path: Path) -> None:
    assert within(own(path), "core", "data")


@pytest.mark.parametrize("path", room("callbacks"), ids=name_of)
def test_callbacks_import_the_base_of_the_methods_at_most(path: Path) -> None:
    modules = {name for name in own(path) if name.startswith("modules")}
    assert {name.rpartition(".")[0] for name in modules} <= {"modules.base"}


def test_methods_are_those_that_are_exported() -> None:
    source = (PACKAGE / "modules" / "__init__.py").read_text(encoding="utf-8")
    assert {name for name in METHODS if f"modules.{name} import" in source} == METHODS
    shared = {"activation_paths", "adapter_layers", "base", "contrasts"}
    shared |= {"descent", "factor_network", "factors"}
    shared |= {"gradient_passes", "hypernetwork", "judging", "key_pass", "learning"}
    shared |= {"lessons", "locate"}
    shared |= {"loop", "mass_edit", "projections", "prompting", "rank_one", "remember", "replay"}
    shared |= {"replicas", "ridge_edit", "second_moment", "tail", "target_loss", "target_values"}
    shared |= {"tuning"}
    files = {path.stem for path in room("modules")} - {"__init__"}
    assert files == METHODS | shared, "name a new file here: as a method, or as shared by methods"


@pytest.mark.parametrize("path", room("modules"), ids=name_of)
def test_methods_never_import_each_other(path: Path) -> None:
    if path.stem == "__init__":
        return
    modules = {name.split(".")[1] for name in own(path) if name.startswith("modules.")}
    assert not modules & METHODS
    assert within(
        own(path),
        "core",
        "evaluation",
        "functional",
        "memories",
        "metrics",
        "models",
        "modules",
        "optim",
    )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nobody_imports_the_command_line(path: Path) -> None:
    front = {"cli", "console", "__main__", "parsing"}
    if path.stem not in front:
        assert not {name.partition(".")[0] for name in own(path)} & front


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_optional_and_heavy_packages_are_imported_where_they_are_needed(path: Path) -> None:
    assert not others(path, lazy=False) & (OPTIONAL | {"transformers", "safetensors"})


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_room_reads_the_environment_or_prints(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("print", "os.getenv", "eval", "exec")
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "os.environ"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_unpickled_and_no_foreign_code_is_run(path: Path) -> None:
    assert not set(imports(path)) & {"pickle", "dill", "cloudpickle", "joblib"}
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert arguments.get("trust_remote_code", "False") == "False"
        if ast.unparse(node.func) == "torch.load":
            assert arguments.get("weights_only") == "True"


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_every_file_has_its_header(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(HEADER) or not text


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_file_of_the_package_is_short_and_says_what_it_is(path: Path) -> None:
    tree = tree_of(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600
    assert ast.get_docstring(tree)
    if any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body):
        assert "annotations" in {name.rpartition(".")[2] for name in imports(path)}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_a_file_offers_is_listed_and_sorted(path: Path) -> None:
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            if isinstance(node.value, ast.List) and not any(
                isinstance(item, ast.Starred) for item in node.value.elts
            ):
                names = ast.literal_eval(node.value)
                constants = sorted(name for name in names if name.isupper())
                classes = sorted(name for name in names if name[0].isupper() and not name.isupper())
                rest = sorted(name for name in names if not name[0].isupper())
                assert set(names) == {*constants, *classes, *rest}
                assert len(names) == len(set(names))
            return
    assert path.name in ("__about__.py", "__init__.py"), "no `__all__`"


def test_no_file_speaks_of_what_is_left_to_do() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "X" * 3)
    for path in EVERYTHING:
        text = path.read_text(encoding="utf-8")
        assert not [mark for mark in marks if mark in text], name_of(path)
