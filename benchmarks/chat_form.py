# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits made bare and in the chat template, each measured bare and in the chat template.

    python benchmarks/chat_form.py                    # ROME, six facts
    python benchmarks/chat_form.py --method MEMIT

Every fact is edited alone, from the unedited model, with the preset of the default model, and
measured by its prompt, a rephrased one and two neighbors.
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
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning_edit as le

REPEATS = re.compile(r"(\w{2,})(?:\W*\1){2}", re.IGNORECASE)
FORMS = {"bare": False, "chat": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="ROME", help="the editor")
    parser.add_argument("--facts", type=int, default=6, help="how many of the demo facts")
    parser.add_argument("--edited", nargs="+", choices=FORMS, default=list(FORMS))
    chosen = parser.parse_args()
    model, tokenizer = le.load_model("smollm2"), le.load_tokenizer("smollm2")
    requests = [
        replace(r, rephrases=r.rephrases[:1], locality=r.locality[:2], portability=())
        for r in le.Facts(demo=True, limit=chosen.facts).requests
    ]
    evaluators = {
        asked: le.Evaluator(
            model,
            le.PromptTokenizer(tokenizer, chat_template=in_chat),
            readings=["teacher_forced", "autoregressive", "stated"],
        )
        for asked, in_chat in FORMS.items()
    }
    baselines = {asked: e.baseline(requests) for asked, e in evaluators.items()}
    found = defaultdict[str, dict[str, list[float]]](lambda: defaultdict(list))
    for edited in chosen.edited:
        editor = getattr(le, chosen.method).from_model(
            model, tokenizer, preset="smollm2", chat_template=FORMS[edited]
        )
        for request in requests:
            with editor.edit(request).applied(model):
                for asked, evaluator in evaluators.items():
                    probes = evaluator.evaluate([request], baselines[asked]).probes
                    add(found[f"{edited} -> {asked}"], probes)
                    text = f"{edited} -> {asked} | {request.target_new} | {probes[0].text}\n"
                    sys.stdout.write(text)
                    sys.stdout.flush()
    table = {
        name: {key: round(sum(own) / len(own), 2) for key, own in scores.items()}
        for name, scores in found.items()
    }
    columns = list(next(iter(table.values())))
    sys.stdout.write("edited -> asked | " + " | ".join(columns) + "\n")
    for name, row in table.items():
        sys.stdout.write(f"{name} | " + " | ".join(f"{row[c]:.2f}" for c in columns) + "\n")
    sys.stdout.write(json.dumps(table) + "\n")


def add(scores: dict[str, list[float]], probes: Sequence[Any]) -> None:
    """Adds the scores of an edit's probes."""
    for probe in probes:
        if probe.metric == "locality":
            scores["kept"].append(float(probe.teacher_forced or 0))
        if probe.metric in ("reliability", "generality"):
            scores[f"{probe.metric} stated"].append(float(bool(probe.stated)))
            scores[f"{probe.metric} exact"].append(float(bool(probe.autoregressive)))
            scores[f"{probe.metric} forced"].append(float(probe.teacher_forced or 0))
            scores["repeats"].append(float(bool(REPEATS.search(probe.text))))


if __name__ == "__main__":
    main()
