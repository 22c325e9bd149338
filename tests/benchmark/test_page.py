# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A comparison's page in a browser: it sorts, filters, draws, and asks nobody for anything."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from lightning_edit.benchmark.figure import Figure
from lightning_edit.benchmark.statistics import RATES, READINGS
from lightning_edit.benchmark.tables import write_tables

playwright = pytest.importorskip("playwright.sync_api")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Reliability after two edits and at the end; seven methods are more than one picture holds.
METHODS = {"A": (0.9, 0.1), "B <b>": (0.5, 0.5), "C": (0.2, 0.8)} | {
    f"M{i}": (0.3, 0.3) for i in range(4)
}
MEBIBYTES = {"A": 900, "B <b>": 2048, "C": 80}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def figures_of(data: str) -> Iterator[Figure]:
    for method, values in METHODS.items():
        for edits, value in zip((2, 10), values, strict=True):
            for metric in RATES:
                for reading in READINGS:
                    yield Figure(
                        data,
                        "sequential",
                        method,
                        edits,
                        edits == 10,
                        metric,
                        reading=reading,
                        value=value,
                        low=value,
                        high=value,
                        n=10,
                        requests=10,
                    )
        if method in MEBIBYTES:
            held = MEBIBYTES[method] * 2.0**20
            yield Figure(data, "sequential", method, 10, True, "peak_memory_bytes", value=held)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    found = [figure for data in ("zsRE", "CounterFact") for figure in figures_of(data)]
    page, *_ = write_tables(folder, "study", found, {"model": "<script>x()</script>"}, ["A note."])
    return page.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    made = browser.new_page(viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    wrong: list[str] = []
    made.on("request", lambda request: asked.append(request.url))
    made.on("console", lambda message: wrong.append(message.text))
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.goto(address)
    yield made
    assert asked == [address]
    assert wrong == []
    made.close()


def names(page: Page) -> list[str]:
    """Methods of the first table that are shown, in their order."""
    heads = page.locator(".compared").first.locator("tbody th:visible")
    return [str(text) for text in heads.all_inner_texts()]


def test_columns_sort_by_their_numbers_and_by_the_keyboard(page: Page) -> None:
    given = list(METHODS)
    assert names(page) == given
    button = page.get_by_role("button", name="peak memory").first
    button.click()
    assert names(page) == ["B <b>", "A", "C", *given[3:]]  # by bytes, not by the digits of units
    head = page.get_by_role("columnheader", name="peak memory").first
    assert head.get_attribute("aria-sort") == "descending"
    button.focus()
    page.keyboard.press("Enter")
    assert names(page) == ["C", "A", "B <b>", *given[3:]]  # those without a number stay last
    page.keyboard.press("Space")
    assert names(page) == given
    assert head.get_attribute("aria-sort") is None
    page.get_by_role("button", name="reliability").first.click()
    assert names(page)[0] == "C"


def test_rows_lines_and_data_sets_are_picked_out(page: Page) -> None:
    status = page.get_by_role("status")
    assert status.inner_text() == "70 of 70 rows are shown."  # 7 + 7 · 4 of each data set
    page.get_by_role("checkbox", name="A", exact=True).uncheck()
    assert names(page) == list(METHODS)[1:]
    assert page.locator('[data-series="A"]:visible').count() == 0
    page.get_by_role("checkbox", name="CounterFact").uncheck()
    assert page.get_by_role("heading", name="CounterFact").count() == 0
    for metric in RATES[1:]:
        page.get_by_role("checkbox", name=metric).uncheck()
    assert status.inner_text() == "12 of 70 rows are shown."
    assert page.locator("figure:visible").count() == 4  # of four and three lines, two readings
    for method in list(METHODS)[4:]:
        page.get_by_role("checkbox", name=method, exact=True).uncheck()
    assert page.locator("figure:visible").count() == 2
    page.get_by_role("button", name="Show all").click()
    playwright.expect(status).to_have_text("70 of 70 rows are shown.")
    assert page.locator("figure:visible").count() == 2 * 4 * 4


def test_curves_are_told_in_words_and_numbers(page: Page) -> None:
    figure = page.locator("figure").first
    picture = figure.get_by_role("img").first
    assert "A: 90 % after 2 edits, 10 % after 10" in str(picture.get_attribute("aria-label"))
    figure.locator("summary").click()
    assert figure.locator("tbody tr").first.inner_text().split() == ["A", "0.900", "0.100"]


def test_headings_and_tables_have_their_names(page: Page) -> None:
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(one => +one.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.locator(".compared:not(:has(caption))").count() == 0
    assert page.locator(".compared th:not([scope])").count() == 0
    assert page.get_by_role("group", name="Methods").get_by_role("checkbox").count() == 7
    # What scrolls by itself can be reached by the keyboard.
    assert page.locator(".scroll:not([tabindex='0'])").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_can_be_read(
    browser: Browser, address: str, width: int, scheme: str
) -> None:
    made = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    made.goto(address)
    assert made.evaluate("document.documentElement.scrollWidth") == width
    colors = made.locator(".compared td, .compared th, .filters label").evaluate_all(
        """all => all.map(one => {
            let back = one;
            while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)")
                back = back.parentElement;
            return [getComputedStyle(one).color, getComputedStyle(back).backgroundColor];
        })"""
    )
    assert min(contrast(*pair) for pair in {tuple(pair) for pair in colors}) >= 4.5  # WCAG, AA
    made.close()


def test_without_its_script_the_page_reads_all_the_same(browser: Browser, address: str) -> None:
    made = browser.new_page(java_script_enabled=False)
    made.goto(address)
    assert not made.locator("#choices").is_visible()
    assert made.locator("[data-data] > .scroll tbody tr:visible").count() == 70
    made.close()


def contrast(ink: str, paper: str) -> float:
    """Of two colors as CSS computes them, by WCAG 2."""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in color.removeprefix("rgb(").rstrip(")").split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)
