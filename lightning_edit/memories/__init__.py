# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Memories that models consult while they run, and what is written into them."""

# Importing this room makes all of its memories known by name, for edits that lie in files.

from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.side_memory import EditMemory, MemoryEntry
from lightning_edit.memories.codebook import Codebook
from lightning_edit.memories.patches import PatchNeurons
from lightning_edit.memories.prompts import PromptMemory
from lightning_edit.memories.scope import ScopeMemory
from lightning_edit.memories.side_matrix import SideMatrices
from lightning_edit.memories.slots import CalibrationSlots

__all__ = [
    "CalibrationSlots",
    "Codebook",
    "EditMemory",
    "MemoryEntry",
    "MemoryWrite",
    "PatchNeurons",
    "PromptMemory",
    "ScopeMemory",
    "SideMatrices",
]
