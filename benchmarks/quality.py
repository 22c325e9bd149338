# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors on facts that the default model knows, each fact alone and in batches.

    python benchmarks/quality.py --counterfact counterfact.json --output quality.jsonl
    python benchmarks/quality.py --output quality.jsonl --show      # the table of what is there
    python benchmarks/quality.py --counterfact counterfact.json --output memory.jsonl \
        --methods GRACE WISE TPatcher SCR IKE --facts 200 --modes 1 --retention 50

Facts are those of the package and, with ``--counterfact``, as many of CounterFact, of which the
unedited model writes the old answer by itself. They are edited each alone (``alone``), and one
batch after another into the same model, measured when all are in (``1``, ``10``, ``50``: requests
of a batch). Target values of the unedited model are searched once for methods that share them,
since they are the same in a batch and alone. A run that was stopped goes on where it was, with the
next fact where each is edited alone.

The methods run with their presets for the default model, ``configs/method``. ``--steps`` gives all
target values another number of passes, 20 in the figures of ``docs/measured.md``.

``--held-out n`` takes n further facts, none of which is among those of ``--facts``: settings are
chosen by these, so that the others tell what they are worth. ``--own-contexts`` leaves contexts to
the presets.

With ``--retention n`` the edits so far are measured after every n, group by group of n, which shows
what later edits leave of earlier ones. ``--set`` puts settings over those of the presets,
as JSON, and ``--label`` the rows another name:

    python benchmarks/quality.py --methods SCR --label "SCR, MiniLM" \
        --set '{"encoder": "all-MiniLM-L6-v2", "threshold": 0.7}'
    python benchmarks/quality.py --methods TrainedEditor --label SERAC \
        --set '{"checkpoint": "serac.ckpt"}'
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lightning_edit as le
from lightning_edit.core.batch import EditBatch
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.evaluation.evaluator import Baseline, Evaluator, ScoredProbe
from lightning_edit.modules.locate_then_edit.target_values import TargetValues
from lightning_edit.presets import load_preset

METRICS = ("reliability", "generality", "locality", "portability")
ALONE = "alone"
LOCATE = ("ROME", "RROME", "MEMIT", "PMET", "EMMET", "AlphaEdit", "UltraEdit", "KN")
TUNE = ("FineTune", "LoRA", "LocFT")
REMEMBER = ("GRACE", "WISE", "TPatcher", "CaliNET", "SCR", "IKE", "SERAC", "TrainedEditor")
# Over the presets: only what is committed by `fit` can be measured here.
OVER: dict[str, dict[str, Any]] = {"SERAC": {"pretrained": True}}


def few_probes(request: le.EditRequest) -> le.EditRequest:
    """At most two rephrasings, three locality and two portability probes."""
    return replace(
        request,
        rephrases=request.rephrases[:2],
        locality=request.locality[:3],
        portability=request.portability[:2],
    )


def known_facts(
    model: Any, tokenizer: Any, counterfact: str | None, count: int, cache: Path
) -> list[Any]:
    """Facts whose old answer the model writes by itself, half of them from CounterFact if it can.

    Args:
        model: The unedited model.
        tokenizer: Its tokenizer.
        counterfact: A file of CounterFact.
        count: Facts wanted.
        cache: Where the ids of those that were found are kept for the next run.
    """
    sets = [le.Facts().requests]
    if counterfact is not None:
        sets.append(le.CounterFact(path=counterfact).requests)
    if cache.is_file():
        by_id = {request.id: request for requests in sets for request in requests}
        return [few_probes(by_id[name]) for name in json.loads(cache.read_text("utf-8"))]
    evaluator = Evaluator(model, le.PromptTokenizer(tokenizer), readings=["autoregressive"])
    known: list[list[Any]] = []
    for requests in sets:
        found: list[Any] = []
        seen: set[str] = set()
        for start in range(0, len(requests), 50):
            old = [r for r in requests[start : start + 50] if r.target_old]
            asked = [replace(r.reversed(), rephrases=(), locality=(), portability=()) for r in old]
            scored = evaluator.evaluate(asked, Baseline({})).probes
            for request, probe in zip(old, scored, strict=True):
                if probe.autoregressive and request.subject not in seen:
                    seen.add(request.subject)
                    found.append(few_probes(request))
            if len(found) >= count:
                break
        known.append(found)
    share = -(-count // len(sets))
    facts = [fact for found in known for fact in found[:share]]
    facts = (facts + [fact for found in known for fact in found[share:]])[:count]
    cache.write_text(json.dumps([fact.id for fact in facts]), encoding="utf-8")
    return facts


class Shared:
    """Target values of the unedited model, searched once for all methods that look for the same."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], TargetValues] = {}

    def of(self, editor: Any) -> None:
        """Has an editor take them from here while its model is unedited."""
        search: Callable[[EditBatch, int], TargetValues] = editor.target_values

        def target_values(batch: EditBatch, layer: int) -> TargetValues:
            if editor.delta.changes:
                return search(batch, layer)
            keys = [
                (r.id, layer, editor.settings, tuple(map(tuple, editor.template_groups)))
                for r in batch.requests
            ]
            missing = [i for i, key in enumerate(keys) if key not in self._found]
            if missing:
                found = search(batch.select(missing), layer)
                for place, i in enumerate(missing):
                    self._found[keys[i]] = found.select([place])
            return TargetValues.joined([self._found[key] for key in keys])

        editor.target_values = target_values


def hits(probes: Sequence[ScoredProbe]) -> Iterator[tuple[str, float]]:
    for probe in probes:
        if probe.teacher_forced is not None:
            yield f"{probe.metric}/teacher_forced", float(probe.teacher_forced)
        if probe.autoregressive is not None:
            yield f"{probe.metric}/autoregressive", float(probe.autoregressive)


def mean(scores: Sequence[float]) -> float:
    return round(sum(scores) / len(scores), 3)


def kept(evaluator: Evaluator, requests: Sequence[Any], group: int) -> list[float]:
    """Teacher-forced reliability of the edits so far, group by group."""
    bare = [replace(r, rephrases=(), locality=(), portability=()) for r in requests]
    scored = evaluator.evaluate(bare, Baseline({})).probes
    found = [float(p.teacher_forced) for p in scored if p.teacher_forced is not None]
    return [mean(found[start : start + group]) for start in range(0, len(found), group)]


def run_alone(
    editor: Any, requests: Sequence[Any], label: str, file: Path
) -> tuple[list[tuple[str, float]], float]:
    """Scores of each edit by itself, and their CPU seconds; a line a fact goes into the file."""
    evaluator = Evaluator(editor.model, editor.tokens)
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    kept = [row for row in map(json.loads, lines) if row["label"] == label]
    done = {row["id"]: row for row in kept}
    for request in requests:
        if request.id in done:
            continue
        began = time.process_time()
        edit = editor.edit(request)
        seconds = time.process_time() - began
        baseline = evaluator.baseline([request])
        with edit.applied(editor.model):
            scores = list(hits(evaluator.evaluate([request], baseline).probes))
        done[request.id] = {"label": label, "id": request.id, "seconds": seconds, "scores": scores}
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(done[request.id]) + "\n")
    rows = [done[request.id] for request in requests]
    found = [(name, score) for row in rows for name, score in row["scores"]]
    return found, sum(row["seconds"] for row in rows)


def run(
    editor: Any, requests: Sequence[Any], mode: str, group: int | None, label: str, file: Path
) -> dict[str, Any]:
    """Edits with all requests and gives the model back."""
    found: list[tuple[str, float]] = []
    measuring = 0.0
    failed: list[str] = []
    retention: dict[int, list[float]] = {}
    if mode == ALONE:
        found, spent = run_alone(editor, requests, label, file)
    else:
        evaluator = Evaluator(editor.model, editor.tokens)
        baseline = evaluator.baseline(requests)
        began = time.process_time()
        size = int(mode)
        for start in range(0, len(requests), size):
            edit = editor.edit(requests[start : start + size])
            failed += edit.details.get("failed", {})
            editor.edit_optimizer.stage(edit)
            editor.edit_optimizer.step()
            held = min(start + size, len(requests))
            if group is not None and held // group > start // group:
                at = time.process_time()
                retention[held] = kept(evaluator, requests[:held], group)
                measuring += time.process_time() - at
        at = time.process_time()
        found += hits(evaluator.evaluate(requests, baseline).probes)
        measuring += time.process_time() - at
        editor.edit_optimizer.rewind()
        spent = time.process_time() - began - measuring
    names = dict.fromkeys(name for name, _ in found)
    scores = {name: [score for key, score in found if key == name] for name in names}
    return {
        "seconds": round(spent / len(requests), 2),
        "failed": failed,
        "scores": {name: mean(part) for name, part in scores.items()},
        "n": {name: len(part) for name, part in scores.items()},
        **({"retention": retention} if retention else {}),
    }


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a method and mode, each metric teacher-forced / autoregressive."""
    lines = [
        "| method | batch | " + " | ".join(METRICS) + " | CPU s an edit |",
        "|---|---|" + "---|" * (len(METRICS) + 1),
    ]
    for row in rows:
        cells = [
            " / ".join(
                f"{row['scores'].get(f'{metric}/{reading}', float('nan')):.2f}"
                for reading in ("teacher_forced", "autoregressive")
            )
            for metric in METRICS
        ]
        head = f"| `{row['method']}` | {row['mode']} | "
        lines.append(head + " | ".join(cells) + f" | {row['seconds']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--counterfact", help="a file of CounterFact; the package's facts alone")
    parser.add_argument("--output", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--held-out", type=int, help="take so many that are not among --facts")
    parser.add_argument("--own-contexts", action="store_true", help="those of each preset")
    parser.add_argument("--methods", nargs="+", default=LOCATE, choices=[*LOCATE, *TUNE, *REMEMBER])
    parser.add_argument("--modes", nargs="+", default=[ALONE, "50", "10", "1"])
    parser.add_argument("--steps", type=int, help="passes for a target value, at most")
    parser.add_argument("--set", type=json.loads, default={}, help="settings, as JSON")
    parser.add_argument("--label", help="instead of the method's name")
    parser.add_argument("--retention", type=int, help="measure all edits after every so many")
    parser.add_argument("--show", action="store_true", help="print the table of the output alone")
    options = parser.parse_args()
    lines = options.output.read_text("utf-8").splitlines() if options.output.is_file() else []
    rows = [json.loads(line) for line in lines]
    if not options.show:
        torch.set_num_threads(1)
        model, tokenizer = le.load_model("smollm2"), le.load_tokenizer("smollm2")
        cache = options.output.with_suffix(f".{options.facts}.json")
        requests = known_facts(model, tokenizer, options.counterfact, options.facts, cache)
        if options.held_out:
            more = options.facts + options.held_out
            cache = options.output.with_suffix(f".{more}.json")
            first = {request.id for request in requests}
            requests = known_facts(model, tokenizer, options.counterfact, more, cache)
            requests = [request for request in requests if request.id not in first]
        done = {(row["method"], row["mode"], row["facts"]) for row in rows}
        contexts: Any = None
        shared = Shared()
        for mode in options.modes:
            for name in options.methods:
                label = options.label or name
                if (label, mode, len(requests)) in done:
                    continue
                settings = load_preset(name, "smollm2") | OVER.get(name, {}) | options.set
                editor: Any = getattr(le, name).from_model(model, tokenizer, **settings)
                if hasattr(editor, "template_groups"):
                    if contexts is None:  # the same for all: bare, and behind five sampled texts
                        memit = le.MEMIT.from_model(model, tokenizer, preset="smollm2")
                        contexts = memit.template_groups
                    if not options.own_contexts:
                        settings |= {"context_templates": contexts}
                    settings |= {"steps": options.steps} if options.steps else {}
                    editor = getattr(le, name).from_model(model, tokenizer, **settings)
                    shared.of(editor)
                row = {"method": label, "mode": mode, "facts": len(requests)}
                alone = options.output.with_suffix(f".{len(requests)}.alone.jsonl")
                rows.append(row | run(editor, requests, mode, options.retention, label, alone))
                if (memory := EditMemory.find(model)) is not None:
                    memory.detach_()
                with options.output.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
                sys.stderr.write(tables(rows[-1:]).splitlines()[-1] + "\n")
    sys.stdout.write(tables(rows) + "\n")
    sys.stdout.write(
        json.dumps({f"{row['method']}/{row['mode']}": row["scores"] for row in rows}) + "\n"
    )


if __name__ == "__main__":
    main()
