# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Change what a language model knows, inside PyTorch Lightning."""

# Names are imported on first use, so that `lightning-edit --help` does not wait for torch. The stub
# beside this file says where they live, to type checkers, too.

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
