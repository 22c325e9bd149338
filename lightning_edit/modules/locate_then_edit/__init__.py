# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors that find where a fact is stored and rewrite it there."""
