# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""An append-only record of edits: what was changed, why and by whom, and the way back."""
