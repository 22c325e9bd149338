# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Behaviors that any Trainer can take on."""

from lightning_edit.callbacks.causal_tracing import CausalTracing
from lightning_edit.callbacks.edit_checkpoint import EditCheckpoint
from lightning_edit.callbacks.edit_evaluator import EditEvaluator
from lightning_edit.callbacks.edit_guard import EditGuard
from lightning_edit.callbacks.edit_report import EditReport
from lightning_edit.callbacks.progress import EditProgressBar
from lightning_edit.callbacks.retention_curve import RetentionCurve
from lightning_edit.callbacks.save_task_vector import SaveTaskVector
from lightning_edit.callbacks.side_effects import SideEffects
from lightning_edit.callbacks.task_vector_forgetting import TaskVectorForgetting

__all__ = [
    "CausalTracing",
    "EditCheckpoint",
    "EditEvaluator",
    "EditGuard",
    "EditProgressBar",
    "EditReport",
    "RetentionCurve",
    "SaveTaskVector",
    "SideEffects",
    "TaskVectorForgetting",
]
