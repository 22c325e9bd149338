# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits by an editor that was trained before, out of its checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

import lightning_edit
from lightning_edit.core.batch import EditBatch
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.locator import ModelTree
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.meta_learning.checkpoints import read_editor
from lightning_edit.modules.meta_learning.training import Trainable
from lightning_edit.modules.targets import Target

__all__ = ["TrainedEditor"]


class TrainedEditor(EditModule[Edit]):
    """Has ``fit`` commit the edits of a trained KE, MEND, MALMEN, RLEdit or SERAC.

    What was trained, and with which settings, is in the checkpoint. Edits are those of the trained
    editor: of weights, low-rank where they are small, or of a memory. A batch of requests makes
    one edit; the next one is computed on the edited model.

    Args:
        checkpoint: A checkpoint of the training.
        model: Hub id or local folder of the model that it was trained with, or ``smollm2``, the
            embedded default.
        any_base: Edit a model with other weights than those it was trained with, such as the same
            one in bfloat16.
        kwargs: Arguments of every editor but ``layers``, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    Raises:
        ArtifactError: If the checkpoint holds no trained editor, or that of another model.
        ValueError: If ``layers`` are given.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_edit import EditDataModule, MEND
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> model, tokenizer = trained_tiny_model()
        >>> mend = MEND.from_model(model, tokenizer, rank=8)
        >>> trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False,
        ...                   limit_val_batches=0, enable_progress_bar=False,
        ...                   enable_model_summary=False)
        >>> trainer.fit(mend, EditDataModule(requests=tiny_requests(4)))
        >>> checkpoint = getfixture("tmp_path") / "mend.ckpt"
        >>> trainer.save_checkpoint(checkpoint)
        >>> editor = TrainedEditor.from_model(model, tokenizer, checkpoint=str(checkpoint))
        >>> edit = editor.edit(tiny_requests(1))
        >>> edit.apply_(model)
        >>> edit.revert_(model)

    References:
        Fast Model Editing at Scale, arXiv 2110.11309, and the papers of the other editors; a
        trained one tells its own.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2110.11309"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")
    unused_arguments: ClassVar[Mapping[str, str]] = {
        "layers": "they are those that the editor was trained to edit, and the checkpoint knows "
        "them. Leave them out."
    }

    def __init__(
        self,
        checkpoint: str,
        model: str = "smollm2",
        any_base: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.checkpoint = checkpoint
        self.any_base = any_base
        self.network: nn.Module | None = None
        # In a tuple, out of sight of Lightning, for which it would be a part of this module.
        self._trained: tuple[EditModule[Edit], ...] = ()

    @property
    def trained(self) -> EditModule[Edit]:
        """The editor out of the checkpoint; there once the model is."""
        return self._trained[0]

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return self.trained.edited_names(tree)

    @override
    def make_target(self, tree: ModelTree) -> Target[Edit]:
        """What the trained editor edits: weights, or a memory."""
        saved = read_editor(self.checkpoint)
        about = saved["lightning_edit"]["editor"]
        methods = _methods(about["method"])
        if about["method"] not in methods:
            raise ArtifactError(
                f"`{self.checkpoint}` was written by {about['method']}, which is not imported. "
                f"Import it first. Known: {', '.join(sorted(methods))}."
            )
        names = ("chat_template", "chat_template_kwargs", "system_prompt")
        own = {"model": self.model_id} | {name: getattr(self, name) for name in names}
        trained = methods[about["method"]](**{**about["settings"], **own})
        trained.adopt(tree.model, self.tokens.tokenizer)
        trained.take_editor(saved, self.checkpoint, any_base=self.any_base)
        trained.network.requires_grad_(False)
        self._trained = (trained,)
        self.network = trained.network  # moves to other devices with this module
        target: Target[Edit] = trained.target
        return target

    @override
    def compute_edit(self, batch: EditBatch) -> Edit:
        edit: Edit = self.trained.compute_edit(batch)
        return edit


def _methods(name: str) -> dict[str, type]:
    """Methods that are trained before they edit, by name: all that are imported, and one more."""
    if name in lightning_edit.__all__:
        getattr(lightning_edit, name)  # public names are imported on first use
    return {cls.__name__: cls for cls in _trainable(EditModule)}


def _trainable(cls: type) -> Iterator[type]:
    """All methods below a class that are trained before they edit."""
    if issubclass(cls, Trainable) and not inspect.isabstract(cls):
        yield cls
    below: list[type] = cls.__subclasses__()
    for one in below:
        yield from _trainable(one)
