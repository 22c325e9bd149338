# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Change what a language model knows, inside PyTorch Lightning."""

# Names are imported on first use, so that `lightning-edit --help` does not wait for torch.

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_edit.__about__ import __version__

if TYPE_CHECKING:
    from lightning_edit.callbacks.causal_tracing import CausalTracing as CausalTracing
    from lightning_edit.callbacks.edit_checkpoint import EditCheckpoint as EditCheckpoint
    from lightning_edit.callbacks.edit_evaluator import EditEvaluator as EditEvaluator
    from lightning_edit.callbacks.edit_report import EditReport as EditReport
    from lightning_edit.callbacks.progress import EditProgressBar as EditProgressBar
    from lightning_edit.callbacks.retention_curve import RetentionCurve as RetentionCurve
    from lightning_edit.callbacks.save_task_vector import SaveTaskVector as SaveTaskVector
    from lightning_edit.callbacks.task_vector_forgetting import (
        TaskVectorForgetting as TaskVectorForgetting,
    )
    from lightning_edit.core.batch import EditBatch as EditBatch
    from lightning_edit.core.batch import PromptTokenizer as PromptTokenizer
    from lightning_edit.core.delta import WeightDelta as WeightDelta
    from lightning_edit.core.errors import EditError as EditError
    from lightning_edit.core.locator import Locator as Locator
    from lightning_edit.core.request import EditRequest as EditRequest
    from lightning_edit.core.request import Probe as Probe
    from lightning_edit.data import CounterFact as CounterFact
    from lightning_edit.data import EditDataModule as EditDataModule
    from lightning_edit.data import Facts as Facts
    from lightning_edit.data import HeldOut as HeldOut
    from lightning_edit.data import KnowEdit as KnowEdit
    from lightning_edit.data import Known1000 as Known1000
    from lightning_edit.data import MQuAKE as MQuAKE
    from lightning_edit.data import OldNewPairs as OldNewPairs
    from lightning_edit.data import OldThenNew as OldThenNew
    from lightning_edit.data import QAEdit as QAEdit
    from lightning_edit.data import TextDataModule as TextDataModule
    from lightning_edit.data import WikiBigEdit as WikiBigEdit
    from lightning_edit.data import ZsRE as ZsRE
    from lightning_edit.evaluation.evaluator import Evaluator as Evaluator
    from lightning_edit.memories import EditMemory as EditMemory
    from lightning_edit.memories import MemoryWrite as MemoryWrite
    from lightning_edit.metrics import Generality as Generality
    from lightning_edit.metrics import Locality as Locality
    from lightning_edit.metrics import Portability as Portability
    from lightning_edit.metrics import Reliability as Reliability
    from lightning_edit.models import load_model as load_model
    from lightning_edit.models import load_tokenizer as load_tokenizer
    from lightning_edit.modules.alpha_edit import AlphaEdit as AlphaEdit
    from lightning_edit.modules.base import EditModule as EditModule
    from lightning_edit.modules.calinet import CaliNET as CaliNET
    from lightning_edit.modules.emmet import EMMET as EMMET
    from lightning_edit.modules.fine_tune import FineTune as FineTune
    from lightning_edit.modules.full_tuning import FullTuning as FullTuning
    from lightning_edit.modules.grace import GRACE as GRACE
    from lightning_edit.modules.ike import IKE as IKE
    from lightning_edit.modules.ke import KE as KE
    from lightning_edit.modules.kn import KN as KN
    from lightning_edit.modules.loc_ft import LocFT as LocFT
    from lightning_edit.modules.lora import LoRA as LoRA
    from lightning_edit.modules.lora_tuning import LoRATuning as LoRATuning
    from lightning_edit.modules.malmen import MALMEN as MALMEN
    from lightning_edit.modules.memit import MEMIT as MEMIT
    from lightning_edit.modules.mend import MEND as MEND
    from lightning_edit.modules.pmet import PMET as PMET
    from lightning_edit.modules.r_rome import RROME as RROME
    from lightning_edit.modules.rome import ROME as ROME
    from lightning_edit.modules.scr import SCR as SCR
    from lightning_edit.modules.serac import SERAC as SERAC
    from lightning_edit.modules.t_patcher import TPatcher as TPatcher
    from lightning_edit.modules.trained_editor import TrainedEditor as TrainedEditor
    from lightning_edit.modules.ultra_edit import UltraEdit as UltraEdit
    from lightning_edit.modules.wise import WISE as WISE

_HOMES = {
    "AlphaEdit": "modules.alpha_edit",
    "CaliNET": "modules.calinet",
    "CausalTracing": "callbacks.causal_tracing",
    "CounterFact": "data",
    "EMMET": "modules.emmet",
    "EditBatch": "core.batch",
    "EditCheckpoint": "callbacks.edit_checkpoint",
    "EditDataModule": "data",
    "EditError": "core.errors",
    "EditEvaluator": "callbacks.edit_evaluator",
    "EditMemory": "memories",
    "EditModule": "modules.base",
    "EditProgressBar": "callbacks.progress",
    "EditReport": "callbacks.edit_report",
    "EditRequest": "core.request",
    "Evaluator": "evaluation.evaluator",
    "Facts": "data",
    "FineTune": "modules.fine_tune",
    "FullTuning": "modules.full_tuning",
    "GRACE": "modules.grace",
    "Generality": "metrics",
    "HeldOut": "data",
    "KE": "modules.ke",
    "IKE": "modules.ike",
    "KN": "modules.kn",
    "KnowEdit": "data",
    "Known1000": "data",
    "LoRA": "modules.lora",
    "LoRATuning": "modules.lora_tuning",
    "LocFT": "modules.loc_ft",
    "Locality": "metrics",
    "Locator": "core.locator",
    "MALMEN": "modules.malmen",
    "MEMIT": "modules.memit",
    "MEND": "modules.mend",
    "MQuAKE": "data",
    "OldNewPairs": "data",
    "OldThenNew": "data",
    "MemoryWrite": "memories",
    "PMET": "modules.pmet",
    "Portability": "metrics",
    "Probe": "core.request",
    "PromptTokenizer": "core.batch",
    "QAEdit": "data",
    "ROME": "modules.rome",
    "RROME": "modules.r_rome",
    "Reliability": "metrics",
    "RetentionCurve": "callbacks.retention_curve",
    "SCR": "modules.scr",
    "SERAC": "modules.serac",
    "SaveTaskVector": "callbacks.save_task_vector",
    "TPatcher": "modules.t_patcher",
    "TaskVectorForgetting": "callbacks.task_vector_forgetting",
    "TrainedEditor": "modules.trained_editor",
    "TextDataModule": "data",
    "UltraEdit": "modules.ultra_edit",
    "WISE": "modules.wise",
    "WeightDelta": "core.delta",
    "WikiBigEdit": "data",
    "ZsRE": "data",
    "load_model": "models",
    "load_tokenizer": "models",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
