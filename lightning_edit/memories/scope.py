# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A memory of edits in words: a prompt in the scope of one is answered by another model."""

# Shapes: N entries, D width of an embedding, B rows, T positions, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_edit.core.errors import EditError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.functional.scope import Distance, chosen_edits, scope_distances
from lightning_edit.memories.router import Router, argument_names, bound, stack_of
from lightning_edit.memories.scope_networks import ScopeNetwork, ScopeNetworks
from lightning_edit.memories.second_opinion import Asked, SecondOpinion
from lightning_edit.memories.text_encoder import PLAIN_POOLING, pooling_setting

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel
    from transformers.utils import ModelOutput

__all__ = ["ScopeMemory"]


@dataclass(frozen=True)
class _Pass:
    """What a pass of the base is about, noted when it begins."""

    route: Tensor
    asked: Asked
    cache: Cache | None


class ScopeMemory(EditMemory):
    """Edits in words, and who answers in their scope (SERAC, arXiv 2206.06520).

    When a prompt is read, it is compared with all edits, once. If it is in the scope of one, a
    counterfactual model that has read the edit answers the whole row, with keys and values of its
    own, which are kept behind those of the base in the same cache. All other rows are answered by
    the base, bit for bit; where no row is in any scope, the counterfactual model is not run.

    Its buffer is ``embeddings`` [N, D], float32: those of the edits, made once. What has been
    trained is a part of its state, once for all entries.

    Args:
        encoder: Folder of a text encoder, used as it asks for; a small one of its own if None.
        counterfactual: Folder of a language model with the base's tokenizer; adapters beside the
            base if None.
        distance: ‖g(z) − g(q)‖² (``euclidean``) or 1 − cos (``cosine``).
        scale: What the distance is multiplied by.
        threshold: What the similarity exp(−distance) must exceed.
        width: D, of an encoder of its own.
        depth: Layers of that encoder.
        heads: Attention heads of that encoder.
        layers: Blocks that adapters stand beside; all if None.
        rank: Rank of the adapters.
        alpha: Adapters count ``alpha / rank``.
        separator: Tokens between an edit and a prompt.
        seed: Of the numbers that its networks begin with.
        weights: Hash of the trained networks; None for those that they begin with.
        pooling: How the encoder out of a folder pools states.
    """

    fields: ClassVar[tuple[str, ...]] = ("embeddings",)
    embeddings: Tensor

    def __init__(
        self,
        encoder: str | None = None,
        counterfactual: str | None = None,
        distance: Distance = "euclidean",
        scale: float = 1.0,
        threshold: float = 0.5,
        width: int = 256,
        depth: int = 2,
        heads: int = 4,
        layers: Sequence[int] | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        separator: Sequence[int] = (),
        seed: int = 0,
        weights: str | None = None,
        pooling: str = PLAIN_POOLING,
    ) -> None:
        super().__init__(
            encoder=encoder,
            counterfactual=counterfactual,
            distance=distance,
            scale=scale,
            threshold=threshold,
            width=width,
            depth=depth,
            heads=heads,
            layers=None if layers is None else list(layers),
            rank=rank,
            alpha=alpha,
            separator=list(separator),
            seed=seed,
            weights=weights,
            **pooling_setting(pooling),
        )
        self.router: Router = Router()
        self.networks: ScopeNetworks = ScopeNetworks(self.settings)
        self._heard: tuple[list[list[int]], Tensor] | None = None
        self._pass: _Pass | None = None
        self._opinion = SecondOpinion(is_encoder_decoder=False)

    # -- networks ----------------------------------------------------------------------------

    @property
    def network(self) -> ScopeNetwork:
        """The networks; there once the memory belongs to a model."""
        return self.networks.network

    @property
    def base(self) -> PreTrainedModel | None:
        """The model that the memory belongs to."""
        return self._model() if self._model is not None else None

    def note_weights(self) -> None:
        """Takes note that the networks have been trained: their hash becomes a setting.

        Raises:
            EditError: If entries are remembered, whose embeddings are of the networks before.
        """
        found = weight_hash(self.network)
        if len(self) and found != self.settings["weights"]:
            raise EditError(
                f"The memory holds {len(self)} edits, whose embeddings other networks have made. "
                "Take them out (`editor.remove([id])`) before networks change."
            )
        self.settings["weights"] = found

    def prepare(self, model: PreTrainedModel) -> Self:
        """Makes the networks for a model, which stays as it is.

        Raises:
            ModelError: If there is no such encoder or counterfactual model, or it does not fit.
        """
        self.networks.prepare(model)
        return self

    def encode(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of texts by their tokens, [B, D] float32, without gradients."""
        kind = self.embeddings.device.type
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return self.network.encoder.encode(self.base, rows)

    def similarities(self, embeddings: Tensor) -> Tensor:
        """exp(−distance) of prompts and entries, [B, N] float32, from embeddings [B, D]."""
        own = self.settings
        return torch.exp(
            -scope_distances(embeddings, self.embeddings, own["distance"], own["scale"])
        )

    def lookup(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Index of the entry whose scope each prompt is in, −1 where there is none.

        Args:
            rows: Token ids of B prompts.

        Returns:
            [B] int64.
        """
        found = self.similarities(self.encode(rows))
        ages, overrides = self._ages.to(found.device), self._overrides.to(found.device)
        return chosen_edits(found, self.settings["threshold"], ages, overrides)

    @override
    def derive(self) -> None:
        notes = [record.notes for record in self._records.values()]
        names = list(self._records)
        self._texts: list[list[int]] = [[*n["ids"], *self.settings["separator"]] for n in notes]
        self._ages = torch.tensor([n["number"] for n in notes], dtype=torch.long)
        overrides = torch.zeros(len(names), len(names), dtype=torch.bool)
        rows = {name: i for i, name in enumerate(names)}
        for newer, note in enumerate(notes):
            overrides[[rows[n] for n in note["overrides"] if n in rows], newer] = True
        # What took the place of an older entry is the newer one, whatever was written before.
        self._overrides = overrides & (self._ages[None] > self._ages[:, None])

    # -- passes ------------------------------------------------------------------------------

    @override
    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        tree = ModelTree.of(model)
        self._opinion = SecondOpinion(is_encoder_decoder=tree.is_encoder_decoder)
        stack = stack_of(tree)
        handles = self.router.follow(tree, begins=tree.is_encoder_decoder)
        handles.append(stack.register_forward_pre_hook(self._begin, with_kwargs=True))
        if tree.is_encoder_decoder:
            encoder = cast("PreTrainedModel", model).get_encoder()
            handles.append(encoder.register_forward_hook(self._hear, with_kwargs=True))
        handles.append(model.register_forward_hook(self._answer, with_kwargs=True))
        return handles

    def _hear(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: ModelOutput,
    ) -> None:
        """Keeps what an encoder has read, for the decoder whose pass follows."""
        if self.is_off:
            return
        given = bound(argument_names(module), args, kwargs)
        ids, mask = _ids_of(given.get("input_ids")), given.get("attention_mask")
        kept = torch.ones_like(ids) if mask is None else mask
        rows = [row[m.bool()].tolist() for row, m in zip(ids, kept, strict=True)]
        self._heard = rows, output[0]

    def _begin(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Decides the route of rows that are asked, and notes what the pass is about."""
        self._pass = None
        router = self.router
        if self.is_off or (router.positions is None and router.route is None):
            return
        given = bound(argument_names(module), args, kwargs)
        ids = _ids_of(given.get("input_ids"))
        heard: list[list[int]] | None = None
        goes_on = router.positions is None
        if not goes_on:
            states = given.get("encoder_hidden_states")
            if states is None:
                prompt = cast(Tensor, router.prompt)
                prompts = [row[p].tolist() for row, p in zip(ids, prompt, strict=True)]
            else:
                prompts = heard = self._heard_by(states)
            router.decide(self.lookup(prompts))
        asked = Asked(ids, cast(Tensor, router.attended), heard, goes_on)
        self._pass = _Pass(cast(Tensor, router.route), asked, given.get("cache"))

    def _heard_by(self, states: Tensor) -> list[list[int]]:
        """Prompts that the encoder has read for each row of its states, which may be repeated."""
        rows, heard = self._heard or ([], states[:0])
        times = len(states) // max(1, len(rows))
        if not rows or not torch.equal(states[::times], heard):
            raise EditError(
                "The decoder got states that were not the encoder's last: which edits they are in "
                "the scope of is not known. Run the encoder right before its decoder, or have "
                "the base alone with `memory.off()`."
            )
        return [row for row in rows for _ in range(times)]

    def _answer(
        self,
        model: PreTrainedModel,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: ModelOutput,
    ) -> ModelOutput | None:
        """Puts the logits of the counterfactual model in the place of the base's."""
        found, self._pass = self._pass, None
        if self.is_off or found is None or not bool((found.route >= 0).any()):
            return None
        logits = getattr(output, "logits", None)
        if logits is None or len(logits) != len(found.route):
            raise EditError(
                f"{type(model).__name__} returned no logits for each of {len(found.route)} rows, "
                "some of which are in the scope of a remembered edit. Call it with "
                "`return_dict=True`, or have the base alone with `memory.off()`."
            )
        given = bound(argument_names(model), args, kwargs)
        made = output.get("cache")
        with (
            self.off(),
            torch.no_grad(),
            self.network.counterfactual.answering(model) as other,
        ):
            output.logits = self._opinion(
                other,
                logits,
                found.asked,
                found.route,
                self._texts,
                found.cache if made is None else made,
                given.get("logits_to_keep", 0),
            )
        labels = given.get("labels")
        if labels is not None:
            said = output.logits.float()
            if not self._opinion.is_encoder_decoder:
                said, labels = said[:, :-1], labels[:, 1:]
            output.loss = cross_entropy(said.flatten(0, 1), labels.flatten())
        return output

    # -- state -------------------------------------------------------------------------------

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.networks.is_made:
            self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @override
    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.networks.is_made:
            for name, tensor in self.shared().items():
                destination[f"{prefix}network.{name}"] = tensor


def _ids_of(ids: Tensor | None) -> Tensor:
    if ids is None:
        raise EditError(
            "The memory reads tokens, but the model was given `inputs_embeds` alone. Give "
            "`input_ids`, or have the base alone with `memory.off()`."
        )
    return ids
