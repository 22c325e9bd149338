# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The nouns: requests, batches, places, edits."""
