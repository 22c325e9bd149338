// Copyright the lightning_edit developers.
// SPDX-License-Identifier: Apache-2.0
// Sorts the tables of a comparison and shows what is chosen of it. The page reads well without.
"use strict";

const rowsOf = (body) => [...body.rows];
const original = new Map(
  [...document.querySelectorAll(".compared tbody")].map((body) => [body, rowsOf(body)]),
);

// Rows without a number stand last, whichever way the others go.
function compare(column, sign) {
  return (left, right) => {
    const [a, b] = [left.cells[column], right.cells[column]];
    if (!a.classList.contains("num")) {
      return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
    }
    const [x, y] = [a.dataset.key, b.dataset.key];
    if (x === undefined || y === undefined) {
      return Number(x === undefined) - Number(y === undefined);
    }
    return sign * (Number(x) - Number(y));
  };
}

// Numbers first go down, names up; then the other way; then as they were.
function sortBy(head) {
  const body = head.closest("table").tBodies[0];
  const ways = head.classList.contains("num")
    ? ["descending", "ascending", null]
    : ["ascending", "descending", null];
  const way = ways[(ways.indexOf(head.getAttribute("aria-sort")) + 1) % ways.length];
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  const rows = [...original.get(body)];
  if (way) {
    head.setAttribute("aria-sort", way);
    rows.sort(compare(head.cellIndex, way === "ascending" ? 1 : -1));
  }
  body.append(...rows);
}

for (const head of document.querySelectorAll(".compared thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  button.addEventListener("click", () => sortBy(head));
  head.append(button);
}

const section = document.getElementById("choices");
const form = section.querySelector("form");
const facets = ["method", "metric", "data", "protocol"];

function show() {
  const left = new Map(
    facets.map((name) => [
      name,
      new Set([...form.querySelectorAll(`[name="${name}"]:not(:checked)`)].map((one) => one.value)),
    ]),
  );
  const is = (name, value) => value === undefined || !left.get(name).has(value);
  const marked = "[data-method], [data-series], [data-metric], [data-data]";
  for (const part of document.querySelectorAll(`main :is(${marked})`)) {
    const told = part.dataset;
    const chosen =
      is("method", told.method ?? told.series) &&
      is("metric", told.metric) &&
      is("data", told.data) &&
      is("protocol", told.protocol);
    part.toggleAttribute("hidden", !chosen);
  }
  // Neither headings without a row nor axes without a line.
  for (const [outer, inner] of [[".scroll:has(table)", "tbody tr"], ["figure", "g[data-series]"]]) {
    for (const whole of document.querySelectorAll(`[data-data] ${outer}`)) {
      const parts = [...whole.querySelectorAll(inner)];
      if (parts.every((part) => part.hasAttribute("hidden"))) whole.hidden = true;
      else if (!whole.dataset.metric) whole.hidden = false;
    }
  }
  const rows = [...document.querySelectorAll("[data-data] > .scroll tbody tr")];
  const shown = rows.filter((row) => !row.closest("[hidden]")).length;
  form.querySelector("output").textContent = `${shown} of ${rows.length} rows are shown.`;
}

form.addEventListener("change", show);
form.addEventListener("reset", () => setTimeout(show));
form.addEventListener("submit", (event) => event.preventDefault());
section.hidden = false;
show();
