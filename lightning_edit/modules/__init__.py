# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors as LightningModules."""

from lightning_edit.modules.base import EditModule
from lightning_edit.modules.fine_tune import FineTune
from lightning_edit.modules.full_tuning import FullTuning
from lightning_edit.modules.kn import KN
from lightning_edit.modules.loc_ft import LocFT
from lightning_edit.modules.lora import LoRA
from lightning_edit.modules.lora_tuning import LoRATuning
from lightning_edit.modules.rome import ROME
from lightning_edit.modules.ultra_edit import UltraEdit

__all__ = [
    "KN",
    "ROME",
    "EditModule",
    "FineTune",
    "FullTuning",
    "LoRA",
    "LoRATuning",
    "LocFT",
    "UltraEdit",
]
