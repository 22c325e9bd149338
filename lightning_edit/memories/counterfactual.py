# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Models that answer in the light of an edit: adapters beside the base, or a model of its own."""

# Shapes: B rows, T positions, V vocabulary, R rank, I inputs and O outputs of a linear map.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.errors import ModelError
from lightning_edit.core.locator import ModelTree, StackKind
from lightning_edit.core.sharding import own_outputs, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Counterfactual", "SideAdapters", "SmallModel", "linear_maps"]


class Counterfactual(nn.Module, ABC):
    """A language model that reads an edit before what it is asked."""

    @abstractmethod
    def answering(self, base: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """A context manager that gives the model to run, inside of which it is this one.

        Args:
            base: The model whose edits these are.
        """


class SmallModel(Counterfactual):
    """A language model of its own, out of a folder.

    Args:
        folder: Folder or hub id of a model, read by transformers.
        is_encoder_decoder: Whether the base has an encoder, as this one then must.
        vocabulary: V of the base.

    Raises:
        ModelError: If there is no such model, or it does not answer in the base's tokens.
    """

    def __init__(self, folder: str, *, is_encoder_decoder: bool, vocabulary: int) -> None:
        super().__init__()
        import transformers

        kind = "Seq2SeqLM" if is_encoder_decoder else "CausalLM"
        auto = getattr(transformers, f"AutoModelFor{kind}")
        try:
            model = auto.from_pretrained(
                folder, dtype="float32", use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"`counterfactual={folder!r}` cannot be loaded as a language model ({error}). Give "
                f"a folder of a model for {kind}, as the base is, or null for adapters beside the "
                "base."
            ) from None
        size = model.get_output_embeddings().weight.shape[0]
        if size != vocabulary:
            raise ModelError(
                f"`counterfactual={folder!r}` answers in {size} tokens, but the base has "
                f"{vocabulary}: it has another tokenizer. Give a model of the base's own "
                "tokenizer, or null for adapters beside the base."
            )
        self.model = model.eval()

    @override
    @contextmanager
    def answering(self, base: PreTrainedModel) -> Iterator[PreTrainedModel]:
        yield self.model


class SideAdapters(Counterfactual):
    """Low-rank maps beside the linear maps of the base: y + s B A x while this one answers.

    B is zero at the beginning, when it is the base itself. The base's weights are never written
    and get no gradients.

    Args:
        base: The model.
        layers: Blocks of each stack; all if None.
        rank: R.
        alpha: s is ``alpha / rank``.
        generator: Of the numbers that A begins with.
    """

    def __init__(
        self,
        base: nn.Module,
        layers: Sequence[int] | None,
        rank: int,
        alpha: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.names = [name for name, _, _ in linear_maps(base, layers)]
        self.scale = alpha / rank
        self.down = nn.ParameterList()
        self.up = nn.ParameterList()
        for _, inputs, outputs in linear_maps(base, layers):
            bound = inputs**-0.5
            down = (2 * torch.rand(rank, inputs, generator=generator) - 1) * bound
            self.down.append(nn.Parameter(down))
            self.up.append(nn.Parameter(torch.zeros(outputs, rank)))

    @override
    @contextmanager
    def answering(self, base: PreTrainedModel) -> Iterator[PreTrainedModel]:
        handles = [
            base.get_submodule(name).register_forward_hook(self._beside(down, up))
            for name, down, up in zip(self.names, self.down, self.up, strict=True)
        ]
        try:
            yield base
        finally:
            for handle in handles:
                handle.remove()

    def _beside(
        self, down: Tensor, up: Tensor
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(projection: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            change = self.scale * (plain(args[0]).to(down.dtype) @ down.T) @ up.T
            return output + own_outputs(projection, change).to(output.dtype)

        return add


def linear_maps(base: nn.Module, layers: Sequence[int] | None) -> list[tuple[str, int, int]]:
    """Linear maps in the blocks of all stacks of a model: name, I and O, in order.

    Args:
        base: A language model.
        layers: Blocks of each stack, negative ones from the end; all if None.

    Raises:
        LocatorError: If a layer does not exist.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> linear_maps(tiny_model("gpt2"), [0])[0]
        ('transformer.h.0.attn.c_attn', 32, 96)
    """
    tree = ModelTree.of(base)
    stacks: list[StackKind] = ["encoder", "decoder"] if tree.is_encoder_decoder else ["decoder"]
    found = []
    for stack in stacks:
        own = ModelTree.of(base, stack)
        indices = range(len(own.blocks)) if layers is None else [own.index(i) for i in layers]
        for index in sorted(set(indices)):
            prefix = own.block_names[index]
            for name, module in own.blocks[index].named_modules():
                if isinstance(module, nn.Linear):
                    found.append((f"{prefix}.{name}", module.in_features, module.out_features))
                elif type(module).__name__ == "Conv1D":
                    inputs, outputs = module.weight.shape
                    found.append((f"{prefix}.{name}", int(inputs), int(outputs)))
    return found
