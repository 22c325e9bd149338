# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of editors share: a bare Trainer, snapshots and independent losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_edit import EditMemory, EditModule, EditRequest, WeightDelta
from lightning_edit.core.hashing import tensor_hash, weight_hash
from lightning_edit.evaluation.evaluator import Baseline

__all__ = [
    "autoregressive",
    "bare_trainer",
    "circumstances",
    "computed",
    "fingerprint",
    "plain_nll",
    "same",
    "same_edit",
    "snapshot",
]


def bare_trainer(**settings: Any) -> Trainer:
    """A Trainer on the CPU that writes nothing."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    return Trainer(**{**defaults, **settings})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, kept: dict[str, Tensor]) -> bool:
    """Whether the model has these parameters and no others, bit for bit."""
    now = dict(model.named_parameters())
    return now.keys() == kept.keys() and all(torch.equal(p, kept[n]) for n, p in now.items())


def fingerprint(model: nn.Module) -> str:
    """All that makes a model say what it says: its weights, and what its memory holds."""
    memory = EditMemory.find(model)
    if memory is None or not len(memory):
        return weight_hash(model)
    tensors = [tensor_hash(tensor) for tensor in memory.state_dict().values()]
    return " ".join([weight_hash(model), *tensors])


def circumstances(model: Any) -> dict[str, Any]:
    """All that is to be as it came whenever somebody has worked on a model, but for its weights."""
    modules = {n: m for n, m in model.named_modules() if "edit_memory" not in n}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in modules.items()},
        "classes": {n: type(m) for n, m in modules.items()},
        "hooks": {n: [list(getattr(m, h).values()) for h in hooks] for n, m in modules.items()},
        "kinds": {n: (p.dtype, p.device) for n, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation": (model.generation_config, model.generation_config.to_dict()),
    }


def same_edit(one: Any, other: Any) -> bool:
    """Whether two edits change the same by the same, bit for bit."""
    if isinstance(one, WeightDelta):
        same_names = list(one.changes) == list(other.changes)
        return same_names and all(torch.equal(one.dense(n), other.dense(n)) for n in one.changes)
    same_names = (one.kind, list(one.entries)) == (other.kind, list(other.entries))
    return same_names and all(
        entry is other.entries[n] or entry.equals(other.entries[n])
        for n, entry in one.entries.items()
    )


def computed(editor: EditModule[Any], requests: Sequence[EditRequest]) -> Any:
    """An edit as ``compute_edit`` leaves it, whose outcome is not measured."""
    return editor.session.edit(requests, editor.compute_edit, editor.provenance)


def autoregressive(editor: EditModule, requests: Sequence[EditRequest], metric: str) -> float:
    """Share of the probes of a metric that the model as it stands answers rightly."""
    found = editor.evaluator.evaluate(requests, Baseline({}))
    hits = [bool(p.autoregressive) for p in found.probes if p.metric == metric]
    return sum(hits) / len(hits)


def plain_nll(model: Any, prompt: Sequence[int], target: Sequence[int]) -> list[Tensor]:
    """NLL of each target token of one unpadded row, with all logits."""
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        decoder = torch.tensor([[start, *target[:-1]]])
        logits = model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=decoder).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 :]
    log_probs = torch.log_softmax(logits, -1)
    return [-log_probs[i, token] for i, token in enumerate(target)]
