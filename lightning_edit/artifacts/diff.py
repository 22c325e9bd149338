# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Saved edits and models compared."""

# torch is imported when the function runs, so that help on the command line does not wait for it.

from __future__ import annotations

from lightning_edit.artifacts.outcomes import Comparison

__all__ = ["diff"]


def diff(first: str, second: str) -> Comparison:
    """Compares two saved edits, two models, or an edit and a model.

    Weights are compared parameter by parameter, memories entry by entry.

    Args:
        first: Folder of a saved edit or a model; a model may also be a hub id or `smollm2`.
        second: The same. Of two models, the one that came later.

    Returns:
        One row for each changed parameter and entry, and what the requests have in common.

    Raises:
        ArtifactError: If an edit is damaged, or the two do not fit together.
        ModelError: If a model cannot be loaded.
    """
    from lightning_edit.artifacts.comparison import (
        compare_edits,
        compare_models,
        compare_with_model,
    )
    from lightning_edit.artifacts.sources import open_edit_or_model
    from lightning_edit.core.edit import Edit

    one, other = open_edit_or_model(first), open_edit_or_model(second)
    if isinstance(one, Edit):
        if isinstance(other, Edit):
            return compare_edits(one, other, (first, second))
        return compare_with_model(one, other, (first, second))
    if isinstance(other, Edit):
        return compare_with_model(other, one, (second, first))
    return compare_models(one, other, (first, second))
