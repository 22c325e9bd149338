# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which room may import which, and what every file looks like, read from the sources."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_edit"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = sorted(
    path
    for folder in ("lightning_edit", "tests", "examples", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
# Sections of docstrings that mkdocstrings knows, and two that it sets in a box.
SECTIONS = {
    "Args",
    "Attributes",
    "Examples",
    "Note",
    "Raises",
    "References",
    "Returns",
    "Warns",
    "Yields",
}
HEADER = "# Copyright the lightning_edit developers.\n# SPDX-License-Identifier: Apache-2.0\n"
OPTIONAL = {
    "rich",
    "peft",
    "matplotlib",
    "datasets",
    "gguf",
    "pandas",
    "pyarrow",
    "ruamel",
    "sentence_transformers",
    "shtab",
    "sqlalchemy",
    "cryptography",
    "torchao",
    "lm_eval",
}
FAMILIES = {
    "locate_then_edit",
    "meta_learning",
    "fine_tuning",
    "memory_based",
    "added_parameters",
}
# Which rooms a room may import from; a room may always import from itself.
ROOMS = {
    "rendering": set(),
    "core": {"rendering"},
    "functional": set(),
    "passes": {"core", "functional"},
    "memories": {"core", "functional", "passes"},
    "metrics": {"core", "functional"},
    "evaluation": {"core", "functional", "metrics", "passes"},
    "tracing": {"core", "passes", "evaluation"},
    "forgetting": {"core", "functional", "passes"},
    "demos": {"core"},
    "report": {"core", "rendering", "__about__"},
    "data": {"checkpoints", "core"},
    "modules": {
        "checkpoints",
        "core",
        "evaluation",
        "functional",
        "memories",
        "metrics",
        "models",
        "optim",
        "passes",
        "presets",
    },
    "ledger": {"__about__", "artifacts", "core", "evaluation", "models", "modules", "optim"},
    "callbacks": {
        "core",
        "data",
        "evaluation",
        "forgetting",
        "functional",
        "ledger",
        "metrics",
        "modules",
        "rendering",
        "report",
        "tracing",
    },
    "serving": {"core", "rendering"},
    "artifacts": {
        "core",
        "evaluation",
        "functional",
        "models",
        "modules",
        "presets",
        "rendering",
        "report",
        "serving",
    },
    "benchmark": {
        "core",
        "data",
        "evaluation",
        "functional",
        "models",
        "modules",
        "presets",
        "rendering",
        "report",
    },
    "tuning": {
        "benchmark",
        "core",
        "data",
        "modules",
        "passes",
        "presets",
        "report",
        "tracing",
    },
    "cli": {
        "__about__",
        "artifacts",
        "benchmark",
        "callbacks",
        "checkpoints",
        "core",
        "ledger",
        "modules",
        "presets",
        "rendering",
        "report",
        "tuning",
    },
}
# Packages that a room may import at all, and those among them only where they are needed.
PACKAGES = {
    "core": ({"torch"}, {"pydantic", "safetensors", "yaml"}),
    "functional": ({"torch"}, set()),
    "passes": ({"torch"}, {"transformers"}),
    "memories": (
        {"torch"},
        {"safetensors", "sentence_transformers", "tokenizers", "transformers"},
    ),
    "metrics": ({"torch", "torchmetrics"}, {"matplotlib"}),
    "rendering": ({"markupsafe"}, {"huggingface_hub", "jinja2"}),
    "report": (set(), {"pydantic", "rich"}),
    "serving": (set(), {"peft"}),
}
# Of `core`, rooms without torch take the errors alone, and what writes and reads files.
ERRORS_ALONE = {"metrics", "report", "serving"}
WITHOUT_TORCH = {"arguments", "documents", "errors", "files"}


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


def dotted(path: Path) -> str:
    """Dotted name of a file of this package, without that of the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> list[Path]:
    files = sorted((PACKAGE / name).rglob("*.py"))
    assert files
    return files


def homes() -> dict[str, str]:
    """Public names and the modules where they live."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    nodes = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in nodes for alias in node.names}


def methods() -> set[str]:
    """The modules of public methods: all others in the families are shared by methods."""
    return {home for home in homes().values() if home.split(".")[0] == "modules"} - {"modules.base"}


def test_rooms_are_those_that_are_named_here() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ROOMS)
    inner = {path.name for path in (PACKAGE / "modules").iterdir() if path.is_dir()}
    assert inner - {"__pycache__"} == FAMILIES


def test_rooms_import_only_from_rooms_that_they_may_know() -> None:
    for name, known in ROOMS.items():
        for path in room(name):
            found = own(path)
            rooms = {one.partition(".")[0] for one in found}
            assert rooms <= known | {name}, f"{name_of(path)} imports {rooms - known - {name}}"
            if name in ERRORS_ALONE:
                parts = {one.split(".")[1] for one in found if one.startswith("core.")}
                assert parts <= WITHOUT_TORCH, name_of(path)


def test_rooms_import_only_packages_that_they_may_need() -> None:
    for name, (always, lazily) in PACKAGES.items():
        for path in room(name):
            assert others(path, lazy=False) <= always | {"lightning_edit"}, name_of(path)
            assert others(path) <= always | lazily | {"lightning_edit"}, name_of(path)


def test_callbacks_import_the_base_of_the_methods_at_most() -> None:
    for path in room("callbacks"):
        modules = {name for name in own(path) if name.startswith("modules")}
        assert {name.rpartition(".")[0] for name in modules} <= {"modules.base"}, name_of(path)


def test_methods_never_import_each_other() -> None:
    assert {name.split(".")[1] for name in methods()} == FAMILIES
    for path in room("modules"):
        modules = {name.rpartition(".")[0] for name in own(path) if name.startswith("modules.")}
        assert not modules & methods(), name_of(path)


def test_nobody_imports_the_command_line() -> None:
    for path in SOURCES:
        if path.parent.name != "cli" and path.stem != "__main__":
            front = {name.partition(".")[0] for name in own(path)} & {"cli", "__main__"}
            assert not front or name_of(path) == "lightning_edit/__init__.py", name_of(path)


def test_no_file_imports_one_that_imports_it() -> None:
    modules = {dotted(path): path for path in SOURCES}
    graph = {}
    for name, path in modules.items():
        found = {one if one in modules else one.rpartition(".")[0] for one in own(path)}
        graph[name] = sorted(found & set(modules) - {name})
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' → '.join((*above, name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_optional_and_heavy_packages_are_imported_where_they_are_needed() -> None:
    for path in SOURCES:
        found = others(path, lazy=False) & (OPTIONAL | {"transformers", "safetensors"})
        assert not found, f"{name_of(path)} imports {found}"


def test_no_room_reads_the_environment_or_prints() -> None:
    # But for the key of a server, which belongs neither into a file nor on a command line.
    keys = PACKAGE / "serving" / "endpoint.py"
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "os.getenv", "eval", "exec"), name_of(path)
            if isinstance(node, ast.Attribute) and path != keys:
                assert ast.unparse(node) != "os.environ", name_of(path)


def test_nothing_is_unpickled_and_no_foreign_code_is_run() -> None:
    for path in SOURCES:
        where = name_of(path)
        assert not set(imports(path)) & {"pickle", "dill", "cloudpickle", "joblib"}, where
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert arguments.get("trust_remote_code", "False") == "False", where
            if ast.unparse(node.func) == "torch.load":
                assert arguments.get("weights_only") == "True", where


def test_every_file_has_its_header() -> None:
    for path in EVERYTHING:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(HEADER) or not text, name_of(path)


def test_every_file_of_the_package_is_short_and_says_what_it_is() -> None:
    for path in SOURCES:
        tree = tree_of(path)
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, name_of(path)
        assert ast.get_docstring(tree), name_of(path)
        if any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body):
            names = {name.rpartition(".")[2] for name in imports(path)}
            assert "annotations" in names, name_of(path)


def test_what_a_file_offers_is_listed_once() -> None:
    for path in SOURCES:
        lists = [
            node.value
            for node in tree_of(path).body
            if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node.targets[0])
        ]
        if not lists:
            assert path.name in ("__about__.py", "__init__.py"), f"{name_of(path)}: no `__all__`"
        for found in lists:
            if isinstance(found, ast.List):
                names = ast.literal_eval(found)
                assert len(names) == len(set(names)), name_of(path)


def test_no_file_speaks_of_what_is_left_to_do() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "X" * 3)
    for path in EVERYTHING:
        text = path.read_text(encoding="utf-8")
        assert not [mark for mark in marks if mark in text], name_of(path)


def test_names_are_referred_to_in_one_syntax() -> None:
    """``[`ROME`][lightning_edit.ROME]``, and of public names alone, which have their pages."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    functional = tree_of(PACKAGE / "functional" / "__init__.py").body[-1]
    assert isinstance(functional, ast.Assign)
    known = set(homes()) | {f"functional.{name}" for name in ast.literal_eval(functional.value)}
    for path in [*EVERYTHING, *pages]:
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r":[a-z]+:`", text), f"{name_of(path)} has roles of Sphinx"
        for name, target in re.findall(r"\[`([\w.]+)`\]\[([\w.]*)\]", text):
            public = target.removeprefix("lightning_edit.")
            assert {public, public.rpartition(".")[0]} & known, f"{name_of(path)}: {target!r}"
            assert target.endswith(f".{name}"), f"{name_of(path)}: {name!r} is {target!r}"


def test_docstrings_have_the_sections_that_are_known() -> None:
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found = re.findall(r"^([A-Z][a-z]+):$", ast.get_docstring(node) or "", re.MULTILINE)
                assert set(found) <= SECTIONS, f"{name_of(path)}: {set(found) - SECTIONS}"
