# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Subjects that a model reads first, where nothing of their own can be stored."""

# Shapes: T positions, D hidden.

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.request import EditRequest
from lightning_edit.passes.key_pass import key_pass_of

__all__ = ["sink_reasons"]

# A first position whose residual stream is this much longer than that of the words after it is a
# sink. Without one the ratio is about 1; in the default model it is 8 or more from layer 3 on.
SINK_RATIO = 3.0


def sink_reasons(
    tree: ModelTree, tokens: PromptTokenizer, requests: Sequence[EditRequest], layer: int
) -> dict[str, str]:
    """Requests whose subject ends where the model has its attention sink, with what to do.

    A model whose tokenizer puts no token before a text makes one of whatever token is first: from
    some layer on, the residual stream there is very long, and the same for all texts. So the
    subject has no key of its own, and what is stored at that key changes every text.

    Args:
        tree: A decoder-only model.
        tokens: Its tokenizer.
        requests: Edit requests.
        layer: The layer whose output is to change.

    Returns:
        A reason for each of them, by id.

    References:
        Massive Activations in Large Language Models, arXiv 2402.17762; Efficient Streaming Language
        Models with Attention Sinks, arXiv 2309.17453.
    """
    reasons: dict[str, str] = {}
    for request in requests:
        prompt, last = tokens.subject_of(request)
        if last > 0:
            continue
        row = [*prompt, *tokens.target(request.prompt, request.target_new, request.glued)]
        states = key_pass_of(tree, layer).capture(tree, [layer], [row], tokens.pad_id).state
        states = states.reshape(-1, *states.shape[-2:])[0]  # of several streams the first
        norms = torch.linalg.vector_norm(states.float(), dim=-1)
        ratio = float(norms[0] / norms[1:].median())
        if ratio > SINK_RATIO:
            reasons[request.id] = (
                f"its subject {request.subject!r} is the first token that the model reads, which "
                f"is its attention sink: the residual stream is {ratio:.0f} times as long there as "
                "after it and the same for every text, so that nothing can be stored for this "
                "subject alone. Put words before the subject, such as 'The company Microsoft was "
                "founded by', set `chat_template=True`, or choose a method that does not edit at "
                "the subject, such as FineTune or GRACE."
            )
    return reasons
