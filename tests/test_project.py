# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What is written down twice agrees: versions, dates, lowest dependencies, workflows."""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_edit

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Neither is imported by the package or by what tests it.
TOOLS = {"mypy", "ruff", "types-pyyaml", "pytest-xdist"}
HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\S+))?$", re.MULTILINE)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def workflow(path: Path) -> dict[Any, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(path)["jobs"].values() for step in job["steps"]]


def lowest() -> dict[str, str]:
    """The lowest version of each dependency by pyproject.toml."""
    names = [*PROJECT["project"]["dependencies"]]
    for extra in (
        "cli",
        "compare",
        "data",
        "default-model",
        "dev",
        "encoders",
        "ledger",
        "peft",
        "plot",
    ):
        names += EXTRAS[extra]
    bounds = {}
    for requirement in map(Requirement, names):
        (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
        bounds[requirement.name.lower()] = bound
    return bounds


def test_the_lowest_versions_are_those_that_are_tried() -> None:
    lines = (line.partition("#")[0].strip() for line in read("constraints-lowest.txt").splitlines())
    pins = dict(line.split("==") for line in lines if line)
    assert list(pins) == sorted(pins)
    held = pins.pop("pyparsing")  # no dependency of ours, but of that age
    assert Version(held) < Version("3.3")
    tried = {name: Version(pin) for name, pin in pins.items()}
    assert tried == {name: Version(low) for name, low in lowest().items() if name not in TOOLS}


def test_the_versions_of_torch_that_are_tried_are_allowed() -> None:
    (torch,) = (
        requirement
        for requirement in map(Requirement, PROJECT["project"]["dependencies"])
        if requirement.name == "torch"
    )
    for name in ("constraints.txt", "constraints-lowest.txt"):
        (pin,) = re.findall(r"^torch==(\S+)$", read(name), re.MULTILINE)
        assert torch.specifier.contains(pin), name


def test_the_changelog_is_dated_and_the_newest_release_is_what_is_cited() -> None:
    (first, none), *released = HEADING.findall(read("CHANGELOG.md"))
    assert (first, none) == ("Unreleased", "")
    dates = [datetime.date.fromisoformat(date) for _, date in released]
    assert dates == sorted(dates, reverse=True)
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["version"], citation["date-released"]) == (released[0][0], dates[0])
    newest, ours = Version(released[0][0]), Version(lightning_edit.__version__)
    assert ours == newest or (ours > newest and ours.is_devrelease)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_do_little_and_use_actions_by_version(path: Path) -> None:
    found = workflow(path)
    assert found["permissions"] == {"contents": "read"}
    assert found["concurrency"]["group"]
    for job in found["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert set(job.get("permissions", {})) <= {"id-token", "pages"}
    for step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w/-]+@(v\d+|release/v1)", step["uses"]), step["uses"]
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
        for constraints in re.findall(r"constraints\S*\.txt", step.get("run", "")):
            assert (ROOT / constraints).is_file()


def test_workflows_try_every_python_and_system_that_is_promised() -> None:
    (job,) = workflow(ROOT / ".github" / "workflows" / "tests.yml")["jobs"].values()
    matrix = job["strategy"]["matrix"]
    says = re.compile(r"Programming Language :: Python :: (3\.\d+)")
    promised = [says.fullmatch(one) for one in PROJECT["project"]["classifiers"]]
    assert matrix["python"] == [match[1] for match in promised if match]
    assert PROJECT["project"]["requires-python"] == f">={matrix['python'][0]}"
    assert len(matrix["os"]) == 3
    assert {"newest"} == set(matrix["versions"])
    (further,) = matrix["include"]
    assert (further["versions"], further["python"]) == ("lowest", matrix["python"][0])


def test_the_site_is_built_with_what_the_extra_asks_for() -> None:
    path = ROOT / ".github" / "workflows" / "docs.yml"
    (install,) = (s["run"] for s in steps(path) if s.get("run", "").startswith("python -m pip"))
    assert re.findall(r"'([^']+)'", install) == EXTRAS["docs"]


def test_hooks_run_the_versions_that_are_installed() -> None:
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    revisions = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in hooks}
    (ruff,) = (one for one in map(Requirement, EXTRAS["dev"]) if one.name == "ruff")
    assert ruff.specifier.contains(revisions["ruff-pre-commit"].removeprefix("v"))
