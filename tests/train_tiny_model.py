# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Trains the tiny model of `lightning_edit.demos`: `python -m tests.train_tiny_model FILE`.

Its weights come with the package, because another instruction set rounds otherwise and so trains
other weights. Whoever changes the world or the architecture trains them anew, puts FILE in place of
`lightning_edit/demos/tiny_llama.safetensors`, and its hash into `lightning_edit/demos/models.py`.
"""

# Shapes: B sentences, T tokens, D hidden size, N answer tokens of all sentences, V vocabulary.

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_edit.demos import tiny_model, tiny_tokenizer, world_sentences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MIN_PROBABILITY", "answer_probabilities", "train"]

STEPS = 500
# No expectation about what the model knows can then rest on how a sum was rounded.
MIN_PROBABILITY = 0.95


def answer_probabilities(model: PreTrainedModel) -> torch.Tensor:
    """Probability of every token of every answer, and of the end after it, shape N."""
    tokenizer = tiny_tokenizer()
    pairs = world_sentences()
    tokens = tokenizer([f"{p} {a}.<end>" for p, a in pairs], padding=True, return_tensors="pt")
    starts_B = torch.tensor([len(tokenizer(prompt).input_ids) for prompt, _ in pairs])
    positions_T = torch.arange(tokens.input_ids.shape[1])
    is_answer_BT = tokens.attention_mask.bool() & (positions_T >= starts_B[:, None])
    answers_N = tokens.input_ids[is_answer_BT]
    hidden_BTD = model.model(**tokens).last_hidden_state
    logits_NV = model.lm_head(hidden_BTD[:, :-1][is_answer_BT[:, 1:]])
    probabilities_N: torch.Tensor = logits_NV.softmax(-1).gather(-1, answers_N[:, None])[:, 0]
    return probabilities_N


def train(seed: int = 0) -> PreTrainedModel:
    """The tiny Llama, trained until it is sure of every sentence of the world."""
    model = tiny_model(seed=seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0, foreach=False
    )
    for _ in range(STEPS):
        probabilities_N = answer_probabilities(model)
        if probabilities_N.min() >= MIN_PROBABILITY:
            return model
        optimizer.zero_grad()
        torch.autograd.backward(-probabilities_N.log().mean())
        optimizer.step()
    raise RuntimeError(f"The tiny model did not learn its world in {STEPS} steps (seed {seed}).")


if __name__ == "__main__":
    from safetensors.torch import save_model

    file = Path(sys.argv[1])
    save_model(train(), str(file))
    print(f"{file}: SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}")
