# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Cards (``README.md``) of edits, edited models, adapters and runs, in the form of the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lightning_edit.rendering.templates import render

__all__ = ["CARD_TAG", "base_name", "make_card"]

#: A tag of every card that is written here.
CARD_TAG = "knowledge-editing"


def make_card(
    template: str,
    /,
    *,
    library: str,
    method: str = "",
    base: str = "",
    tags: Sequence[str] = (),
    **values: object,
) -> str:
    """A model card: metadata that programs read, and a text for people.

    Args:
        template: Its name in ``rendering/templates``: ``run``, ``edit``, ``edited_model`` or
            ``adapter``.
        library: The library that loads what the card is about.
        method: Name of the editor, which becomes a tag.
        base: What the base model was loaded from; named in the metadata only where others can look
            it up, as ``owner/name`` on the hub.
        tags: Further tags.
        values: What the template names beside ``method`` and ``base``, its name.

    Examples:
        >>> card = make_card("edited_model", library="transformers", method="R-ROME", base="a/b",
        ...                  paper="", kind="WeightDelta", request_ids=["<i>"], requests=[],
        ...                  sha256="", norm=1.0)
        >>> print(card[: card.index("With")])
        ---
        base_model: a/b
        library_name: transformers
        tags:
        - knowledge-editing
        - r-rome
        ---
        <BLANKLINE>
        # a/b, edited
        <BLANKLINE>
        Made with R-ROME for 1 request(s): &lt;i&gt;. ‖Δ‖ = 1.
        <BLANKLINE>
    """
    from huggingface_hub import ModelCard, ModelCardData

    slug = re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        library_name=library,
        tags=[CARD_TAG, *tags, *([slug] if slug else [])],
    )
    text = render(__package__, f"{template}.md", method=method, base=base_name(base), **values)
    whole = "---\n{{ card_data }}\n---\n\n{{ text }}"
    return f"{ModelCard.from_template(data, template_str=whole, text=text)}"


def base_name(base: str) -> str:
    """A base model's name: of a folder, the last part of its path.

    Examples:
        >>> base_name("acme/tiny"), base_name("/home/me/llama"), base_name("")
        ('acme/tiny', 'llama', '')
    """
    return base if _is_hub_id(base) else Path(base).name


def _is_hub_id(name: str) -> bool:
    """Whether others may find a model by its name: ``owner/name``, and no folder of one's own."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()
