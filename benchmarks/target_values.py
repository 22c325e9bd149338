# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Seconds a request of the search for target values, against a plain implementation.

    python benchmarks/target_values.py                 # 1, 4, 16 and 64 requests
    python benchmarks/target_values.py --counts 1 4
    python benchmarks/target_values.py --searches 10   # Gauss-Newton beside Adam, on so many facts

The plain one takes one request at a time, as the papers' code does: every pass runs all rows
through the whole model and projects all positions on the vocabulary. Both sides make equally many
passes with the same 21 contexts and must find the same values. Requests differ in length, so the
plain one is timed on the very requests of each count: all passes of the first four, and three of
the others (behind the first 16, of every fourth), as its passes all take the same time. One
thread, float32; where the processor has bfloat16 products, ours is timed in bfloat16, too.

``--searches`` compares the two searches on facts that the model knows: Adam makes 25 passes, as the
preset says, Gauss-Newton 12. Neither stops early, so that passes to any loss can be told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import lightning_edit
from lightning_edit import ROME, EditRequest, Facts, load_model, load_tokenizer
from lightning_edit.core.batch import pad_rows
from lightning_edit.modules.locate_then_edit.target_values import (
    TargetValueSettings,
    optimize_target_values,
)


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


def searches(method: str, count: int, limit: float) -> None:
    """Passes, losses and CPU seconds of both searches, on the first facts that the model knows."""
    editor: Any = getattr(lightning_edit, method).from_model(
        load_model("smollm2").requires_grad_(False), load_tokenizer("smollm2"), preset="smollm2"
    )
    layer, templates = editor.sites(editor.tree)[-1].layer, editor.templates
    steps = {"adam": 25, "gauss_newton": 12}
    traces: dict[str, list[list[float]]] = {kind: [] for kind in steps}
    lengths: dict[str, list[float]] = {kind: [] for kind in steps}
    seconds = dict.fromkeys(steps, 0.0)
    began = time.monotonic()
    for request in Facts(known_to="smollm2").requests[:count]:
        if time.monotonic() - began > limit:
            break
        for kind in steps:
            settings = replace(editor.settings, steps=steps[kind], stop_loss=0.0, search=kind)
            spent, found = seconds_of(
                lambda settings=settings, request=request: optimize_target_values(
                    editor.tree, editor.tokens, layer, [request], templates, settings
                )
            )
            seconds[kind] += spent
            traces[kind].append([one["total"] for one in found.losses[0]])
            lengths[kind].append(float(found.deltas.norm() / found.outputs[0, 0].norm()))
    facts = len(traces["adam"])
    goals = {
        "the loss of Adam after 25": [trace[-1] for trace in traces["adam"]],
        "a loss of 0.05": [0.05] * facts,
    }
    out = [f"{method}, {facts} facts", "search | passes to | reached by | median | mean"]
    for goal, bounds in goals.items():
        for kind, own in traces.items():
            passes = [
                next((i for i, loss in enumerate(trace, 1) if loss <= bound), None)
                for trace, bound in zip(own, bounds, strict=True)
            ]
            reached = [n for n in passes if n is not None] or [0]
            out.append(
                f"{kind} | {goal} | {facts - passes.count(None)} | {statistics.median(reached)} | "
                f"{statistics.mean(reached):.1f}"
            )
    out.append("search | passes | median loss | mean loss")
    for kind, n in (("adam", 8), ("adam", 25), ("gauss_newton", 8), ("gauss_newton", 12)):
        losses = [trace[n - 1] for trace in traces[kind]]
        out.append(
            f"{kind} | {n} | {statistics.median(losses):.4f} | {statistics.mean(losses):.4f}"
        )
    out.append("search | CPU seconds a pass | median ‖δ‖/‖v‖ at the end")
    for kind, shares in lengths.items():
        each = seconds[kind] / facts / steps[kind]
        out.append(f"{kind} | {each:.3f} | {statistics.median(shares):.2f}")
    out.append(json.dumps({"seconds": seconds, "traces": traces}))
    sys.stdout.write("\n".join(out) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=20, help="passes of each search")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--searches", type=int, help="facts on which searches are compared")
    parser.add_argument("--seconds", type=float, default=1e9, help="no fact is begun after these")
    parser.add_argument("--method", default="ROME", help="whose settings the searches have")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.searches is not None:
        searches(options.method, options.searches, options.seconds)
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
