# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors as LightningModules."""

from lightning_edit.modules.base import EditModule
from lightning_edit.modules.rome import ROME

__all__ = ["ROME", "EditModule"]
