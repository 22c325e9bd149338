# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits on a model that is being served: pushed, listed, shared out and taken back by adapters."""

import lazy_loader

# Imported on first use: a client of a server needs no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "deployment": ["Deployment", "Version"],
        "in_process": ["InProcess"],
        "llama_cpp": ["LlamaCpp"],
        "merged": ["TransformersServe"],
        "router": ["choose"],
        "server": ["LiveServer", "Served", "pull_all"],
        "sglang": ["SGLang"],
        "vllm": ["VLLM"],
    },
)
