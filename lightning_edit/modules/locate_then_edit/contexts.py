# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Context templates: texts that a prompt is put into, over which keys are averaged."""

# Shapes: T templates, M inputs of the edited projection.

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.request import EditRequest
from lightning_edit.modules.fitting import EditState

__all__ = ["Contexts"]


class Contexts:
    """The contexts of an editor, in groups that count as much as another.

    Args:
        templates: Texts that end in ``{}``, where the prompt goes, the first of them ``"{}"``; or
            groups of such texts. None to sample them when they are asked for first.
        sample: Samples groups of contexts from the unedited model.

    Raises:
        ValueError: If one does not end where the prompt goes, or the first is not the bare prompt.

    Examples:
        >>> contexts = Contexts([["{}"], ["It is said. {}", "Today. {}"]], list)
        >>> contexts.mean_keys(torch.tensor([[8.0], [1.0], [3.0]]))
        tensor([5.])
    """

    def __init__(
        self,
        templates: Sequence[str] | Sequence[list[str]] | None,
        sample: Callable[[], list[list[str]]],
    ) -> None:
        self._sample = sample
        self._groups = _grouped(templates) if templates else None

    @property
    def groups(self) -> list[list[str]]:
        """Contexts that a prompt is put into, sampled on first use where none were given."""
        if self._groups is None:
            self._groups = self._sample()
        return self._groups

    @property
    def templates(self) -> list[str]:
        """The contexts of all groups; the first is the bare prompt."""
        return [template for group in self.groups for template in group]

    def mean_keys(self, keys: Tensor) -> Tensor:
        """Keys averaged over the templates of each group, then over groups: [..., T, M] → [..., M].

        References:
            arXiv 2210.07229, section 4.3, for groups; arXiv 2202.05262, equation 3, for one.
        """
        groups = self.groups
        weights = [1 / (len(groups) * len(group)) for group in groups for _ in group]
        return torch.einsum("...tm,t->...m", keys, torch.tensor(weights, device=keys.device))

    def subject_rows(
        self, tokens: PromptTokenizer, requests: Sequence[EditRequest]
    ) -> list[list[list[int]]]:
        """Token ids of each request in each template, cut after the subject's last token."""
        prefixes = [template.removesuffix("{}") for template in self.templates]

        def row(request: EditRequest, prefix: str) -> list[int]:
            ids, last = tokens.subject_of(request, prefix)
            return list(ids[: last + 1])

        return [[row(request, prefix) for prefix in prefixes] for request in requests]

    def edit_state(self) -> EditState:
        """The contexts, since a resumed run holds an edited model, which would write others."""
        return {"context_templates": self.groups}

    def load_edit_state(self, state: EditState) -> None:
        """Takes over the contexts of an earlier run."""
        self._groups = _grouped(state["context_templates"])


def _grouped(templates: Sequence[str] | Sequence[list[str]]) -> list[list[str]]:
    """Context templates in groups.

    Raises:
        ValueError: If one does not end where the prompt goes, or the first is not the bare prompt.
    """
    flat = [item for item in templates if isinstance(item, str)]
    groups = [flat] if flat else [[str(template) for template in group] for group in templates]
    if flat and len(flat) < len(templates):
        raise ValueError(
            "`context_templates` is expected to be a list of texts or a list of lists of texts, "
            "but it mixes them. Put every text into a list."
        )
    for template in (template for group in groups for template in group):
        if not template.endswith("{}"):
            raise ValueError(
                f"`context_templates`: {template!r} is expected to end in {{}}, where the "
                "prompt goes, since the target follows it."
            )
    if not all(groups) or groups[0][0] != "{}":
        first = groups[0][0] if groups[0] else groups[0]
        raise ValueError(
            "`context_templates`: the first is expected to be '{}', the bare prompt, in which "
            f"the new value is stored, but got {first!r}. Put '{{}}' before it, and leave no "
            "group empty."
        )
    return groups
