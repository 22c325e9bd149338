# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors that fine-tune: in a few steps, or by Lightning's own loop."""
