# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The networks of SERAC: what tells the scope of an edit, and what answers in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_edit.core.errors import ArtifactError, EditError, ModelError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.locator import ModelTree
from lightning_edit.memories.counterfactual import Counterfactual, SideAdapters, SmallModel
from lightning_edit.memories.scope_encoder import FolderEncoder, ScopeEncoder, TokenEncoder
from lightning_edit.memories.text_encoder import PLAIN_POOLING
from lightning_edit.passes.caches import keeps_keys_and_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ScopeNetwork", "ScopeNetworks"]


class ScopeNetwork(nn.Module):
    """What SERAC trains: the encoder of its scope classifier, and the counterfactual model.

    Args:
        encoder: Gives prompts and edits a place in space.
        counterfactual: Answers prompts that are in the scope of an edit.
    """

    def __init__(self, encoder: ScopeEncoder, counterfactual: Counterfactual) -> None:
        super().__init__()
        self.encoder = encoder
        self.counterfactual = counterfactual


class ScopeNetworks:
    """The networks of a memory of scopes, made for the model that it belongs to.

    Args:
        settings: Those of the memory, whose ``weights`` become the hash of what was trained.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        # In a tuple, for its weights are not the model's: neither do they count in its hash, nor
        # are its blocks blocks of the model.
        self._network: tuple[ScopeNetwork, ...] = ()

    @property
    def is_made(self) -> bool:
        """Whether the networks are there."""
        return bool(self._network)

    @property
    def network(self) -> ScopeNetwork:
        """The networks.

        Raises:
            EditError: If the memory belongs to no model yet.
        """
        if not self._network:
            raise EditError("The memory belongs to no model yet. Call `memory.attach_(model)`.")
        return self._network[0]

    def prepare(self, model: PreTrainedModel) -> None:
        """Makes the networks for a model, which stays as it is.

        Raises:
            ArtifactError: If the encoder pools states in another way than the settings say.
            ModelError: If there is no such encoder or counterfactual model, or it does not fit.
        """
        if not self._network:
            self._network = (self._build(model),)

    def _build(self, base: PreTrainedModel) -> ScopeNetwork:
        if not keeps_keys_and_values(base):
            raise ModelError(
                f"{type(base).__name__} hands on more than keys and values from position to "
                "position, with which those of a second model could be kept. Choose another model, "
                "or a memory beside one layer, such as GRACE or WISE."
            )
        own = self.settings
        generator = torch.Generator().manual_seed(own["seed"])
        encoder: ScopeEncoder = (
            FolderEncoder(own["encoder"], own.get("pooling", PLAIN_POOLING))
            if own["encoder"] is not None
            else TokenEncoder(base, own["width"], own["depth"], own["heads"], generator)
        )
        tree = ModelTree.of(base)
        counterfactual: Counterfactual = (
            SmallModel(
                own["counterfactual"],
                is_encoder_decoder=tree.is_encoder_decoder,
                vocabulary=base.get_output_embeddings().weight.shape[0],
            )
            if own["counterfactual"] is not None
            else SideAdapters(base, own["layers"], own["rank"], own["alpha"], generator)
        )
        return ScopeNetwork(encoder, counterfactual)

    def shared(self) -> dict[str, Tensor]:
        """What was trained, and the tokenizer by which a foreign encoder gets its text."""
        is_trained = self.settings["weights"] is not None
        return {
            name: tensor.detach()
            for name, tensor in self.network.state_dict().items()
            if is_trained or name == "encoder.tokenizer"
        }

    def take_shared(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what ``shared`` gave elsewhere.

        Raises:
            ArtifactError: If it does not belong to these settings.
        """
        is_trained = self.settings["weights"] is not None
        try:
            found = self.network.load_state_dict(dict(tensors), strict=False)
        except RuntimeError as error:
            raise ArtifactError(f"The networks of this memory do not fit: {error}") from None
        lacking = found.missing_keys if is_trained else []
        if lacking or found.unexpected_keys:
            raise ArtifactError(
                f"The networks of this memory do not fit: {[*lacking, *found.unexpected_keys][0]} "
                "is not in both. The files do not belong together."
            )
        if is_trained and weight_hash(self.network) != self.settings["weights"]:
            raise ArtifactError(
                "The networks that came with this edit are not those that it was made with. "
                "Training went on after the edit was made: save edits before, or make it again."
            )

    def load(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Takes over networks out of a model's state, if they were trained and these were not."""
        if self.settings["weights"] is None and settings.get("weights") is not None:
            self.settings["weights"] = settings["weights"]
            self.take_shared(tensors)
