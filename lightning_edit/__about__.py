# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The version, readable without importing the package's dependencies."""

__version__ = "0.2.0.dev0"
