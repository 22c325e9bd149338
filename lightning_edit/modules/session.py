# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A model that is being edited: its tokens, what is edited in it, and what was committed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Generic

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_edit.core.batch import EditBatch, PromptTokenizer
from lightning_edit.core.committed import RequestBatch, requests_of
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import ArtifactError, EditError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.hashing import WeightHashes
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.plain_model import check_ids
from lightning_edit.core.processes import Processes
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.core.request import EditRequest, check_requests, check_subjects
from lightning_edit.core.sharding import local_change, local_shard
from lightning_edit.evaluation.scoring import prompt_ids, score_targets
from lightning_edit.functional.routing import routing_similarity
from lightning_edit.modules.targets import Target, kept_weights
from lightning_edit.optim import E
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.routing import expert_sets

__all__ = ["EditSession", "requests_in", "write_for_now"]


class EditSession(Generic[E]):
    """A model that is being edited. There is no Lightning in it.

    Args:
        model: The language model.
        tokens: Its tokenizer.
        target: What is edited in it.
        model_id: Hub id or folder the model was loaded from, for the record.
        revision: Revision of a hub model, for the record.
        needs_subject: Whether requests must name their subjects.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: PromptTokenizer,
        target: Target[E],
        model_id: str = "",
        revision: str | None = None,
        needs_subject: bool = False,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.target = target
        self.model_id = model_id
        self.revision = revision
        self.needs_subject = needs_subject
        self._base: BaseModelInfo | None = None
        self._hashes = WeightHashes(model)

    @property
    def tree(self) -> ModelTree:
        """Where the model's parts are."""
        return ModelTree.of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(next(self.model.parameters()).device)

    @property
    def base(self) -> BaseModelInfo:
        """The unedited model, with the hash of its weights."""
        if self._base is None:
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            self._base = BaseModelInfo(
                id=self.model_id,
                revision=self.revision,
                dtype=dtype,
                sha256=self._hashes.combined(self.target.originals),
                parameters=sum(p.numel() for p in self.model.parameters()),
            )
        return self._base

    @property
    def state(self) -> BaseModelInfo:
        """The model as it stands, edited or not, with the hash of its weights."""
        delta = self.target.delta  # made anew where it is asked for, if it is a memory's
        if not (delta.changes_weights and len(delta)) and self.target.optimizer.is_intact:
            return self.base
        return replace(self.base, sha256=self._hashes.combined())

    def edit(
        self,
        requests: EditBatch | EditRequest | Sequence[EditRequest],
        compute: Callable[[EditBatch], E],
        provenance: Provenance,
        processes: Processes | None = None,
    ) -> E:
        """Computes an edit and leaves the model as it is.

        Args:
            requests: What to change: one request, several, or a batch made of them.
            compute: Makes an edit of a batch; it may change the weights that are edited.
            provenance: Where the edit comes from.
            processes: Those that hold the same requests and share the work; this one alone if
                None.

        Raises:
            RequestError: If the requests contradict each other, or lack a subject that the method
                needs.
        """
        if self.needs_subject:
            check_subjects(requests_in(requests), provenance.method)
        device = self.device
        mixed = torch.is_autocast_enabled(device.type)
        found = torch.get_autocast_dtype(device.type) if mixed else None
        # Tokens made under inference mode could not be saved for backward, and what a method does
        # not compute in `pass_dtype` must not be rounded.
        exact = torch.autocast(device.type, enabled=False)
        kept = kept_weights(self.target.parameters)
        lent = borrowed(self.model, self.target.trainable)
        held = self._hashes.holding()
        with held, torch.inference_mode(False), torch.enable_grad(), exact, lent, kept:
            if not isinstance(requests, EditBatch):
                requests = requests_in(requests)
                check_requests(requests)
                requests = EditBatch.from_requests(requests, self.tokens)
            check_ids(self.model, self.tokens, requests.input_ids.tolist())
            batch = replace(
                requests.to(device),
                processes=processes or Processes(),
                # Gradients would leave the range of float16, for which a Trainer scales losses.
                pass_dtype=found if found == torch.bfloat16 else None,
            )
            edit = compute(batch)
            edit.check_finite()
        failed = edit.details.get("failed", {})
        asked = {request.id: request for request in batch.requests}
        edit.provenance = provenance.answering((i for i in asked if i not in failed), asked)
        rounded = str(batch.pass_dtype).removeprefix("torch.") if batch.pass_dtype else ""
        edit.batches = (RequestBatch(batch.requests, rounded) if asked else None,)
        return edit

    def described(self, edit: E, requests: Sequence[EditRequest], *, is_written: bool) -> E:
        """An edit whose figures tell what the model with it makes of each request.

        Args:
            edit: Made of the model for these requests.
            requests: The requests; those that failed are left out.
            is_written: Whether the edit stands in the model. If not, it is written for as long as
                it takes to measure.

        Returns:
            The edit, in whose ``details["requests"]`` each request has what ``measured`` gives.
        """
        failed = edit.details.get("failed", {})
        asked = {request.id: request for request in requests if request.id not in failed}
        rows: dict[str, RequestFigures] = {id_: {"id": id_} for id_ in asked}
        rows |= {row["id"]: row for row in edit.details.get("requests", [])}
        layers = later_mixtures(self.tree, edit)
        with torch.inference_mode(False):
            with self._without(edit) if is_written and layers else nullcontext():
                before = self._experts_of(asked.values(), layers)
            with nullcontext() if is_written else self._tried(edit):
                for id_, found in self.measured(list(asked.values())).items():
                    rows[id_] = {**rows[id_], **found}
                after = self._experts_of(asked.values(), layers)
        for id_, now, then in zip(asked if layers else (), after, before, strict=True):
            rows[id_]["routing_similarity"] = float(routing_similarity(now, then).mean())
        edit.details["requests"] = list(rows.values())
        return edit

    def measured(self, requests: Sequence[EditRequest]) -> dict[str, RequestFigures]:
        """``loss``, ``p_target`` and ``took`` of each request in the model as it stands, by id.

        Prompts are asked as metrics ask them: without a context or an end token, and with what a
        memory tells the model before them. All of them are one batch, whose logits are computed at
        the answers alone.

        Args:
            requests: The requests, the same on all processes.
        """
        if not requests:
            return {}
        ids = prompt_ids(self.model, self.tokens, [request.prompt for request in requests])
        pairs = [
            (ids[r.prompt], self.tokens.target(r.prompt, r.target_new, r.glued)) for r in requests
        ]
        with torch.autocast(self.device.type, enabled=False):
            scores = score_targets(self.model, self.tokens, pairs)
        return {
            request.id: {
                "id": request.id,
                "loss": score.nll,
                "p_target": math.exp(-score.nll),
                "took": score.argmax == score.target,
            }
            for request, score in zip(requests, scores, strict=True)
        }

    def _experts_of(self, requests: Iterable[EditRequest], layers: Sequence[int]) -> list[Tensor]:
        """Experts of some layers that tokens of each prompt are sent to, [layers, T, E] bool.

        Nothing where there is no such layer, as in most models.
        """
        if not layers:
            return []
        rows = [self.tokens.prompt(request.prompt) for request in requests]
        found = expert_sets(self.tree, layers, rows, self.tokens.pad_id)
        width = max((sets.shape[1] for row in found for sets in row.values()), default=0)
        return [
            torch.cat([pad(sets, (0, width - sets.shape[1])) for sets in row.values()])
            for row in found
        ]

    def unanswered(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """Those of some requests that are not in the model, or were other ones when they were."""
        ids, known = self.target.request_ids, self.target.optimizer.requests
        # One whose text is not known was committed by hand, or by an earlier version.
        return [r for r in requests if r.id not in ids or known.get(r.id, r).sha256() != r.sha256()]

    def check_base(self, sha256: str) -> None:
        """Checks that a checkpoint is of this model, by the hash of its base weights.

        Raises:
            ArtifactError: If it is of another.
        """
        if sha256 != self.base.sha256:
            raise ArtifactError(
                f"The checkpoint belongs to the base weights {sha256[:12]}…, but {self.model_id} "
                f"has {self.base.sha256[:12]}…. Resume with the model it was made with."
            )

    def check_made_here(self, edit: E) -> None:
        """Checks that an edit was made of the model as it stands.

        Raises:
            EditError: If it was made of other weights, or something else wrote to them.
        """
        self.target.check()
        made_of, now = edit.provenance.base.sha256, self.state.sha256
        if made_of and made_of != now:
            raise EditError(
                f"This edit was made of weights with the hash {made_of[:12]}…, but the model "
                f"stands at {now[:12]}…, so that it does not reckon with what was committed since. "
                "Make it again of the model as it stands: `editor.commit(editor.edit(requests))`."
            )

    def commit(self, edit: E) -> None:
        """Writes an edit into the model, on top of all that were committed.

        Raises:
            EditError: If it changes what was not announced, or something else wrote to the model.
        """
        self.target.optimizer.stage(edit)
        self.target.optimizer.step()

    @contextmanager
    def written(self, edit: E) -> Iterator[None]:
        """Context manager: the model with an edit that was just made of it."""
        with edit.kept(self.model):
            # Hashing all weights again would only take time.
            edit.apply_(self.model, check=False)
            yield

    @contextmanager
    def _tried(self, edit: E) -> Iterator[None]:
        """Context manager: as ``written``, without a trace of it in the edit."""
        if not isinstance(edit, WeightDelta):
            with self.written(edit):
                yield
            return
        with self._for_now(edit):
            yield

    @contextmanager
    def _without(self, edit: E) -> Iterator[None]:
        """Context manager: the model without an edit of weights that stands in it."""
        with self._for_now(-edit) if isinstance(edit, WeightDelta) else nullcontext():
            yield

    @contextmanager
    def _for_now(self, edit: WeightDelta) -> Iterator[None]:
        """Context manager: the model with a change, of which no hash is taken."""
        kept = kept_weights({name: self.model.get_parameter(name) for name in edit.changes})
        with self._hashes.holding(), kept:
            write_for_now(self.model, edit)
            yield

    def committed(self, provenance: Provenance) -> E:
        """All committed edits as one artefact, with originals and hashes for an exact undo.

        Args:
            provenance: Where they come from, with what is known of requests beside what the edits
                themselves know.

        Raises:
            EditError: If something else wrote to the model.
        """
        self.target.check()
        total = self.target.committed()
        known = {request.id: request for request in provenance.requests}
        known |= requests_of(self.target.delta.batches)
        total.provenance = provenance.answering(total.provenance.request_ids, known)
        return total


def later_mixtures(tree: ModelTree, edit: Edit) -> list[int]:
    """Layers that are mixtures of experts and read what an edit of weights changes.

    Args:
        tree: The model.
        edit: An edit of it; what a memory adds is not followed.
    """
    changed = edit.changes if isinstance(edit, WeightDelta) else {}
    names = {i: f"{name}." for i, name in enumerate(tree.block_names)}
    touched = [i for i, name in names.items() if any(one.startswith(name) for one in changed)]
    return [i for i in tree.mixtures if i > min(touched)] if touched else []


def requests_in(
    requests: EditBatch | EditRequest | Sequence[EditRequest],
) -> Sequence[EditRequest]:
    """Requests that come as one, as several or as a batch made of them."""
    if isinstance(requests, EditBatch):
        return requests.requests
    return [requests] if isinstance(requests, EditRequest) else requests


@torch.no_grad()
def write_for_now(model: nn.Module, edit: WeightDelta) -> None:
    """Adds an edit to the weights inside ``compute_edit``, after which it is taken out.

    Args:
        model: The model.
        edit: What to add, in float32, rounded once to the weights' dtype.
    """
    for name, change in edit.changes.items():
        parameter = model.get_parameter(name)
        weight = local_shard(parameter)
        weight.copy_(weight.float() + local_change(parameter, change))
