# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors as LightningModules, in the families of the survey arXiv 2305.13172."""
