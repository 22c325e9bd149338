# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What all editors have in common: everything Lightning, so that a method is only its method."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Generic, Literal, Self, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.checkpoints import PlainCheckpoints, load_plainly
from lightning_edit.core.batch import EditBatch, PromptTokenizer
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import BaseModelInfo, Provenance
from lightning_edit.core.errors import (
    ArtifactError,
    EditError,
    FailedRequestsError,
    ModelError,
)
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.locator import Locator, ModelTree
from lightning_edit.core.request import EditRequest, check_requests
from lightning_edit.core.sharding import local_shard, shard_like
from lightning_edit.evaluation.evaluator import Baseline, Evaluator
from lightning_edit.metrics import edit_metrics
from lightning_edit.optim import E, EditOptimizer

__all__ = ["DType", "EditModule", "Protocol"]

DType = Literal["auto", "float32", "bfloat16", "float16"]
Protocol = Literal["independent", "batch", "sequential"]


class EditModule(PlainCheckpoints, LightningModule, ABC, Generic[E]):
    """Base of all editors: a language model, and how to change what it knows.

    A subclass writes one method, ``compute_edit``, and where it edits, ``edited_names``.
    Its edits are of weights, unless it derives from a base for another kind. It must not override
    ``edit``, ``training_step``, ``configure_model`` or the checkpoint hooks; what a method
    carries from edit to edit goes into the edit, and comes back as ``carried`` once that is
    committed.

    The verbs of the Trainer have editing meanings. ``fit`` commits edits, one optimizer step a
    batch of requests; ``validate`` measures the model as it stands; ``test`` makes edits, measures
    and takes them out again; ``predict`` writes texts before and after.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. The method's default when None.
        dtype: Precision of the weights. Edits are computed and added in float32.
        revision: Revision of a hub model.
        chat_template: Ask as a user of a chat model would.
        cache_dir: Folder for converted models and statistics; ``~/.cache/lightning_edit`` if None.
        test_protocol: How ``test`` measures: each request by itself (``independent``), a batch of
            requests at once (``batch``), or all after one another (``sequential``).
        max_new_tokens: Longest continuation that is read by the autoregressive metrics, in tokens.
    """

    #: Address of the paper that describes the method.
    paper: ClassVar[str] = ""
    #: Whether the method needs a model without an encoder.
    decoder_only: ClassVar[bool] = False

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        dtype: DType = "float32",
        revision: str | None = None,
        chat_template: bool = False,
        cache_dir: str | None = None,
        test_protocol: Protocol = "independent",
        max_new_tokens: int = 24,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=self.unsaved_arguments)
        self.model_id = model
        self.layers = layers
        self.dtype_name = dtype
        self.revision = revision
        self.chat_template = chat_template
        self.cache_dir = cache_dir
        self.test_protocol = test_protocol
        self.max_new_tokens = max_new_tokens
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold only what changed
        self.model: Any = None
        self.val_metrics = edit_metrics("val/")
        self.test_metrics = edit_metrics("test/")
        #: Figures of each committed edit, in order: ``id``, ``seconds`` and the method's own.
        self.history: list[dict[str, Any]] = []
        #: Precision of passes that a method may round, from the Trainer's ``bf16-mixed`` or the
        #: caller's autocast; None for that of the weights.
        self.pass_dtype: torch.dtype | None = None
        #: Whether all processes hold the same batch, whose work they may share out.
        self.shares_batches = False
        self._tested: list[tuple[list[EditRequest], Baseline]] = []
        self._delta_before_test: E | None = None
        self._tokens: PromptTokenizer | None = None
        self._optimizer: EditOptimizer[E] | None = None
        self._tuned: dict[str, nn.Parameter] = {}
        self._base: BaseModelInfo | None = None

    # -- the method --------------------------------------------------------------------------

    @abstractmethod
    def compute_edit(self, batch: EditBatch) -> E:
        """Computes the edit that answers a batch of requests.

        Called with gradients enabled. Weights may be changed on the way: the base class puts
        them back.
        """

    def edited_names(self, tree: ModelTree) -> list[str]:
        """Names of the parameters that edits may change; the MLP outputs of the layers."""
        layers = self.layers if self.layers is not None else self.default_layers(tree)
        return [site.name for site in Locator(layers=layers).sites(tree.model)]

    def _make_optimizer(self, tree: ModelTree, originals: dict[str, Tensor]) -> EditOptimizer[E]:
        return EditOptimizer(tree.model, originals)

    def default_layers(self, tree: ModelTree) -> list[int]:
        """Layers to edit where the user names none."""
        return list(range(len(tree.blocks)))

    def edit_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the edits, as tensors and primitives."""
        return {"history": self.history}

    def load_edit_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``edit_state`` returned in an earlier run."""
        self.history = [dict(row) for row in state["history"]]

    @property
    def carried(self) -> dict[str, Tensor]:
        """What the last committed edit left for the next one, by name; empty before the first.

        A method reads it in ``compute_edit`` and leaves new tensors in ``edit.carried``, which
        the optimizer takes over with the edit: an edit that is never committed changes no later
        one, one that is taken back takes this back, and a resumed run has it.
        """
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in self.delta.carried.items()}

    # -- a model -----------------------------------------------------------------------------

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, **settings: Any) -> Self:
        """An editor of a model that is in memory already.

        Args:
            model: A Hugging Face language model. It is edited in place, not copied.
            tokenizer: Its fast tokenizer.
            settings: Further arguments of the editor.

        Examples:
            >>> from lightning_edit import ROME
            >>> from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
            >>> model = tiny_model()
            >>> editor = ROME.from_model(model, tiny_tokenizer(), layers=[1], steps=3)
            >>> edit = editor.edit(tiny_requests(1))
            >>> edit.apply_(model)
            >>> edit.revert_(model)
        """
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        module = cls(model=name or type(model).__name__, **settings)
        module._adopt(model, tokenizer)
        return module

    @override
    def setup(self, stage: str) -> None:
        load_plainly(self.trainer.strategy)
        if self.trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
            raise EditError(
                f"`trainer.precision` is {self.trainer.precision!r}, by which Lightning would "
                "convert the weights after their originals were kept. Give the editor its `dtype` "
                "instead, such as `dtype='bfloat16'`."
            )

    @override
    def configure_model(self) -> None:
        """Loads the model once; Lightning calls this before every verb."""
        if self.model is None:
            from lightning_edit.models import load_model, load_tokenizer

            # Lightning would have new tensors on the accelerator, where a seed draws other numbers.
            with torch.device("cpu"):
                model = load_model(
                    self.model_id,
                    revision=self.revision,
                    dtype=self.dtype_name,
                    cache_dir=self.cache_dir,
                )
                self._adopt(model, load_tokenizer(self.model_id, self.revision, self.cache_dir))
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        if shared and not any(p.requires_grad for p in self.parameters()):
            # `ddp` refuses modules that have nothing to train.
            self.anchor = nn.Parameter(torch.zeros((), device=self.model.device))

    def _adopt(self, model: Any, tokenizer: Any) -> None:
        tree = ModelTree.of(model)
        if tree.is_encoder_decoder and self.decoder_only:
            raise ModelError(
                f"{type(self).__name__} needs a decoder-only model, but {self.model_id} "
                f"({type(model).__name__}) has an encoder. Choose another method or model."
            )
        names = self.edited_names(tree)  # fails before the model is touched
        self._tokens = PromptTokenizer(
            tokenizer,
            chat_template=self.chat_template,
            is_encoder_decoder=tree.is_encoder_decoder,
            max_length=getattr(getattr(model, "config", None), "max_position_embeddings", None),
        )
        self.model = model
        named = dict(model.named_parameters())
        model.requires_grad_(False)
        for name in names:
            named[name].requires_grad_(True)
        originals = {name: named[name].detach().clone() for name in names}
        self._optimizer = self._make_optimizer(tree, originals)

    @property
    def tokens(self) -> PromptTokenizer:
        """The tokenizer, as every method and metric uses it."""
        if self._tokens is None:
            raise ModelError("The model is not loaded yet. Call `configure_model()` first.")
        return self._tokens

    @property
    def tree(self) -> ModelTree:
        """Where the model's parts are."""
        return ModelTree.of(self.model)

    @property
    def edit_optimizer(self) -> EditOptimizer[E]:
        """The optimizer that commits edits and knows all that were committed."""
        if self._optimizer is None:
            raise ModelError("The model is not loaded yet. Call `configure_model()` first.")
        return self._optimizer

    @property
    def delta(self) -> E:
        """All that was committed so far."""
        return self.edit_optimizer.delta

    @property
    def base(self) -> BaseModelInfo:
        """The unedited model, with the hash of its weights."""
        if self._base is None:
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            self._base = BaseModelInfo(
                id=self.model_id,
                revision=self.revision,
                dtype=dtype,
                sha256=weight_hash(self.model, self.edit_optimizer.originals),
                parameters=sum(p.numel() for p in self.model.parameters()),
            )
        return self._base

    @property
    def provenance(self) -> Provenance:
        """The editor's part of an edit's provenance."""
        settings = {k: v for k, v in self.hparams.items() if not k.startswith("_")}
        return Provenance(type(self).__name__, self.paper, settings, self.base)

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """Has the unedited model inside a ``with`` block."""
        with self._kept_weights():
            with torch.no_grad():
                for name, parameter in self._edited_parameters().items():
                    original = self.edit_optimizer.originals[name]
                    local_shard(parameter).copy_(shard_like(parameter, original))
            yield

    @contextmanager
    def _kept_weights(self) -> Iterator[None]:
        """Puts the weights back after a ``with`` block, bit for bit, whatever happens in it."""
        parameters = self._edited_parameters()
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        flags = {name: p.requires_grad for name, p in parameters.items()}
        gradients = {name: p.grad for name, p in parameters.items()}  # accumulated so far
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name])
                    parameter.requires_grad_(flags[name])
                    parameter.grad = gradients[name]

    @torch.no_grad()
    def write_for_now(self, edit: WeightDelta) -> None:
        """Adds an edit to the weights inside ``compute_edit``, after which it is taken out."""
        for name in edit.changes:
            parameter = self.model.get_parameter(name)
            weight = local_shard(parameter)
            weight.copy_(weight.float() + shard_like(parameter, edit.dense(name)))

    def _edited_parameters(self) -> dict[str, nn.Parameter]:
        return {name: self.model.get_parameter(name) for name in self.edit_optimizer.originals}

    # -- edits -------------------------------------------------------------------------------

    def edit(self, requests: EditBatch | EditRequest | Sequence[EditRequest]) -> E:
        """Computes an edit and leaves the model as it is.

        Args:
            requests: What to change: one request, several, or a batch made of them.

        Returns:
            The edit; ``apply_`` writes it, ``revert_`` takes it out.

        Raises:
            RequestError: If the requests contradict each other.
            FailedRequestsError: If the method fails on every one of them. Where it fails on some,
                the edit is that of the others, with a warning and the reasons in
                ``edit.details["failed"]``.
        """
        if isinstance(requests, EditRequest):
            requests = [requests]
        device = next(self.model.parameters()).device
        mixed = torch.is_autocast_enabled(device.type)
        found = torch.get_autocast_dtype(device.type) if mixed else None
        # Gradients would leave the range of float16, for which a Trainer scales its losses.
        self.pass_dtype = found if found == torch.bfloat16 else None
        # Tokens made under inference mode could not be saved for backward, and what a method does
        # not compute in `pass_dtype` must not be rounded.
        exact = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), exact, self._kept_weights():
            if not isinstance(requests, EditBatch):
                check_requests(requests)
                requests = EditBatch.from_requests(requests, self.tokens)
            batch = requests.to(device)
            edit = self.compute_edit(batch)
        failed = edit.details.get("failed", {})
        ids = tuple(request.id for request in batch.requests if request.id not in failed)
        edit.provenance = replace(self.provenance, request_ids=ids)
        if len(self.delta) and edit.changes_weights:
            # It continues from an edited model, which is not the recorded base.
            edit.provenance = replace(edit.provenance, base=replace(self.base, sha256=""))
        return edit

    def _edit_or_go_on(self, requests: Sequence[EditRequest]) -> E:
        """An edit; an empty one where the method fails on every request, so that a run goes on."""
        try:
            return self.edit(requests)
        except FailedRequestsError as error:
            rank_zero_warn(f"Nothing is written. {error}")
            nothing = self.edit_optimizer.nothing
            nothing.details["failed"] = error.reasons
            return nothing

    @override
    def configure_optimizers(self) -> Any:
        return self.edit_optimizer

    @override
    def training_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        began = time.perf_counter()
        self.shares_batches = True
        try:
            edit = self._edit_or_go_on(batch)
        finally:
            self.shares_batches = False
        optimizer = cast(Any, self.optimizers())
        # The wrapper would keep the attribute to itself.
        optimizer.optimizer.stage(edit)
        optimizer.step()
        seconds = (time.perf_counter() - began) / len(batch)
        failed = [{"id": i, "failed": why} for i, why in edit.details.get("failed", {}).items()]
        details = edit.details.get("requests", [])
        details = details + failed or [{"id": request.id} for request in batch]
        self.history += [{**row, "seconds": seconds} for row in details]
        figures = [row["p_target"] for row in details if "p_target" in row]
        if figures:
            self._show("p(target)", sum(figures) / len(figures), len(batch))
        self._show(*self._size(), len(batch))

    def _size(self) -> tuple[str, float]:
        """Name and value of the figure by which a run shows how much has been changed."""
        return "‖Δ‖/‖W‖", self.relative_norm()

    def _show(self, name: str, value: float, batch_size: int) -> None:
        self.log(name, value, prog_bar=True, batch_size=batch_size)

    def relative_norm(self) -> float:
        """‖Δ‖ / ‖W‖ over the parameters that edits may change."""
        size = sum(float(t.float().square().sum()) for t in self.edit_optimizer.originals.values())
        return self.delta.norm() / size**0.5 if size else 0.0

    def committed(self) -> E:
        """All committed edits as one artefact, with originals and hashes for an exact undo."""
        ids = self.delta.provenance.request_ids
        total = self.delta.seal(self.model, self.edit_optimizer.originals)
        total.provenance = replace(self.provenance, request_ids=ids)
        return total

    # -- measuring ---------------------------------------------------------------------------

    @property
    def evaluator(self) -> Evaluator:
        """Measures this model."""
        return Evaluator(self.model, self.tokens, max_new_tokens=self.max_new_tokens)

    @override
    def validation_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        if not batch:  # a process whose share ran out
            return
        with self.base_weights():
            baseline = self.evaluator.baseline(batch)
        self.evaluator.evaluate(batch, baseline).update(self.val_metrics)

    @override
    def on_validation_epoch_end(self) -> None:
        self.log_dict(_finite(self.val_metrics.compute()), sync_dist=True)  # equal already
        self.val_metrics.reset()

    @override
    def on_test_start(self) -> None:
        if self.test_protocol != "independent" and self.trainer.world_size > 1:
            raise EditError(
                f"`test_protocol={self.test_protocol!r}` edits one model with all requests, but "
                f"{self.trainer.world_size} processes would each edit their own. Set "
                "`trainer.devices=1`, or `test_protocol='independent'`."
            )
        self._delta_before_test = self.edit_optimizer.delta

    @override
    def test_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        evaluator = self.evaluator
        if self.test_protocol == "sequential":
            with self.base_weights():
                baseline = evaluator.baseline(batch)
            self._tested.append((batch, baseline))
            with torch.inference_mode(False):
                for request in batch:
                    self.edit_optimizer.stage(self._edit_or_go_on([request]))
                    self.edit_optimizer.step()
            return
        groups = [batch] if self.test_protocol == "batch" else [[request] for request in batch]
        for group in filter(None, groups):
            baseline = evaluator.baseline(group)
            with self._written(self._edit_or_go_on(group)):
                evaluator.evaluate(group, baseline).update(self.test_metrics)

    @contextmanager
    def _written(self, edit: E) -> Iterator[None]:
        """Has an edit of this very model in it; hashing all weights again would only take time."""
        edit.apply_(self.model, check=False)
        try:
            yield
        finally:
            edit.revert_(self.model)

    @override
    def on_test_epoch_end(self) -> None:
        for batch, baseline in self._tested:
            self.evaluator.evaluate(batch, baseline).update(self.test_metrics)
        if self._tested:
            self._tested.clear()
            self.edit_optimizer.rewind(self._delta_before_test)
        self.log_dict(_finite(self.test_metrics.compute()), sync_dist=True)  # equal already
        self.test_metrics.reset()

    @override
    def predict_step(self, batch: list[EditRequest], batch_idx: int) -> list[dict[str, str]]:
        if not batch:
            return []
        prompts = [request.prompt for request in batch]
        with self.base_weights():
            before = self.evaluator.continuations(prompts)
        if len(self.delta):
            after = self.evaluator.continuations(prompts)
        else:
            with self._written(self._edit_or_go_on(batch)):
                after = self.evaluator.continuations(prompts)
        return [
            {"id": request.id, "prompt": request.prompt, "before": b, "after": a}
            for request, b, a in zip(batch, before, after, strict=True)
        ]

    # -- checkpoints -------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {
            name: tensor
            for name, tensor in checkpoint["state_dict"].items()
            if self._is_kept(name.removeprefix("model."))
        }
        checkpoint["lightning_edit"] = {
            "base_sha256": self.base.sha256,
            "edit_state": self.edit_state(),
        }

    def _load_kept(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what Lightning does not load, or only after the edits have to be known."""

    def _is_kept(self, name: str) -> bool:
        """Whether checkpoints hold a parameter or buffer of the model."""
        return name in self.edit_optimizer.originals

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("lightning_edit")
        if saved is None:
            raise ArtifactError(
                "The checkpoint was not written by an editor of lightning_edit: it lacks the key "
                "`lightning_edit`. Give a checkpoint of an editing run."
            )
        self.configure_model()
        if saved["base_sha256"] != self.base.sha256:
            raise ArtifactError(
                f"The checkpoint belongs to the base weights {saved['base_sha256'][:12]}…, but "
                f"{self.model_id} has {self.base.sha256[:12]}…. Resume with the model it was made "
                "with."
            )
        self._load_kept(checkpoint["state_dict"])
        self.load_edit_state(saved["edit_state"])
        # The other verbs, for which Lightning restores no optimizer, have to know the edits, too.
        for state in checkpoint.get("optimizer_states", ()):
            if "delta" in state:
                self.edit_optimizer.load_state_dict(state)


def _finite(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out metrics that no probe was asked for."""
    return {name: value for name, value in values.items() if not bool(torch.isnan(value))}
