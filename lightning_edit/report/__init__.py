# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""From rows of results to files that people read."""
