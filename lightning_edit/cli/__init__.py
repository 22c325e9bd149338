# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The command line: the Trainer's verbs, and those on saved edits."""

import lazy_loader

# Imported on first use: the verbs on saved edits need no Trainer.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"trainer": ["EditCLI", "main"]}
)
