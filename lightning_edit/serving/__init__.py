# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits on a model that is being served: pushed, listed, shared out and taken back by adapters."""

from lightning_edit.serving.deployment import Deployment, Version
from lightning_edit.serving.in_process import InProcess
from lightning_edit.serving.llama_cpp import LlamaCpp
from lightning_edit.serving.merged import TransformersServe
from lightning_edit.serving.router import choose
from lightning_edit.serving.server import LiveServer, Served, pull_all
from lightning_edit.serving.sglang import SGLang
from lightning_edit.serving.vllm import VLLM

__all__ = [
    "VLLM",
    "Deployment",
    "InProcess",
    "LiveServer",
    "LlamaCpp",
    "SGLang",
    "Served",
    "TransformersServe",
    "Version",
    "choose",
    "pull_all",
]
