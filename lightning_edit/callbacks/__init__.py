# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Behaviors that any Trainer can take on."""
