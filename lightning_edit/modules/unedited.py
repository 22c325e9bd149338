# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The unedited model, which ``validate`` compares with: an editor's own, or another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from torch import nn

from lightning_edit.core.request import EditRequest
from lightning_edit.evaluation.evaluator import Evaluation, Evaluator
from lightning_edit.optim import E

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_edit.modules.base import EditModule

__all__ = ["UneditedModel", "evaluator_of"]


def evaluator_of(editor: EditModule[E], model: PreTrainedModel) -> Evaluator:
    """What measures a model as an editor measures its own."""
    return Evaluator(
        model,
        editor.tokens,
        max_new_tokens=editor.max_new_tokens,
        chat_template=editor.measure_in_chat,
    )


class UneditedModel:
    """The unedited model of an editor.

    Args:
        name: Hub id or folder of another model to compare with; None for the editor's own, without
            its edits.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self._given: nn.Module | None = None
        self._known: Evaluation | None = None

    @property
    def is_other(self) -> bool:
        """Whether it is a model that was named or given, rather than the editor's own."""
        return self.name is not None or self._given is not None

    def take(self, model: nn.Module) -> None:
        """Takes a model in memory."""
        self._given = model

    def know(self, evaluation: Evaluation) -> None:
        """Takes scores of the editor's own unedited model, so that they are not measured again.

        Args:
            evaluation: By the same readings, with what the model said to the locality prompts.
        """
        self._known = evaluation

    def known(self, requests: Sequence[EditRequest]) -> Evaluation | None:
        """Known scores of requests; None unless those of each are."""
        if self._known is None:
            return None
        parts = [list(self._known.of(request.id)) for request in requests]
        probes = [probe for part in parts for probe in part]
        return Evaluation(probes, self._known.baseline) if all(parts) else None

    @contextmanager
    def evaluator(self, editor: EditModule[E]) -> Iterator[Evaluator]:
        """Context manager: what measures it, with the editor's tokenizer."""
        if not self.is_other:
            with editor.base_weights():
                yield editor.evaluator
            return
        if self._given is None:
            from lightning_edit.models import load_model

            name = cast(str, self.name)
            self._given = load_model(name, dtype=editor.dtype_name, cache_dir=editor.cache_dir)
        editor.target.check()
        self._given.to(editor.session.device)
        yield evaluator_of(editor, cast("PreTrainedModel", self._given))
