# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Texts from anywhere inside HTML and Markdown: escaping, templates, and the cards of edits."""
