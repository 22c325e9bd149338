# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Finds the language model and the tokenizer inside anybody's LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import reshard
from lightning_edit.modules.base import EditModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "find_model",
    "find_requests",
    "find_tokenizer",
    "model_and_tokens",
    "unedited",
]


def model_and_tokens(
    module: LightningModule, attribute: str | None, who: str, *, measures: bool = False
) -> tuple[PreTrainedModel, PromptTokenizer]:
    """The language model in a module, and its tokenizer.

    Args:
        module: A LightningModule after ``configure_model``.
        attribute: As in ``find_model``.
        who: Name of the callback that needs them, for the error.
        measures: Have the tokenizer ask as an editor measures, rather than as it edits.

    Raises:
        ModelError: If there is no model, or there are several and no attribute is named.
        EditError: If there is no tokenizer.
    """
    if isinstance(module, EditModule):
        return module.model, module.evaluator.tokens if measures else module.tokens
    model = find_model(module, attribute)
    tokens = find_tokenizer(module, model)
    if tokens is None:
        raise EditError(
            f"{who} needs the tokenizer of {type(module).__name__}. Keep a fast one as an "
            "attribute of the module: `self.tokenizer = ...`."
        )
    return model, tokens


def find_requests(
    trainer: Trainer, given: Sequence[EditRequest] | None, who: str
) -> list[EditRequest]:
    """Requests that a callback was given, or those of the Trainer's datamodule.

    Args:
        trainer: The Trainer that runs.
        given: What the callback was given; None to ask the datamodule.
        who: Name of the callback, for the error.

    Raises:
        EditError: If there are none.
    """
    if given is not None:
        return list(given)
    requests = getattr(getattr(trainer, "datamodule", None), "requests", None)
    if not requests:
        raise EditError(
            f"{who} has nothing to ask: the Trainer's datamodule has no `requests`. Give them: "
            f"`{who}(requests=[...])`."
        )
    return list(requests)


def find_model(module: nn.Module, attribute: str | None = None) -> PreTrainedModel:
    """The Hugging Face model in a module; of a peft model, the language model in it.

    Its parameters lie as the optimizer has them: a callback may read and write them.

    Args:
        module: A LightningModule after ``configure_model``.
        attribute: Name of the attribute that holds the model, with dots for nested ones; needed
            only where there are several models.

    Raises:
        ModelError: If there is none, or there are several and no attribute is named.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> holder = nn.Module()
        >>> holder.net = tiny_model()
        >>> find_model(holder) is holder.net
        True
        >>> find_model(nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        lightning_edit.core.errors.ModelError: Linear holds no Hugging Face model: ...
    """
    owner = type(module).__name__
    reshard(module)
    if attribute is not None:
        try:
            module = reduce(getattr, attribute.split("."), module)
        except AttributeError:
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ModelError(
                f"`model_attribute` is {attribute!r}, but {owner} has no such attribute. Modules "
                f"in it: {children}."
            ) from None
    found = _models(module) if isinstance(module, nn.Module) else {}
    if not found:
        where = f"`{attribute}` of {owner}" if attribute else owner
        raise ModelError(
            f"{where} holds no Hugging Face model: no `transformers.PreTrainedModel` is among its "
            "modules. Assign one to an attribute, in `__init__` or `configure_model`."
        )
    if len(found) > 1:
        names = ", ".join(f"`{name}`" for name in found)
        raise ModelError(
            f"{owner} holds {len(found)} Hugging Face models: {names}. Name the one to change with "
            "`model_attribute`."
        )
    return next(iter(found.values()))


def _models(module: nn.Module, prefix: str = "") -> dict[str, PreTrainedModel]:
    """Outermost language models by name, each once."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        return {prefix: module}
    found: dict[str, PreTrainedModel] = {}
    for name, child in module.named_children():  # lists a module shared by two names once
        for path, model in _models(child, f"{prefix}.{name}" if prefix else name).items():
            if not any(model is other for other in found.values()):
                found[path] = model
    return found


def find_tokenizer(module: nn.Module, model: PreTrainedModel) -> PromptTokenizer | None:
    """The module's tokenizer, ready for prompts, or None where it keeps none that is fast.

    Args:
        module: A LightningModule.
        model: The language model in it.
    """
    from transformers import PreTrainedTokenizerBase

    held = list(vars(module).values())
    for value in held:
        if isinstance(value, PromptTokenizer):
            return value
    is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for value in held:
        if isinstance(value, PreTrainedTokenizerBase) and value.is_fast:
            return PromptTokenizer(value, is_encoder_decoder=is_encoder_decoder)
    return None


def unedited(module: LightningModule) -> AbstractContextManager[None]:
    """Context manager: an editor's model is as it was before its edits; any other stays as it is.

    Args:
        module: The module of a run.
    """
    return module.base_weights() if isinstance(module, EditModule) else nullcontext()
