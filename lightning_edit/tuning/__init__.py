# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A method's settings for a model that none were chosen for: rules, and a small search."""
