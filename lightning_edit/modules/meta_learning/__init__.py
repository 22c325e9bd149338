# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors with a network that learns to edit."""
