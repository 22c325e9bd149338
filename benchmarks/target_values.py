# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Seconds a request of the search for target values, against a plain implementation.

    python benchmarks/target_values.py                 # 1, 4, 16 and 64 requests
    python benchmarks/target_values.py --counts 1 4
    python benchmarks/target_values.py --searches 0:150:3  # Gauss-Newton beside Adam, on 50 facts

The plain one takes one request at a time, as the papers' code does: every pass runs all rows
through the whole model and projects all positions on the vocabulary. Both sides make equally many
passes with the same 21 contexts and must find the same values. Requests differ in length, so the
plain one is timed on the very requests of each count: all passes of the first four, and three of
the others (behind the first 16, of every fourth), as its passes all take the same time. One
thread, float32; where the processor has bfloat16 products, ours is timed in bfloat16, too.

``--searches`` compares the two searches on a slice of the facts that the model knows: Adam makes
25 passes at most, as the preset says, Gauss-Newton a third of them, 8. Both end where the loss is
below 0.05, as edits do, or below ``--stop``, and each fact is edited by itself with what either
found and measured, teacher-forced. ``--few`` takes the bare prompt and MEMIT's five contexts in
place of ROME's twenty. Facts that ``--output`` holds are not edited again, so that a run that was
stopped goes on; the losses of each pass are in there, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_edit
from lightning_edit import (
    MEMIT,
    ROME,
    EditRequest,
    Evaluator,
    Facts,
    PromptTokenizer,
    load_model,
    load_tokenizer,
)
from lightning_edit.core.batch import pad_rows
from lightning_edit.modules.locate_then_edit.target_values import (
    TargetValueSettings,
    optimize_target_values,
)

SEARCH_STEPS = {"adam": 25, "gauss_newton": 8}
QUALITY = ("reliability", "generality", "locality")


def plain(
    editor: Any, layer: int, request: EditRequest, templates: Sequence[str], s: TargetValueSettings
) -> Tensor:
    """δ of one request, with the whole model and all logits in every pass, [D]."""
    model, tokens = editor.model, editor.tokens
    target = tokens.target(request.prompt, request.target_new)
    prompts = [
        tokens.subject_last(request.prompt, request.subject, t.removesuffix("{}"))
        for t in templates
    ]
    anchor = tokens.subject_last(s.kl_prompt.replace("{}", request.subject), request.subject)
    rows = [[*ids, *target[:-1]] for ids, _ in prompts] + [list(anchor[0])]
    at = torch.tensor([last for _, last in prompts] + [anchor[1]])
    ids, mask = pad_rows(rows, tokens.pad_id)
    every = torch.arange(len(rows))
    delta = torch.zeros(model.config.hidden_size, requires_grad=True)
    clean: list[Tensor] = []

    def add(_: Any, __: Any, output: Tensor) -> Tensor:
        if not clean:
            clean.append(output[0, at[0]].detach().clone())
        output = output.clone()
        output[every, at] += delta
        return output

    hook = editor.tree.mlp(layer).register_forward_hook(add)
    optimizer = torch.optim.Adam([delta], lr=s.lr)
    reference: Tensor | None = None
    try:
        for step in range(s.steps):
            logp = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits, dim=-1)
            nll = torch.zeros(())
            for row, (prompt, _) in enumerate(prompts):
                places = logp[row, len(prompt) - 1 : len(prompt) - 1 + len(target)]
                nll = nll - places.gather(1, torch.tensor(target)[:, None]).mean() / len(prompts)
            own = logp[-1, anchor[1]]
            reference = own.detach() if reference is None else reference
            kl = s.kl_factor * (own.exp() * (own - reference)).sum()
            wd = s.weight_decay * torch.linalg.vector_norm(delta) / clean[0].norm() ** 2
            if step == s.steps - 1:
                break
            (delta.grad,) = torch.autograd.grad(nll + kl + wd, [delta])
            optimizer.step()
            with torch.no_grad():
                limit = s.clamp_norm_factor * clean[0].norm()
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    finally:
        hook.remove()
    return delta.detach()


def seconds_of(run: Any) -> tuple[float, Any]:
    began = time.process_time()
    found = run()
    return time.process_time() - began, found


def matrix_share(run: Any) -> float:
    """Share of the time that is bare matrix products."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = profiler.key_averages()
    products = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
    whole = sum(event.self_cpu_time_total for event in events)
    return float(sum(e.self_cpu_time_total for e in events if e.key in products) / whole)


def compare_searches(
    method: str, facts: slice, few: bool, stop: float, limit: float, output: Path
) -> None:
    """Passes, losses, CPU seconds and quality of edits by both searches, fact by fact."""
    model, tokenizer = load_model("smollm2").requires_grad_(False), load_tokenizer("smollm2")
    contexts = MEMIT.from_model(model, tokenizer, preset="smollm2").template_groups if few else None
    kind_of: Any = getattr(lightning_edit, method)
    editors = {
        kind: kind_of.from_model(
            model,
            tokenizer,
            preset="smollm2",
            context_templates=contexts,
            search=kind,
            steps=steps,
            stop_loss=stop,
        )
        for kind, steps in SEARCH_STEPS.items()
    }
    for editor in editors.values():  # what is made once is not of an edit's time
        _ = editor.templates
        for site in editor.sites(editor.tree):
            editor.factor(site.layer)
    evaluator = Evaluator(model, PromptTokenizer(tokenizer), readings=["teacher_forced"])
    lines = output.read_text("utf-8").splitlines() if output.is_file() else []
    rows = [json.loads(line) for line in lines]
    done = {row["id"] for row in rows}
    began = time.monotonic()
    for request in Facts(known_to="smollm2").requests[facts]:
        if request.id in done:
            continue
        if time.monotonic() - began > limit:
            break
        baseline = evaluator.baseline([request])
        row: dict[str, Any] = {"id": request.id}
        for kind, editor in editors.items():
            spent, edit = seconds_of(lambda editor=editor, request=request: editor.edit(request))
            with edit.applied(model):
                scored = evaluator.evaluate([request], baseline).probes
            losses = [one["total"] for one in edit.details["target_values"].losses[0]]
            row[kind] = {"losses": losses, "seconds": spent} | {
                metric: [p.teacher_forced for p in scored if p.metric == metric]
                for metric in QUALITY
            }
        rows.append(row)
        with output.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    sys.stdout.write(searches_table(rows, stop) + "\n")


def searches_table(rows: Sequence[dict[str, Any]], stop: float) -> str:
    """What the searches came to, a line each, where they end at a loss."""
    out = [
        f"{len(rows)} facts",
        "search | passes at most | passes, mean | median | CPU seconds a request | loss, mean | "
        "median | as low as Adam's | " + " | ".join(QUALITY),
    ]
    # No search goes on once its loss is where it stops.
    goals = [max(row["adam"]["losses"][-1], stop) for row in rows]
    for kind, steps in SEARCH_STEPS.items():
        found = [row[kind] for row in rows]
        passes = [len(one["losses"]) for one in found]
        last = [one["losses"][-1] for one in found]
        reached = sum(loss <= goal for loss, goal in zip(last, goals, strict=True))
        scores = [
            statistics.mean(score for one in found for score in one[metric]) for metric in QUALITY
        ]
        out.append(
            f"{kind} | {steps} | {statistics.mean(passes):.1f} | {statistics.median(passes)} | "
            f"{statistics.mean(one['seconds'] for one in found):.2f} | "
            f"{statistics.mean(last):.3f} | {statistics.median(last):.3f} | {reached} | "
            + " | ".join(f"{score:.3f}" for score in scores)
        )
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=20, help="passes of each search")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--searches", metavar="START:STOP:STEP", help="facts for both searches")
    parser.add_argument("--seconds", type=float, default=1e9, help="no fact is begun after these")
    parser.add_argument("--method", default="ROME", help="whose settings the searches have")
    parser.add_argument("--few", action="store_true", help="six contexts in place of 21")
    parser.add_argument("--stop", type=float, default=0.05, help="the loss where searches end")
    parser.add_argument("--output", type=Path, default=Path("searches.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.searches is not None:
        facts = slice(*map(int, options.searches.split(":")))
        compare_searches(
            options.method, facts, options.few, options.stop, options.seconds, options.output
        )
        return
    model = load_model("smollm2").requires_grad_(False)
    editor: Any = ROME.from_model(
        model, load_tokenizer("smollm2"), preset="smollm2", layers=[options.layer]
    )
    templates = editor.templates
    requests = Facts(known_to=None).requests[: max(options.counts)]
    settings = replace(editor.settings, steps=options.steps, stop_loss=0.0)
    short = replace(settings, steps=min(3, settings.steps))
    half = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None

    def ours(count: int, dtype: torch.dtype | None = None) -> Any:
        with torch.no_grad():
            return optimize_target_values(
                editor.tree,
                editor.tokens,
                options.layer,
                requests[:count],
                templates,
                settings,
                dtype=dtype,
            )

    ours(1)  # warms allocators and kernels up
    chosen = [n for n in range(len(requests)) if n < 16 or n % 4 == 0]
    slow: dict[int, float] = {}
    found: dict[int, Tensor] = {}
    fast: dict[int, list[float]] = {count: [] for count in options.counts}
    rough: dict[int, list[float]] = {count: [] for count in options.counts}
    for n in chosen:
        few = settings if n < 4 else short
        seconds, found[n] = seconds_of(
            lambda n=n, few=few: plain(editor, options.layer, requests[n], templates, few)
        )
        slow[n] = seconds * settings.steps / few.steps
        for count in options.counts:  # between the plain ones
            turns = 3 if count < 16 else 1
            if len(fast[count]) == turns:
                continue
            fast[count].append(seconds_of(lambda count=count: ours(count))[0] / count)
            if half is not None:
                spent = seconds_of(lambda count=count: ours(count, half))[0]
                rough[count].append(spent / count)
    alike = min(4, len(chosen))
    same = ours(alike).deltas
    errors = [float((same[n] - found[n]).norm() / found[n].norm()) for n in range(alike)]
    plain_seconds = {
        count: statistics.mean(slow[n] for n in chosen if n < count) for count in options.counts
    }
    ratio = {
        str(c): round(plain_seconds[c] / statistics.median(fast[c]), 2) for c in options.counts
    }
    ratio_half = {
        str(c): round(plain_seconds[c] / statistics.median(v), 2) for c, v in rough.items() if v
    }
    share = matrix_share(lambda: ours(4))
    out = [f"largest difference of δ {max(errors):.1e}; CPU seconds a request"]
    out.append("requests | plain | ours | ratio | bfloat16 | ratio")
    for count in options.counts:
        half_seconds = f"{statistics.median(rough[count]):.2f}" if rough[count] else "–"
        out.append(
            f"{count} | {plain_seconds[count]:.2f} | {statistics.median(fast[count]):.2f} | "
            f"{ratio[str(count)]} | "
            f"{half_seconds} | {ratio_half.get(str(count), '–')}"
        )
    out.append(f"bare matrix products: {share:.0%} of our time at 4 requests")
    out.append(
        json.dumps({"ratio": ratio, "ratio_bf16": ratio_half, "matrix_share": round(share, 2)})
    )
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
