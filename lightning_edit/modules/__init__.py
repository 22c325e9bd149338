# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors as LightningModules."""

from lightning_edit.modules.alpha_edit import AlphaEdit
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.calinet import CaliNET
from lightning_edit.modules.emmet import EMMET
from lightning_edit.modules.fine_tune import FineTune
from lightning_edit.modules.full_tuning import FullTuning
from lightning_edit.modules.grace import GRACE
from lightning_edit.modules.ike import IKE
from lightning_edit.modules.ke import KE
from lightning_edit.modules.kn import KN
from lightning_edit.modules.loc_ft import LocFT
from lightning_edit.modules.lora import LoRA
from lightning_edit.modules.lora_tuning import LoRATuning
from lightning_edit.modules.malmen import MALMEN
from lightning_edit.modules.memit import MEMIT
from lightning_edit.modules.mend import MEND
from lightning_edit.modules.pmet import PMET
from lightning_edit.modules.r_rome import RROME
from lightning_edit.modules.remember import MemoryModule
from lightning_edit.modules.rome import ROME
from lightning_edit.modules.scr import SCR
from lightning_edit.modules.serac import SERAC
from lightning_edit.modules.t_patcher import TPatcher
from lightning_edit.modules.trained_editor import TrainedEditor
from lightning_edit.modules.ultra_edit import UltraEdit
from lightning_edit.modules.wise import WISE

__all__ = [
    "EMMET",
    "GRACE",
    "IKE",
    "KE",
    "KN",
    "MALMEN",
    "MEMIT",
    "MEND",
    "PMET",
    "ROME",
    "RROME",
    "SCR",
    "SERAC",
    "WISE",
    "AlphaEdit",
    "CaliNET",
    "EditModule",
    "FineTune",
    "FullTuning",
    "LoRA",
    "LoRATuning",
    "LocFT",
    "MemoryModule",
    "TPatcher",
    "TrainedEditor",
    "UltraEdit",
]
