# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that opens anywhere: no network, no script, no file beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from itertools import groupby

from lightning_edit.rendering.escaping import is_web_address
from lightning_edit.report.glossary import METRICS, READINGS, metric_name, sort_metrics
from lightning_edit.report.markup import code_block, escape, facts, scroll, section
from lightning_edit.report.page_edits import edit_list
from lightning_edit.report.results import MetricRow, RunReport
from lightning_edit.report.summary import MIRAGE, Outcome, gap_sentence, gaps, headline, outcomes
from lightning_edit.report.svg import (
    gap_chart,
    layer_chart,
    metric_bar,
    sequence_chart,
    sequence_legend,
    sequence_series,
)
from lightning_edit.report.text import (
    DASH,
    byte_count,
    duration,
    flatten,
    interval,
    natural_key,
    number,
    percent,
)
from lightning_edit.report.undo import CAUTION, INTENDED_USE, UNDO, apply_commands, apply_python

__all__ = ["render_html"]

MAX_LAYERS = 40

# Nothing may be fetched or run, whatever a prompt or a model's answer says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_TILES = {
    "reliability": "new answers given",
    "generality": "rephrased prompts follow",
    "locality": "neighbors unchanged",
    "portability": "consequences follow",
}


def render_html(report: RunReport) -> str:
    """The report as a self-contained HTML page.

    Examples:
        >>> page = render_html(RunReport(method="ROME", notes=["<script>alert(1)</script>"]))
        >>> "<script" in page, page.startswith("<!doctype html>")
        (False, True)
    """
    style = files("lightning_edit.report").joinpath("page.css").read_text(encoding="utf-8")
    model = str(report.model.get("id") or "")
    title = f"{report.method} on {model}" if model else report.method
    sections = (
        _metrics(report),
        _gap(report),
        edit_list(report.edits),
        _sequence(report),
        _layers(report),
        _undo(report),
        _reproduce(report),
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)} · edit report</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            _header(report),
            "<main>",
            *filter(None, sections),
            "</main>",
            "<footer><p>Written by lightning_edit. The same facts lie beside this page as "
            "<code>report.md</code>, <code>results.json</code> and <code>edits.jsonl</code>."
            "</p></footer>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _header(report: RunReport) -> str:
    line = [f"<strong>{escape(report.method)}</strong>"]
    if is_web_address(report.paper):
        paper = escape(report.paper)
        line.append(f'<a href="{paper}" rel="noreferrer">{paper}</a>')
    elif report.paper:
        line.append(escape(report.paper))
    if report.model.get("id"):
        line.append(escape(report.model["id"]))
    if report.created:
        line.append(f"<time>{escape(report.created)}</time>")
    found = outcomes(report)
    tiles = "".join(
        _tile(found[metric], text) for metric, text in _TILES.items() if metric in found
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return (
        f'<header>\n<p class="eyebrow">{" · ".join(line)}</p>\n<h1>{escape(headline(report))}</h1>'
        + (f'\n<div class="tiles">{tiles}</div>' if tiles else "")
        + (f'\n<aside class="notes" aria-label="Notes"><ul>{notes}</ul></aside>' if notes else "")
        + "\n</header>"
    )


def _tile(outcome: Outcome, text: str) -> str:
    if outcome.hits is None:
        big = escape(percent(outcome.share))
    else:
        big = f"{outcome.hits}<small> of {outcome.total}</small>"
    width = f"{100 * min(max(outcome.share, 0.0), 1.0):.4g}"
    term = METRICS[outcome.metric]
    return (
        f'<div class="tile"><p class="big">{big}</p><p>{text}</p>'
        f'<div class="meter" aria-hidden="true"><span style="width:{width}%"></span></div>'
        f'<p class="quiet"><abbr title="{escape(term.meaning)}">{escape(term.label)}</abbr></p>'
        "</div>"
    )


def _metrics(report: RunReport) -> str:
    if not report.metrics:
        return ""
    bodies = []
    names = sort_metrics(report.metrics)
    for _, group in groupby(names, key=lambda key: metric_name(key).label):
        keys = list(group)
        rows = "".join(
            _metric_row(key, report.metrics[key], len(keys) if i == 0 else 0)
            for i, key in enumerate(keys)
        )
        bodies.append(f"<tbody>{rows}</tbody>")
    head = (
        '<thead><tr><th scope="col">Metric</th><th scope="col">Reading</th>'
        '<th scope="col" class="num">Before</th><th scope="col" class="num">After</th>'
        '<th scope="col"><span class="scale"><span>0 %</span><span>50 %</span>'
        '<span>100 %</span></span></th><th scope="col" class="num">95 % interval</th>'
        '<th scope="col" class="num"><abbr title="number of cases">n</abbr></th></tr></thead>'
    )
    legend = (
        '<ul class="legend"><li><span class="swatch after"></span>after</li>'
        '<li><span class="swatch before"></span>before</li>'
        '<li><span class="swatch whisker"></span>95 % interval of the value after</li></ul>'
    )
    table = scroll(
        '<table class="metrics"><caption class="hidden">Metrics before and after the edits'
        f"</caption>{head}{''.join(bodies)}</table>",
        "Metrics before and after",
    )
    return section("metrics", "What was measured", legend + table + _glossary(names))


def _metric_row(key: str, row: MetricRow, span: int) -> str:
    name = metric_name(key)
    cells = []
    if span:
        term = METRICS.get(name.metric)
        question = ""
        if term and not name.kind:
            question = f'<span class="quiet">{escape(term.question)}</span>'
        meaning = f' title="{escape(term.meaning)}"' if term else ""
        cells.append(
            f'<th scope="rowgroup" rowspan="{span}"><abbr{meaning}>{escape(name.label)}</abbr>'
            f"{question}</th>"
        )
    if name.reading:
        reading = READINGS.get(name.reading)
        meaning = f' title="{escape(reading.meaning)}"' if reading else ""
        label = f"<abbr{meaning}>{escape(name.reading_label)}</abbr>"
        cells.append(f'<th scope="row" class="reading">{label}</th>')
    else:
        cells.append("<td></td>")
    show = percent if name.is_rate else number
    if name.is_rate:
        ci = f"{percent(row.ci[0])} – {percent(row.ci[1])}" if row.ci else DASH
    else:
        ci = interval(row.ci)
    cells += [
        f'<td class="num">{escape(show(row.before))}</td>',
        f'<td class="num strong">{escape(show(row.after))}</td>',
        f"<td>{metric_bar(row) if name.is_rate else ''}</td>",
        f'<td class="num">{escape(ci)}</td>',
        f'<td class="num">{row.n}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _glossary(keys: Iterable[str]) -> str:
    names = [metric_name(key) for key in keys]
    terms = [METRICS[m] for m in dict.fromkeys(n.metric for n in names) if m in METRICS]
    terms += [READINGS[r] for r in dict.fromkeys(n.reading for n in names) if r in READINGS]
    items = "".join(f"<dt>{escape(t.label)}</dt><dd>{escape(t.meaning)}</dd>" for t in terms)
    return (
        f"<details><summary>What the words mean</summary><dl>{items}</dl></details>"
        if items
        else ""
    )


def _gap(report: RunReport) -> str:
    found = gaps(report)
    if not found:
        return ""
    sentence = gap_sentence(found)
    lead = f"<p>{escape(sentence)}</p>" if sentence else ""
    text = f'<p class="quiet">{escape(MIRAGE)}</p>'
    legend = (
        '<ul class="legend"><li><span class="dot forced"></span>teacher-forced</li>'
        '<li><span class="dot free"></span>autoregressive</li></ul>'
    )
    return section(
        "gap", "The mirage gap", lead + text + legend + scroll(gap_chart(found), "The mirage gap")
    )


def _sequence(report: RunReport) -> str:
    series = sequence_series(report)
    if not series:
        return ""
    body = sequence_legend(series) + scroll(sequence_chart(series), "Curves")
    read = [point for point in report.sequence if point.get("perplexity_ratio") is not None]
    if read:
        body += (
            f"<p>Ordinary prose after {read[-1]['edits']} edits: its perplexity is "
            f"{number(read[-1]['perplexity_ratio'])} times that of the unedited model.</p>"
        )
    return section("sequence", "Over the sequence of edits", body)


def _layers(report: RunReport) -> str:
    if not report.layers:
        return ""
    rows = [
        (name, entry.get("norm"), entry.get("relative_norm"))
        for name, entry in sorted(report.layers.items(), key=lambda item: natural_key(item[0]))
    ]
    text = "How far each weight matrix moved: ‖Δ‖, and its share of the size of the matrix, ‖W‖."
    if len(rows) > MAX_LAYERS:
        largest = {row[0] for row in sorted(rows, key=lambda r: -(r[1] or 0.0))[:MAX_LAYERS]}
        text += f" The {MAX_LAYERS} largest of {len(rows)}; all are in results.json."
        rows = [row for row in rows if row[0] in largest]
    body = f'<p class="quiet">{escape(text)}</p>{scroll(layer_chart(rows), "Size of the change")}'
    return section("layers", "Where the weights changed", body)


def _undo(report: RunReport) -> str:
    body = f"<p>{escape(INTENDED_USE)}</p><p>{escape(CAUTION)}</p>"
    if report.artifact:
        words, commands = "", apply_commands(report)
        if commands:
            words = "<p>Or write an edited copy of the model from the command line:</p>"
            words += code_block(commands)
        body = (
            f"<p>The edit lies in <code>{escape(report.artifact)}/</code> beside this page. "
            f"{escape(UNDO)}</p>"
            + code_block(apply_python(report))
            + words
            + "<h3>Before you use it</h3>"
            + body
        )
    return section(
        "undo", "How to apply and undo it" if report.artifact else "Before you use it", body
    )


def _reproduce(report: RunReport) -> str:
    model = {k: f"{v:,}" if k == "parameters" and v else v for k, v in report.model.items()}
    costs = {name: duration(value) for name, value in report.seconds.items()}
    if report.peak_memory_bytes is not None:
        costs["peak memory"] = byte_count(report.peak_memory_bytes)
    run = {
        "method": report.method,
        "paper": report.paper,
        "created": report.created,
        "requests sha256": report.requests_sha256,
    }
    tables: tuple[tuple[str, Mapping[str, object]], ...] = (
        ("Run", {k: v for k, v in run.items() if v}),
        ("Model", {k: v for k, v in model.items() if v not in (None, "", 0)}),
        ("Settings", dict(flatten(report.settings))),
        ("Versions", report.versions),
        ("Time and memory", costs),
    )
    body = "".join(facts(title, entries) for title, entries in tables if entries)
    return section("reproduce", "To reproduce it", f'<div class="columns">{body}</div>')
