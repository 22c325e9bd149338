# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Every method has a page of the site, which says what its class, its preset and the tables say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lightning_edit.artifacts.catalog import offers

DOCS = Path(__file__).parent.parent / "docs"
METHODS = [offer.name for offer in offers("methods")]


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """What mkdocs calls while it builds; no module of a package."""
    spec = importlib.util.spec_from_file_location("methods", DOCS / "methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page_has_words_settings_and_paper(hook: ModuleType, subtests: pytest.Subtests) -> None:
    for offer in offers("methods"):
        with subtests.test(offer.name):
            text = hook.method_page(offer.name)
            plain = text.replace("``", "")
            assert plain.startswith(f"# {offer.name}\n\n{offer.summary}")
            assert offer.paper in text
            assert "Args:" not in text
            assert re.search(r"^`-c method/\w+`:$", text, re.MULTILINE)


def test_every_configuration_is_on_one_page(hook: ModuleType) -> None:
    named = [name for names in hook.configurations().values() for name in names]
    folder = DOCS.parent / "configs" / "method"
    assert sorted(named) == sorted(f"method/{path.stem}" for path in folder.glob("*.yaml"))


def test_rows_are_those_of_the_tables(hook: ModuleType) -> None:
    text = hook.method_page("GRACE")
    lines = (DOCS / "measured.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `GRACE`")]
    assert len(rows) == 2
    assert all(row in text for row in rows)
    assert "`TPatcher`" not in text
    # What tells the four tables of one section from each other.
    titles = [one.words for one in hook.measured("ROME") if one.heading == "Locate, then edit"]
    assert titles[0] == "Each fact alone"
    assert len(set(titles[:4])) == 4
    assert "| LoRA | 1.00 / 1.00 |" in hook.method_page("LoRA")
    assert "[Each fact of CounterFact alone](../results/counterfact.md#" in hook.method_page("ROME")


def test_links_lead_to_headings_that_are_there(hook: ModuleType) -> None:
    for method in METHODS:
        for page, anchor in re.findall(
            r"\]\(\.\./([\w/]+\.md)(?:#([\w-]+))?\)", hook.method_page(method)
        ):
            text = (DOCS / page).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            anchors = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h.lower())) for h in headings}
            assert not anchor or anchor in anchors, (method, page, anchor)


def test_the_navigation_and_the_list_have_all(hook: ModuleType) -> None:
    config = SimpleNamespace(nav=["index.md", {"Methods": ["which_method.md"]}])
    hook.on_config(config)
    pages = [f"methods/{name}.md" for name in METHODS]
    assert config.nav[1] == {"Methods": ["which_method.md", *pages]}
    text = hook.on_page_markdown((DOCS / "which_method.md").read_text(encoding="utf-8"))
    assert hook.PLACE not in text
    assert all(f"]({page})" in text for page in pages)
