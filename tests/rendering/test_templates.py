# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Values are escaped in templates of both kinds, and a missing one is an error."""

from __future__ import annotations

import sys
from pathlib import Path

import jinja2
import pytest
from markupsafe import Markup

from lightning_edit.rendering.templates import render

NAME = "templates_of_a_test"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / NAME / "templates"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    body = "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice(text) }} {{ done }}"
    for suffix in ("html", "md"):
        (folder / f"page.{suffix}").write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return NAME


def test_what_is_escaped_how(package: str) -> None:
    values = {"text": "<*\x1b>", "done": Markup("<b>_")}
    assert render(package, "page.html", **values) == "&lt;*␛&gt;&lt;*␛&gt; <b>_"
    assert render(package, "page.md", **values) == r"&lt;\*␛&gt;&lt;\*␛&gt; <b>_"
    with pytest.raises(jinja2.UndefinedError, match="'done' is undefined"):
        render(package, "page.md", text="")
