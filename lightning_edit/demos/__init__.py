# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A world small enough for doctests and tests: models, facts and edits.

The world has six countries and their capitals, all invented, and a tiny model knows it: its trained
weights come with the package, so that every processor starts from the same ones.
"""

from lightning_edit.demos.models import TinyKind, tiny_model, tiny_tokenizer, trained_tiny_model
from lightning_edit.demos.world import WORLD, TinyFact, tiny_requests, world_sentences

__all__ = [
    "WORLD",
    "TinyFact",
    "TinyKind",
    "tiny_model",
    "tiny_requests",
    "tiny_tokenizer",
    "trained_tiny_model",
    "world_sentences",
]
