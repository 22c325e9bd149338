# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits made bare and in the chat template, each measured bare and in the chat template.

    python benchmarks/chat_form.py                                # ROME, 24 facts
    python benchmarks/chat_form.py --method MEMIT --seconds 500   # the same line goes on

The facts are spread over the package's relations, and known to the default model. Each is edited
alone, from the unedited model, with the preset of the default model, and measured by its prompt, a
rephrased one and two neighbors. What is measured is kept in ``--output``, a row an edit, and not
measured again.

``stated`` is the share of texts that state the new answer, ``exact`` the share that begin with it
(completions) or equal it (replies), ``forced`` the share of its tokens under teacher forcing,
``kept`` the share of neighbors' tokens that stay, and ``repeats`` the share of replies that hold a
run of three equal words or of a word repeated within itself.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import lightning_edit as le
from lightning_edit.evaluation.evaluator import ScoredProbe

REPEATS = re.compile(r"(\w{2,})(?:\W*\1){2}", re.IGNORECASE)
FORMS = {"bare": False, "chat": True}

Scores = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="ROME", help="the editor")
    parser.add_argument("--facts", type=int, default=24, help="how many of the known facts")
    parser.add_argument("--edited", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after an edit")
    parser.add_argument("--output", type=Path, default=Path("runs/chat_form.jsonl"))
    chosen = parser.parse_args()
    ends = time.monotonic() + chosen.seconds
    requests = spread(chosen.facts)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    rows = read(chosen.output)
    wanted = [(chosen.method, edited, r) for r in requests for edited in chosen.edited]
    if missing := [one for one in wanted if key(*one) not in rows]:
        with chosen.output.open("a", encoding="utf-8") as file:
            for name, row in measured(missing):
                rows[name] = row
                file.write(json.dumps({"edit": name, "scores": row}) + "\n")
                file.flush()
                if time.monotonic() > ends:
                    break
    show([(edited, rows[name]) for m, edited, r in wanted if (name := key(m, edited, r)) in rows])


def spread(count: int) -> list[le.EditRequest]:
    """Known facts at even distances, so that they are of all relations."""
    known = le.Facts().requests
    chosen = [known[i * len(known) // count] for i in range(count)]
    return [
        replace(r, rephrases=r.rephrases[:1], locality=r.locality[:2], portability=())
        for r in chosen
    ]


def key(method: str, edited: str, request: le.EditRequest) -> str:
    return f"{method} {edited} {request.id}"


def read(path: Path) -> dict[str, dict[str, Scores]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["edit"]: row["scores"] for row in map(json.loads, lines)}


def measured(
    missing: Sequence[tuple[str, str, le.EditRequest]],
) -> Iterator[tuple[str, dict[str, Scores]]]:
    """Makes edits, and yields each one's scores by the form in which it is asked for."""
    model, tokenizer = le.load_model("smollm2"), le.load_tokenizer("smollm2")
    evaluators = {
        asked: le.Evaluator(
            model,
            le.PromptTokenizer(tokenizer, chat_template=in_chat),
            readings=["teacher_forced", "autoregressive", "stated"],
        )
        for asked, in_chat in FORMS.items()
    }
    editors: dict[tuple[str, str], le.EditModule] = {}
    for method, edited, request in missing:
        before = {asked: evaluator.baseline([request]) for asked, evaluator in evaluators.items()}
        if (method, edited) not in editors:
            editors[method, edited] = getattr(le, method).from_model(
                model, tokenizer, preset="smollm2", chat_template=FORMS[edited]
            )
        row: dict[str, Scores] = {}
        with editors[method, edited].edit(request).applied(model):
            for asked, evaluator in evaluators.items():
                probes = evaluator.evaluate([request], before[asked]).probes
                row[asked] = scores(probes)
                text = f"{edited} -> {asked} | {request.target_new} | {probes[0].text}\n"
                sys.stdout.write(text)
                sys.stdout.flush()
        yield key(method, edited, request), row


def scores(probes: Sequence[ScoredProbe]) -> Scores:
    """The scores of an edit's probes."""
    found: Scores = defaultdict(list)
    for probe in probes:
        if probe.metric == "locality":
            found["kept"].append(float(probe.teacher_forced or 0))
        if probe.metric in ("reliability", "generality"):
            found[f"{probe.metric} stated"].append(float(bool(probe.stated)))
            found[f"{probe.metric} exact"].append(float(bool(probe.autoregressive)))
            found[f"{probe.metric} forced"].append(float(probe.teacher_forced or 0))
            found["repeats"].append(float(bool(REPEATS.search(probe.text))))
    return found


def show(rows: Sequence[tuple[str, dict[str, Scores]]]) -> None:
    """Writes the table of means."""
    found = defaultdict[str, Scores](lambda: defaultdict(list))
    counts = defaultdict[str, int](int)
    for edited, row in rows:
        for asked, own in row.items():
            counts[f"{edited} -> {asked}"] += 1
            for name, values in own.items():
                found[f"{edited} -> {asked}"][name] += values
    columns = list(next(iter(found.values())))
    sys.stdout.write("edited -> asked | edits | " + " | ".join(columns) + "\n")
    for name, own in found.items():
        cells = [f"{sum(own[c]) / len(own[c]):.2f}" for c in columns]
        sys.stdout.write(f"{name} | {counts[name]} | " + " | ".join(cells) + "\n")


if __name__ == "__main__":
    main()
