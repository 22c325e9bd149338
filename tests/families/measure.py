# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What works on an architecture, each figure held against unbatched, unpadded forward passes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edit import GRACE, MEMIT, ROME, FineTune
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.demos import tiny_requests, tiny_tokenizer
from lightning_edit.evaluation.scoring import continuations, prompt_ids, score_targets
from lightning_edit.models import load_model
from lightning_edit.modules.base import EditModule
from lightning_edit.passes.hooks import hooked

__all__ = ["METHODS", "Row", "measure", "naive_log_probs"]

METHODS: dict[str, Callable[[Any, int], EditModule[Any]]] = {
    "ROME": lambda model, layer: ROME.from_model(
        model, tiny_tokenizer(), layers=[layer], steps=3, **_SMALL
    ),
    "MEMIT": lambda model, layer: MEMIT.from_model(
        model, tiny_tokenizer(), layers=[layer], steps=3, **_SMALL
    ),
    "FineTune": lambda model, layer: FineTune.from_model(
        model, tiny_tokenizer(), layers=[layer], steps=2
    ),
    "GRACE": lambda model, layer: GRACE.from_model(
        model, tiny_tokenizer(), layers=[layer], steps=3, radius=0.5
    ),
}
_SMALL: dict[str, Any] = {"context_templates": ["{}", "So it is. {}"], "tokens_per_dimension": 2}
LONGEST = 6  # tokens of a continuation


@dataclass
class Row:
    """What was seen of an architecture; each cell is ``ok``, a refusal's words, or ``BAD``."""

    name: str
    kind: str
    mlp_out: list[str] = field(default_factory=list)
    cells: dict[str, str] = field(default_factory=dict)


def naive_log_probs(model: Any, prompt: Sequence[int], target: Sequence[int]) -> list[float]:
    """Log-probabilities of an answer's tokens by one unpadded pass without a cache."""
    device = next(model.parameters()).device
    if model.config.is_encoder_decoder:
        begin = _begin(model)
        ids = torch.tensor([[begin, *target[:-1]]], device=device)
        row = torch.tensor([list(prompt)], device=device)
        logits = model(input_ids=row, decoder_input_ids=ids, use_cache=False).logits[0]
    else:
        row = torch.tensor([[*prompt, *target[:-1]]], device=device)
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 :]
    logp = torch.log_softmax(logits.float(), -1)
    return [float(logp[i, token]) for i, token in enumerate(target)]


def _begin(model: Any) -> int:
    begin = getattr(model.config, "decoder_start_token_id", None)
    return int(model.config.bos_token_id if begin is None else begin)


def _naive_text(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens, each by one unpadded pass without a cache."""
    memory = EditMemory.find(model)
    written: list[int] = []
    for _ in range(count):
        if model.config.is_encoder_decoder:
            decoded = torch.tensor([[_begin(model), *written]])
            row, more = torch.tensor([list(prompt)]), {"decoder_input_ids": decoded}
        else:
            row, more = torch.tensor([[*prompt, *written]]), {}
        with nullcontext() if memory is None else memory.prompts_of([len(prompt)]):
            logits = model(input_ids=row, use_cache=False, **more).logits
        written.append(int(logits[0, -1].argmax()))
    return written


def _tokens(model: Any) -> PromptTokenizer:
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    return PromptTokenizer(tiny_tokenizer(), is_encoder_decoder=is_encoder_decoder)


def _tried(check: Callable[[], str]) -> str:
    try:
        return check()
    except EditError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"BAD {type(error).__name__}: {' '.join(str(error).split())[:160]}"


@torch.no_grad()
def evaluator(model: Any) -> str:
    """Whether scores and greedy texts are those of unpadded rows without a cache."""
    tokens = _tokens(model)
    requests = tiny_requests(4)
    prompts = [request.prompt for request in requests]
    ids = prompt_ids(model, tokens, prompts)
    pairs = [
        (ids[request.prompt], tokens.target(request.prompt, answer))
        for request in requests
        for answer in (request.target_new, f"{request.subject} of the {request.target_new}")
    ]
    worst = 0.0
    for (prompt, target), score in zip(pairs, score_targets(model, tokens, pairs), strict=True):
        wanted = naive_log_probs(model, prompt, target)
        worst = max(worst, *(abs(a - b) for a, b in zip(score.log_probs, wanted, strict=True)))
    if not worst < 1e-4:
        return f"BAD log-probabilities differ by {worst:.1e}"
    texts = continuations(model, tokens, prompts, max_new_tokens=LONGEST)
    for asked, text in zip(prompts, texts, strict=True):
        if list(text.ids) != _naive_text(model, ids[asked], len(text.ids)):
            return "BAD text differs"
    return "ok"


def edited(model: Any, method: str, layer: int) -> str:
    """Whether an edit is what it says, and leaves nothing behind."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    editor = METHODS[method](model, layer)
    tokens = editor.tokens
    requests = tiny_requests(3)
    edit = editor.edit(requests)
    found = edit.details.get("target_values")
    if found is not None:
        layer = edit.details.get("layer", layer)
        with torch.no_grad():
            for e, request in enumerate(requests):
                wanted = _patched(editor, request, layer, found.deltas[e])
                if not abs(wanted - found.probabilities[e]) < 1e-5 + 1e-4 * wanted:
                    return f"BAD claims {found.probabilities[e]:.6f} for {wanted:.6f}"
    edit.apply_(model)
    with torch.no_grad():
        ids = prompt_ids(model, tokens, [r.prompt for r in requests])
        pairs = [(ids[r.prompt], tokens.target(r.prompt, r.target_new)) for r in requests]
        scores = score_targets(model, tokens, pairs)
        if method != "GRACE":
            for (prompt, target), score in zip(pairs, scores, strict=True):
                wanted_nll = -sum(naive_log_probs(model, prompt, target)) / len(target)
                if not abs(wanted_nll - score.nll) < 1e-4:
                    return f"BAD measures {score.nll:.6f} for {wanted_nll:.6f}"
        else:
            for row, score in zip(edit.details["requests"], scores, strict=True):
                if not abs(row["searched_loss"] - score.nll) < 1e-3:
                    return f"BAD measures {score.nll:.4f} for {row['searched_loss']:.4f}"
            texts = continuations(
                model, tokens, [r.prompt for r in requests], max_new_tokens=LONGEST
            )
            for r, text in zip(requests, texts, strict=True):
                if list(text.ids) != _naive_text(model, ids[r.prompt], len(text.ids)):
                    return "BAD text differs"
    edit.revert_(model)
    if any(not torch.equal(before[name], p) for name, p in model.named_parameters()):
        return "BAD left weights changed"
    return "ok"


def _patched(editor: Any, request: Any, layer: int, delta: Tensor) -> float:
    """Mean probability of an answer over templates where the layer returns its target value."""
    model, tokens = editor.model, editor.tokens
    templates: list[str] = editor.templates
    place = editor.settings.place
    tree = ModelTree.of(model)
    module = tree.blocks[layer] if place == "block" else tree.mlp(layer)
    target = tokens.target(request.prompt, request.target_new, request.glued)
    total = 0.0
    for template in templates:
        prompt, last = tokens.subject_of(request, template.removesuffix("{}"))

        def add(_: nn.Module, __: object, output: Any, last: int = last) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            rows = whole.reshape(1, -1, whole.shape[-1]).clone()
            rows[0, last] += delta
            moved = rows.reshape(whole.shape)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        with hooked({module: add}):
            total += sum(naive_log_probs(model, prompt, target)) / len(target)
    return math.exp(total / len(templates))


def loaded(model: Any) -> str:
    """Whether ``load_model`` gives the model that was saved."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = load_model(folder)
    if type(again) is not type(model):
        return f"BAD gives {type(again).__name__}"
    weights = again.state_dict()
    same = all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    return "ok" if same else "BAD other weights"


def places(model: Any) -> tuple[list[str], str]:
    """The last projection of each layer's MLP or experts, and what was said of others."""
    tree = ModelTree.of(model)
    found, said = [], ""
    for layer, block in enumerate(tree.block_names):
        try:
            name = tree.mlp_site(layer).name
            found.append(name.removeprefix(f"{block}.").removesuffix(".weight"))
        except EditError as error:
            found.append("")
            said = str(error)
    return found, said


def measure(name: str, model: Any) -> Row:
    """All cells of an architecture."""
    row = Row(name, type(model).__name__)
    row.cells["evaluator"] = _tried(lambda: evaluator(model))
    try:
        row.mlp_out, said = places(model)
    except EditError as error:
        said = str(error)
    layer = next((i for i, place in enumerate(row.mlp_out) if place), 0)
    for method in METHODS:
        row.cells[method] = _tried(partial(edited, model, method, layer))
    row.cells["load_model"] = _tried(lambda: loaded(model))
    row.cells["said"] = said
    return row
