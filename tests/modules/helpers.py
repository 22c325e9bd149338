# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of editors share: a bare Trainer, snapshots and independent losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_edit import EditModule, EditRequest
from lightning_edit.evaluation.evaluator import Baseline

__all__ = ["autoregressive", "bare_trainer", "plain_nll", "same", "snapshot"]


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
