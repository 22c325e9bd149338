# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Running parts of a model: cached suffixes, key passes, replays, gradients, recorders, hooks."""
