# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors that leave the weights alone and remember edits beside them."""
