# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors that add parameters to a model for what is new."""
