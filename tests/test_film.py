# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The film in the README: a picture of what commands really print, line after line."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from lightning_edit import __version__

ROOT = Path(__file__).parent.parent
FILM = ROOT / "docs" / "film.svg"


@pytest.fixture(scope="module")
def film() -> ModuleType:
    spec = importlib.util.spec_from_file_location("film", ROOT / "docs" / "film.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(svg: str) -> str:
    """What the picture says, blanks as blanks."""
    root = ElementTree.fromstring(svg)  # noqa: S314 - drawn here
    found = root.iter("{http://www.w3.org/2000/svg}text")
    return "\n".join("".join(one.itertext()).replace("\xa0", " ") for one in found)


def test_the_script_films_what_a_command_prints(film: ModuleType, tmp_path: Path) -> None:
    film.main(["--output", str(tmp_path / "film.svg"), "--command", "lightning-edit --version"])
    svg = (tmp_path / "film.svg").read_text(encoding="utf-8")
    assert "$ lightning-edit --version" in texts(svg)
    assert f"lightning_edit {__version__}" in texts(svg)


def test_lines_appear_in_their_order_and_pauses_are_short(film: ModuleType) -> None:
    lines = [film.Line(0.5, "$ one"), film.Line(300.0, "x" * 150), film.Line(0.25, "<&>")]
    svg = film.draw(lines, "title")
    pairs = re.findall(r'animation-delay:([\d.]+)s"[^>]*film-line-(\d+)', svg)
    # The second line takes two rows.
    assert {int(row): float(delay) for delay, row in pairs} == {0: 0.5, 1: 1.7, 2: 1.7, 3: 1.95}
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "").replace(
        "https://www.textualize.io", ""
    )
    assert "<&>" in texts(svg)
    assert "prefers-reduced-motion" in svg


def test_a_command_that_fails_makes_no_film(film: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        film.record(["lightning-edit fitt"], tmp_path)
    assert "Did you mean `fit`?" in str(error.value.output)


def test_the_film_of_the_readme_shows_its_commands(film: ModuleType) -> None:
    svg = FILM.read_text(encoding="utf-8")
    said = texts(svg).replace("\n", "")
    for command in film.COMMANDS:
        assert f"$ {command}" in said
    assert "Reliability" in said
    assert "docs/film.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
