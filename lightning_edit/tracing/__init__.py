# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Causal tracing: where a model keeps a fact, and pictures of it."""
