# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Change what a language model knows, inside PyTorch Lightning."""

# Names are imported on first use, so that `lightning-edit --help` does not wait for torch.

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_edit.__about__ import __version__

if TYPE_CHECKING:
    from lightning_edit.core.batch import EditBatch as EditBatch
    from lightning_edit.core.delta import WeightDelta as WeightDelta
    from lightning_edit.core.errors import EditError as EditError
    from lightning_edit.core.locator import Locator as Locator
    from lightning_edit.core.request import EditRequest as EditRequest
    from lightning_edit.core.request import Probe as Probe
    from lightning_edit.evaluation.evaluator import Evaluator as Evaluator
    from lightning_edit.metrics import Generality as Generality
    from lightning_edit.metrics import Locality as Locality
    from lightning_edit.metrics import Portability as Portability
    from lightning_edit.metrics import Reliability as Reliability
    from lightning_edit.modules.base import EditModule as EditModule
    from lightning_edit.modules.rome import ROME as ROME

_HOMES = {
    "EditBatch": "core.batch",
    "EditError": "core.errors",
    "EditModule": "modules.base",
    "EditRequest": "core.request",
    "Evaluator": "evaluation.evaluator",
    "Generality": "metrics",
    "Locality": "metrics",
    "Locator": "core.locator",
    "Portability": "metrics",
    "Probe": "core.request",
    "ROME": "modules.rome",
    "Reliability": "metrics",
    "WeightDelta": "core.delta",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
